"""The command ``python -m recipe.skpo.export``."""

import sys

from recipe.skpo.export.command import main

if __name__ == "__main__":
    sys.exit(main())
