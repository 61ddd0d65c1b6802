"""Speed and memory of the attention operations, as ratios to a matrix product timed in the same run.

    python -m benchmarks.ops                                  # the default cases: table, and JSON with --output
    python -m benchmarks.ops --case=p2,1,16384,4,64 --case=p4,1,16384,4,16:blockwise
    python -m benchmarks.ops --sweep=1024,4096,16384,65536    # time per token against T, and the crossover
    python -m benchmarks.ops --sweep=... --torch[=PYTHON]     # adds PyTorch's scaled_dot_product_attention
    python -m benchmarks.ops --sweep=... --plot=FILE.png

A case is KERNEL,B,T,H,D[:implementation[:chunk]], KERNEL one of p2, p4, p6, taylor, softmax. Every measurement with
its own peak memory runs in a process of its own.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEFAULT_CASES = (
    "p2,1,16384,4,64:chunked",
    "p2,1,16384,4,32:chunked",
    "p2,4,512,4,32:chunked",
    "p2,4,512,4,32:blockwise",
    "p2,4,512,4,32:reference",
    "p4,1,16384,4,16:chunked",
    "p4,1,16384,4,16:blockwise",
    "taylor,1,16384,4,16:chunked",
    "softmax,1,8192,4,64",
)
SWEEP = ("softmax", 64), ("p2", 32), ("p2", 64), ("p4", 16)


def parse(case: str) -> dict:
    """KERNEL,B,T,H,D[:implementation[:chunk]] as a dict."""
    shape, *form = case.split(":")
    kernel, *sizes = shape.split(",")
    B, T, H, D = (int(size) for size in sizes)
    chunk = int(form[1]) if len(form) > 1 else None
    return {
        "kernel": kernel,
        "B": B,
        "T": T,
        "H": H,
        "D": D,
        "implementation": form[0] if form else None,
        "chunk": chunk,
    }


def useful_flops(kernel: str, B: int, T: int, H: int, D: int) -> float:
    """Of the forward pass, with the exact number of features; for softmax the causal half of the two products."""
    if kernel == "softmax":
        return 2.0 * B * H * T * T * D
    features = (
        1 + D + math.comb(D + 1, 2) if kernel == "taylor" else math.comb(D + int(kernel[1:]) - 1, int(kernel[1:]))
    )
    return 4.0 * features * (D + 1) * B * H * T


def programs(case: dict, dtype: str) -> dict:
    """The forward and the forward + backward program of a case, as functions without arguments."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from sympow_jax import ops

    rng = np.random.default_rng(0)
    shape = tuple(case[n] for n in "BTHD")
    q, k, v, cotangent = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4))
    gates = jax.nn.log_sigmoid(jnp.asarray(6.9 + rng.normal(size=shape[:3]), jnp.float32))
    options = {"implementation": case["implementation"]}

    def attention(q, k, v, gates):
        if case["kernel"] == "softmax":
            return ops.softmax_attention(q, k, v, log_gates=gates, block_size=case["chunk"], **options)
        if case["kernel"] == "taylor":
            return ops.taylor_attention(q, k, v, log_gates=gates, chunk_size=case["chunk"], **options)
        degree = int(case["kernel"][1:])
        return ops.power_attention(q, k, v, degree=degree, log_gates=gates, chunk_size=case["chunk"], **options)

    forward = jax.jit(attention)
    both = jax.jit(lambda cotangent, *inputs: jax.vjp(attention, *inputs)[1](cotangent))
    return {"forward": lambda: forward(q, k, v, gates), "forward+backward": lambda: both(cotangent, q, k, v, gates)}


def measure(case: dict, dtype: str, seconds: float) -> dict:
    """Both programs of a case interleaved with the probe, in this process; the memory is that of the process."""
    from benchmarks import probe

    product, probe_flops = probe.gemm_probe()
    product()
    bare = probe.peak_memory_bytes()
    times = probe.interleaved({"probe": product, **programs(case, dtype)}, seconds=seconds)
    peak = probe_flops / times["probe"]["median"]
    flops = useful_flops(*(case[n] for n in ("kernel", "B", "T", "H", "D")))
    row = {
        **case,
        "dtype": dtype,
        "peak_memory_mb": (probe.peak_memory_bytes() - bare) / 2**20,
        "probe_gflops": peak / 1e9,
    }
    for name, factor in (("forward", 1), ("forward+backward", 3)):
        rate = factor * flops / times[name]["median"]
        row[name] = {
            **times[name],
            "gflops": rate / 1e9,
            "fraction_of_probe": rate / peak,
            "us_per_token": 1e6 * times[name]["median"] / (case["B"] * case["T"]),
        }
    return row


def measure_torch(case: dict, seconds: float) -> dict:
    """PyTorch's causal scaled_dot_product_attention, two threads; runs under an interpreter that has torch."""
    import time

    import torch

    torch.set_num_threads(2)
    q, k, v = (torch.randn(case["B"], case["H"], case["T"], case["D"], requires_grad=True) for _ in range(3))
    attention = torch.nn.functional.scaled_dot_product_attention
    row = {**case, "kernel": "torch sdpa", "dtype": "float32"}
    cotangent = torch.ones_like(q)
    for name in ("forward", "forward+backward"):
        times, start = [], time.perf_counter()
        while len(times) < 2 or time.perf_counter() - start < seconds / 2:
            begin = time.perf_counter()
            out = attention(q, k, v, is_causal=True)
            if name != "forward":
                out.backward(cotangent)
            times.append(time.perf_counter() - begin)
        times = sorted(times[1:])
        median = times[len(times) // 2]
        row[name] = {"median": median, "runs": len(times), "us_per_token": 1e6 * median / (case["B"] * case["T"])}
    return row


def in_own_process(kind: str, case: dict, arguments, python: str = sys.executable) -> dict:
    """One measurement in a process of its own, so that memory and thread pools are not shared."""
    command = [python, str(pathlib.Path(__file__).resolve()), f"--worker={kind}", f"--case={json.dumps(case)}"]
    command += [f"--dtype={arguments.dtype}", f"--seconds={arguments.seconds}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{case}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def print_table(rows: list[dict]) -> None:
    """One line a case."""
    print(f"{'case':42s} {'fwd ms':>9s} {'of GEMM':>8s} {'f+b ms':>9s} {'of GEMM':>8s} {'us/token':>9s} {'MB':>7s}")
    for row in rows:
        form = ":".join(str(row[n]) for n in ("implementation", "chunk") if row[n])
        name = f"{row['kernel']} B{row['B']} T{row['T']} H{row['H']} D{row['D']} {form}"
        cells = []
        for part in ("forward", "forward+backward"):
            cells.append(f"{1e3 * row[part]['median']:9.1f}")
            fraction = row[part].get("fraction_of_probe")
            cells.append(f"{fraction:8.1%}" if fraction else " " * 8)
        print(
            f"{name:42s} {' '.join(cells)} {row[part]['us_per_token']:9.2f} {row.get('peak_memory_mb', math.nan):7.0f}"
        )


def crossover(rows: list[dict], slow: str, fast: tuple[str, int]) -> int | None:
    """The smallest measured T from which `fast` trains faster than `slow`."""
    times = {(r["kernel"], r["D"], r["T"]): r["forward+backward"]["median"] for r in rows}
    lengths = sorted({r["T"] for r in rows if r["kernel"] == slow})
    wins = [T for T in lengths if times.get((*fast, T), math.inf) < times[slow, 64, T]]
    return wins[0] if wins else None


def plot(rows: list[dict], path: str) -> None:
    """Time per token of forward + backward against context, one line for each kernel and head_dim."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for kernel, D in dict.fromkeys((r["kernel"], r["D"]) for r in rows):
        points = sorted(
            (r["T"], r["forward+backward"]["us_per_token"]) for r in rows if (r["kernel"], r["D"]) == (kernel, D)
        )
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{kernel}, head_dim {D}")
    axes.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="forward + backward, µs per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="KERNEL,B,T,H,D[:implementation[:chunk]]; may be repeated")
    parser.add_argument("--sweep", help="lengths, comma-separated: time per token of every kernel")
    parser.add_argument("--torch", nargs="?", const=sys.executable, help="also PyTorch, run by this interpreter")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--seconds", type=float, default=10.0, help="for each case")
    parser.add_argument("--output", help="write all rows as JSON")
    parser.add_argument("--plot", help="write the plot of a sweep")
    parser.add_argument("--worker", choices=("jax", "torch"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        case = json.loads(arguments.case[0])
        run = measure_torch(case, arguments.seconds) if arguments.worker == "torch" else None
        print(json.dumps(run or measure(case, arguments.dtype, arguments.seconds)))
        return

    cases = [parse(case) for case in arguments.case or (() if arguments.sweep else DEFAULT_CASES)]
    for T in (int(T) for T in (arguments.sweep or "").split(",") if T):
        cases += [parse(f"{kernel},1,{T},4,{D}") for kernel, D in SWEEP]
    rows = [in_own_process("jax", case, arguments) for case in cases]
    if arguments.torch:
        shapes = {tuple(case[n] for n in "BTHD"): case for case in cases if case["D"] == 64}
        rows += [in_own_process("torch", case, arguments, arguments.torch) for case in shapes.values()]
    print_table(rows)
    if arguments.sweep:
        for slow in ("softmax", "torch sdpa") if arguments.torch else ("softmax",):
            print(f"p2 at head_dim 64 trains faster than {slow} from T = {crossover(rows, slow, ('p2', 64))} on")
    if arguments.output:
        pathlib.Path(arguments.output).write_text(json.dumps(rows, indent=1))
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
