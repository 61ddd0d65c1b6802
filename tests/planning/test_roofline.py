import pytest

from sympow_jax.planning.roofline import roofline
from sympow_jax.planning.targets import DEVICES, Target


def bounds(name, **changes):
    target = Target(name, DEVICES[name], (4, 4), ())
    work = {"flops": {"bfloat16": 197e12}, "memory_bytes": 819e9 / 2, "network_seconds": 0.25}
    step = {"num_devices": 16, "model_flops": 16 * 197e12 / 2, "tokens_per_step": 1000, "num_steps": 86_400}
    return roofline(target, **(work | step | changes))


def test_a_step_takes_as_long_as_its_slowest_part():
    r = bounds("v5e")
    assert (r.compute_seconds, r.memory_seconds, r.network_seconds) == pytest.approx((1.0, 0.5, 0.25))
    assert (r.step_seconds, r.bound) == (pytest.approx(1.0), "compute")
    assert r.mfu == pytest.approx(0.5)
    assert (r.tokens_per_second, r.tokens_per_day, r.days) == pytest.approx((1000, 86.4e6, 1.0))
    slow = bounds("v5e", network_seconds=4.0)
    assert (slow.step_seconds, slow.bound, slow.days) == (4.0, "network", pytest.approx(4.0))


def test_float32_products_run_at_tf32_speed_on_gpus():
    assert bounds("h100", flops={"float32": 989e12}).compute_seconds == pytest.approx(2.0)
    assert bounds("v5e", flops={"float32": 197e12}).compute_seconds == pytest.approx(1.0)


def test_compute_is_at_least_the_models():
    r = bounds("v5e", flops={"bfloat16": 1.0}, memory_bytes=0.0, network_seconds=0.0)
    assert (r.compute_seconds, r.mfu) == pytest.approx((0.5, 1.0))
