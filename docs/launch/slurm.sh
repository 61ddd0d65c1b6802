#!/bin/bash
# One task per GPU; processes find each other by SLURM's variables. Submit it from the clone:
#   sbatch docs/launch/slurm.sh --config=configs/lc64_124m.py:conformal_sympow,65536 --workdir=/shared/runs/lc64 \
#     --config.mesh.data=1 --config.mesh.fsdp=8 --config.mesh.seq=2
# The same job submitted again continues from the newest checkpoint; this file does so itself, under the same number,
# whenever the job is stopped by SIGTERM: preempted, or out of time. End it for good with scancel.
#SBATCH --job-name=sympow_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this file with sbatch}"
# shellcheck disable=SC1091
source .venv/bin/activate
code=0
srun python train.py "$@" || code=$?
# 143: stopped and saved. SLURM itself requeues only a job that its grace time had to kill.
if [ "$code" = 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
