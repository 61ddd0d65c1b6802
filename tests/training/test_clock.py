"""Where a run says that its time went, on a clock of the test's own."""

import types

from sympow_jax.training import clock


def test_what_is_not_training_is_added_up_and_told_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    c = clock.Clock()
    assert "restored and verified in 5.00 s; 7 steps" in c.restored(5.0, 7)
    batches = types.SimpleNamespace(wait_fraction=lambda: 0.0)
    c.begin(0, batches, tokens_per_step=1, flops_per_token=1.0, peak_flops=1.0, num_devices=1)
    now[0] = 110.0
    c.saved(2.0)
    c.saved(1.0)
    row = c.row(1)
    assert (row["restore_seconds"], row["lost_steps"], row["save_stall_seconds"]) == (5.0, 7, 3.0)
    assert row["checkpoint_fraction"] == 0.3 and row["compute_fraction"] == 0.7
    for seconds in (4.0, 6.0):
        with c.evaluating(1):
            now[0] += seconds
    c.saved(0.5)
    now[0] += 10.0
    row = c.row(2)
    assert row["save_stall_seconds"] == 0.5 and "restore_seconds" not in row
    now[0] = 200.0  # 100 s, of which 5 restored, 3.5 saved and 10 evaluated
    assert c.summary(40) == (
        "40 steps in 100.0 s: 81.5% for steps and start-up; 3 saves held it for 3.50 s, 2.000 s at most; "
        "restore 5.00 s, evaluation 10.00 s"
    )
