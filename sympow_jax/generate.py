"""Continues text with a trained model, and checks that the model computes the same in every form.

    python -m sympow_jax.generate --workdir=DIR --prompt=TEXT      # or --prompt_file=FILE, or text on standard input
        [--max_new_tokens=256] [--temperature=0.8] [--top_k=0] [--top_p=1] [--seed=0] [--batch=1] [--stop=TEXT ...]
        [--step=latest|best|N] [--position.scaling=yarn ...] [--save_state=DIR] [--load_state=DIR]
    python -m sympow_jax.generate --workdir=DIR --check [--prompt_file=FILE]
        [--mesh.data=N --mesh.fsdp=N --mesh.tensor=N --mesh.seq=N]     # both, on the run's mesh by default

With --check or --load_state standard input is read where --prompt_file=- says so.
Prints the continuation as it comes, without the prompt; rows of a batch one after another. Speed and the size of the
state go to standard error. --temperature=0 takes the most likely token. --save_state keeps what was read, so that
--load_state continues a long document without reading it again; --max_new_tokens=0 only reads.

Under position.scaling=dynamic_ntk all tokens have the frequencies of the length that the stream may reach: what
--load_state has read, the prompt and --max_new_tokens. Where that exceeds position.original_length, another
--max_new_tokens is another text from its first token on.
"""

import hashlib
import math
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from sympow_jax import generation
from sympow_jax.command_line import (
    MESH_FLAGS,
    PROCESS_FLAGS,
    flag_value,
    joined_processes,
    mesh_flags,
    run_program,
    split_flags,
    step_flag,
    use_compilation_cache,
)
from sympow_jax.config import ConfigError
from sympow_jax.files import check_place, printable
from sympow_jax.generation import check
from sympow_jax.input_pipeline.tokenizers import load_tokenizer
from sympow_jax.loading import AT_EVALUATION, check_stream, load_step
from sympow_jax.models.model import Model
from sympow_jax.models.state_bytes import describe_state
from sympow_jax.training import same_run
from sympow_jax.training.cpu_devices import use_cpu_devices_of_run
from sympow_jax.training.evaluation_mesh import evaluation_mesh, lost_axes, mesh_note
from sympow_jax.training.run_files import load_config
from sympow_jax.typing import PyTree

_DEFAULTS = {"max_new_tokens": 256, "temperature": 0.8, "top_k": 0, "top_p": 1.0, "seed": 0, "batch": 1}
_OWN = ("workdir", "step", "prompt", "prompt_file", "save_state", "load_state", *_DEFAULTS)
_FLAGS = (*_OWN, *AT_EVALUATION, *MESH_FLAGS, *PROCESS_FLAGS)


def read_prompt(flags: Mapping[str, str]) -> str:
    """The text of --prompt, --prompt_file (- is standard input), or of standard input when neither is given.

    Raises:
      ConfigError: both, neither on a terminal, no such file, or bytes that are not UTF-8.
    """
    if "prompt" in flags and "prompt_file" in flags:
        raise ConfigError("--prompt and --prompt_file: give one of them")
    if "prompt" in flags:
        return _utf8(flags["prompt"].encode("utf-8", "surrogateescape"), "--prompt")
    path = flags.get("prompt_file", "-")
    if path != "-":
        if not pathlib.Path(path).is_file():
            raise ConfigError(f"--prompt_file = {path!r}: no such file")
        return _utf8(pathlib.Path(path).read_bytes(), f"--prompt_file = {path!r}")
    if sys.stdin.isatty():
        raise ConfigError("--prompt is missing: give --prompt=TEXT, --prompt_file=FILE, or text on standard input")
    return _utf8(sys.stdin.buffer.read(), "standard input")


def _utf8(content: bytes, source: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{source}: byte 0x{content[error.start]:02x} at offset {error.start:,} is not UTF-8; convert it first"
        ) from None


def _numbers(flags: Mapping[str, str]) -> dict[str, Any]:
    least = {"max_new_tokens": 0, "batch": 1}
    most = {"max_new_tokens": 2**31 - 1, "batch": 2**31 - 1}  # positions are int32
    return {
        name: flag_value(flags, name, default, least=least.get(name, -math.inf), most=most.get(name, math.inf))
        for name, default in _DEFAULTS.items()
    }


def _read(decoder: generation.Decoder, stream: generation.Stream, ids: Any) -> None:
    decoder.prepare(stream, ids.shape[1])
    begin = time.perf_counter()
    decoder.read(stream, ids)
    jax.block_until_ready(stream.state)
    seconds = time.perf_counter() - begin
    note = f"read {ids.shape[1]:,} tokens in {seconds:.2f} s, {ids.size / seconds:,.0f} tokens/s"
    _note(f"{note} (compiled in {decoder.compile_seconds:.1f} s)")


def _write(decoder: generation.Decoder, stream: generation.Stream, pieces: Iterator[list[str]]) -> None:
    """Prints the first row as it comes and the others after it; then the speed and the size of the state."""
    shown = printable if sys.stdout.isatty() else str
    before, begin, rows = stream.tokens_read, time.perf_counter(), [""] * stream.batch_size
    for new in pieces:
        rows = [row + text for row, text in zip(rows, new, strict=True)]
        _say(shown(new[0]), end="", flush=True)
    _say("")
    for number, text in enumerate(rows[1:], start=2):
        _say(f"--- sample {number} ---\n{shown(text)}")
    seconds, steps = time.perf_counter() - begin, stream.tokens_read - before
    if steps:
        rate = f"{steps * stream.batch_size / seconds:,.1f} tokens/s, {1e3 * seconds / steps:.2f} ms a step"
        _note(f"generated {steps:,} tokens{f' x {stream.batch_size}' if stream.batch_size > 1 else ''}: {rate}")
    kind = "state of constant size" if decoder.model.streams_constant else f"cache for {stream.max_length:,} tokens"
    _note(f"{kind}: {stream.num_bytes:,} bytes: {describe_state(decoder.model.config, stream.state)}")


def _note(text: str) -> None:
    _say(text, file=sys.stderr)


def _say(text: str, **options: Any) -> None:
    """Prints, in the first process."""
    if jax.process_index() == 0:
        print(text, **options)


def run(argv: Sequence[str]) -> int:
    """Continues the text, or checks the model, as the flags say; returns the exit code."""
    stop = [flag.removeprefix("--stop=") for flag in argv if flag.startswith("--stop=")]
    rest = [flag for flag in argv if not flag.startswith("--stop=")]
    own, _ = split_flags(rest, [*_FLAGS, "stop"], switches=("check",), may_be_empty=("prompt",))
    if "workdir" not in own:
        raise ConfigError("--workdir is missing: the folder of a trained run")
    unused = [name for name in (*_DEFAULTS, "save_state", "load_state") if name in own] + ["stop"] * bool(stop)
    if "check" in own and unused:
        raise ConfigError(f"--{unused[0]}: --check generates nothing; leave it out")
    numbers = _numbers(own)
    batch, new_tokens = numbers["batch"], numbers["max_new_tokens"]
    sampling = generation.Sampling(*(numbers[name] for name in ("temperature", "top_k", "top_p", "seed")))
    generation.check_stop(stop)
    if "save_state" in own and batch > 1:
        raise ConfigError(f"--save_state with --batch = {batch}: the state of one text is kept; use --batch=1")
    if "save_state" in own:
        check_place(pathlib.Path(own["save_state"]) / "state.npz", f"--save_state = {own['save_state']!r}")
    optional = "check" in own or "load_state" in own
    prompt = read_prompt(own) if "prompt" in own or "prompt_file" in own or not optional else ""
    use_compilation_cache()
    with joined_processes(own):
        return _run(own, prompt, stop, sampling, batch=1 if "check" in own else batch, new_tokens=new_tokens)


def _run(
    own: Mapping[str, str],
    prompt: str,
    stop: Sequence[str],
    sampling: generation.Sampling,
    *,
    batch: int,
    new_tokens: int,
) -> int:
    """`run` on the mesh, in each of its processes."""
    model, params = _load(own, prompt, stop, batch)
    if "check" not in own:
        check_stream(model.config, _overrides(own))
        sampling.check_vocabulary(model.vocab_size)
    tokenizer = load_tokenizer(pathlib.Path(own["workdir"]) / "tokenizer")
    if "check" in own:
        return check.check(model, params, check.check_tokens(tokenizer, prompt, model.max_length))
    decoder = generation.Decoder(model, params)
    ids = generation.prompt_tokens(tokenizer, prompt, batch_size=batch, bos="load_state" not in own)
    length = ids.shape[1] + new_tokens
    if "load_state" in own:
        stream = generation.load_state(own["load_state"], decoder, params, batch_size=batch, extra_length=length)
    else:
        stream = decoder.start(batch, length)
    _read(decoder, stream, ids)
    pieces = generation.generate(decoder, stream, tokenizer, sampling=sampling, max_new_tokens=new_tokens, stop=stop)
    _write(decoder, stream, pieces)
    if "save_state" in own:
        generation.save_state(own["save_state"], decoder, stream, params)
        _note(f"state after {stream.tokens_read:,} tokens: {own['save_state']}")
    return 0


def _load(own: Mapping[str, str], prompt: str, stop: Sequence[str], batch: int) -> tuple[Model, PyTree]:
    """The model and its parameters where they live on the mesh, once all processes agree on what is asked."""
    config, asked = load_config(own["workdir"]), mesh_flags(own)
    use_cpu_devices_of_run(config)
    told = {name: value for name, value in own.items() if name not in (*PROCESS_FLAGS, "prompt", "prompt_file")}
    same_run.check_settings(config, **told, stop=stop, prompt=hashlib.sha256(prompt.encode()).hexdigest()[:12])
    mesh = evaluation_mesh(config, asked, rows=batch)
    if mesh.size > 1 or asked or lost_axes(config, mesh):
        _note(mesh_note(config, mesh, asked))
    model, params, _ = load_step(own["workdir"], step_flag(own), overrides=_overrides(own), mesh=mesh)
    return model, params


def _overrides(own: Mapping[str, str]) -> dict[str, str]:
    return {name: own[name] for name in AT_EVALUATION if name in own}


def main() -> None:
    """Runs the command on this process's flags and exits; text goes out as UTF-8 whatever the locale."""
    sys.stdout.reconfigure(encoding="utf-8")  # pyright: ignore[reportAttributeAccessIssue]
    run_program(run)


if __name__ == "__main__":
    main()
