"""The tasks of the Language Model Evaluation Harness (lm-eval, arXiv 2405.14782) on a trained run.

    python -m sympow_jax.lm_eval --workdir=DIR --tasks=NAME[,NAME ...] [--step=latest|best|N] [--limit=N]
        [--num_fewshot=N] [--include_path=FOLDER] [--batch_size=N] [--bos=true|false] [--output=FILE.json]
        [--seed=N] [--position.scaling=...] [--mesh.AXIS=N]

--include_path is a folder of tasks (YAML), whose data may be local: nothing is then downloaded. --bos=false reads texts
without the BOS that the texts of training begin with. --seed is the harness's own, which draws the examples of
--num_fewshot: one number for all of its generators, or four, for Python's, NumPy's, PyTorch's and that of the examples
(0,1234,1234,1234 unless given). Needs the extra `lm-eval`.
"""

import importlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from sympow_jax.command_line import (
    MESH_FLAGS,
    flag_value,
    mesh_flags,
    run_program,
    split_flags,
    step_flag,
    use_compilation_cache,
)
from sympow_jax.config import ConfigError
from sympow_jax.evals.files import plain, write_json
from sympow_jax.files import check_place
from sympow_jax.generation.text_model import TextModel
from sympow_jax.input_pipeline.tokenizers import load_tokenizer
from sympow_jax.loading import AT_EVALUATION, check_stream, load_step
from sympow_jax.training.cpu_devices import use_cpu_devices_of_run
from sympow_jax.training.evaluation_mesh import evaluation_mesh, mesh_note
from sympow_jax.training.run_files import load_config

_OWN = ("workdir", "tasks", "step", "limit", "num_fewshot", "include_path", "batch_size", "bos", "output", "seed")
_SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


def harness() -> Any:
    """The package lm_eval.

    Raises:
      ConfigError: it is not installed.
    """
    try:
        for part in ("api.model", "tasks", "utils"):
            importlib.import_module(f"lm_eval.{part}")
        return importlib.import_module("lm_eval")
    except ImportError as error:
        raise ConfigError(f"lm-eval cannot be imported ({error}); pip install 'sympow_jax[lm-eval]'") from None


def language_model(texts: TextModel) -> Any:
    """`texts` as an lm_eval.api.model.LM, for `lm_eval.simple_evaluate(model=...)`."""
    template = harness().api.model.TemplateLM

    class SympowLM(template):
        """A run of sympow_jax behind the harness's interface; texts are encoded as there."""

        tokenizer_name = texts.tokenizer.digest

        @property
        def eot_token_id(self) -> int:
            return next(iter(texts.tokenizer.eos_ids), texts.tokenizer.bos_id)

        @property
        def prefix_token_id(self) -> int:
            return texts.tokenizer.bos_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return texts.encode(string, bos=add_special_tokens)

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            return texts.log_likelihoods([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            return texts.whole([request.args[0] for request in requests])

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return texts.continuations([request.args for request in requests])

    return SympowLM()


def _seeds(flags: Mapping[str, str]) -> dict[str, int]:
    """The harness's arguments of --seed, one number for all of them or one for each; none without the flag."""
    if "seed" not in flags:
        return {}
    texts = flags["seed"].split(",")
    if len(texts) not in (1, len(_SEEDS)):
        raise ConfigError(f"--seed = {flags['seed']}: give one number, or four: {', '.join(_SEEDS)}")
    numbers = [flag_value({"seed": text}, "seed", 0, least=0, most=2**32 - 1) for text in texts]
    return dict(zip(_SEEDS, numbers * (len(_SEEDS) // len(numbers)), strict=True))


def run(argv: Sequence[str]) -> int:
    """Runs the tasks and prints the harness's table; returns the exit code."""
    flags, _ = split_flags(argv, [*_OWN, *AT_EVALUATION, *MESH_FLAGS])
    for name, what in (("workdir", "the folder of a trained run"), ("tasks", "names of tasks, with commas between")):
        if name not in flags:
            raise ConfigError(f"--{name} is missing: {what}")
    limit, shots = (flag_value(flags, name, -1, least=-1) for name in ("limit", "num_fewshot"))
    batch_size = flag_value(flags, "batch_size", 16, least=1)
    bos, seeds = flag_value(flags, "bos", True), _seeds(flags)
    overrides = {name: flags[name] for name in AT_EVALUATION if name in flags}
    if "output" in flags:
        check_place(flags["output"], f"--output = {flags['output']!r}")
    lm_eval = harness()
    tasks = lm_eval.tasks.TaskManager(include_path=flags.get("include_path"))
    asked = flags["tasks"].split(",")
    unknown = [name for name in asked if not tasks.match_tasks([name])]  # names and patterns
    if unknown:
        raise ConfigError(f"--tasks: {unknown[0]!r} is no task that lm-eval or --include_path has")
    names = tasks.match_tasks(asked)
    use_compilation_cache()
    saved = load_config(flags["workdir"])
    use_cpu_devices_of_run(saved)
    mesh = evaluation_mesh(saved, mesh_flags(flags), rows=batch_size)
    print(mesh_note(saved, mesh, mesh_flags(flags)))
    model, params, step = load_step(flags["workdir"], step_flag(flags), overrides=overrides, mesh=mesh)
    check_stream(model.config, overrides)
    tokenizer = load_tokenizer(pathlib.Path(flags["workdir"]) / "tokenizer")
    texts = TextModel(model, params, tokenizer, batch_size=batch_size, bos=bos)
    results = lm_eval.simple_evaluate(
        model=language_model(texts),
        tasks=names,
        task_manager=tasks,
        limit=limit if limit >= 0 else None,
        num_fewshot=shots if shots >= 0 else None,
        **seeds,
    )
    print(f"step {step}, {texts.num_programs} programs compiled")
    print(lm_eval.utils.make_table(results))
    if "output" in flags:
        found = json.loads(json.dumps(plain(results), default=str))  # tasks keep functions among their settings
        write_json(flags["output"], found)
    return 0


def main() -> None:
    """Runs the command on this process's flags and exits."""
    run_program(run)


if __name__ == "__main__":
    main()
