"""A training step beside a PyTorch GPT of the same shape, eager and compiled, in tokens/s, each in its own process.

    python -m benchmarks.train_step --torch=PYTHON --compile                # the default cases
    python -m benchmarks.train_step --torch=PYTHON --case=conformal_sympow,4,1,16384 --rounds=3
    python -m benchmarks.train_step                                         # without PyTorch: our step and the probe

A case is VARIANT,H,B,T: 4 layers of width 256, H heads of 256 / H, MLP 1024, tied byte vocabulary, float32. Both sides
clip the gradient and apply AdamW. Ours is the step of `train.py`, with its CPU devices: one a core, as far as B divides
(--config.mesh.cpu_devices=1 is one). PyTorch's has learned positions, scaled_dot_product_attention, fused AdamW and a
thread for each core; eager, it warms up on a short batch, as its steps compile nothing, and --compile adds the same
loss and gradient under torch.compile. Steps alternate, one process working at a time.

Our process keeps freed memory, as `train.py` does, and PyTorch's has glibc's defaults, as its users have;
--same_allocator has glibc keep freed memory on both sides. Other --config flags reach our model alone.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

KEEPING = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
ROOT = pathlib.Path(__file__).resolve().parents[1]
LAYERS, WIDTH, MLP, VOCAB = 4, 256, 1024, 257
DEFAULT_CASES = (
    "softmax_rope,4,8,512",
    "conformal_sympow,4,8,512",
    "conformal_sympow,4,1,16384",
    "conformal_sympow,4,1,32768",
    "conformal_sympow,8,1,32768",
)


def jax_steps(variant: str, H: int, B: int, T: int, more: list[str]) -> dict[str, Callable[[], object]]:
    """Our step as train.py runs it, and the matrix-product probe."""
    import jax
    import numpy as np

    from benchmarks.probe import gemm_probe
    from sympow_jax.command_line import keep_freed_memory, use_compilation_cache
    from sympow_jax.config import parse_flags
    from sympow_jax.models.model import Model, resolve_implementation
    from sympow_jax.sharding import batch_sharding
    from sympow_jax.training.config_mesh import config_mesh
    from sympow_jax.training.cpu_devices import use_cpu_devices
    from sympow_jax.training.step import make_train_step
    from sympow_jax.training.train_state import create_train_state

    keep_freed_memory()  # as train.py does
    use_compilation_cache()
    shape = {"num_layers": LAYERS, "embed_dim": WIDTH, "mlp_dim": MLP, "num_heads": H, "head_dim": WIDTH // H}
    flags = [f"--config.model.{name}={value}" for name, value in shape.items()]
    flags += [f"--config.data.seq_len={T}", f"--config.data.batch_size={B}", *more]
    config = parse_flags([f"--config={ROOT}/configs/quickstart.py:{variant}", *flags])
    use_cpu_devices(config)  # before resolve_implementation, which may ask JAX for its platform
    config = resolve_implementation(config)
    mesh = config_mesh(config)
    model = Model(config, VOCAB, mesh)
    step, state = make_train_step(model), create_train_state(model, 0)
    rng = np.random.default_rng(0)
    batch = {name: rng.integers(0, VOCAB, (B, T)).astype(np.int32) for name in ("inputs", "targets")}
    batch = jax.device_put(batch, batch_sharding(mesh))

    def train():
        nonlocal state
        state, metrics = step(state, batch)
        return jax.block_until_ready(metrics)

    product, _ = gemm_probe()
    train()
    return {"step": train, "probe": lambda: jax.block_until_ready(product())}


def torch_steps(H: int, B: int, T: int, *, compiled: bool) -> dict[str, Callable[[], object]]:
    """GPT-2's block in PyTorch: pre-norm, tanh GELU, tied output."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
            self.up, self.down = nn.Linear(WIDTH, MLP), nn.Linear(MLP, WIDTH)

        def forward(self, x):
            q, k, v = (y.view(*x.shape[:2], H, -1).transpose(1, 2) for y in self.qkv(self.norm1(x)).split(WIDTH, dim=2))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
            x = x + self.out(mixed)
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    embedding, positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(T, WIDTH)
    blocks, norm = nn.Sequential(*(Block() for _ in range(LAYERS))), nn.LayerNorm(WIDTH)
    model = nn.ModuleList([embedding, positions, blocks, norm])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    tokens, targets = torch.randint(0, VOCAB, (B, T)), torch.randint(0, VOCAB, (B, T))

    def loss_of(tokens, targets):
        x = embedding(tokens) + positions.weight[: tokens.shape[1]]
        logits = norm(blocks(x)) @ embedding.weight.T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    loss_of = torch.compile(loss_of) if compiled else loss_of

    def train(length: int = T):
        loss = loss_of(tokens[:, :length], targets[:, :length])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    train(T if compiled else min(T, 512))
    return {"step": train}


def work(kind: str, case: str, more: list[str]) -> None:
    """A worker: for each name of a step on standard input, runs it and prints its seconds, of time and of CPU."""
    variant, *sizes = case.split(",")
    H, B, T = (int(size) for size in sizes)
    steps = jax_steps(variant, H, B, T, more) if kind == "jax" else torch_steps(H, B, T, compiled=kind == "compiled")
    print("ready", flush=True)
    for line in sys.stdin:
        begin, begin_cpu = time.perf_counter(), time.process_time()
        steps[line.strip()]()
        print(time.perf_counter() - begin, time.process_time() - begin_cpu, flush=True)


class Worker:
    """A process that runs steps when asked."""

    def __init__(self, kind: str, case: str, python: str, more: list[str], malloc: dict[str, str]):
        command = [python, str(pathlib.Path(__file__).resolve()), f"--worker={kind}", f"--case={case}", *more]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **malloc}, **pipes)
        self._read()

    def seconds(self, name: str) -> tuple[float, float]:
        """Of one step: time, and CPU seconds of all threads."""
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        wall, cpu = self._read().split()
        return float(wall), float(cpu)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a worker ended; its error is above")
        return line.strip()


def measure(case: str, arguments: argparse.Namespace, more: list[str]) -> dict:
    """Medians of alternating steps, and the probe's speed around them; ratios are PyTorch's time over ours."""
    malloc = KEEPING if arguments.same_allocator else {}
    kinds = {"jax": sys.executable} | ({"torch": arguments.torch} if arguments.torch else {})
    kinds |= {"compiled": arguments.torch} if arguments.torch and arguments.compile else {}
    workers = {kind: Worker(kind, case, python, more * (kind == "jax"), malloc) for kind, python in kinds.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in (*workers, "probe")}
    for _ in range(arguments.rounds):
        times["probe"].append(workers["jax"].seconds("probe"))
        for name, worker in workers.items():
            times[name].append(worker.seconds("step"))
    for worker in workers.values():
        worker.close()
    _, _, B, T = case.split(",")
    seconds, cpu = ({name: statistics.median(t[i] for t in times[name]) for name in workers} for i in (0, 1))
    gflops = [2 * 2048**3 / wall / 1e9 for wall, _ in times["probe"]]
    return {
        "case": case,
        "rounds": arguments.rounds,
        "same_allocator": arguments.same_allocator,
        "flags": more,
        "tokens_per_sec": {name: int(B) * int(T) / value for name, value in seconds.items()},
        "ratios": {name: seconds[name] / seconds["jax"] for name in workers if name != "jax"},
        "cpu_ratios": {name: cpu[name] / cpu["jax"] for name in workers if name != "jax"},
        "seconds": times,
        "probe_gflops": [min(gflops), statistics.median(gflops), max(gflops)],
    }


def table(rows: list[dict]) -> str:
    """One line a case, as Markdown; a ratio is our speed over PyTorch's, and by CPU seconds in parentheses."""
    lines = ["| case | tokens/s | over eager PyTorch | over torch.compile | probe GFLOP/s (min, median, max) |"]
    lines += ["|---|---|---|---|---|"]
    for row in rows:
        name = ", ".join([row["case"], *row["flags"], *["same allocator"] * row["same_allocator"]])
        cells = [name, f"{row['tokens_per_sec']['jax']:,.0f}"]
        for kind in ("torch", "compiled"):
            found = kind in row["ratios"]
            cells.append(f"{row['ratios'][kind]:.2f} ({row['cpu_ratios'][kind]:.2f})" if found else "")
        lines.append(f"| {' | '.join([*cells, ', '.join(f'{g:.0f}' for g in row['probe_gflops'])])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="VARIANT,H,B,T; may be repeated")
    parser.add_argument("--torch", default="", help="an interpreter that has torch")
    parser.add_argument("--compile", action="store_true", help="PyTorch under torch.compile too")
    parser.add_argument("--same_allocator", action="store_true", help="glibc keeps freed memory on both sides")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", help="write all rows as JSON")
    parser.add_argument("--worker", choices=("jax", "torch", "compiled"), help=argparse.SUPPRESS)
    arguments, more = parser.parse_known_args()
    if arguments.worker:
        work(arguments.worker, arguments.case[0], more)
        return
    rows = []
    for case in arguments.case or DEFAULT_CASES:
        rows.append(measure(case, arguments, more))
        print(table(rows[-1:]) if len(rows) == 1 else table(rows[-1:]).splitlines()[-1], flush=True)
    if arguments.output:
        pathlib.Path(arguments.output).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
