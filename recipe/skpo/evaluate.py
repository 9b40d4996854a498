"""The old name of the command ``python -m recipe.skpo.evaluation``, kept for one release."""

import sys

from recipe.skpo.evaluation.command import main

if __name__ == "__main__":
    sys.exit(main())
