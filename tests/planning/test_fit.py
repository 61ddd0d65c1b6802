import pytest

from sympow_jax import config as config_lib
from sympow_jax import plan as plan_command
from sympow_jax.files import read_json
from sympow_jax.planning import fit, targets

FLAGS = ["--config=configs/lc64_124m.py:conformal_sympow,65536", "--config.model.num_heads=8"]


def config(*flags):
    return config_lib.parse_flags([*FLAGS, "--config.data.batch_size=4", *flags])


def test_meshes_communicate_little_first():
    first = fit.meshes(config(), 8)[0]
    assert first == {"mesh.data": 4, "mesh.fsdp": 1, "mesh.tensor": 1, "mesh.seq": 2}
    state_too_large = config("--config.attention.degree=4", "--config.attention.implementation=blockwise")
    assert fit.meshes(state_too_large, 8)[0]["mesh.tensor"] == 2
    order = [(m["mesh.seq"], m["mesh.tensor"], m["mesh.fsdp"]) for m in fit.meshes(config(), 8)]
    assert order[:4] == [(2, 1, 1), (2, 1, 4), (1, 2, 1), (1, 2, 4)]
    for mesh in fit.meshes(config(), 8):
        sizes = list(mesh.values())
        assert sizes[0] * sizes[1] * sizes[2] * sizes[3] == 8
        assert 4 % (sizes[0] * sizes[1]) == 0


def test_the_default_mesh_is_the_first_that_is_legal():
    target = targets.find("cpu:8")
    chosen = fit.with_default_mesh(config(), target).mesh
    assert (chosen.data, chosen.fsdp, chosen.tensor, chosen.seq) == (4, 1, 1, 2)
    odd = fit.with_default_mesh(config("--config.data.seq_len=65537"), target).mesh
    assert odd == config().mesh, "no mesh divides an odd length: left alone, so that the error says so"


def test_a_mesh_that_a_file_asks_for_is_planned():
    scale = config_lib.parse_flags(["--config=configs/scale/large.py:1.3b,65536"])
    assert fit.with_default_mesh(scale, targets.find("cpu:8")) == scale
    assert (scale.mesh.data, scale.mesh.fsdp, scale.mesh.seq) == (1, 64, -1)


def test_search_finds_what_recomputes_least_on_each_mesh_and_ranks_by_time(monkeypatch):
    tried = []

    def try_plan(candidate, vocab_size, target, *_, **__):
        tried.append(candidate)
        parts, remat = candidate.optimizer.accumulation_steps, candidate.model.remat
        fits = fit.KEPT[remat] / parts * 8 / candidate.mesh.seq <= 1
        seconds = candidate.mesh.seq * (2 - fit.KEPT[remat]) + candidate.attention.chunk_size / 1e6
        return {"status": "fits" if fits else "does not fit", "roofline": {"step_seconds": seconds}}

    monkeypatch.setattr(fit, "try_plan", try_plan)
    lines = []
    found = fit.search(config(), 257, targets.find("cpu:8"), max_compiles=40, tell=lines.append)
    assert len(tried) == len(lines) <= 40
    times = [plan["roofline"]["step_seconds"] for _, plan in found]
    assert times == sorted(times)
    best = found[0][0]
    assert (best["mesh.data"], best["mesh.tensor"], best["mesh.seq"]) == (2, 4, 1)
    assert best["model.remat"] == "attention", "of what fits at two rows a device, the least recomputation"
    assert best["attention.chunk_size"] == 128, "half the configured chunk is faster here"
    again = config_lib.parse_flags([*FLAGS, "--config.data.batch_size=4", *fit.flags(config(), best).split()])
    assert (again.mesh.tensor, again.model.remat, again.attention.chunk_size) == (4, "attention", 128)


@pytest.mark.parametrize("max_compiles", [1, 2, 3, 5])
@pytest.mark.parametrize("first_fit", [1, 2, 3, 99])
def test_search_compiles_all_that_it_may_and_keeps_chunk_sizes_back_once_something_fits(
    max_compiles, first_fit, monkeypatch
):
    tried = []

    def try_plan(candidate, *_, **__):
        tried.append(candidate.attention.chunk_size)
        status = "fits" if len(tried) >= first_fit else "does not fit"
        return {"status": status, "roofline": {"step_seconds": len(tried)}}

    monkeypatch.setattr(fit, "try_plan", try_plan)
    found = fit.search(config(), 257, targets.find("cpu:8"), max_compiles=max_compiles, tell=lambda text: None)
    assert len(tried) == max_compiles
    assert len(found) == max(max_compiles - first_fit + 1, 0)
    if first_fit < max_compiles:
        assert set(tried[-min(2, max_compiles - first_fit) :]) <= {128, 512}


def test_a_search_in_vain_says_how_many_it_compiled(monkeypatch, capsys):
    monkeypatch.setattr(fit, "try_plan", lambda *_, **__: {"status": "does not fit"})
    monkeypatch.setattr(plan_command, "_prepare_compilers", lambda: None)
    flags = [*FLAGS, "--config.data.batch_size=1", "--topology=cpu:1", "--fit"]
    assert plan_command.run([*flags, "--max_compiles=1"]) == 2
    said = "nothing fits of 1 compiled; try a larger slice, or --max_compiles above 1\n"
    assert capsys.readouterr().out.endswith(said)
    assert plan_command.run([*flags, "--max_compiles=40"]) == 2
    assert capsys.readouterr().out.endswith("nothing fits of 2 compiled; try a larger slice\n")


def test_a_plan_has_the_vocabulary_of_its_data(monkeypatch):
    """8,192 ids of MQAR; bytes and BOS of the default corpus; GPT-2's of another."""
    planned = []

    def try_plan(config, vocab_size, target, *_, **options):
        planned.append(vocab_size)
        return {"status": "does not fit", "reason": "", "variant": "", "context": 0, "compiled_for": "", "degree": 0}

    monkeypatch.setattr(plan_command.fit, "try_plan", try_plan)
    h100 = targets.Target("h100:8", targets.DEVICES["h100"], (8,), ())
    monkeypatch.setattr(plan_command.targets, "find", lambda name: h100)
    monkeypatch.setattr(plan_command.fit, "with_default_mesh", lambda config, target: config)
    monkeypatch.setattr(plan_command, "_prepare_compilers", lambda: None)
    for data in ("mqar", "passkey", "python-stdlib", "gs://longcrawl64/train.zarr"):
        stores = [f"--config.data.{split}={data}" for split in ("train", "heldout")]
        plan_command.run(["--config=configs/quickstart.py", "--topology=h100:8", *stores])
    assert planned == [8_192, 257, 257, 50_257]


def test_candidates_have_what_flags_give():
    target, asked = targets.find("cpu:8"), config()
    for fixed in (
        {"mesh.seq": 8}, {"mesh.fsdp": 2}, {"mesh.data": 2, "mesh.fsdp": 2}, {"mesh.data": 2, "mesh.tensor": 2},
        {"model.remat": "none"}, {"model.remat": "offload"}, {"optimizer.accumulation_steps": 2},
    ):  # fmt: skip
        found = [changes for ladder in fit.candidates(asked, target, fixed) for changes in ladder]
        assert found and all(changes[key] == fixed[key] for changes in found for key in fixed), fixed
    assert {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 1, "mesh.seq": 2} in fit.meshes(asked, 8, {"mesh.fsdp": 2})
    assert fit.meshes(asked, 8, {"mesh.seq": 3}) == []
    assert [m["mesh.seq"] for m in fit.meshes(config("--config.data.batch_size=2"), 6, {"mesh.seq": 3})] == [3, 3, 3]


def searched(monkeypatch, *flags):
    """The configs that --fit on eight devices tries where everything fits, and the options of their plans."""
    tried = []

    def try_plan(candidate, vocab_size, target, folder, **options):
        tried.append((candidate, options))
        return {"status": "fits", "roofline": {"step_seconds": 1.0}}

    monkeypatch.setattr(fit, "try_plan", try_plan)
    monkeypatch.setattr(plan_command, "_prepare_compilers", lambda: None)
    monkeypatch.setattr(plan_command.report, "matrix", lambda plans: "")
    flags = ["--config.data.batch_size=4", "--max_compiles=40", *flags]
    return plan_command.run([*FLAGS, "--topology=cpu:8", "--fit", *flags]), tried


def test_the_command_searches_among_what_flags_leave_open(monkeypatch, capsys):
    free = searched(monkeypatch)[1]
    assert {c.mesh.seq for c, _ in free} > {1, 2, 4} and {c.attention.chunk_size for c, _ in free} == {128, 256, 512}
    flags = ["mesh.seq=2", "mesh.data=-1", "mesh.cpu_devices=8", "model.remat=block", "optimizer.accumulation_steps=2"]
    code, tried = searched(monkeypatch, *(f"--config.{flag}" for flag in [*flags, "attention.chunk_size=256"]))
    assert code == 0 and len(tried) > 1
    for c, options in tried:
        assert (c.mesh.seq, c.model.remat, c.optimizer.accumulation_steps, c.attention.chunk_size) == (
            2,
            "block",
            2,
            256,
        )
        assert not options["kernels"]
    assert {c.mesh.data for c, _ in tried} == {1, 2}
    assert all(options["kernels"] for _, options in searched(monkeypatch, "--kernels")[1])
    capsys.readouterr()
    assert searched(monkeypatch, "--config.mesh.seq=3") == (2, [])
    assert "no mesh, remat and accumulation are legal with these flags" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["fit", "kernels"])
def test_evaluations_are_neither_searched_nor_have_kernels(name):
    with pytest.raises(config_lib.ConfigError, match=f"--{name} --evaluate: .* leave one of the two out"):
        plan_command.run([*FLAGS, "--topology=cpu:8", f"--{name}", "--evaluate"])


def test_a_number_of_cpu_devices_is_no_mesh(monkeypatch):
    planned = []

    def try_plan(config, *_, **__):
        planned.append((config.mesh.data, config.mesh.seq))
        return {"status": "fits", "reason": "", "variant": "", "context": 0, "compiled_for": "", "degree": 0}

    monkeypatch.setattr(fit, "try_plan", try_plan)
    monkeypatch.setattr(plan_command, "_prepare_compilers", lambda: None)
    for flag in ("--config.mesh.cpu_devices=2", "--config.mesh.seq=4"):
        plan_command.run([*FLAGS, "--config.data.batch_size=4", "--topology=cpu:8", flag])
    assert planned == [(4, 2), (-1, 4)]


@pytest.mark.parametrize("mode", ["", "--fit", "--evaluate"])
def test_what_was_planned_is_printed_and_written_before_the_next(mode, tmp_path, monkeypatch, capsys):
    """The third of three variants is interrupted."""
    made = []

    def make(config, *_, **__):
        made.append(config.variant)
        if len(made) == 3:
            raise KeyboardInterrupt
        header = {"variant": config.variant, "compiled_for": "cpu:8", "degree": 0, "context": 64, "mesh": {}}
        return header | {"status": "fits", "reason": "", "evaluations": [], "roofline": {"step_seconds": 1.0}}

    def table(plan):
        return f"table of {plan['variant']}"

    monkeypatch.setattr(fit, "try_plan", make)
    monkeypatch.setattr(fit, "with_default_mesh", lambda config, target: config)
    monkeypatch.setattr(plan_command.evaluation, "plan_evaluation", make)
    monkeypatch.setattr(plan_command.evaluation, "evaluation_table", table)
    monkeypatch.setattr(plan_command.report, "table", table)
    monkeypatch.setattr(plan_command.report, "matrix", lambda plans: f"matrix of {len(plans)}")
    monkeypatch.setattr(plan_command, "_prepare_compilers", lambda: None)
    flags = ["--config=configs/quickstart.py", "--variants=softmax_rope,sympow,based", "--topology=cpu:8"]
    flags += [mode, "--max_compiles=1"] if mode else []
    with pytest.raises(KeyboardInterrupt):
        plan_command.run([*flags, f"--output={tmp_path}/three"])
    assert [plan["variant"] for plan in read_json(tmp_path / "three.json", kind=list)] == ["softmax_rope", "sympow"]
    assert (tmp_path / "three.md").exists() == (mode != "--evaluate")
    printed = capsys.readouterr().out
    assert printed.count("1. 1 s a step at best") == 2 if mode == "--fit" else "table of sympow\n" in printed


def test_a_config_that_cannot_be_planned_is_a_row_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def try_plan(config, *_, **__):
        if config.variant == "fox":
            raise config_lib.ConfigError("data.batch_size = 3: must divide")
        header = {"variant": config.variant, "compiled_for": "cpu:8", "degree": 0, "context": 64}
        return header | {"status": "fits", "reason": "a compiler's words [/a] are no markup"}

    monkeypatch.setattr(fit, "try_plan", try_plan)
    monkeypatch.setattr(plan_command, "_prepare_compilers", lambda: None)
    flags = ["--config=configs/quickstart.py", "--topology=cpu:8"]
    assert plan_command.run([*flags, "--variants=fox,sympow", f"--output={tmp_path}/two"]) == 1
    printed = capsys.readouterr()
    assert "| fox | 512 | cpu:8 | | config error: data.batch_size = 3: must divide |" in printed.out
    assert "| sympow | 64 | cpu:8 | | fits" in printed.out
    assert "fits: a compiler's words [/a] are" in printed.out
    assert printed.err == "error: fox for cpu:8: data.batch_size = 3: must divide\n"
    assert [plan["status"] for plan in read_json(tmp_path / "two.json", kind=list)] == ["config error", "fits"]
    with pytest.raises(config_lib.ConfigError, match="must divide"):
        plan_command.run([*flags, "--variants=fox"])
