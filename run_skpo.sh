#!/usr/bin/env bash
# Trains SKPO. Installs what is needed the first time; every argument is a Hydra override:
#
#     bash run_skpo.sh
#     bash run_skpo.sh platform=gpu actor_rollout_ref.model.path=... skpo.group_size=8
#
# Relative file names are looked up in the folder that it is called from; a run's default folder is in the project root.
set -euo pipefail
unset CDPATH
export SKPO_CALLER="$PWD"
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

# The platform decides what is installed, so it is needed before Hydra can read it.
requested=""
for argument in "$@"; do
    case "$argument" in
        platform=* | +platform=* | ++platform=*) requested="${argument#*=}" ;;
    esac
done
if [[ -n "$requested" ]]; then export SKPO_PLATFORM="$requested"; fi
SKPO_PLATFORM="$(bash scripts/bootstrap.sh)"
export SKPO_PLATFORM

if [[ -z "$requested" ]]; then
    # Hydra's parser takes its overrides as one block: between or behind options like --cfg it refuses a second block.
    # So the platform joins the first override there is, or comes last.
    arguments=() placed=no
    for argument in "$@"; do
        if [[ $placed == no && "$argument" != -* && ("$argument" == *=* || "$argument" == "~"*) ]]; then
            arguments+=("platform=$SKPO_PLATFORM")
            placed=yes
        fi
        arguments+=("$argument")
    done
    if [[ $placed == no ]]; then arguments+=("platform=$SKPO_PLATFORM"); fi
    set -- "${arguments[@]}"
fi

# A regular package of this name hides this project's, wherever it stands, so that not even its errors are seen.
IFS=: read -ra places <<<"${PYTHONPATH:-}"
for place in ${places[@]+"${places[@]}"} .venv/lib/python3.*/site-packages; do
    if [[ -n "$place" && -f "$place/recipe/__init__.py" ]]; then
        echo "error: PYTHONPATH: $place/recipe/__init__.py hides this project's package recipe; take $place off it, or remove that file" >&2
        exit 1
    fi
done

exec .venv/bin/python -m recipe.skpo.main "$@"
