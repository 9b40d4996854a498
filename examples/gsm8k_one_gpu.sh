#!/usr/bin/env bash
# Llama-3.2-3B-Instruct on GSM8K, on one GPU of 80 GB.  Model and data come from the hub, or from folders given by
# actor_rollout_ref.model.path and data.source.  Arguments are Hydra overrides; the last one of a name wins:
#
#     bash examples/gsm8k_one_gpu.sh trainer.total_training_steps=50
set -euo pipefail

# GSM8K needs less than the paper's 3072 tokens: 512 of prompt, 512 of segment and 1024 of response fit into 2048.  The
# length that is expected before a prompt's first visit (initial_length) is replaced by the measured one.
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/../run_skpo.sh" platform=gpu model=llama3_2_3b_instruct data=gsm8k \
    trainer.n_gpus_per_node=1 trainer.total_training_steps=200 \
    data.max_prompt_length=512 data.max_response_length=1024 skpo.initial_length=256 \
    actor_rollout_ref.rollout.max_model_len=2048 "$@"
