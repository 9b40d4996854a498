"""``python -m recipe.skpo.analysis`` lists the analyses."""

from pathlib import Path

from data_prep.command import listed

if __name__ == "__main__":
    print(listed(Path(__file__).parent, "recipe.skpo.analysis"))
