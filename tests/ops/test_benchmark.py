"""The counts of the benchmark of operations."""

from benchmarks import ops as benchmark


def test_useful_flops_are_those_of_exact_sizes():
    linear = benchmark.useful_flops(benchmark.parse("p2,1,16384,4,64:chunked"))
    assert linear["forward"] == 4 * 2080 * 65 * 4 * 16384
    assert linear["forward+backward"] == 3 * linear["forward"]
    quartic = benchmark.useful_flops(benchmark.parse("p4,1,1,1,16:chunked"))
    assert quartic["forward"] == 4 * 3876 * 17
    softmax = benchmark.useful_flops(benchmark.parse("softmax,1,1024,4,64"))
    assert softmax["forward"] == 4 * 2 * (2 * 64) * 1024**2 / 2
