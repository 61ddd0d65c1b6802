"""Import and export as a user meets them: the command, files that are wrong, and the plain format."""

import json
import os
import pathlib
import re
import resource
import stat

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers

from sympow_jax.config import ConfigError, override
from sympow_jax.convert import __main__ as command
from sympow_jax.convert import exporting, safetensors
from sympow_jax.convert.architecture import make_config
from sympow_jax.convert.exporting import exact, export_workdir
from sympow_jax.convert.families import FAMILIES
from sympow_jax.convert.importing import import_folder, open_folder, read_parameters
from sympow_jax.convert.layouts import Columns, HeadRows, Rows, ScaleMinusOne
from sympow_jax.convert.parts import NotExactError
from sympow_jax.convert.safetensors import Pending, TensorFolder, write_folder
from sympow_jax.convert.windows import shortest_pattern
from sympow_jax.files import FileError
from sympow_jax.loading import load, load_step
from sympow_jax.training.manifest import flatten
from tests.convert.cases import CASES, GOLDEN, make_folder
from tests.convert.test_families import same
from tests.test_generate import make_run

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOKENS = np.load(GOLDEN / "llama_tied" / "logits.npz")["tokens_64"][None, :16]


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    return make_folder("llama_tied", tmp_path / "in")


def foreign(case: str) -> dict:
    return json.loads((GOLDEN / case / "config.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_configurations_are_read_written_and_read_again(case):
    theirs = foreign(case)
    family = FAMILIES[theirs["model_type"]]
    config = make_config(family.read(theirs))
    written = exact(family, config, theirs["vocab_size"])
    assert make_config(family.read(written)) == config
    fewer = {name: value for name, value in theirs.items() if not isinstance(value, bool)}
    unknown = {"moe_layers": 3}
    with pytest.raises(ConfigError, match="moe_layers = '3': this key of"):
        family.read(fewer | unknown)


def test_a_model_that_differs_in_one_value_is_not_of_the_family():
    config = make_config(FAMILIES["llama"].read(foreign("llama")))
    exact(FAMILIES["llama"], override(config, {"position.factor": 2.0}), 96)  # which nothing is scaled by
    for key, value in (("model.residual_scale", 0.5), ("attention.output_gate", True), ("position.scaling", "ntk")):
        with pytest.raises(NotExactError, match=key.replace(".", "[.]")):
            exact(FAMILIES["llama"], override(config, {key: value, "position.factor": 2.0}), 96)


def test_older_names_of_rotary_settings_mean_the_same():
    family, theirs = FAMILIES["llama"], foreign("llama_yarn")
    new = family.read(theirs)
    settings = theirs.pop("rope_parameters")
    old = {"rope_theta": settings.pop("rope_theta"), "rope_scaling": settings | {"type": settings.pop("rope_type")}}
    assert family.read(theirs | old) == new
    theirs = foreign("gemma3")
    new = FAMILIES["gemma3_text"].read(theirs)
    assert (new["position.base"], new["position.window_base"]) == (1e6, 1e4)
    theirs["rope_parameters"] = ...
    old = {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0}
    assert FAMILIES["gemma3_text"].read({k: v for k, v in theirs.items() if v is not ...} | old) == new


def test_the_share_that_is_rotated_has_one_value_under_all_its_names():
    family, theirs = FAMILIES["gpt_neox"], foreign("gpt_neox")
    new = family.read(theirs)
    del theirs["rope_parameters"]
    old = {"rotary_pct": 0.25, "partial_rotary_factor": 0.25, "rotary_emb_base": 10_000, "rope_theta": 10_000}
    assert family.read(theirs | old) == new == family.read(theirs | {"partial_rotary_factor": 0.25})
    with pytest.raises(ConfigError, match=r"partial_rotary_factor = 0\.5: rotary_pct says 0\.25 for the same"):
        family.read(theirs | old | {"partial_rotary_factor": 0.5})


def test_keys_have_the_other_names_of_their_classes():
    theirs = foreign("bloom")
    older = {"n_embed": theirs.pop("hidden_size"), "num_attention_heads": theirs.pop("n_head")}
    assert FAMILIES["bloom"].read(theirs | older) == FAMILIES["bloom"].read(foreign("bloom"))


@pytest.mark.parametrize(
    ("case", "values", "said"),
    [
        ("llama", {"hidden_act": "relu"}, "hidden_act = 'relu': is not understood; legal are 'silu'"),
        ("llama", {"hidden_size": "32"}, "hidden_size = '32': expected int, got str"),
        ("llama", {"vocab_size": None}, "vocab_size: missing"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type = 'longrope': is not understood"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "sections": 3}}, "sections = '3'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: is not understood in this family"),
        ("gemma2", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0: attention has no such cap"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types = .*: expected 2 of full_attention, sliding"),
        ("llama", {"rope_parameters": {"rope_type": ["x"]}}, r"rope_type = .*: is not understood"),
        ("qwen3", {"num_hidden_layers": 10**9}, r"num_hidden_layers = 1000000000: must be 1\.\.10000"),
        ("qwen3", {"layer_types": [[], []]}, "layer_types = .*: expected 2 of"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True: is not under"),
    ],
)
def test_what_cannot_be_expressed_is_named(case, values, said):
    theirs = foreign(case) | values
    with pytest.raises(ConfigError, match=said):
        FAMILIES[theirs["model_type"]].read(theirs)


def test_an_absent_cap_of_gemma_2_is_not_none():
    theirs = foreign("gemma2")
    del theirs["attn_logit_softcapping"]
    with pytest.raises(ConfigError, match=r"attn_logit_softcapping = 50\.0"):
        FAMILIES["gemma2"].read(theirs)


@pytest.mark.parametrize(
    ("layout", "shapes", "whole"),
    [
        (Columns(), [(3, 4), (3, 2)], (3, 6)),
        (Rows(), [(3, 4), (3, 2), (3, 2)], (8, 3)),
        (Rows(), [(4,), (2,)], (6,)),
        (HeadRows(2), [(3, 4), (3, 4), (3, 4)], (12, 3)),
        (HeadRows(2), [(4,), (4,), (4,)], (12,)),
        (ScaleMinusOne(), [(5,)], (5,)),
    ],
)
def test_layouts_split_what_they_join(layout, shapes, whole, rng):
    arrays = [1 + rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    tensor = layout.join(arrays)
    assert tensor.shape == layout.shape(shapes) == whole
    again = layout.split(tensor, shapes)
    assert all(
        np.allclose(one, other, atol=1e-6) and one.shape == other.shape
        for one, other in zip(arrays, again, strict=True)
    )


def test_rows_by_head_hold_queries_keys_and_values_of_a_head_together():
    q, k, v = (np.full((3, 4), number, np.float32) for number in range(3))
    assert HeadRows(2).join([q, k, v])[:, 0].tolist() == [0, 0, 1, 1, 2, 2] * 2


def test_patterns_are_as_short_as_they_can_be():
    assert shortest_pattern("wwawwaww") == tuple("wwa")
    assert shortest_pattern("wwaw") == tuple("wwa")
    assert shortest_pattern("aaa") == ("a",)


def test_files_of_several_shards_and_of_bfloat16(tmp_path, monkeypatch, rng):
    monkeypatch.setattr(safetensors, "_SHARD_BYTES", 40)
    arrays = {name: rng.standard_normal((2, 3)).astype(np.float32) for name in "abcd"}
    for dtype in ("float32", "bfloat16"):
        pending = [Pending(name, array.shape, lambda array=array: array) for name, array in arrays.items()]
        write_folder(tmp_path / dtype, pending, dtype)
        read = TensorFolder(tmp_path / dtype)
        for name, array in arrays.items():
            assert np.array_equal(
                read[name], array.astype(np.dtype(dtype) if dtype == "float32" else ml_dtypes.bfloat16)
            )
    index = json.loads((tmp_path / "float32" / safetensors.INDEX).read_text())
    assert index["metadata"] == {"total_size": 96} and len({*index["weight_map"].values()}) == 4
    assert len({*json.loads((tmp_path / "bfloat16" / safetensors.INDEX).read_text())["weight_map"].values()}) == 2


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_have_the_mode_that_the_umask_leaves(umask, tmp_path):
    before = os.umask(umask)
    try:
        write_folder(tmp_path, [Pending("a", (2,), lambda: np.zeros(2, np.float32))], "float32")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / safetensors.SINGLE).stat().st_mode) == 0o666 & ~umask


def test_a_file_that_cannot_be_written_is_one_line_and_says_what_to_remove(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "_SHARD_BYTES", 100_000)
    pending = [
        Pending(name, (size,), lambda size=size: np.zeros(size, np.float32))
        for name, size in (("a", 20_000), ("b", 100_000))
    ]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # as of a disk that is full
    try:
        with pytest.raises(FileError, match=r"model-00002-of-00002\.safetensors: cannot .*\(.*\); .* remove .*out and"):
            write_folder(tmp_path / "out", pending, "float32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model-00001-of-00002.safetensors"]
    with pytest.raises(ConfigError, match="is not empty"):
        export_workdir("anywhere", str(tmp_path / "out"))


def test_an_imported_folder_is_a_workdir_and_the_command_says_what_it_did(folder, tmp_path, capsys):
    assert command.run(["import", str(folder), f"--workdir={tmp_path / 'w'}"]) == 0
    _, params, tokenizer = load(str(tmp_path / "w"))
    second = TensorFolder(folder)["model.layers.1.self_attn.q_proj.weight"]
    assert np.array_equal(params["blocks_0"]["mixer"]["query"]["kernel"][1], second.T)
    assert (
        command.run(["export", f"--workdir={tmp_path / 'w'}", f"--output={tmp_path / 'out'}", "--dtype=bfloat16"]) == 0
    )
    assert "llama" in capsys.readouterr().out
    again = open_folder(str(tmp_path / "out"))
    assert again.model.config.model.dtype == "bfloat16" and again.tokenizer.digest == tokenizer.digest
    assert {entry.dtype for entry in again.tensors.entries.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert again.tensors["model.norm.weight"].tolist() == params["final_norm"]["scale"].astype(jnp.bfloat16).tolist()


def test_special_tokens_beyond_the_embedding_are_left_out(folder, tmp_path):
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<image>"])  # of id 96, as Gemma 3 has one beyond its rows
    tokenizer.save(str(folder / "tokenizer.json"))
    import_folder(str(folder), str(tmp_path / "w"))
    model, _, ours = load(str(tmp_path / "w"))
    assert (model.vocab_size, ours.vocab_size, ours.spec["vocab_size"], ours.bos_id) == (96, 96, 96, 0)
    assert json.loads((tmp_path / "w" / "data.json").read_text())["tokenizer_digest"] == ours.digest
    export_workdir(str(tmp_path / "w"), str(tmp_path / "out"))
    assert open_folder(str(tmp_path / "out")).tokenizer.digest == ours.digest
    words = json.loads(tokenizer.to_str())
    words["added_tokens"][-1]["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ConfigError, match=r"vocab_size = 96: the tokenizer beside it has 97 ids; legal are 97\.\."):
        open_folder(str(folder))


@pytest.mark.slow
@pytest.mark.quick
def test_parameters_go_straight_to_the_devices_of_a_mesh_and_the_workdir_has_it(folder, tmp_path, monkeypatch):
    flags = ["--mesh.fsdp=2", "--mesh.tensor=2"]
    assert command.run(["import", str(folder), f"--workdir={tmp_path / 'w'}", *flags]) == 0
    foreign = open_folder(str(folder), {"fsdp": 2, "tensor": 2})
    params = flatten(read_parameters(foreign))
    assert {name: array.sharding for name, array in params.items()} == {
        name: spec.sharding for name, spec in foreign.specs.items()
    }
    shards = params["params/blocks_0/mlp/up/kernel"].addressable_shards
    assert {shard.data.shape for shard in shards} == {(2, 16, 24)} and len(shards) == 8
    model, whole, _ = load(str(tmp_path / "w"))
    assert same(flatten({"params": whole}), params)
    assert (model.config.mesh.data, model.config.mesh.fsdp, model.config.mesh.tensor) == (2, 2, 2)

    seen = []
    monkeypatch.setattr(exporting, "load_step", lambda *args, **kw: seen.append(load_step(*args, **kw)) or seen[0])
    export_workdir(str(tmp_path / "w"), str(tmp_path / "out"))
    exported = flatten({"params": seen[0][1]})
    assert {name: array.sharding for name, array in exported.items()} == {
        name: array.sharding for name, array in params.items()
    }
    theirs, ours = TensorFolder(folder), TensorFolder(tmp_path / "out")
    assert all(np.array_equal(theirs[name], ours[name]) for name in theirs.entries)


def test_tied_embeddings_may_be_there_twice_if_they_are_equal(folder):
    entry = TensorFolder(folder)["model.embed_tokens.weight"]
    names = [*TensorFolder(folder).entries]
    arrays = {name: np.array(TensorFolder(folder)[name]) for name in names} | {"lm_head.weight": np.array(entry)}
    for more, legal in ((0, True), (1, False)):
        arrays["lm_head.weight"] = np.array(entry) + np.float32(more)
        write_folder(folder, [Pending(n, a.shape, lambda a=a: a) for n, a in arrays.items()], "float32")
        if legal:
            open_folder(str(folder))
        else:
            with pytest.raises(ConfigError, match=r"lm_head\.weight has no place in this model"):
                open_folder(str(folder))


def read_with_numpy() -> object:
    """The reader that docs/convert.md shows."""
    code = re.search(r"```python\n(import json.+?)```", (ROOT / "docs" / "convert.md").read_text(), re.DOTALL)
    assert code and sum(bool(line.strip()) for line in code[1].splitlines()) <= 10
    names: dict = {}
    exec(code[1], names)
    return names["read"]


@pytest.mark.slow
@pytest.mark.quick
def test_a_sympow_model_is_exported_by_our_own_names_and_read_back(tmp_path):
    workdir = make_run(tmp_path / "run", "conformal_sympow")
    _, params, tokenizer = load(workdir)
    assert export_workdir(workdir, str(tmp_path / "out")) == "sympow_jax"
    arrays = read_with_numpy()(tmp_path / "out" / "model.safetensors")
    first = params["blocks_0"]["mixer"]["query"]["kernel"][0]
    assert np.array_equal(arrays["layers.0.mixer.query.kernel"], first)
    import_folder(str(tmp_path / "out"), str(tmp_path / "again"))
    again, params_again, tokenizer_again = load(str(tmp_path / "again"))
    assert same(params, params_again) and tokenizer_again.digest == tokenizer.digest
    assert again.config.model.vocab_size == 257
    assert jax.tree.structure(params) == jax.tree.structure(params_again)
