"""The pictures of docs/variants.md: what kernels, biases, gates and rotations do to a key with its distance.

python docs/pictures.py          (from the clone; writes docs/images/)
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from sympow_jax.ops import gates, positions
from sympow_jax.plots import style

IMAGES = pathlib.Path(__file__).parent / "images"
HEADS = 8
DISTANCES = np.unique(np.round(np.geomspace(1, 16_384, 240)).astype(np.int32))


def kernels(figure: Figure) -> None:
    """The weight of a pair as a function of its score, each divided by its value at 4."""
    axes = figure.subplots()
    s = np.linspace(-4, 4, 401)
    curves = {"softmax: exp(s)": np.exp(s), "power, p = 2: s²": s**2, "power, p = 4: s⁴": s**4}
    curves["taylor: 1 + s + s²/2"] = 1 + s + s * s / 2
    for i, (name, weight) in enumerate(curves.items()):
        axes.plot(s, weight / weight[-1], label=name, **style.line_style(i) | {"marker": None})
    axes.set(xlabel="score s = scale q · k", ylabel="weight / weight at s = 4")
    axes.legend()


def biases(figure: Figure) -> None:
    """exp(bias) of one head out of eight at its initial parameters, query at the last position."""
    axes = figure.subplots()
    length = int(DISTANCES[-1]) + 1
    query = jnp.asarray([length - 1])
    keys = jnp.asarray(length - 1 - DISTANCES)
    learned = ("kerple_log", "kerple_power", "t5", "fire")
    made = {"alibi": positions.alibi_bias(jnp.asarray(positions.alibi_slopes(HEADS), jnp.float32))}
    made |= {k: positions.learned_bias(k, positions.init_bias(k, jax.random.key(1), HEADS)) for k in learned}
    made["sandwich"] = positions.sandwich_bias(HEADS)
    for i, (name, bias) in enumerate(made.items()):
        values = np.exp(np.asarray(bias.function(bias.params, query, keys)[HEADS // 2, 0]))
        axes.plot(DISTANCES, values, label=name, **style.line_style(i) | {"marker": None})
    axes.set(xscale="log", xlabel="distance in tokens", ylabel="factor exp(bias), head 5 of 8, before training")
    axes.legend()


def gate_curves(figure: Figure) -> None:
    """The product of a gate over the distance, for gates as they start."""
    axes = figure.subplots()
    scales = np.asarray(jax.nn.sigmoid(jnp.asarray(gates.time_scale_logits(HEADS, 16.0, 4096.0))))
    for i, gate in enumerate(scales):
        label = {0: "timescales: 16 tokens", HEADS - 1: "timescales: 4,096 tokens"}.get(i)
        line = {"color": style.COLOURS[0], "alpha": 0.35 + 0.08 * i, "label": label}
        axes.plot(DISTANCES, gate ** DISTANCES.astype(float), **line)
    for i, (label, gate) in enumerate({"long: 0.999": 0.999, "zero: 1/2": 0.5}.items()):
        line = style.line_style(i + 1) | {"marker": None}
        axes.plot(DISTANCES, gate ** DISTANCES.astype(float), label=label, **line)
    axes.set(xscale="log", xlabel="distance in tokens", ylabel="product of gates over the distance")
    axes.legend()


def rotations(figure: Figure) -> None:
    """The mean of cos(frequency x distance) over the planes: the score of two equal vectors under RoPE."""
    axes = figure.subplots()
    scaled = {
        "rope": {},
        "linear, factor 8": {"scaling": "linear", "factor": 8.0, "original_length": 2048},
        "ntk, factor 8": {"scaling": "ntk", "factor": 8.0, "original_length": 2048},
        "yarn, factor 8": {"scaling": "yarn", "factor": 8.0, "original_length": 2048},
        "llama3, factor 8": {"scaling": "llama3", "factor": 8.0, "original_length": 2048},
    }
    for i, (name, options) in enumerate(scaled.items()):
        frequencies, factor = positions.rope_frequencies(64, **options)
        angles = DISTANCES[:, None].astype(float) * np.asarray(frequencies, float)
        line = style.line_style(i) | {"marker": None}
        axes.plot(DISTANCES, float(factor) ** 2 * np.cos(angles).mean(axis=1), label=name, **line)
    axes.axvline(2048, color=style.GREY, linewidth=0.8)
    axes.set(xscale="log", xlabel="distance in tokens (trained to 2,048)", ylabel="score of equal vectors of norm 1")
    axes.legend()


def main() -> None:
    """Writes one PNG a picture."""
    pictures = {"kernels": kernels, "biases": biases, "gates": gate_curves, "rotations": rotations}
    for name, draw in pictures.items():
        with style.styled():
            figure = Figure(figsize=(6.4, 3.4), layout="constrained")
            draw(figure)
            style.save(figure, IMAGES / f"{name}.png")


if __name__ == "__main__":
    main()
