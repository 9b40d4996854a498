#!/usr/bin/env bash
# Checks this recipe on a machine with one GPU, without network, in at most --minutes (30), and prints one table:
#
#     bash scripts/gpu_check.sh [--parts attention,default,resume,compare,determinism] [--data <folder with GSM8K>]
#                               [--minutes 30] [--out outputs/gpu_check] [Hydra overrides of every run]
#
# Each part has its share of the time, and one that fails or runs out of it does not stop the others.  benchmarks/gpu_check.py
# says what they are.  --device cpu --tiny runs them without a GPU.  PYTHON names another interpreter than .venv's.
set -uo pipefail
unset CDPATH
caller=$PWD
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit 1
python="${PYTHON:-.venv/bin/python}"

parts=attention,default,resume,compare,determinism minutes=30 out=$PWD/outputs/gpu_check data="" device=cuda rest=()
while [[ $# -gt 0 ]]; do
    case "$1" in
        --parts | --minutes | --out | --data | --device)
            if [[ $# -lt 2 ]]; then echo "error: $1: has no value; give one" >&2 && exit 2; fi
            value=$2
            if [[ ($1 == --out || $1 == --data) && $value != /* ]]; then value=$caller/$value; fi
            printf -v "${1#--}" %s "$value"
            shift 2
            ;;
        *) rest+=("$1") && shift ;;
    esac
done
# Of thirty minutes, in seconds; a start takes most of them: about 285 s where everything is imported for the first time.
declare -A share=([attention]=150 [default]=375 [resume]=325 [compare]=650 [determinism]=300)
for part in ${parts//,/ }; do
    if [[ -z "${share[$part]:-}" ]]; then
        echo "error: --parts: $part is unknown; choose from attention,default,resume,compare,determinism" >&2
        exit 2
    fi
done
if [[ ! "$minutes" =~ ^[1-9][0-9]{0,3}$ ]]; then
    echo "error: --minutes: is $minutes; give a whole number of minutes" >&2
    exit 2
fi
if [[ -e "$out/results.jsonl" ]]; then
    echo "error: --out: $out has results already; give another folder" >&2
    exit 2
fi
if [[ $device != cpu ]] && ! nvidia-smi >/dev/null 2>&1; then
    echo "error: no NVIDIA GPU was found; --device cpu --tiny runs the parts without one" >&2
    exit 2
fi

rest+=(--parts "$parts" --out "$out" --device "$device" ${data:+--data "$data"})
mkdir -p "$out" || exit 1
# timeout has a process group of its own, which Ctrl-C does not reach; it hands the signal on to the part and its runs.
running=""
trap 'if [[ -n "$running" ]]; then kill "$running" 2>/dev/null; fi; exit 130' INT TERM HUP
for part in ${parts//,/ }; do
    seconds=$((share[$part] * minutes / 30))
    echo "== $part, at most $seconds s"
    timeout --kill-after=20 "$seconds" "$python" -m benchmarks.gpu_check "$part" "${rest[@]}" &
    running=$!
    wait "$running"
    status=$?
    # 1 has been noted by the part itself.
    if [[ $status -gt 1 ]]; then
        reason="exit status $status" && [[ $status -ne 124 ]] || reason="no end within $seconds s"
        printf '{"part": "%s", "what": "stopped", "values": {"reason": "%s"}, "passed": false}\n' "$part" "$reason" \
            >>"$out/results.jsonl"
    fi
done
echo
"$python" -m benchmarks.gpu_check table --out "$out"
