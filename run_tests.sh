#!/usr/bin/env bash
# Lint, types, arrows between the rooms, the site, and all tests. Arguments go to pytest and leave all but the tests out (SKPO_LINT=1 brings them back):
#
#     bash run_tests.sh
#     bash run_tests.sh -m "not e2e"
set -euo pipefail
unset CDPATH
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

SKPO_PLATFORM="$(bash scripts/bootstrap.sh)"
export SKPO_PLATFORM
# No test may depend on a download, and forking after a tokenizer ran would print a warning each time.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

python=.venv/bin/python
status=0
# Everything runs even if something failed before: one run shows all there is to repair.
if [[ $# -eq 0 || "${SKPO_LINT:-0}" == 1 ]]; then
    "$python" -m ruff check . || status=1
    "$python" -m ruff format --check . || status=1
    "$python" -m mypy || status=1
    "$python" .venv/bin/lint-imports || status=1
    # The site, with every link of it; the variable silences an advertisement.
    NO_MKDOCS_2_WARNING=1 "$python" -m mkdocs build --strict --quiet || status=1
fi
if [[ $# -eq 0 ]]; then
    # Test files side by side, in their order, because the first take longest; then whole training runs, which need the
    # cores for themselves.
    "$python" -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder \
        -m "not e2e and not nightly and not fuzz" || status=$?
    "$python" -m pytest -m "e2e and not nightly and not fuzz" || status=$?
else
    "$python" -m pytest "$@" || status=$?
fi
exit "$status"
