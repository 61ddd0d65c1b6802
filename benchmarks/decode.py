"""Milliseconds a token against position, prefill speed against prompt length, and bytes of state or cache.

    python -m benchmarks.decode                            # the default variants and positions
    python -m benchmarks.decode --variants=fox,sympow --positions=1000,32768 --prompts=512,4096 --batch=1
    python -m benchmarks.decode --output=decode.json --plot=decode.png

Untrained models of --layers layers and width --width with heads of 64, float32, byte vocabulary. A token is a greedy
draw and a step of `sympow_jax.generation.Decoder`. Positions, variants and a matrix product are timed in turn, round
after round, in one process; each variant runs one compiled step for all positions. Caches hold the longest position.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import probe
from sympow_jax.config import parse_flags
from sympow_jax.generation import Decoder, Sampling, sample
from sympow_jax.models.model import Model, resolve_implementation
from sympow_jax.ops.softmax_attention.cache import KVCache

VOCAB = 257


def make_decoder(variant: str, layers: int, width: int) -> Decoder:
    heads = f"model.num_heads={width // 64} model.head_dim=64"
    flags = f"model.num_layers={layers} model.embed_dim={width} model.mlp_dim={4 * width} {heads}".split()
    config = parse_flags([f"--config=configs/quickstart.py:{variant}", *(f"--config.{flag}" for flag in flags)])
    model = Model(resolve_implementation(config), VOCAB)
    return Decoder(model, model.init(jax.random.key(0)))


class Stepper:
    """One stream that stands at any position: its state after a real prompt, its caches full of random keys."""

    def __init__(self, decoder: Decoder, length: int, batch: int):
        self.decoder, self.stream = decoder, decoder.start(batch, length)
        decoder.read(self.stream, np.random.default_rng(0).integers(0, VOCAB, (batch, 585)))
        self.stream.state = jax.tree.map(self._fill, self.stream.state, is_leaf=lambda x: isinstance(x, KVCache))

    def _fill(self, leaf):
        if not isinstance(leaf, KVCache):
            return leaf
        random = (
            jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, x in enumerate((leaf.keys, leaf.values))
        )
        positions = jnp.broadcast_to(jnp.arange(leaf.positions.shape[1], dtype=jnp.int32), leaf.positions.shape)
        return dataclasses.replace(leaf, keys=next(random), values=next(random), positions=positions)

    def seconds(self, position: int) -> float:
        """Of one token at `position`."""
        self.stream.state |= {"offset": jnp.int32(position)}
        self.stream.tokens_read = position
        jax.block_until_ready(self.stream.state)
        begin = time.perf_counter()
        token = np.asarray(sample(self.stream.logits, position, Sampling(temperature=0)))
        self.decoder.read(self.stream, token[:, None])
        jax.block_until_ready(self.stream.state)
        return time.perf_counter() - begin


def decode_rows(decoders: dict[str, Decoder], positions: list[int], batch: int, seconds: float) -> list[dict]:
    """Seconds a token of each variant at each position, interleaved with a matrix product."""
    steppers = {name: Stepper(decoder, max(positions) + 2, batch) for name, decoder in decoders.items()}
    product, flops = probe.gemm_probe(1024)
    times: dict = {(name, p): [] for name in decoders for p in positions} | {"probe": []}
    for stepper in steppers.values():
        stepper.seconds(max(positions))
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times["probe"]) < 5:
        begin = time.perf_counter()
        jax.block_until_ready(product())
        times["probe"].append(time.perf_counter() - begin)
        for name, position in (key for key in times if key != "probe"):
            steppers[name].seconds(position)  # what ran before has emptied the caches
            times[name, position].append(steppers[name].seconds(position))
    peak = flops / probe.summary(times.pop("probe"))["median"]
    print(f"matrix product in the same run: {peak / 1e9:.0f} GFLOP/s")
    return [
        {
            "variant": name,
            "position": position,
            "batch": batch,
            **probe.summary(values),
            "state_bytes": state_bytes(decoders[name], batch, position),
            "probe_gflops": peak / 1e9,
        }
        for (name, position), values in times.items()
    ]


def state_bytes(decoder: Decoder, batch: int, length: int) -> int:
    """Of streams that end at `length`."""
    state = jax.eval_shape(lambda: decoder.model.initial_state(batch, length))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def prefill_rows(decoders: dict[str, Decoder], prompts: list[int], batch: int, seconds: float) -> list[dict]:
    """Seconds to read a prompt of each length into an empty stream, variants in turn."""

    def read(decoder, length):
        tokens = np.random.default_rng(0).integers(0, VOCAB, (batch, length))

        def prompt():
            stream = decoder.start(batch, max(prompts))
            decoder.read(stream, tokens)
            return stream.logits

        return prompt

    rows = []
    for length in prompts:
        cases = {name: read(decoder, length) for name, decoder in decoders.items()}
        for name, result in probe.interleaved(cases, seconds=seconds / len(prompts), repeats=3).items():
            rate = batch * length / result["median"]
            rows.append({"variant": name, "prompt": length, "batch": batch, **result, "tokens_per_sec": rate})
    return rows


def print_tables(decode: list[dict], prefill: list[dict]) -> None:
    positions, variants = (list(dict.fromkeys(r[key] for r in decode)) for key in ("position", "variant"))
    print(f"\n{'ms a token at position':24s}" + "".join(f"{p:>12,}" for p in positions) + "  last / first")
    for name in variants:
        rows = [r for r in decode if r["variant"] == name]
        ratio = rows[-1]["median"] / rows[0]["median"]
        print(f"{name:24s}" + "".join(f"{1e3 * r['median']:12.2f}" for r in rows) + f"{ratio:14.2f}")
    print(f"\n{'MiB of state or cache':24s}" + "".join(f"{p:>12,}" for p in positions))
    for name in variants:
        print(f"{name:24s}" + "".join(f"{r['state_bytes'] / 2**20:12.2f}" for r in decode if r["variant"] == name))
    prompts = list(dict.fromkeys(r["prompt"] for r in prefill))
    print(f"\n{'prefill, tokens/s':24s}" + "".join(f"{p:>12,}" for p in prompts))
    for name in variants:
        print(f"{name:24s}" + "".join(f"{r['tokens_per_sec']:12,.0f}" for r in prefill if r["variant"] == name))


def table(result: dict) -> str:
    """Milliseconds a token by position and tokens/s of prefill, as Markdown."""
    decode, prefill = result["decode"], result["prefill"]

    def lines(rows, key, title, cell):
        columns, variants = (list(dict.fromkeys(r[name] for r in rows)) for name in (key, "variant"))
        yield f"| {title} | {' | '.join(f'{c:,}' for c in columns)} |"
        yield "|---" * (len(columns) + 1) + "|"
        for name in variants:
            yield f"| {name} | {' | '.join(cell(r) for r in rows if r['variant'] == name)} |"

    tokens = lines(decode, "position", "ms a token at position", lambda r: f"{1e3 * r['median']:.2f}")
    prompts = lines(prefill, "prompt", "prefill, tokens/s at a prompt of", lambda r: f"{r['tokens_per_sec']:,.0f}")
    cpu = lines(prefill, "prompt", "prefill, CPU seconds of a prompt of", lambda r: f"{r['cpu_median']:.3f}")
    return "\n".join([*tokens, "", *prompts, "", *cpu])


def plot(decode: list[dict], prefill: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    panels = (
        (decode, "position", lambda r: 1e3 * r["median"], "ms a token"),
        (decode, "position", lambda r: r["state_bytes"] / 2**20, "MiB of state or cache"),
        (prefill, "prompt", lambda r: r["tokens_per_sec"], "prefill, tokens/s"),
    )
    for axis, (rows, x, y, label) in zip(axes, panels, strict=True):
        for name in dict.fromkeys(r["variant"] for r in rows):
            points = [(r[x], y(r)) for r in rows if r["variant"] == name]
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel=f"{x} (tokens)", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default="conformal_sympow,sympow,softmax_rope,fox")
    parser.add_argument("--positions", default="1000,8192,32768,100000")
    parser.add_argument("--prompts", default="512,2048,8192")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--seconds", type=float, default=40.0, help="for decoding, and again for prefill")
    parser.add_argument("--output", help="write all rows as JSON")
    parser.add_argument("--plot", help="write the figure")
    arguments = parser.parse_args()
    positions, prompts = ([int(n) for n in text.split(",")] for text in (arguments.positions, arguments.prompts))
    decoders = {name: make_decoder(name, arguments.layers, arguments.width) for name in arguments.variants.split(",")}
    decode = decode_rows(decoders, positions, arguments.batch, arguments.seconds)
    prefill = prefill_rows(decoders, prompts, arguments.batch, arguments.seconds)
    print_tables(decode, prefill)
    if arguments.output:
        device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        result = {"arguments": vars(arguments), "device": device, "decode": decode, "prefill": prefill}
        pathlib.Path(arguments.output).write_text(json.dumps(result, indent=1))
    if arguments.plot:
        plot(decode, prefill, arguments.plot)


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
    main()
