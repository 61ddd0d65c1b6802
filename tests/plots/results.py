"""Made-up evaluation results of the documented shape."""


def length_result(variant="conformal_sympow", slope=-0.05, seed=0, train_length=512, intervals=True):
    contexts = [512, 1024, 2048, 4096]
    level = [2.0 + slope * i for i in range(4)]

    def ci(value, half=0.03):
        return [value - half, value + half] if intervals else [None, None]

    positions = [0.5 + 2.0**k for k in range(12)]
    losses = [3.0 - 0.1 * k for k in range(12)]
    return {
        "step": 100,
        "variant": variant,
        "seed": seed,
        "dtype": "float32",
        "train_length": train_length,
        "data": {"store": "heldout.zarr", "digest": "abc", "bos_rule": "BOS first"},
        "position_overrides": {},
        "num_documents": 48,
        "num_sources": 30,
        "num_targets": 256,
        "lengths": [
            {"length": c, "nll": v + 0.1, "ci95": ci(v + 0.1), "num_tokens": 48 * c}
            for c, v in zip(contexts, level, strict=True)
        ],
        "same_target": [
            {"context": c, "nll": v, "ci95": ci(v), "num_tokens": 48 * 256}
            for c, v in zip(contexts, level, strict=True)
        ],
        "same_target_change": {
            "from_context": 512,
            "context": contexts,
            "difference": [v - level[0] for v in level],
            "ci95": [ci(v - level[0], 0.01) for v in level],
        },
        "contextwise": {"position": positions, "nll": losses, "ci95": [ci(v) for v in losses]},
    }


def remembrance_result(variant="conformal_sympow", layers=(0, 2), intervals=True):
    positions = [32, 64, 1792, 3328, 3584, 3776, 3808, 3840]
    changes = [0.0, 0.01, 0.02, 0.05, 0.2, 0.4, 0.5, 0.9]
    pairs = [[value - 0.02, value + 0.02] if intervals else [None, None] for value in changes]
    header = ("step", "variant", "seed", "train_length", "data", "num_documents", "num_sources", "num_targets")
    return {name: length_result(variant)[name] for name in header} | {
        "length": 4096,
        "loss": {"nll": 2.0, "ci95": [1.9, 2.1]},
        "remembrance": {
            "position": positions,
            "difference": changes,
            "ci95": pairs,
            "total_variation": [value / 2 for value in changes],
            "total_variation_ci95": pairs,
        },
        "state_norms": [
            {"layer": layer, "state": [p**0.5 for p in positions], "normalizer": [float(p) for p in positions]}
            for layer in layers
        ],
    }
