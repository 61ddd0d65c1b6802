"""The conformal family: power attention of degree 2 with every gate and rotation, from none to one for every plane.

    python -m benchmarks.study conformal_family      (what of the sweep below is missing; RESULTS.md)
    python -m sympow_jax.sweep --config=configs/figures/conformal_family.py --root=runs/conformal_family \
        --points=all --seeds=0,1,2
    python train.py --config=configs/figures/conformal_family.py:POINT --workdir=DIR        (POINT vector,frequency)

A point is GATE,ROTATION. Gates: none, fixed (log-spaced from 16 to 4,096 tokens over the heads), learned (one a head),
scalar (of each token, one a head), vector (of each token, one a plane, or a dim where nothing rotates). Rotations:
none, rope, scalar (steps of each token, one a head), frequency (one a head and frequency). none,rope is sympow,
scalar,rope sympow_gated, scalar,scalar conformal_sympow and vector,frequency conformal_vector_sympow. Gates other than
fixed ones start at 0.999, which is 0.999^2 of a weight for vector. The quickstart's model and data, 4 layers of width
128 on the Python sources, trained at 512 tokens and evaluated from 32 to 8,192, 16 times that.
Budget: 800 steps of 4 x 512 bytes, 1.6 million tokens, 20 points of three seeds: 60 runs, 112 minutes on two cores
of an AMD processor (family 26, model 2), two runs at a time, beside other work.
Paper: Kumar et al. (arXiv 2503.03269): with gates of each token sympow keeps its loss in contexts longer than the
trained one, and learned rotations are better than rope there. GLA (arXiv 2312.06635) and Selective RoPE (arXiv
2511.17388) have gates of every dim and angles of every plane in other models.
Found (RESULTS.md): with gates of each token and any rotation 1.57 to 1.60 at 512 and at 8,192 tokens; with fixed gates
1.67 to 1.69; with learned ones, which hardly move in 800 steps, 1.91 to 1.98 and rising; without gates 1.95 to 2.04 and
collapsing. No rotation costs 0.1 to 0.5. Three seeds tell no rotation from another, nor vector gates from scalar ones.
"""

from ml_collections import ConfigDict

from configs import quickstart

GATES = {"none": "none", "fixed": "fixed", "learned": "learned", "scalar": "data", "vector": "vector"}
ROTATIONS = {
    "none": ("none", "scalar"),
    "rope": ("rope", "scalar"),
    "scalar": ("learned_rope", "scalar"),
    "frequency": ("learned_rope", "frequency"),
}
POINTS = tuple(f"{gate},{rotation}" for gate in GATES for rotation in ROTATIONS)


def get_config(point: str = "vector,frequency") -> ConfigDict:
    """GATE,ROTATION, one of POINTS."""
    if point not in POINTS:
        raise ValueError(f"{point!r}: a point is one of {', '.join(map(repr, POINTS))}")
    gate, _, rotation = point.partition(",")
    c = quickstart.of_a_study("sympow")
    c.attention.gate = GATES[gate]
    c.attention.position, c.position.rotation = ROTATIONS[rotation]
    return c
