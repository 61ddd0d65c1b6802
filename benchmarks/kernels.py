"""Static cost of the fused kernels, compiled ahead of time; on an accelerator, their time against XLA's form.

    pip install 'jax[tpu]'    (the compiler needs no device)
    python -m benchmarks.kernels --output=docs/benchmarks/kernels.json [--targets=v5e,v5p] [--sizes=64/64] [--time]

What GPU kernels take (--targets=h100,a100): `benchmarks/gpu_kernels.py`. TPU kernels: bundles are the instruction words
of the compiler's final schedule for 512 tokens of one head with bfloat16 inputs, without waiting for memory: a lower
bound of the time, and a number to compare schedules by. The useful share is that of the matrix units' peak that the
exact count of the op, 4 P (Dv + 1) FLOPs a token forward and twice that backward, takes in these bundles. VMEM is what
the kernel is estimated to hold; bytes are those of its arguments and results.
Each kernel is compiled in a process of its own, because the compiler reads where to write its schedule only once.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

from benchmarks import gpu_kernels

ROOT = pathlib.Path(__file__).resolve().parents[1]
TARGETS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
MACS_A_BUNDLE = {"v5e": 4 * 128**2, "v5p": 4 * 128**2, "v6e": 2 * 256**2}
SIZES = ("64/64", "64/128", "128/128")
USEFUL = {"forward": 1, "backward_queries": 1, "backward_keys": 1, "state": 0.5, "state_backward": 1}  # of a forward
ROWS, TOKENS = 12, 32768
CHUNK = 256


def compiled(kernel: str, topology: str, head_dim: int, value_dim: int):
    """The kernel for one device of a topology, and the tokens in a step of its grid."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from sympow_jax.ops.linear_attention.kernels import PowerKernel
    from sympow_jax.ops.linear_attention.pallas_tpu import backward, forward, layouts, state
    from sympow_jax.ops.linear_attention.pallas_tpu.tiles import SUBLANES, Tiles

    sharding = SingleDeviceSharding(topologies.get_topology_desc(topology, "tpu").devices[0])
    power = PowerKernel(2)
    features = layouts.features_of(power, head_dim)
    tiles = Tiles.of(CHUNK, TOKENS, features.rows)

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((ROWS, *shape), dtype, sharding=sharding)

    q, out = (array(1, rows, TOKENS, dtype=jnp.bfloat16) for rows in (head_dim, value_dim))
    k, v = (array(rows, TOKENS, dtype=jnp.bfloat16) for rows in (head_dim, value_dim))
    decays, row = array(SUBLANES, TOKENS), array(1, 1, TOKENS)
    states = array(value_dim, features.rows), array(features.moments, features.moments)
    calls = {
        "forward": (lambda *a: forward.forward(power, features, tiles, *a), ((q, k, v), decays, states)),
        "backward_queries": (
            lambda *a: backward.queries_backward(power, features, tiles, *a),
            ((q, k, v), decays, row, out, states),
        ),
        "backward_keys": (
            lambda *a: backward.keys_backward(power, features, tiles, *a),
            ((q, k, v), decays, row, out, row, states),
        ),
        "state": (lambda *a: state.final_state(features, tiles, *a), ((k, v), decays)),
        "state_backward": (lambda *a: state.final_state_backward(features, tiles, *a), ((k, v), decays, states)),
    }
    function, arguments = calls[kernel]
    return jax.jit(function).lower(*arguments).compile(), tiles.block


def bundles(folder: pathlib.Path) -> tuple[int, float]:
    """(bundles, share of them in which a slot of the matrix units is taken) of the largest program dumped there."""
    found = []
    for path in folder.glob("*final_hlo-static-per-bundle-utilization.txt"):
        _, names, capacities, _, *rows = path.read_text().splitlines()
        slot = [name.strip() for name in names.split(",")].index("MXU")
        used = [int(row.split()[slot]) for row in rows if re.fullmatch(r"\d+( \d+)*", row.strip())]
        found.append((len(used), sum(used) / (len(used) * int(capacities.split()[slot]))))
    return max(found)


def measure(kernel: str, target: str, size: str) -> dict:
    """The row of one kernel; this process must be the one whose schedule is dumped, see `run`."""
    from sympow_jax.ops.linear_attention.pallas_tpu.tiles import vmem_bytes

    head_dim, value_dim = map(int, size.split("/"))
    program, block = compiled(kernel, TARGETS[target], head_dim, value_dim)
    count, busy = bundles(pathlib.Path(os.environ["KERNEL_DUMP"]))
    count *= 512 / block
    features = head_dim * (head_dim + 1) // 2
    useful = USEFUL[kernel] * 512 * 2 * features * (value_dim + 1) / MACS_A_BUNDLE[target]
    memory = program.memory_analysis()
    assert memory is not None  # the compiler of TPUs gives one
    moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return {
        "kernel": kernel,
        "target": target,
        "size": size,
        "bundles_per_512": round(count),
        "useful_share": round(useful / count, 3),
        "matrix_units_busy": round(busy, 3),
        "vmem_mib": round(vmem_bytes(features, value_dim) / 2**20, 1),
        "bytes_per_token_and_head": round(moved / (ROWS * TOKENS)),
    }


def variables(folder: str) -> dict[str, str]:
    """The environment of the process that compiles, for `folder` to hold the compiler's schedule."""
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
        "KERNEL_DUMP": folder,
    }


def run(kernel: str, target: str, size: str, inputs: str) -> list[dict]:
    """`measure` in a process of its own: a row, for a GPU those of all kernels, whatever `kernel` is."""
    on_gpu = target in gpu_kernels.TARGETS
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | (gpu_kernels.variables(folder) if on_gpu else variables(folder))
        command = [sys.executable, "-m", "benchmarks.kernels", f"--one={kernel},{target},{size},{inputs}"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kernel} for {target} at {size}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def times(head_dim: int, value_dim: int, tokens: int = 65536, heads: int = 12) -> dict[str, float]:
    """Seconds of forward + backward on this machine's accelerator, by implementation."""
    import jax
    import jax.numpy as jnp

    from sympow_jax import ops
    from sympow_jax.ops.linear_attention.dispatch import Implementation

    keys = jax.random.split(jax.random.key(0), 3)
    dims = (head_dim, head_dim, value_dim)
    q, k, v = (jax.random.normal(key, (1, tokens, heads, d), jnp.bfloat16) for key, d in zip(keys, dims, strict=True))
    gates = jnp.full((1, tokens, heads), -1e-3)

    def gradients(form: Implementation):
        def loss(q, k, v, gates):
            return ops.power_attention(q, k, v, log_gates=gates, implementation=form).astype(jnp.float32).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))

    steps, found = {"pallas": gradients("pallas"), "chunked": gradients("chunked")}, {}
    for form, step in steps.items():
        result = jax.block_until_ready(step(q, k, v, gates))
        start = time.perf_counter()
        for _ in range(5):
            result = step(q, k, v, gates)
        jax.block_until_ready(result)
        found[form] = (time.perf_counter() - start) / 5
    return found


def table(rows: list[dict]) -> str:
    """A line a TPU kernel and target, in Markdown."""
    lines = [
        "| kernel | target | D/Dv | bundles per 512 tokens | useful share | bytes a token and head |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['kernel']} | {r['target']} | {r['size']} | {r['bundles_per_512']:,} | {r['useful_share']:.0%} "
            f"| {r['bytes_per_token_and_head']:,} |"
        )
    return "\n".join(lines)


def _identity(row: dict) -> tuple:
    return row["kernel"], row["target"], row["size"], row.get("inputs")


def main() -> None:
    """Compiles every kernel for every target and size; keeps the rows that --output holds of the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS), help=f"and {', '.join(gpu_kernels.TARGETS)}")
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--kernels", default=",".join(USEFUL))
    parser.add_argument("--inputs", default="bfloat16", choices=("bfloat16", "float32"), help="of the kernels of GPUs")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--time", action="store_true", help="forward + backward on this machine's accelerator as well")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        kernel, target, size, inputs = options.one.split(",")
        on_gpu = target in gpu_kernels.TARGETS
        print(json.dumps(gpu_kernels.measure(target, size, inputs) if on_gpu else [measure(kernel, target, size)]))
        return
    rows = {}
    if options.output and options.output.exists():
        rows = {_identity(row): row for row in json.loads(options.output.read_text())["kernels"]}
    for size in options.sizes.split(","):
        for target in options.targets.split(","):
            kernels = ["all"] if target in gpu_kernels.TARGETS else options.kernels.split(",")
            for found in (row for kernel in kernels for row in run(kernel, target, size, options.inputs)):
                rows[_identity(found)] = found
                print(found, flush=True)
                if options.output:
                    text = json.dumps({"kernels": list(rows.values())}, indent=1) + "\n"
                    options.output.write_text(text)
    for_gpus = [row for row in rows.values() if row["target"] in gpu_kernels.TARGETS]
    print(table([row for row in rows.values() if row not in for_gpus]), gpu_kernels.table(for_gpus), sep="\n\n")
    if options.time:
        for size in options.sizes.split(","):
            seconds = times(*map(int, size.split("/")))
            ratio = seconds["chunked"] / seconds["pallas"]
            print(f"{size}: forward + backward {seconds['pallas']:.4f} s, {ratio:.2f} times faster than XLA's form")


if __name__ == "__main__":
    main()
