"""The command ``python -m recipe.skpo.evaluation``."""

import sys

from recipe.skpo.evaluation.command import main

if __name__ == "__main__":
    sys.exit(main())
