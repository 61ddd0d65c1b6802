"""The calls of Taylor attention that tests and benchmarks share."""

from sympow_jax.ops.linear_attention.specs import ArgSpec

# with those of power attention: every pair of choices occurs, see there
TEST_SPECS = (
    ArgSpec(degree=0, gates="extreme", T=1, D=8, Dv=8, H=4, K=2),
    ArgSpec(degree=0, gates="strong", T=37, D=8, Dv=8, H=2, K=2),
    ArgSpec(degree=0, gates="none", T=63, D=7, Dv=5, H=4, K=2, initial_state=True),
    ArgSpec(degree=0, gates="mild", T=64, D=8, Dv=8, H=2, K=2, segments=True),
    ArgSpec(degree=0, gates="extreme", T=1000, D=8, Dv=8, H=4, K=2, segments=True, initial_state=True),
)

BENCHMARK_SPECS = {
    "taylor D16": ArgSpec(degree=0, T=16384, D=16, Dv=64, H=4, K=4, gates="mild"),
}
