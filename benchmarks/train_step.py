"""A training step beside an eager PyTorch GPT of the same shape, in tokens/s, each in a process of its own.

    python -m benchmarks.train_step --torch=PYTHON                          # the default cases
    python -m benchmarks.train_step --torch=PYTHON --case=conformal_sympow,4,1,16384 --rounds=3
    python -m benchmarks.train_step                                         # without PyTorch: our step and the probe

A case is VARIANT,H,B,T: 4 layers of width 256, H heads of 256 / H, MLP 1024, tied byte vocabulary, float32. Both sides
clip the gradient and apply AdamW. PyTorch's has learned positions, scaled_dot_product_attention, fused AdamW and two
threads, and warms up on a short batch, as eager steps compile nothing. Steps alternate, one process working at a time.
Under JAX_NUM_CPU_DEVICES=2 each core is a device, and they split B. --config flags reach our model alone.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

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
    from sympow_jax.training.step import make_train_step
    from sympow_jax.training.train_state import create_train_state

    keep_freed_memory()  # as train.py does
    use_compilation_cache()
    shape = {"num_layers": LAYERS, "embed_dim": WIDTH, "mlp_dim": MLP, "num_heads": H, "head_dim": WIDTH // H}
    flags = [f"--config.model.{name}={value}" for name, value in shape.items()]
    flags += [f"--config.data.seq_len={T}", f"--config.data.batch_size={B}", *more]
    config = resolve_implementation(parse_flags([f"--config={ROOT}/configs/quickstart.py:{variant}", *flags]))
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


def torch_steps(H: int, B: int, T: int) -> dict[str, Callable[[], object]]:
    """GPT-2's block in eager PyTorch: pre-norm, tanh GELU, tied output."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.set_num_threads(2)
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

    def train(length: int = T):
        x = embedding(tokens[:, :length]) + positions.weight[:length]
        logits = norm(blocks(x)) @ embedding.weight.T
        loss = F.cross_entropy(logits.flatten(0, 1), targets[:, :length].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    train(min(T, 512))
    return {"step": train}


def work(kind: str, case: str, more: list[str]) -> None:
    """A worker: for each name of a step on standard input, runs it and prints its seconds."""
    variant, *sizes = case.split(",")
    H, B, T = (int(size) for size in sizes)
    steps = torch_steps(H, B, T) if kind == "torch" else jax_steps(variant, H, B, T, more)
    print("ready", flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        steps[line.strip()]()
        print(time.perf_counter() - begin, flush=True)


class Worker:
    """A process that runs steps when asked."""

    def __init__(self, kind: str, case: str, python: str, more: list[str]):
        command = [python, str(pathlib.Path(__file__).resolve()), f"--worker={kind}", f"--case={case}", *more]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self._read()

    def seconds(self, name: str) -> float:
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a worker ended; its error is above")
        return line.strip()


def measure(case: str, python: str, rounds: int, more: list[str]) -> dict:
    """Medians of alternating steps, and the probe's speed around them."""
    workers = {"jax": Worker("jax", case, sys.executable, more)}
    if python:
        workers["torch"] = Worker("torch", case, python, [])
    times: dict[str, list[float]] = {name: [] for name in (*workers, "probe")}
    for _ in range(rounds):
        times["probe"].append(workers["jax"].seconds("probe"))
        for name, worker in workers.items():
            times[name].append(worker.seconds("step"))
    for worker in workers.values():
        worker.close()
    _, _, B, T = case.split(",")
    rates = {name: int(B) * int(T) / statistics.median(times[name]) for name in workers}
    gflops = [2 * 2048**3 / seconds / 1e9 for seconds in times["probe"]]
    row = {"case": case, "rounds": rounds, "tokens_per_sec": rates, "seconds": times}
    row["probe_gflops"] = [min(gflops), statistics.median(gflops), max(gflops)]
    return row | ({"ratio": rates["jax"] / rates["torch"]} if python else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="VARIANT,H,B,T; may be repeated")
    parser.add_argument("--torch", default="", help="an interpreter that has torch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", help="write all rows as JSON")
    parser.add_argument("--worker", choices=("jax", "torch"), help=argparse.SUPPRESS)
    arguments, more = parser.parse_known_args()
    if arguments.worker:
        work(arguments.worker, arguments.case[0], more)
        return
    rows = []
    print(f"{'case':32s} {'tokens/s':>10s} {'PyTorch':>10s} {'ratio':>6s}  probe GFLOP/s (min, median, max)")
    for case in arguments.case or DEFAULT_CASES:
        row = measure(case, arguments.torch, arguments.rounds, more)
        rates, probe = row["tokens_per_sec"], ", ".join(f"{g:.0f}" for g in row["probe_gflops"])
        other = f"{rates['torch']:10,.0f} {row['ratio']:6.2f}" if arguments.torch else " " * 17
        print(f"{case:32s} {rates['jax']:10,.0f} {other}  {probe}", flush=True)
        rows.append(row)
    if arguments.output:
        pathlib.Path(arguments.output).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
