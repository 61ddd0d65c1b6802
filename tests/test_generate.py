"""The command: what it prints, and every way of using it wrongly, on a run that was never trained."""

import dataclasses
import io
import json
import shutil
import types

import jax
import numpy as np
import pytest

import sympow_jax
from sympow_jax import config as config_lib
from sympow_jax import generate, generation
from sympow_jax.command_line import one_line_errors
from sympow_jax.evals.files import write_json
from sympow_jax.generation.text import MAX_STOP_LENGTH
from sympow_jax.input_pipeline.tokenizers import ByteTokenizer
from sympow_jax.models.model import Model, resolve_implementation
from sympow_jax.training.checkpoint import Checkpointer
from tests.models.small import moved, tiny_config


def make_run(folder, variant, *flags):
    """A workdir as a run leaves it, with the parameters of step 1 a bit away from their initial values."""
    config = resolve_implementation(tiny_config(variant, "model.tied_embeddings=false", *flags))
    model = Model(config, 257)
    params = moved(model.init(jax.random.key(0)), 0.05)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", dataclasses.asdict(config))
    write_json(folder / "data.json", {"vocab_size": 257})
    ByteTokenizer().save(folder / "tokenizer")
    with Checkpointer(folder / "checkpoints") as checkpointer:
        checkpointer.save(1, {"params": params}, metadata={})
    return str(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return types.SimpleNamespace(
        sympow=make_run(folder / "sympow", "conformal_sympow"),
        softmax=make_run(folder / "softmax", "softmax_rope"),
        absolute=make_run(folder / "absolute", "softmax_absolute"),
    )


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """The suite has its own compilation cache."""
    monkeypatch.setattr("sympow_jax.generate.use_compilation_cache", lambda: None)


def run(capsys, workdir, *flags):
    """(exit code, standard output, standard error)."""
    code = one_line_errors(generate.run, [f"--workdir={workdir}", *flags])
    return code, *capsys.readouterr()


def greedy(capsys, workdir, *flags):
    code, out, err = run(capsys, workdir, "--temperature=0", *flags)
    assert code == 0, err
    return out.removesuffix("\n"), err


def test_prompts_from_a_flag_a_file_and_standard_input_are_the_same(monkeypatch, tmp_path):
    text = "def f(x):\n    return 'é'"
    (tmp_path / "prompt.txt").write_text(text)
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(text.encode()), isatty=lambda: False))
    assert generate.read_prompt({}) == text
    assert generate.read_prompt({"prompt": text}) == text
    assert generate.read_prompt({"prompt_file": f"{tmp_path}/prompt.txt"}) == text


def test_the_devices_are_those_of_the_run_and_a_mesh_that_does_not_fit_is_said(tmp_path, capsys, monkeypatch):
    chosen = []
    monkeypatch.setattr(generate, "use_cpu_devices_of_run", lambda config: chosen.append(config.mesh.fsdp))
    workdir = make_run(tmp_path / "run", "softmax_rope", "mesh.data=1", "mesh.fsdp=16")
    code, _, err = run(capsys, workdir, "--prompt=abc", "--max_new_tokens=0")
    assert (code, chosen) == (0, [16])
    assert err.startswith("mesh: one device: 1 x cpu; the run's fsdp 16 does not fit what is here\n")


def test_a_stop_string_ends_the_text_before_it(runs, capsys):
    whole, err = greedy(capsys, runs.sympow, "--prompt=abc", "--max_new_tokens=30")
    assert "read 4 tokens" in err and "generated 30 tokens" in err and "state of constant size" in err
    stop = whole[9:12]
    cut, _ = greedy(capsys, runs.sympow, "--prompt=abc", "--max_new_tokens=30", f"--stop={stop}", "--stop=nowhere")
    assert cut == whole[: whole.index(stop)]


@pytest.mark.slow
def test_a_batch_draws_different_samples_and_its_first_row_is_that_of_a_batch_of_one(runs, capsys):
    flags = ("--prompt=a", "--temperature=5", "--max_new_tokens=12", "--seed=7")
    _, one, _ = run(capsys, runs.sympow, *flags)
    _, two, _ = run(capsys, runs.sympow, *flags, "--batch=2")
    first, second = two.split("--- sample 2 ---\n")
    assert first == one and second != one
    _, other, _ = run(capsys, runs.sympow, *flags[:-1], "--seed=8")
    assert other != one


@pytest.mark.parametrize("kind", ["softmax", pytest.param("sympow", marks=pytest.mark.slow)])
def test_a_saved_state_continues_as_if_nothing_had_happened(kind, runs, tmp_path):
    model, params, tokenizer = sympow_jax.load(getattr(runs, kind))
    decoder, sampling = generation.Decoder(model, params), generation.Sampling(temperature=3.0, seed=3)

    def draw(stream, count):
        drawn = []
        for _ in range(count):
            drawn.append(np.asarray(generation.sample(stream.logits, stream.tokens_read, sampling)))
            decoder.read(stream, drawn[-1][:, None])
        return [int(token) for (token,) in drawn]

    whole, first = decoder.start(1, 21), decoder.start(1, 21)
    for stream in (whole, first):
        decoder.read(stream, generation.prompt_tokens(tokenizer, "one two"))
    begun = draw(first, 5)
    generation.save_state(tmp_path, decoder, first, params)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state.json", "state.npz"]
    again = generation.load_state(tmp_path, decoder, params, batch_size=1, extra_length=8)
    assert again.tokens_read == 13
    np.testing.assert_array_equal(again.recent, first.recent)
    assert again.recent.shape == (1, 13) and again.recent[0, 1:8].tolist() == list(b"one two")
    continued = begun + draw(again, 8)
    assert continued == draw(whole, 13) and len(set(continued)) > 5


@pytest.mark.slow
def test_one_saved_row_serves_a_batch_and_reading_can_be_all(runs, capsys, tmp_path):
    code, out, _ = run(capsys, runs.softmax, "--prompt=one two", "--max_new_tokens=0", f"--save_state={tmp_path}/s")
    assert (code, out) == (0, "\n")
    whole, _ = greedy(capsys, runs.softmax, "--prompt=one two three", "--max_new_tokens=8")
    rows, _ = greedy(
        capsys, runs.softmax, f"--load_state={tmp_path}/s", "--prompt= three", "--batch=2", "--max_new_tokens=8"
    )
    assert rows == f"{whole}\n--- sample 2 ---\n{whole}"


@pytest.mark.slow
def test_an_empty_prompt_starts_a_text(runs, capsys):
    _, err = greedy(capsys, runs.sympow, "--prompt=", "--max_new_tokens=5")
    assert "read 1 tokens" in err and "generated" in err


@pytest.mark.slow
def test_a_prompt_of_ten_thousand_tokens(runs, capsys, tmp_path):
    (tmp_path / "long.txt").write_text("0123456789" * 1000)
    for workdir in (runs.sympow, runs.softmax):
        code, _, err = run(capsys, workdir, f"--prompt_file={tmp_path}/long.txt", "--max_new_tokens=4")
        assert code == 0 and "read 10,001 tokens" in err and "generated 4 tokens" in err


@pytest.mark.slow
def test_position_scaling_is_a_flag(runs, capsys, monkeypatch):
    decoders = []

    class Recorded(generation.Decoder):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            decoders.append(self)

    monkeypatch.setattr(generation, "Decoder", Recorded)
    greedy(
        capsys, runs.softmax, "--prompt=x", "--max_new_tokens=1", "--position.scaling=linear", "--position.factor=64"
    )
    position = decoders[0].model.config.position
    assert (position.scaling, position.factor) == ("linear", 64.0)


def test_errors_are_one_line(runs, capsys, monkeypatch, tmp_path):
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(isatty=lambda: True))
    wrong = {
        ("--prompt_file=latin1.txt",): "byte 0xe9 at offset 3 is not UTF-8",
        ("--prompt=caf\udce9",): "byte 0xe9 at offset 3 is not UTF-8",
        ("--prompt_file=none.txt",): "no such file",
        (): "--prompt is missing",
        ("--prompt=a", "--prompt_file=latin1.txt"): "give one of them",
        ("--prompt=a", "--stop=" + "x" * (MAX_STOP_LENGTH + 1)): "legal are 1 to 256",
        ("--prompt=a", "--stop="): "legal are 1 to 256",
        ("--prompt=a", "--temperature=-1"): "--temperature = -1.0",
        ("--prompt=a", "--top_p=0"): "--top_p = 0.0",
        ("--prompt=a", "--top_k=-2"): "--top_k = -2",
        ("--prompt=a", "--batch=0"): "--batch = 0",
        ("--prompt=a", "--max_new_tokens=many"): "expected int",
        ("--prompt=a", "--max_new_token=3"): "did you mean 'max_new_tokens'",
        ("--prompt=a", "--step=bset"): "choose latest, best or a step number",
        ("--prompt=a", "--step=7"): "7",
        ("--prompt=a", "--position.scaling=yarn"): "only rope is scaled",
        ("--prompt=a", "--save_state=s", "--batch=2"): "use --batch=1",
        ("--prompt=a", "--save_state=latin1.txt/s", "--step=7"): "latin1.txt is no folder; name another place",
        ("--load_state=nothing",): "does not exist",
        ("--check", "--batch=2"): "--batch: --check generates nothing",
        ("--check", "--stop=a"): "--stop: --check generates nothing",
    }
    monkeypatch.chdir(tmp_path)
    for flags, message in wrong.items():
        code, out, err = run(capsys, runs.sympow, *flags)
        assert code == 1 and out == "" and message in err and err.count("\n") == 1, (flags, out, err)
    code, _, err = run(capsys, str(tmp_path / "empty"), "--prompt=a")
    assert code == 1 and "config.json does not exist" in err and err.count("\n") == 1
    code, _, err = run(capsys, runs.absolute, "--prompt=a", "--max_new_tokens=100")
    assert code == 1 and "learned_absolute has 48 positions" in err and err.count("\n") == 1


@pytest.mark.slow
def test_a_state_of_another_model_and_damaged_files_are_refused(runs, capsys, tmp_path):
    state = tmp_path / "s"
    assert run(capsys, runs.sympow, "--prompt=abc", "--max_new_tokens=0", f"--save_state={state}")[0] == 0

    def refusal(workdir=runs.sympow, *flags):
        code, _, err = run(capsys, workdir, f"--load_state={state}", "--max_new_tokens=1", *flags)
        assert code == 1 and err.count("\n") == 1
        return err

    assert "attention.gate was 'data' and is 'none' now" in refusal(runs.softmax)
    other = str(shutil.copytree(runs.sympow, tmp_path / "other"))
    saved = json.loads((tmp_path / "other" / "config.json").read_text())
    write_json(tmp_path / "other" / "config.json", saved | {"seed": 1})
    assert run(capsys, other, f"--load_state={state}", "--max_new_tokens=1")[0] == 0  # the same parameters
    _, params, _ = sympow_jax.load(other)
    with Checkpointer(tmp_path / "other" / "checkpoints") as checkpointer:
        checkpointer.save(2, {"params": jax.tree.map(lambda x: x * 1.01, params)}, metadata={})
    assert "belongs to other parameters" in refusal(other)
    about = json.loads((state / "state.json").read_text())
    (state / "state.json").write_text(json.dumps(about | {"format": 99}))
    assert "not of format 1" in refusal()
    undigested = {name: value for name, value in about.items() if name != "digest"}  # as states were before it
    for recent in ([[300]], [[-1]], "x", [[1] * 65], {}):
        (state / "state.json").write_text(json.dumps(undigested | {"recent": recent}))
        assert "recent holds no token ids" in refusal()
    (state / "state.json").write_text(json.dumps(about))
    (state / "state.npz").write_bytes((state / "state.npz").read_bytes()[:-1])
    assert "not the one that was saved" in refusal()


@pytest.mark.slow
def test_check_passes_on_a_sound_model_and_fails_on_an_unsound_one(runs, capsys, monkeypatch):
    code, out, err = run(capsys, runs.sympow, "--check", "--prompt=" + "some text to check " * 3)
    assert code == 0, out + err
    assert "all forms agree" in out and "worst layer" in out and "condition factor" in out
    assert all(form in out for form in ("blockwise", "chunked", "recurrent", "prefill + decode"))
    from sympow_jax.ops.linear_attention import recurrent

    monkeypatch.setattr(recurrent, "normalise", lambda x, axis: x[..., :-1])
    code, out, _ = run(capsys, runs.sympow, "--check", "--prompt=" + "some text to check " * 3)
    assert code == 1 and "FORMS DISAGREE" in out and "prefill + decode" in out


@pytest.mark.slow
@pytest.mark.quick
def test_check_takes_the_forms_and_the_positions_that_a_model_has(runs, capsys, tmp_path):
    code, out, err = run(capsys, make_run(tmp_path / "bias", "sympow", "attention.position=fire"), "--check")
    assert code == 0 and "forms: blockwise, each against" in out and "all forms agree" in out, out + err
    code, out, err = run(capsys, runs.absolute, "--check")
    assert code == 0 and "48 tokens" in out, out + err


@pytest.mark.slow
def test_notebook_api(runs):
    model, params, tokenizer = sympow_jax.load(runs.sympow)
    decoder = generation.Decoder(model, params)
    stream = decoder.start(batch_size=1)
    tokens = generation.prompt_tokens(tokenizer, "import jax" * 70)
    decoder.read(stream, tokens)
    want, _ = model.logits(params, tokens)
    np.testing.assert_allclose(np.asarray(stream.logits), want[:, -1], rtol=1e-4, atol=1e-4)
    with pytest.raises(config_lib.ConfigError, match="token ids must be from 0 to 256"):
        decoder.read(stream, np.asarray([[257]]))
