#!/bin/bash
# One task per GPU; processes find each other by SLURM's variables. Submit it from the clone:
#   sbatch docs/launch/slurm.sh --config=configs/lc64_124m.py:conformal_sympow,65536 --workdir=/shared/runs/lc64 \
#     --config.mesh.data=1 --config.mesh.fsdp=8 --config.mesh.seq=2
# The same job submitted again continues from the newest checkpoint; --requeue does so after a preemption.
#SBATCH --job-name=sympow_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this file with sbatch}"
# shellcheck disable=SC1091
source .venv/bin/activate
exec srun python train.py "$@"
