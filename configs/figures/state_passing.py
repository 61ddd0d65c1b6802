"""What a state that is not empty at the start of a batch does for length: three kernels by three initial states.

    python -m benchmarks.study state_passing      (what of the sweep below is missing; RESULTS.md)
    python -m sympow_jax.sweep --config=configs/figures/state_passing.py --root=runs/state_passing \
        --points=all --seeds=0,1,2
    python train.py --config=configs/figures/state_passing.py:POINT --workdir=DIR        (POINT sympow,carried)

A point is VARIANT,STATE, the variants sympow, sympow_gated and based by training.initial_state zero, noise and carried;
softmax_rope has zero alone, since its cache grows and cannot be carried. The quickstart's model, 4 layers of width 128
on the Python sources, trained at 512 tokens and evaluated from 32 to 8,192. All points read data.order = stream, which
carried needs, so that they differ in the state alone; 16 batches in a row are of the same four rows, unlike those of
the quickstart.
Budget: 800 steps of 4 x 512 bytes, 1.6 million tokens, 10 points of three seeds: 30 runs of 4 to 8 CPU
minutes, about 2.5 CPU hours.
Paper: Buitrago and Gu (arXiv 2507.02782): 500 more steps from states passed on, or from fitted noise, let Mamba-1,
Mamba-2 and GLA, trained at 2,048 tokens and less, read up to 128k without the loss that they had beyond it.
Found: carried, not noise, cures sympow beyond 512 tokens (+0.04 nats a token at 8,192, after +0.60), at 0.28 more at
512 itself; sympow_gated and based have nothing to cure (RESULTS.md).
"""

from ml_collections import ConfigDict

from configs import quickstart

VARIANTS, STATES = ("sympow", "sympow_gated", "based"), ("zero", "noise", "carried")
POINTS = (*(f"{variant},{state}" for variant in VARIANTS for state in STATES), "softmax_rope,zero")


def get_config(point: str = "sympow,carried") -> ConfigDict:
    """VARIANT,STATE, one of POINTS."""
    if point not in POINTS:
        raise ValueError(f"{point!r}: a point is one of {', '.join(map(repr, POINTS))}")
    variant, _, state = point.partition(",")
    c = quickstart.of_a_study(variant)
    c.training.initial_state = state
    c.data.order = "stream"
    return c
