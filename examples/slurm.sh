#!/usr/bin/env bash
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64 --signal=INT@120
# Several nodes under Slurm, one Ray node each: sbatch examples/slurm.sh [overrides].  The project is installed in
# /shared/verl-skpo, and every node sees it, the data and output_dir under the same path.  An interrupted job resumes from
# its last checkpoint when it is submitted again.
set -eo pipefail
cd /shared/verl-skpo && source .venv/bin/activate
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
address=$(srun --nodes=1 --ntasks=1 -w "$head" hostname --ip-address | awk '{print $1}'):6379
srun --nodes=1 --ntasks=1 -w "$head" ray start --head --port=6379 --block &
sleep 20
srun --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --exclude="$head" ray start --address="$address" --block &
sleep 20
srun --overlap --nodes=1 --ntasks=1 -w "$head" python -m recipe.skpo.main platform=gpu model=qwen2_5_math_7b data=files \
    data.train_files=/shared/train.parquet data.val_files=/shared/val.parquet output_dir=/shared/runs/one \
    trainer.nnodes="$SLURM_NNODES" trainer.n_gpus_per_node=8 +ray_kwargs.ray_init.address="$address" "$@"
