"""The old name of the command ``python -m benchmarks.agreement``, kept for one release."""

import sys

from benchmarks.agreement import main

if __name__ == "__main__":
    sys.exit(main())
