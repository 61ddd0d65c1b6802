"""What the fused GPU kernels take of a multiprocessor, compiled ahead of time, for `benchmarks.kernels`.

    pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12    (of jax's version; no device, no driver)
    python -m benchmarks.kernels --targets=h100,a100 --output=docs/benchmarks/kernels.json

Registers of a thread and bytes that it spills are what ptxas says of the kernel's PTX, shared memory is what XLA starts
it with, and bytes are those of its arguments and results, by the estimate that plans count.
"""

import importlib.util
import os
import pathlib
import re
import subprocess

TARGETS = ("h100", "a100")
SIZES = ("32/32", "64/64", "64/128", "128/128")
HEADS, TOKENS = 12, 16384


def variables(folder: str) -> dict[str, str]:
    """The environment of the process that compiles, for `folder` to hold what the compiler says."""
    flags = f"--xla_dump_to={folder} --xla_dump_emitter_re=.*"  # the latter for PTX, with jax 0.12
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "KERNEL_DUMP": folder}


def compiled(target: str, head_dim: int, value_dim: int, inputs: str):
    """Forward + backward for one device of a target, and its kernels as traced."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec, use_abstract_mesh

    from sympow_jax import ops
    from sympow_jax.ops.platform import compiling_for
    from sympow_jax.planning.kernels import traced_kernels
    from sympow_jax.planning.targets import find

    mesh = jax.make_mesh((1,), ("data",), devices=find(f"{target}:1").devices)
    sharding = NamedSharding(mesh, PartitionSpec())

    def array(*shape, dtype=inputs):
        return jax.ShapeDtypeStruct((1, TOKENS, HEADS, *shape), dtype, sharding=sharding)

    def loss(q, k, v, gates):
        return ops.power_attention(q, k, v, log_gates=gates, implementation="pallas").astype(jnp.float32).sum()

    arguments = array(head_dim), array(head_dim), array(value_dim), array(dtype="float32")
    with compiling_for("gpu"), use_abstract_mesh(mesh.abstract_mesh):  # names the GPU, which jax 0.12 asks for
        traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3))).trace(*arguments)
        traced.lower(lowering_platforms=("cuda",)).compile(compiler_options={"xla_gpu_autotune_level": "0"})
    return traced_kernels(traced.jaxpr)


def resources(folder: pathlib.Path) -> dict[str, dict[str, int]]:
    """Registers, spilled bytes and shared memory of each kernel of the program dumped there."""
    found = {}
    (started,) = folder.glob("*thunk_sequence.txt")
    shared = dict(re.findall(r"\b(linear_attention_\w+) grid.*shared_memory: (\d+)", started.read_text()))
    for path in folder.glob("*.ptx"):
        name = re.search(r"\.entry (linear_attention_\w+)\(", text := path.read_text())
        if name:
            registers, spilled = _assembled(path, text)
            taken = {"registers": registers, "spilled_bytes": spilled, "shared_bytes": int(shared[name[1]])}
            found[re.sub(r"_\d*$", "", name[1]).removeprefix("linear_attention_")] = taken
    return found


def _assembled(path: pathlib.Path, text: str) -> tuple[int, int]:
    target = re.search(r"\.target (\w+)", text)
    assert target is not None  # every PTX file names one
    command = [_ptxas(), "-v", f"-arch={target[1]}", str(path), "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers and spilled, said
    return int(registers[1]), int(spilled[1])


def _ptxas() -> str:
    spec = importlib.util.find_spec("nvidia")
    places = list(spec.submodule_search_locations or []) if spec else []
    found = [path for place in places for path in pathlib.Path(place).glob("*/bin/ptxas")]
    if not found:
        raise SystemExit("ptxas is missing: pip install nvidia-cuda-nvcc-cu12")
    return str(found[0])


def measure(target: str, size: str, inputs: str) -> list[dict]:
    """The rows of all kernels; this process must be the one whose program is dumped, see `variables`."""
    kernels = {
        k.name.removeprefix("linear_attention_"): k for k in compiled(target, *map(int, size.split("/")), inputs)
    }
    taken = resources(pathlib.Path(os.environ["KERNEL_DUMP"]))
    return [
        {"kernel": name, "target": target, "size": size, "inputs": inputs}
        | taken[name]
        | {"bytes_per_token_and_head": round((kernel.bytes or 0) / (HEADS * TOKENS))}
        for name, kernel in kernels.items()
    ]


def table(rows: list[dict]) -> str:
    """A line a kernel and target, in Markdown."""
    lines = [
        "| kernel | target | D/Dv | inputs | registers | bytes spilled | shared memory, KiB | bytes a token and head |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['kernel']} | {r['target']} | {r['size']} | {r['inputs']} | {r['registers']} | {r['spilled_bytes']} "
            f"| {r['shared_bytes'] / 1024:.0f} | {r['bytes_per_token_and_head']:,} |"
        )
    return "\n".join(lines)
