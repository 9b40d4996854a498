#!/usr/bin/env bash
# Resolves requirements/*.in into the fully pinned requirements/*.txt. Needed only to change a version:
# whoever installs never resolves, the pins are installed with --no-deps.
#
# Needs uv (named by UV when it is not on PATH). The CPU build of torch is not on the default package index; uv finds it
# where UV_FIND_LINKS (a folder with the wheel) or UV_EXTRA_INDEX_URL (PyTorch's CPU wheel index) points.
# Versions already pinned stay as they are unless an argument asks otherwise: --upgrade-package NAME, or --upgrade.
#
# Python 3.11 is the lower bound of the project. The pins also hold for 3.12: PYTHON_VERSION=3.12 gives the same result.
set -euo pipefail
unset CDPATH
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

for platform in cpu cuda; do
    # The header and the result must not depend on the machine, so uv's own command line is not written into the file.
    "${UV:-uv}" pip compile "requirements/$platform.in" \
        --override "requirements/$platform-overrides.txt" \
        --python-version "${PYTHON_VERSION:-3.11}" \
        --python-platform x86_64-manylinux_2_28 \
        --custom-compile-command "requirements/compile.sh" \
        --generate-hashes --quiet --output-file "requirements/$platform.txt" "$@" >/dev/null
done
# The CPU build of torch has a wheel per Python, of which a folder may hold one; bootstrap.sh installs it by itself, first.
sed -i -e '/^torch==.*+cpu \\$/,/^    # via/{/^    --hash=/d; s/ \\$//}' requirements/cpu.txt
