"""The old name of the command ``python -m recipe.skpo.output.page``, kept for one release."""

from recipe.skpo.output.page import main

if __name__ == "__main__":
    main()
