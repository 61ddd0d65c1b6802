"""What a config or a run is made of, without training it.

    python -m sympow_jax.inspect --config=configs/NAME.py[:ARG] [--config.a.b=value ...]
    python -m sympow_jax.inspect --workdir=DIR [--batch=N]

Prints the parameters, the floating-point operations of a token and the size of the state or cache that decoding keeps;
with --batch, the documents and the text that batch N of the run was.
"""

import json
from collections.abc import Sequence

import jax
from rich.console import Console

from sympow_jax import config as config_lib
from sympow_jax.command_line import flag_value, run_program, split_flags
from sympow_jax.config import Config, ConfigError, describe_layers
from sympow_jax.models import flops
from sympow_jax.models.model import Model, resolve_implementation
from sympow_jax.models.state_bytes import describe_state, state_bytes
from sympow_jax.training.data import open_run_data, vocabulary
from sympow_jax.training.run_files import check_data, load_config, load_vocab_size
from sympow_jax.training.screen import parameter_table


def print_config(config: Config, vocab_size: int) -> None:
    """Parameter table, FLOPs per token, and state size at growing contexts."""
    config = resolve_implementation(config)
    model = Model(config, vocab_size)
    params = jax.eval_shape(model.init, jax.random.key(0))
    Console(markup=False).print(parameter_table(params))
    attention, rest = flops.train_flops_per_token(config, params, config.data.seq_len)
    print(f"{config.variant}: {describe_layers(config)}, {config.attention.implementation}")
    print(f"training FLOPs a token at context {config.data.seq_len:,}: {attention:.4g} attention + {rest:.4g} the rest")
    if not model.streams:
        print("decoding: reads no stream, since a linear kernel with an additive bias has no finite state")
        return
    for length in (config.data.seq_len, 16 * config.data.seq_len):
        state = jax.eval_shape(lambda length=length: model.initial_state(1, length))
        size = sum(state_bytes(config, state).values()) / 2**20
        print(f"decoding state of one stream of {length:,} tokens: {size:,.2f} MiB: {describe_state(config, state)}")


def print_batch(workdir: str, batch: int) -> None:
    """Which documents batch `batch` (from 0) of a run held, and their text, one JSON object a sequence."""
    data = open_run_data(load_config(workdir))
    check_data(workdir, data)
    for sequence in data.train.describe(batch):
        print(json.dumps(sequence))  # JSON escapes control characters of the data


def run(argv: Sequence[str]) -> int:
    """Prints what the flags ask for; returns the exit code."""
    own, rest = split_flags(argv, ("workdir", "batch"), prefix="config")
    if "workdir" in own and rest:
        raise ConfigError(f"{rest[0]}: the settings of --workdir={own['workdir']} are those it was trained with")
    if "workdir" not in own and "batch" in own:
        raise ConfigError("--batch: belongs to a run; name it with --workdir=DIR")
    if "workdir" not in own:
        config = config_lib.parse_flags(rest)
        print_config(config, vocabulary(config))
    elif "batch" in own:
        print_batch(own["workdir"], flag_value(own, "batch", 0, least=0, most=2**31))
    else:
        print_config(load_config(own["workdir"]), load_vocab_size(own["workdir"]))
    return 0


def main() -> None:
    """Runs the command on this process's flags and exits."""
    run_program(run)


if __name__ == "__main__":
    main()
