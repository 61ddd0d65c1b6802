"""Learned biases and gates against distance, one panel a layer, one line a head."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sympow_jax.plots import style


def distance_figure(curves: Mapping[str, Any]) -> Figure:
    """The contents of eval/position_bias.json: log weight of a key against its distance."""
    layers, distance = curves["layers"], np.asarray(curves["distance"], float)
    with style.styled():
        figure = Figure(figsize=(1.2 + 2.2 * max(len(layers), 1), 2.8), layout="constrained")
        panels = figure.subplots(1, max(len(layers), 1), sharey=True, squeeze=False)[0]
        for axes, layer in zip(panels, layers, strict=False):
            for head, values in enumerate(layer["log_weight"]):
                axes.plot(
                    distance, style.finite(values), **style.line_style(head) | {"marker": ""}, label=f"head {head}"
                )
            axes.set_xscale("symlog", base=4, linthresh=1)
            axes.set_title(f"layer {layer['layer']}")
            axes.set_xlabel("distance (tokens)")
        values = [value for layer in layers for head in layer["log_weight"] for value in head if value is not None]
        panels[0].set_ylim(max(min(values, default=-1.0), -20.0), max(values, default=0.0) + 0.5)
        panels[0].set_ylabel("log weight")
        if layers and len(layers[0]["log_weight"]) <= 8:
            panels[-1].legend(fontsize=7)
        figure.suptitle(
            f"{curves['variant']}: bias and mean gate at query position {curves['query_position']:,}", fontsize=9
        )
    return figure
