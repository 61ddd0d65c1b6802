"""Configs resolve, every key can be set from the command line, and mistakes are one line that names the fix."""

import dataclasses
import json
import pathlib
import re
import shutil

import numpy as np
import pytest

from sympow_jax import config as config_lib
from sympow_jax.config import ConfigError, parse_flags
from sympow_jax.config.absent import ABSENT
from sympow_jax.loading import check_stream, evaluation_config
from sympow_jax.models.model import resolve_implementation
from sympow_jax.ops import positions
from sympow_jax.training.run_files import check_resume
from sympow_jax.variants import VARIANTS

ROOT = pathlib.Path(__file__).resolve().parents[1]
QUICKSTART = f"--config={ROOT}/configs/quickstart.py"


def resolve(*flags: str, variant: str = "conformal_sympow") -> config_lib.Config:
    return parse_flags([f"{QUICKSTART}:{variant}", *(f"--config.{flag}" for flag in flags)])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_resolves_to_its_row(variant):
    config = resolve(variant=variant)
    row = VARIANTS[variant]
    assert (config.attention.kernel, config.attention.position, config.attention.gate) == (
        row.kernel, row.position, row.gate,
    )  # fmt: skip
    assert config.attention.layer_pattern == row.layer_pattern


def test_every_key_can_be_set_from_the_command_line():
    values = config_lib.flatten(config_lib.load_file(f"{ROOT}/configs/default.py").get_config().to_dict())
    for key, value in values.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert isinstance(resolve(f"{key}={text}"), config_lib.Config), key


def test_a_saved_config_resolves_to_itself():
    config = resolve("attention.degree=4", "evaluation.lengths=64,128")
    saved = json.loads(json.dumps(config_lib.flatten(config)))
    tree: dict = {}
    for path, value in saved.items():
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    assert config_lib.resolve(tree) == config


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([f"{QUICKSTART}:conformal_sympw"], ["conformal_sympw", "did you mean 'conformal_sympow'"]),
        (["configs/nothing.py"], ["--config is missing"]),
        (["--config=configs/nothing.py"], ["configs/nothing.py", "no such file"]),
        ([QUICKSTART, "--config.model.num_layer=3"], ["num_layer", "did you mean 'model.num_layers'"]),
        ([QUICKSTART, "--config.model.num_layers=three"], ["model.num_layers", "'three'", "expected int"]),
        ([QUICKSTART, "--config.model.num_layers=0"], ["model.num_layers", "0", "positive"]),
        ([QUICKSTART, "--config.mesh.tensor=0"], ["mesh.tensor = 0", "positive, or -1"]),
        ([QUICKSTART, "--config.attention.degree=3"], ["attention.degree", "3", "2, 4, 6"]),
        ([QUICKSTART, "--config.model.norm=layrnorm"], ["model.norm", "did you mean 'layernorm'"]),
        ([QUICKSTART, "--config.model.num_kv_heads=3"], ["num_kv_heads", "3", "divide", "4"]),
        ([QUICKSTART, "--config.data.batch_size=3", "--config.optimizer.accumulation_steps=2"], ["accumulation_steps"]),
        ([QUICKSTART, "--config.model.head_dim=31"], ["head_dim = 31", "even"]),
        ([f"{QUICKSTART}:fox", "--config.attention.implementation=chunked"], ["chunked", "blockwise", "reference"]),
        (
            [QUICKSTART, "--config.attention.position=fire", "--config.attention.implementation=chunked"],
            ["fire", "'reference' or 'blockwise'"],
        ),
        ([QUICKSTART, "--config.position.scaling=yarn"], ["yarn", "learned_rope", "rope"]),
        ([f"{QUICKSTART}:sympow", "--config.position.scaling=dynamic_ntk"], ["dynamic_ntk", "softmax"]),
        ([f"{QUICKSTART}:rebased", "--config.attention.qk_norm=true"], ["qk_norm", "rebased", "use false"]),
        ([f"{QUICKSTART}:fox", "--config.position.alibi_slope_scale=2"], ["alibi_slope_scale", "'none'", "use 1.0"]),
        (
            [QUICKSTART, "--config.attention.position=sinusoidal", "--config.model.embed_dim=33"],
            ["embed_dim = 33", "even"],
        ),
        (
            [QUICKSTART, "--config.model.parallel_residual=true", "--config.model.norm_placement=post"],
            ["model.parallel_residual", "norm_placement 'post'", "use an MLP and 'pre', or false"],
        ),
        ([QUICKSTART, "--config.model.mlp=none", "--config.model.mlp_bias=all"], ["mlp_bias = 'all'", "use 'auto'"]),
        ([QUICKSTART, "--config.model.norm_eps=1e-45"], ["model.norm_eps = 1e-45", "0 in float32"]),
        ([QUICKSTART, "--config.attention.qk_norm_span=concatenated"], ["attention.qk_norm is false", "to true"]),
        ([f"{QUICKSTART}:based", "--config.attention.gate=vector"], ["'vector'", "softmax", "use 'data'"]),
        (
            [QUICKSTART, "--config.attention.gate=vector", "--config.attention.position=alibi"],
            ["'vector'", "position is 'alibi'", "'none' or a rotary position"],
        ),
        (
            [QUICKSTART, "--config.attention.gate=vector", "--config.attention.implementation=pallas"],
            ["'pallas'", "gate is 'vector'", "use 'chunked'"],
        ),
        ([QUICKSTART, "--config.position.rotary_fraction=0.1"], ["rotary_fraction = 0.1", "is 3 of 32 dims", "0.5"]),
        (
            [f"{QUICKSTART}:fox", "--config.position.rotary_fraction=0.5"],
            ["rotary_fraction = 0.5", "'none'", "use 1.0"],
        ),
        (
            [f"{QUICKSTART}:softmax_rope", "--config.position.rotation=frequency"],
            ["position.rotation = 'frequency'", "position is 'rope'", "use 'variant' or 'scalar', or learned_rope"],
        ),
        ([f"{QUICKSTART}:softmax_rope", "--config.position.window_base=1e4"], ["window_base", "`window`", "use 0"]),
        ([QUICKSTART, "--config.position.beta_fast=1"], ["beta_slow = 1.0", "below position.beta_fast = 1.0"]),
        ([QUICKSTART, "--config.position.low_freq_factor=4"], ["low_freq_factor", "below position.high_freq_factor"]),
        ([QUICKSTART, "--config.attention.layer_pattern=conv"], ["layer_pattern", "gated_conv"]),
        ([QUICKSTART, "--confg.seed=1"], ["--confg.seed", "no such flag"]),
        ([QUICKSTART, "--config.seed"], ["--config.seed", "VALUE"]),
        ([f"--config={ROOT}/configs/scale/large.py:7b"], ["no context in '7b'", "7b,65536"]),
        ([QUICKSTART, f"--config.optimizer.warmup_steps={2**31}"], ["warmup_steps = 2147483648", "at most 2147483647"]),
        (
            [QUICKSTART, "--config.optimizer.schedule=linear", f"--config.num_train_steps={2**31}"],
            ["num_train_steps = 2147483648", "at most 2147483647"],
        ),
        ([f"{QUICKSTART}:foxx"], ["no variant 'foxx'", "did you mean 'fox'"]),
        ([], ["--config is missing"]),
    ],
)
def test_mistakes_are_one_line_that_helps(flags, words):
    with pytest.raises(ConfigError) as caught:
        parse_flags(flags)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_zeros_are_chosen_and_other_values_stay():
    chosen, given = resolve("data.seq_len=48"), resolve("position.original_length=99", "data.seq_len=48")
    assert (chosen.position.original_length, given.position.original_length) == (48, 99)
    assert (chosen.model.num_kv_heads, resolve("model.num_kv_heads=2").model.num_kv_heads) == (4, 2)


def test_a_whole_number_is_a_float_and_no_truth_value_is():
    values = dataclasses.asdict(resolve())
    values["optimizer"]["learning_rate"] = 1
    assert type(config_lib.resolve(values).optimizer.learning_rate) is float
    values["optimizer"]["learning_rate"] = True
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate = True: expected float, got bool"):
        config_lib.resolve(values)


@pytest.mark.parametrize(
    ("variant", "overrides", "message"),
    [
        ("softmax_rope", {"position.scaling": "yarn", "position.factor": "8"}, ""),
        ("softmax_rope", {"position.scaling": "yarn", "position.factor": "8", "position.beta_fast": "16"}, ""),
        ("softmax_rope", {"position.beta_fast": "16"}, r"beta_fast: has no effect .* set --position.scaling too"),
        ("conformal_sympow", {"position.base": "500000"}, ""),
        ("softmax_alibi", {"position.alibi_slope_scale": "0.5"}, ""),
        ("softmax_rope", {"position.factor": "8"}, r"--position.factor: has no effect .* set --position.scaling too"),
        ("fox", {"position.base": "500000"}, r"--position.base: has no effect with attention.position = 'none'"),
        ("fox", {"position.alibi_slope_scale": "2"}, "attention.position is 'none', which has no slopes"),
        ("fox", {"model.num_layers": "2"}, "cannot change after training"),
        ("softmax_rope", {"position.scaling": "dynamic_ntk"}, ""),
        (
            "softmax_rope",
            {"position.scaling": "yarn"},
            r"position.factor = 1.0: position.scaling = 'yarn' changes nothing",
        ),
        ("softmax_rope", {"position.scaling": "linear", "position.factor": "1"}, "'linear' changes nothing"),
        ("softmax_rope", {"position.scaling": "ntk"}, "'ntk' changes nothing"),
        ("softmax_rope", {"position.scaling": "llama3"}, "'llama3' changes nothing"),
        (
            "softmax_rope",
            {"position.scaling": "yarn", "position.factor": "0.5"},
            "factor = 0.5: .* at least 1",
        ),
        (
            "softmax_rope",
            {"position.scaling": "yarn", "position.factor": "8", "position.base": "1"},
            "position.base = 1.0: yarn takes its logarithm",
        ),
        (
            "softmax_rope",
            {"position.scaling": "linear", "position.factor": "8", "position.original_length": "99"},
            "--position.original_length: has no effect with .*'linear'",
        ),
        ("softmax_rope", {"position.alibi_slope_scale": "1"}, "--position.alibi_slope_scale: has no effect"),
        ("softmax_rope", {"attention.chunk_size": "64"}, "chunk_size: has no effect with attention.kernel = 'softmax'"),
        ("sympow", {"attention.chunk_size": "64"}, ""),
        (
            "sympow",
            {"attention.chunk_size": "64", "attention.implementation": "recurrent"},
            "no effect .*'recurrent'",
        ),
    ],
)
def test_position_settings_change_at_evaluation_only_where_they_act(variant, overrides, message):
    config = resolve(variant=variant)
    if not message:
        assert set(config_lib.diff(config, evaluation_config(config, overrides))) == set(overrides)
        return
    with pytest.raises(ConfigError, match=message):
        evaluation_config(config, overrides)


def test_the_frequencies_of_the_manifest_convention_have_no_base():
    config = resolve("position.convention=manifest", variant="softmax_rope")
    with pytest.raises(ConfigError, match=r"--position.base: has no effect with .* position.convention = 'manifest'"):
        evaluation_config(config, {"position.base": "500000"})


@pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn", "llama3"])
def test_a_factor_of_one_leaves_every_frequency(scaling):
    """Why such a scaling is refused; a run that was trained with it can be read and continued."""
    options = {"scaling": scaling, "factor": 1.0, "original_length": 512}
    frequencies, factor = positions.rope_frequencies(64, **options)
    np.testing.assert_allclose(frequencies, 10000.0 ** (-np.arange(0, 64, 2) / 64), rtol=1e-12)
    assert factor == 1.0
    config = resolve(f"position.scaling={scaling}", variant="softmax_rope")
    assert config_lib.resolve(dataclasses.asdict(config)) == config
    assert evaluation_config(config, {"model.dtype": "bfloat16"}).position == config.position


def test_no_run_starts_with_a_scaling_that_does_nothing_and_an_old_one_continues(tmp_path):
    config = resolve_implementation(resolve("position.scaling=yarn", variant="softmax_rope"))
    with pytest.raises(ConfigError, match=r"position.factor = 1.0: position.scaling = 'yarn' changes nothing"):
        check_resume(config, str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    check_resume(config, str(tmp_path))


def test_no_run_starts_with_the_parameters_of_another_seed_and_an_old_one_continues(tmp_path):
    config = resolve_implementation(resolve(f"seed={2**32}"))
    with pytest.raises(ConfigError, match=r"^seed = 4294967296: parameters .* use at most 4294967295$"):
        check_resume(config, str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    check_resume(config, str(tmp_path))


@pytest.mark.parametrize(
    ("variant", "implementation", "hint"),
    [("softmax_rope", "reference", "leave it out"), ("sympow", "blockwise", "use chunked or recurrent")],
)
def test_a_stream_has_no_quadratic_form(variant, implementation, hint):
    overrides = {"attention.implementation": implementation}
    with pytest.raises(ConfigError, match=f"has no effect where {variant} reads a text as a stream; {hint}"):
        check_stream(evaluation_config(resolve(variant=variant), overrides), overrides)
    overrides = {"attention.implementation": "recurrent"}
    check_stream(evaluation_config(resolve(variant="sympow"), overrides), overrides)
    check_stream(resolve(variant=variant), {})


def test_an_unknown_key_in_a_saved_config_is_named():
    tree = config_lib.load_file(f"{ROOT}/configs/default.py").get_config().to_dict()
    tree["model"]["num_layrs"] = 2
    with pytest.raises(ConfigError, match=r"model\.num_layrs: no such key; did you mean 'num_layers'"):
        config_lib.resolve(tree)


def test_diff_names_fields():
    changes = config_lib.diff(resolve(), resolve("optimizer.learning_rate=1e-3"))
    assert changes == {"optimizer.learning_rate": (5e-3, 1e-3)}


def write_config(folder: pathlib.Path, text: str) -> str:
    path = folder / "mine.py"
    path.write_text(text)
    return f"--config={path}"


@pytest.mark.parametrize("name", ["quickstart", "figures/mqar_zoology", "configs/quickstart.py"])
def test_config_files_are_found_by_name_and_by_path(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert config_lib.parse_flags([f"--config={name}:fox"]).variant == "fox"


def test_the_argument_of_a_config_file_is_what_its_get_config_says(tmp_path):
    assert parse_flags([f"--config={ROOT}/configs/small.py:12m"]).model.embed_dim == 384
    file = tmp_path / "mine.py"
    file.write_text(
        "from configs import quickstart\ndef get_config(size):\n    c = quickstart.get_config()\n"
        "    c.model.mlp_dim = {'large': 640}[size]\n    c.optimizer.freeze = ()\n    return c\n"
    )
    config = parse_flags([f"--config={file}:large", "--config.optimizer.freeze=embedding/*"])
    assert config.model.mlp_dim == 640 and config.optimizer.freeze == ("embedding/*",)


@pytest.mark.parametrize("arg", ["", ":fox"])
def test_the_name_of_a_workdir_may_have_colons(tmp_path, arg):
    (tmp_path / "at:07:04").mkdir()
    with pytest.raises(ConfigError, match=r"^--config = '.*/at:07:04': has no config.json"):
        parse_flags([f"--config={tmp_path}/at:07:04{arg}"])


def test_a_flag_has_the_type_of_its_key_whatever_a_file_has_there(tmp_path):
    text = (
        "from ml_collections import ConfigDict\nfrom configs import quickstart\n\ndef get_config(arg='fox'):\n"
        "    values = quickstart.get_config(arg).to_dict()\n    values['optimizer']['weight_decay'] = 0\n"
        "    values['data']['train'] = None\n    values['other'] = ()\n    return ConfigDict(values)\n"
    )
    flags = [write_config(tmp_path, text), "--config.data.train=x", "--config.optimizer.weight_decay=0.5"]
    with pytest.raises(ConfigError, match=r"^--config.other: no such key"):
        parse_flags([*flags, "--config.other=1"])
    with pytest.raises(ConfigError, match=r"^other: no such key"):  # all others were understood
        parse_flags(flags)


def test_names_work_in_any_folder_even_beside_other_folders_of_the_same_name(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()  # not ours: it has no default.py
    monkeypatch.chdir(tmp_path)
    assert config_lib.parse_flags(["--config=quickstart:sympow"]).model.num_layers == 4
    text = "from configs import quickstart\n\ndef get_config(arg):\n    return quickstart.get_config('fox')\n"
    flag = write_config(tmp_path, text) + ":fox"
    assert config_lib.parse_flags([flag]) == config_lib.parse_flags(["--config=quickstart:fox"])


def test_a_whole_folder_of_configs_has_its_own_defaults(tmp_path):
    """A copy of configs/ elsewhere is a project of its own: what its files import is beside them."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    default = tmp_path / "configs" / "default.py"
    default.write_text(default.read_text().replace("c.seed = 0", "c.seed = 7"))
    assert config_lib.parse_flags([f"--config={tmp_path}/configs/quickstart.py:fox"]).seed == 7
    assert config_lib.parse_flags(["--config=quickstart:fox"]).seed == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import nothing_like_this\n", "line 1: ModuleNotFoundError"),
        ("x = 1\ndef get_config(:\n", "line 2: SyntaxError"),
        ("\n\ndef get_config():\n    return {}['key']\n", "line 4: KeyError: 'key'"),
        ("def get_config():\n    return {}\n", "get_config returns dict; it must return a ConfigDict"),
        ("x = 1\n", "defines no get_config"),
    ],
)
def test_what_goes_wrong_inside_a_config_file_names_its_line(tmp_path, text, words):
    flag = write_config(tmp_path, text)
    with pytest.raises(ConfigError, match=re.escape(f"{flag.removeprefix('--config=')!r}") + ".*" + re.escape(words)):
        config_lib.parse_flags([flag])


SAVED = sorted((ROOT / "tests" / "saved_configs").glob("*.json"))
LATER = {  # what programs of the time did, by hand
    "optimizer.decay_fraction": 0.2, "optimizer.z_loss": 0.0, "optimizer.outlier_ratio": 0.0,
    "logging.wandb_project": "", "logging.profile_steps": (0,),
    "task.vocab_size": 8192, "task.num_pairs": 8, "task.num_passes": 1,
    "task.power": 0.01, "task.random_filler": True, "task.tokenizer": "byte", "evaluation.contextwise_length": 0,
    "mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 1, "mesh.seq": 1,
    "model.mlp_bias": "all", "model.norm_eps": 1e-5, "model.norm_placement": "pre", "model.parallel_residual": False,
    "model.vocab_size": 0, "model.embedding_scale": 1.0, "model.residual_scale": 1.0, "model.logit_scale": 1.0,
    "model.logit_softcap": 0.0, "attention.scale": 0.0, "attention.bias": "none", "attention.qk_norm_span": "head",
    "attention.qk_norm_eps": 1e-6, "position.window_base": 0.0, "position.rotary_fraction": 1.0,
    "position.beta_fast": 32.0, "position.beta_slow": 1.0, "position.truncate": True, "position.attention_factor": 0.0,
    "position.mscale": 1.0, "position.mscale_all_dim": 0.0, "position.low_freq_factor": 1.0,
    "position.high_freq_factor": 4.0, "position.rotation": "scalar",
}  # fmt: skip


@pytest.mark.parametrize("path", SAVED, ids=lambda path: path.stem)
def test_saved_configs_of_earlier_commits_mean_what_they_meant(path):
    saved = json.loads(path.read_text())
    config = config_lib.flatten(config_lib.resolve_saved(saved))
    written = config_lib.flatten(saved)
    assert {key: config[key] for key in written} == written
    assert {key: config[key] for key in LATER} == LATER | {k: v for k, v in written.items() if k in LATER}


@pytest.mark.parametrize("pattern", ["attention", "conformal_vector_sympow"])
def test_vector_gates_saved_without_a_rotation_have_one_step_a_head(pattern):
    """The row has steps for every frequency since; a run, or a layer of a pattern, of before goes on as it was."""
    now = resolve(f"attention.layer_pattern={pattern}", variant="conformal_vector_sympow")
    saved = dataclasses.asdict(now)
    del saved["position"]["rotation"], saved["position"]["rotation_rank"]
    rotations = [config_lib.layer_specs(c)[0].position.rotation for c in (now, config_lib.resolve_saved(saved))]
    assert rotations == ["frequency", "scalar"]


@pytest.mark.parametrize("pattern", ["softmax_nope,fox", "conformal_sympow,softmax_nope"])
def test_rows_of_a_pattern_saved_without_a_rotation_go_on(pattern):
    now = resolve(f"attention.layer_pattern={pattern}", variant="selective_rope")
    saved = dataclasses.asdict(now)
    del saved["position"]["rotation"], saved["position"]["rotation_rank"]
    assert config_lib.diff(config_lib.resolve_saved(saved), now) == {}


def test_every_key_is_as_old_as_the_first_config_or_has_a_row_for_those_without_it():
    first = config_lib.flatten(json.loads((ROOT / "tests" / "saved_configs" / "098c34f.json").read_text()))
    assert {*config_lib.flatten(resolve())} == {*first} | {key for key, _ in ABSENT}


def test_a_saved_config_without_a_key_that_all_had_is_refused():
    saved = json.loads(SAVED[0].read_text())
    del saved["model"]["num_layers"]
    with pytest.raises(ConfigError, match=r"model\.num_layers: missing"):
        config_lib.resolve_saved(saved)


def test_the_number_of_layers_is_bounded():
    flags = [QUICKSTART, "--config.attention.layer_pattern=attention"]
    assert parse_flags([*flags, "--config.model.num_layers=10000"]).model.num_layers == 10_000
    with pytest.raises(ConfigError, match=r"model\.num_layers = 1000000000000000: at most 10,000"):
        parse_flags([*flags, f"--config.model.num_layers={10**15}"])
