"""Between checkpoints of other libraries and workdirs.

    python -m sympow_jax.convert import FOLDER --workdir=W [--mesh.AXIS=N] [flags of processes, as train.py has them]
    python -m sympow_jax.convert export --workdir=W --output=FOLDER [--dtype=bfloat16] [--step=latest|best|N]

`import` makes a workdir of a folder as Hugging Face has it: config.json, safetensors, tokenizer.json. `export` writes
the class of transformers that computes exactly the same, or else safetensors with names of our own and a config.json.
With --mesh.AXIS=N, parameters go tensor by tensor to the devices of that mesh, which becomes the workdir's. Needs the
extra `hf`.
"""

from collections.abc import Sequence

import jax

from sympow_jax.command_line import (
    MESH_FLAGS,
    PROCESS_FLAGS,
    joined_processes,
    mesh_flags,
    run_program,
    split_flags,
    step_flag,
)
from sympow_jax.config import ConfigError
from sympow_jax.convert.exporting import export_workdir
from sympow_jax.convert.importing import import_folder

_USAGE = "use `import FOLDER --workdir=W` or `export --workdir=W --output=FOLDER`"


def run(argv: Sequence[str]) -> int:
    """Converts as the arguments say; returns the exit code."""
    what, rest = (argv[0], argv[1:]) if argv else ("", ())
    if what == "import":
        return _import(rest)
    if what == "export":
        return _export(rest)
    raise ConfigError(f"{what!r}: {_USAGE}")


def _import(argv: Sequence[str]) -> int:
    folders = [word for word in argv if not word.startswith("--")]
    flags, _ = split_flags([word for word in argv if word.startswith("--")], ("workdir", *MESH_FLAGS, *PROCESS_FLAGS))
    if len(folders) != 1 or "workdir" not in flags:
        raise ConfigError(f"import: one folder and --workdir are needed; {_USAGE}")
    with joined_processes(flags):
        foreign = import_folder(folders[0], flags["workdir"], mesh=mesh_flags(flags))
        if jax.process_index() == 0:
            count = sum(entry.size for entry in foreign.tensors.entries.values())
            print(f"{flags['workdir']}: {foreign.kind}, {count:,} numbers in {len(foreign.tensors.entries)} tensors")
    return 0


def _export(argv: Sequence[str]) -> int:
    flags, _ = split_flags(argv, ("workdir", "output", "dtype", "step"))
    for name in ("workdir", "output"):
        if name not in flags:
            raise ConfigError(f"--{name} is missing; {_USAGE}")
    dtype = flags.get("dtype", "float32")
    name = export_workdir(flags["workdir"], flags["output"], step=step_flag(flags), dtype=dtype)
    print(f"{flags['output']}: {name}, {dtype}")
    return 0


def main() -> None:
    """Runs the command on this process's arguments and exits."""
    run_program(run)


if __name__ == "__main__":
    main()
