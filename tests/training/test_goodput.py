"""Where a run says that its time went, on a clock of the test's own."""

from sympow_jax.training import goodput


def test_what_is_not_training_is_added_up_and_new_in_each_row(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: clock[0])
    g = goodput.Goodput()
    assert "restored and verified in 5.00 s; 7 steps" in g.restored(5.0, 7)
    g.saved(2.0)
    g.saved(1.0)
    assert g.row() == {"restore_seconds": 5.0, "lost_steps": 7, "save_stall_seconds": 3.0}
    for seconds in (4.0, 6.0):
        with g.evaluating():
            clock[0] += seconds
    g.saved(0.5)
    assert g.row() == {"save_stall_seconds": 0.5} and g.row() == {}
    clock[0] = 200.0  # 100 s, of which 5 restored, 3.5 saved and 10 evaluated
    assert g.summary(40) == (
        "40 steps in 100.0 s: 81.5% for steps and start-up; 3 saves held it for 3.50 s, 2.000 s at most; "
        "restore 5.00 s, evaluation 10.00 s"
    )
