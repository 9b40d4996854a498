#!/usr/bin/env bash
# Known vulnerabilities of the pinned packages: bash scripts/audit.sh [options of pip-audit, such as -s osv]
#
# pip-audit is installed into a temporary environment and asks an advisory service (the package index's own, or OSV with
# -s osv) about every line of requirements/*.txt.  Without such a service it fails: --strict makes a package that
# could not be looked up an error, so that silence is never taken for a clean result.
set -euo pipefail
unset CDPATH
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pip-audit==2.10.1

status=0
for file in requirements/cpu.txt requirements/cuda.txt; do
    echo "== $file"
    # Names and versions are all that it looks up.
    grep -oE '^[A-Za-z0-9._-]+==[^ ;]+' "$file" >"$folder/pins.txt"
    "$folder/venv/bin/pip-audit" -r "$folder/pins.txt" --no-deps --disable-pip --strict --progress-spinner off "$@" || status=1
done
exit "$status"
