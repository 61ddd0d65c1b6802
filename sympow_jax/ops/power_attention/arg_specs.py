"""The calls of power attention that tests and benchmarks share."""

from sympow_jax.ops.linear_attention.specs import ArgSpec

# with those of Taylor attention: every pair of values of degree, gates, T, parity of D, grouped queries, segments
# and initial state occurs
TEST_SPECS = (
    ArgSpec(degree=2, gates="mild", T=1, D=8, Dv=8, H=2, K=2, segments=True),
    ArgSpec(degree=4, gates="none", T=1, D=5, Dv=5, H=2, K=2, segments=True),
    ArgSpec(degree=6, gates="strong", T=1, D=4, Dv=8, H=4, K=2, segments=True, initial_state=True),
    ArgSpec(degree=2, gates="extreme", T=37, D=8, Dv=8, H=2, K=2, segments=True, initial_state=True),
    ArgSpec(degree=4, gates="mild", T=37, D=5, Dv=5, H=4, K=2),
    ArgSpec(degree=6, gates="none", T=37, D=4, Dv=8, H=4, K=2, initial_state=True),
    ArgSpec(degree=2, gates="mild", T=63, D=7, Dv=5, H=2, K=2, initial_state=True),
    ArgSpec(degree=4, gates="extreme", T=63, D=5, Dv=5, H=2, K=2, segments=True, initial_state=True),
    ArgSpec(degree=6, gates="strong", T=63, D=4, Dv=8, H=2, K=2, segments=True),
    ArgSpec(degree=2, gates="strong", T=64, D=7, Dv=5, H=4, K=2),
    ArgSpec(degree=4, gates="none", T=64, D=5, Dv=5, H=4, K=2, segments=True, initial_state=True),
    ArgSpec(degree=6, gates="extreme", T=64, D=3, Dv=5, H=2, K=2),
    ArgSpec(degree=2, gates="none", T=1000, D=8, Dv=8, H=2, K=2),
    ArgSpec(degree=4, gates="strong", T=1000, D=6, Dv=8, H=4, K=2, segments=True, initial_state=True),
    ArgSpec(degree=6, gates="mild", T=1000, D=3, Dv=5, H=4, K=2, segments=True, initial_state=True),
)

BENCHMARK_SPECS = {
    "p2 D64": ArgSpec(degree=2, T=16384, D=64, Dv=64, H=4, K=4, gates="mild"),
    "p2 D32": ArgSpec(degree=2, T=16384, D=32, Dv=32, H=4, K=4, gates="mild"),
    "p2 D32 batch": ArgSpec(degree=2, T=512, D=32, Dv=32, H=4, K=4, B=4, gates="mild"),
    "p4 D16": ArgSpec(degree=4, T=16384, D=16, Dv=16, H=4, K=4, gates="mild"),
}
