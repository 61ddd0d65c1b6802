#!/usr/bin/env bash
# Creates a TPU VM or pod slice, installs the package on every host, and trains; run again, it continues.
#   NAME=lc64 ZONE=us-west4-a TYPE=v5litepod-16 WORKDIR=/mnt/shared/runs/lc64 docs/launch/tpu_vm.sh \
#     --config=configs/lc64_124m.py:conformal_sympow,65536 --config.mesh.data=1 --config.mesh.fsdp=8 --config.mesh.seq=-1
# WORKDIR must be on a disk that all hosts share (Filestore, or a bucket through a mount): a VM's own disk goes with it.
set -euo pipefail

: "${NAME:?the name of the TPU VM}" "${ZONE:?its zone}" "${TYPE:?its accelerator type, for example v5litepod-8}"
: "${WORKDIR:?the folder of the run, on a disk that all hosts share}"
VERSION=${VERSION:-v2-alpha-tpuv5-lite}
SOURCE=$(cd "$(dirname "$0")/../.." && pwd)

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" >/dev/null 2>&1 ||
  gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" --version="$VERSION"

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git -C "$SOURCE" archive --format=tar.gz --output="$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$NAME:sympow_jax.tar.gz" --zone="$ZONE" --worker=all
on_all_hosts "mkdir -p sympow_jax && tar -xzf sympow_jax.tar.gz -C sympow_jax && cd sympow_jax &&
  { [ -d .venv ] || python3 -m venv .venv; } && .venv/bin/pip install --quiet '.[tpu]'"

flags=$(printf '%q ' "$@")
on_all_hosts "cd sympow_jax && .venv/bin/python train.py --workdir=$(printf '%q' "$WORKDIR") $flags"
