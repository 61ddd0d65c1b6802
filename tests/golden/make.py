"""Writes what the golden tests compare with: `make golden`, after a change of figures or defaults that is meant.

configs.json: every key of configs/default.py, resolved, and for every other file under configs/, and every variant,
the keys that differ. metrics.json: three steps of small models of six variants from their first parameters on, and the
platform that they were made on.
"""

import json
import os
import pathlib
from typing import Any

import tests.conftest  # noqa: F401  (the flags of the compiler, before JAX is imported)

# isort: split
from sympow_jax.config import Config, diff, flatten, parse_flags
from sympow_jax.models.model import Model, resolve_implementation
from sympow_jax.training.data import open_run_data
from sympow_jax.training.step import make_train_step
from sympow_jax.training.train_state import create_train_state
from sympow_jax.variants import VARIANTS
from tests.checkpoints import make as kept

HERE = pathlib.Path(__file__).parent
CONFIGS, METRICS = HERE / "configs.json", HERE / "metrics.json"
DEFAULT = "configs/default.py"
STEPS = 3


def config_files() -> list[str]:
    """All configs with their default argument, and the default with every variant."""
    files = sorted(path for path in (kept.ROOT / "configs").rglob("*.py") if path.name != "__init__.py")
    names = [str(path.relative_to(kept.ROOT)) for path in files]
    return [*names, *(f"configs/default.py:{variant}" for variant in VARIANTS)]


def resolved(name: str) -> Config:
    """The resolved config of a file, or FILE:ARGUMENT."""
    return parse_flags([f"--config={kept.ROOT / name}"])


def differences(name: str) -> dict[str, Any]:
    """The keys of a config that differ from the default's, as JSON has them."""
    changes: dict[str, Any] = diff(resolved(DEFAULT), resolved(name))
    return json.loads(json.dumps({key: new for key, (_, new) in changes.items()}))


def metrics(variant: str) -> list[dict[str, float]]:
    """Loss, norms and learning rate of the first steps."""
    config = resolve_implementation(kept.config(variant, STEPS))
    with kept.as_recorded():
        data = open_run_data(config)
        model = Model(config, data.vocab_size)
        state = create_train_state(model, config.seed)
        step, rows = make_train_step(model), []
        for number in range(STEPS):
            state, values = step(state, data.train[number])
            names = ("loss", "grad_norm", "param_norm", "learning_rate")
            rows.append({name: float(values[name]) for name in names})
    return rows


def write(path: pathlib.Path, value: Any) -> None:
    """As JSON."""
    path.write_text(json.dumps(value, indent=1) + "\n")


def main() -> None:
    """Writes both files."""
    os.chdir(kept.ROOT)
    default: dict[str, Any] = flatten(resolved(DEFAULT))
    write(CONFIGS, {DEFAULT: default} | {name: differences(name) for name in config_files() if name != DEFAULT})
    rows = {variant: metrics(variant) for variant in kept.VARIANTS}
    write(METRICS, {"platform": kept.this_platform(), "metrics": rows})


if __name__ == "__main__":
    main()
