#!/usr/bin/env bash
# The paper's set-up: Qwen2.5-Math-7B on DAPO-Math-17k, 500 steps of 128 prompts, one node of 8 GPUs of 80 GB.  The
# settings are the defaults of recipe/skpo/config.  The paper's other policy is model=llama3_2_3b_instruct.  Without a hub:
#
#     bash examples/paper_8gpu.sh actor_rollout_ref.model.path=/models/Qwen2.5-Math-7B \
#         data.source=/data/dapo-math-17k.parquet data.val_source=/data/aime24.jsonl
set -euo pipefail

exec bash "$(dirname -- "${BASH_SOURCE[0]}")/../run_skpo.sh" platform=gpu model=qwen2_5_math_7b data=dapo_math \
    trainer.n_gpus_per_node=8 "$@"
