"""Trains a model: python train.py --config=configs/NAME.py[:VARIANT] --workdir=DIR [--config.a.b=value ...]

The same command on the same workdir continues where the run stopped. --config=WORKDIR:VARIANT is the configuration of
another run with its attention exchanged (docs/retrofit.md). Other flags:
  --list                          show the variants and the configs, and exit
  --init_from=WORKDIR[:STEP]      start a new run from the parameters of another, layer by layer
  --init_from_allow=PATTERN,...   parameters that it may lack and that start anew: layers/*/mixer/gate/*
  --strict                        refuse to continue from anything but an undamaged newest checkpoint
  --allow_learning_rate_change    continue a run with other learning-rate settings
  --coordinator_address=HOST:PORT --num_processes=N --process_id=I
                                  one of N processes; not needed on TPU, GKE, SLURM or Open MPI, where it is detected
  --heartbeat_seconds=S           end with one line when another process does not come, or is silent, for S seconds (40)
"""

from sympow_jax.train import main

if __name__ == "__main__":
    main()
