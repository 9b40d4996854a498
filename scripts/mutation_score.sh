#!/usr/bin/env bash
# Breaks recipe/skpo/method in every way that mutmut knows, one at a time, and counts how many its tests notice:
#
#     bash scripts/mutation_score.sh                                   # all, in half an hour
#     bash scripts/mutation_score.sh 'recipe.skpo.method.loss.*'       # of one module
#
# A run that was stopped goes on where it was. Settings are below tool.mutmut in pyproject.toml; what it finds is in
# mutants/, and `PYTHONPATH=.cache/mutmut .venv/bin/python -m mutmut show <name>` shows a mutant that survived.
set -euo pipefail
unset CDPATH
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-.venv/bin/python}"
tools=.cache/mutmut
# Beside the environment, not in it: nothing else needs them.
if [[ ! -d $tools ]]; then
    "$python" -m pip install --quiet --no-deps --target "$tools" mutmut==3.8.1 libcst==1.9.0 coverage==7.17.5 textual==8.2.8
fi
# One thread per process, because forks do not inherit a pool of threads.
export PYTHONPATH="$tools" OMP_NUM_THREADS=1 SKPO_PLATFORM=cpu HF_HUB_OFFLINE=1
"$python" -m mutmut run "$@"
"$python" -m mutmut export-cicd-stats >/dev/null
"$python" - <<'SCORE'
import json

counts = json.load(open("mutants/mutmut-cicd-stats.json", encoding="utf-8"))
tried = counts["killed"] + counts["timeout"] + counts["survived"] + counts["suspicious"]
print(f"{counts['killed'] + counts['timeout']} of {tried} mutants were noticed; {counts['no_tests']} are in no test")
SCORE
