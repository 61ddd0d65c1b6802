"""Speed and memory of the attention operations, as ratios to a matrix product timed in the same run.

    python -m benchmarks.ops --output=docs/benchmarks/ops.json --plot=docs/ops_time_per_token.png [--torch[=PYTHON]]
    python -m benchmarks.ops --case=p2,1,16384,4,64:chunked --case=p4,1,16384,4,16:blockwise:128

A case is KERNEL,B,T,H,D[:implementation[:chunk]], KERNEL one of p2, p4, p6, taylor (all with data gates; p2_vector and
so on with a gate for every dim, in turns with the gates of a head), softmax,
fox (softmax with data gates), or an additive bias of softmax (alibi, kerple_log, kerple_power, t5, sandwich, fire).
Gated and biased softmax takes turns with the plain one, and CPU seconds are compared. --torch adds PyTorch's causal
scaled_dot_product_attention at the lengths of the softmax cases and of `LONG`. Every case runs in a process of its
own, so that memory and thread pools are not shared; --output keeps the cases that it holds already, so that a
stopped run goes on. The forward pass by itself is timed up to 16,384 tokens.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
GATED_OR_BIASED = ("fox", "alibi", "kerple_log", "kerple_power", "t5", "sandwich", "fire")
LENGTHS = {
    "p2,1,{T},4,64:chunked": (1024, 4096, 8192, 16384, 65536, 131072),
    "p2,1,{T},4,32:chunked": (1024, 4096, 16384, 65536),
    "p4,1,{T},4,16:chunked": (1024, 4096, 16384, 65536),
    "p4,1,{T},4,16:blockwise": (4096, 16384),
    "p4,1,{T},4,64:blockwise": (1024, 4096, 32768),
    "taylor,1,{T},4,16:chunked": (16384,),
    "softmax,1,{T},4,64:blockwise": (1024, 4096, 8192, 16384),
    "softmax,1,{T},4,32:blockwise": (1024, 4096, 16384),
    **{kernel + ",1,{T},4,64:blockwise": (2048, 16384) for kernel in GATED_OR_BIASED},
}
VECTOR = "_vector"
LONG = (32768, 65536)
FORWARD_UP_TO = 16384
PARTS = ("forward", "forward+backward")
SOFTMAX = ("softmax", *GATED_OR_BIASED)


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


def plain_kernel(kernel: str) -> str | None:
    """What a case takes turns with: softmax beside its gates and biases, gates of a head beside those of every dim."""
    return "softmax" if kernel in GATED_OR_BIASED else kernel.removesuffix(VECTOR) if VECTOR in kernel else None


def useful_flops(case: dict) -> dict[str, float]:
    """With the exact number of features for a linear form, and of the causal half of the products for a quadratic."""
    B, T, H, D = (case[n] for n in "BTHD")
    kernel = case["kernel"].removesuffix(VECTOR)
    if kernel in SOFTMAX or case["implementation"] in ("reference", "blockwise"):
        return dict(zip(PARTS, (2.0 * B * H * T * T * D, 7.0 * B * H * T * T * D), strict=True))
    features = 1 + D + math.comb(D + 1, 2) if kernel == "taylor" else math.comb(D + int(kernel[1:]) - 1, D - 1)
    forward = 4.0 * features * (D + 1) * B * H * T
    return dict(zip(PARTS, (forward, 3 * forward), strict=True))


def programs(case: dict, dtype: str) -> dict:
    """The compiled forward and forward + backward programs of a case, as functions without arguments."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from sympow_jax import ops
    from sympow_jax.ops.softmax_attention import arg_specs

    rng = np.random.default_rng(0)
    shape = tuple(case[n] for n in "BTHD")
    q, k, v, cotangent = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4))
    kernel = case["kernel"].removesuffix(VECTOR)
    one_a = shape if VECTOR in case["kernel"] else shape[:3]
    gates = jax.nn.log_sigmoid(jnp.asarray(6.9 + rng.normal(size=one_a), jnp.float32))
    extra: dict = {}
    if case["kernel"] in GATED_OR_BIASED:
        gated = case["kernel"] == "fox"
        extra = {"log_gates": gates} if gated else {"bias": arg_specs.make_bias(case["kernel"], case["H"])}
    options = {"implementation": case["implementation"]}

    def attention(q, k, v, gates, extra):
        if kernel in SOFTMAX:
            return ops.softmax_attention(q, k, v, block_size=case["chunk"], **extra, **options)
        arguments = {"log_gates": gates, "chunk_size": case["chunk"], **options}
        if kernel == "taylor":
            return ops.taylor_attention(q, k, v, **arguments)
        return ops.power_attention(q, k, v, degree=int(kernel[1:]), **arguments)

    def both(cotangent, *inputs):
        return jax.vjp(attention, *inputs)[1](cotangent)

    inputs = q, k, v, gates, extra
    compiled = {"forward+backward": (jax.jit(both).lower(cotangent, *inputs).compile(), (cotangent, *inputs))}
    if case["T"] <= FORWARD_UP_TO:
        compiled["forward"] = (jax.jit(attention).lower(*inputs).compile(), inputs)
    return {name: functools.partial(program, *arguments) for name, (program, arguments) in compiled.items()}


def measure(case: dict, dtype: str, seconds: float) -> dict:
    """The programs of a case interleaved with the probe, in this process; the memory is that of the process."""
    import jax

    from benchmarks import probe

    product, probe_flops = probe.gemm_probe()
    product()
    bare = probe.peak_memory_bytes()
    plain, beside = {}, plain_kernel(case["kernel"])
    if beside:
        plain = {f"plain {name}": program for name, program in programs({**case, "kernel": beside}, dtype).items()}
    times = probe.interleaved({"probe": product, **programs(case, dtype), **plain}, seconds=seconds)
    peak = probe_flops / times["probe"]["median"]
    flops = useful_flops(case)
    row = {
        **case,
        "dtype": dtype,
        "device": f"{jax.device_count()} {jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "jax": jax.__version__,
        "peak_memory_mb": (probe.peak_memory_bytes() - bare) / 2**20,
        "probe_gflops": peak / 1e9,
    }
    for name in PARTS:
        if name in times:
            rate = flops[name] / times[name]["median"]
            row[name] = {**times[name], "gflops": rate / 1e9, "fraction_of_probe": rate / peak}
            if plain:
                row[name]["over_plain"] = times[name]["cpu_median"] / times[f"plain {name}"]["cpu_median"]
    return with_time_per_token(row)


def with_time_per_token(row: dict) -> dict:
    for name in PARTS:
        if name in row:
            row[name]["us_per_token"] = 1e6 * row[name]["median"] / (row["B"] * row["T"])
    return row


def measure_torch(case: dict, seconds: float) -> dict:
    """PyTorch's causal scaled_dot_product_attention, two threads; runs under an interpreter that has torch."""
    import statistics
    import time

    import torch

    torch.set_num_threads(2)
    q, k, v = (torch.randn(case["B"], case["H"], case["T"], case["D"], requires_grad=True) for _ in range(3))
    attention = torch.nn.functional.scaled_dot_product_attention
    cotangent = torch.ones_like(q)
    row = {**case, "kernel": "torch sdpa", "dtype": "float32", "torch": torch.__version__}
    for name in PARTS[case["T"] > FORWARD_UP_TO :]:
        times, start = [], time.perf_counter()
        while len(times) < 8 and (len(times) < 2 or time.perf_counter() - start < seconds / 2):
            begin = time.perf_counter()
            out = attention(q, k, v, is_causal=True)
            if name != "forward":
                out.backward(cotangent)
            times.append(time.perf_counter() - begin)
            if times[0] > seconds / 2:
                break
        times = times[1:] or times
        row[name] = {"median": statistics.median(times), "best": min(times), "runs": len(times)}
    return with_time_per_token(row)


def in_own_process(case: dict, arguments) -> dict:
    """One measurement in a process of its own; PyTorch's in an interpreter of its own."""
    python = arguments.torch if case["kernel"] == "torch sdpa" else sys.executable
    command = [python, str(pathlib.Path(__file__).resolve()), f"--worker={json.dumps(case)}"]
    command += [f"--dtype={arguments.dtype}", f"--seconds={arguments.seconds}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{case}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def name_of(row: dict) -> str:
    form = ":".join(str(row[n]) for n in ("implementation", "chunk") if row[n])
    return f"{row['kernel']} B{row['B']} T{row['T']} H{row['H']} D{row['D']} {form}".strip()


def print_table(rows: list[dict]) -> None:
    """One line a case, and the ratios between them."""
    print(f"{'case':42s} {'fwd ms':>9s} {'of GEMM':>8s} {'f+b ms':>9s} {'of GEMM':>8s} {'us/token':>9s} {'MB':>7s}")
    for row in rows:
        cells = []
        for part in PARTS:
            fraction = row.get(part, {}).get("fraction_of_probe")
            cells.append(f"{1e3 * row[part]['median']:9.1f}" if part in row else " " * 9)
            cells.append(f"{fraction:8.1%}" if fraction else " " * 8)
        ratios = [f"{row[part]['over_plain']:.2f}" for part in PARTS if "over_plain" in row.get(part, {})]
        memory = f"{row['peak_memory_mb']:7.0f}" if "peak_memory_mb" in row else ""
        beside = f"  {', '.join(ratios)} of {plain_kernel(row['kernel'])}" if ratios else ""
        print(f"{name_of(row):42s} {' '.join(cells)} {row[PARTS[1]]['us_per_token']:9.2f} {memory}{beside}")
    times = {(r["kernel"], r["T"]): r[PARTS[1]]["median"] for r in rows if r["D"] == 64}
    for slow in ("softmax", "torch sdpa"):
        shared = sorted(T for kernel, T in times if kernel == slow and ("p2", T) in times)
        ratios = ", ".join(f"{T}: {times[slow, T] / times['p2', T]:.2f}" for T in shared)
        if shared:
            print(f"forward + backward at head_dim 64, {slow} over p2, by T: {ratios}")


def over_softmax_table(rows: list[dict]) -> str:
    """CPU seconds of gated and biased softmax over those of plain softmax, as Markdown."""
    rows = [row for row in rows if row["kernel"] in GATED_OR_BIASED]
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    lines = [f"| T, pass | {' | '.join(kernels)} |", "|---" * (len(kernels) + 1) + "|"]
    for T in sorted({row["T"] for row in rows}):
        for part in PARTS:
            found = {row["kernel"]: f"{row[part]['over_plain']:.2f}" for row in rows if row["T"] == T and part in row}
            cells = " | ".join(found.get(kernel, "") for kernel in kernels)
            lines.append(f"| {T:,}, {part.replace('+', ' + ')} | {cells} |")
    return "\n".join(lines)


def plot(rows: list[dict], path: str) -> None:
    """Time per token of forward + backward against context, one line for each kernel and head_dim."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    lines: dict[str, list] = {}
    for row in rows:
        form = f", {row['implementation']}" if row["implementation"] else ""
        label = f"{row['kernel']}, head_dim {row['D']}{form}"
        lines.setdefault(label, []).append((row["T"], row[PARTS[1]]["us_per_token"]))
    for label, points in lines.items():
        if len(points) > 1:
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="forward + backward, µs per token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def default_cases(*, with_torch: bool) -> list[dict]:
    """Every kernel at its lengths, PyTorch's next to the cases it is compared with."""
    cases = [parse(case.format(T=T)) for case, lengths in LENGTHS.items() for T in lengths]
    if with_torch:
        softmax = [case for case in cases if case["kernel"] == "softmax" and case["D"] == 64]
        lengths = sorted({case["T"] for case in softmax} | set(LONG))
        cases += [{**softmax[0], "kernel": "torch sdpa", "T": T, "implementation": None} for T in lengths]
    return sorted(cases, key=lambda case: case["T"])


def save(rows: list[dict], path: str) -> None:
    lines = ",\n".join(json.dumps(row) for row in rows)
    pathlib.Path(path).write_text(f"[\n{lines}\n]\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="KERNEL,B,T,H,D[:implementation[:chunk]]; may be repeated")
    parser.add_argument("--torch", nargs="?", const=sys.executable, help="also PyTorch, run by this interpreter")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--seconds", type=float, default=10.0, help="for each case")
    parser.add_argument("--output", help="the JSON of all rows; those in it are not measured again")
    parser.add_argument("--plot", help="the figure of time per token against context")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        case = json.loads(arguments.worker)
        torch = case["kernel"] == "torch sdpa"
        print(
            json.dumps(
                measure_torch(case, arguments.seconds) if torch else measure(case, arguments.dtype, arguments.seconds)
            )
        )
        return

    cases = [parse(case) for case in arguments.case or ()] or default_cases(with_torch=bool(arguments.torch))
    output = pathlib.Path(arguments.output) if arguments.output else None
    rows = json.loads(output.read_text()) if output and output.exists() else []
    for case in cases:
        if any(case.items() <= row.items() for row in rows):
            continue
        rows.append(in_own_process(case, arguments))
        if output:
            save(rows, arguments.output)
    print_table(rows)
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
