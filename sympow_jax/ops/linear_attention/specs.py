"""Argument specifications: the shapes and regimes that the tests and the benchmarks run."""

import dataclasses

import numpy as np

GATES = {"none": None, "mild": 0.01, "strong": 1.0, "extreme": 40.0}  # the mean of minus the log gates
VECTOR_GATES = (1e-4, 6.9)  # minus the log gates of the slowest and of the fastest dim of a head, about: "vector"


@dataclasses.dataclass(frozen=True)
class ArgSpec:
    """One call of a linear kernel; `degree` 0 is the Taylor kernel."""

    degree: int = 2
    gates: str = "mild"
    T: int = 64
    D: int = 8
    Dv: int = 8
    H: int = 2
    K: int = 2
    B: int = 1
    segments: bool = False
    initial_state: bool = False

    def __str__(self) -> str:
        kernel = f"p{self.degree}" if self.degree else "taylor"
        extras = "-segments" * self.segments + "-state" * self.initial_state
        return f"{kernel}-{self.gates}-B{self.B}T{self.T}H{self.H}K{self.K}D{self.D}Dv{self.Dv}{extras}"

    def inputs(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Random arguments in float64 that are exact in float32, by name; absent ones are left out."""
        rng = np.random.default_rng(seed)
        arrays = {
            "q": _directions(rng, (self.B, self.T, self.H, self.D)),
            "k": _directions(rng, (self.B, self.T, self.K, self.D)),
            "v": rng.normal(size=(self.B, self.T, self.K, self.Dv)),
        }
        if self.gates == "vector":
            rates = rng.permuted(np.tile(np.geomspace(*VECTOR_GATES, self.D), (self.K, 1)), axis=1)
            arrays["log_gates"] = -rates * rng.uniform(0.5, 1.5, size=(self.B, self.T, self.K, self.D))
        elif self.gates != "none":
            arrays["log_gates"] = -GATES[self.gates] * rng.exponential(size=(self.B, self.T, self.K))
        if self.gates == "extreme":  # now and then nothing at all passes
            arrays["log_gates"][:, self.T // 2 :: 7] = -1e30
            arrays["log_gates"][:, self.T // 3 :] *= rng.random((self.B, self.T - self.T // 3, self.K)) < 0.5
        arrays = {name: x.astype(np.float32).astype(np.float64) for name, x in arrays.items()}
        if self.segments:
            arrays["segment_ids"] = self._segment_ids(rng)
        return arrays

    def _segment_ids(self, rng: np.random.Generator) -> np.ndarray:
        """Documents of uneven lengths, padding in the middle of a row and, for T = 63, at its end."""
        changes = rng.random((self.B, self.T)) < 6 / self.T
        changes[:, 0] = False
        ids = np.cumsum(changes, axis=1) + 1
        if self.T == 63:
            ids[:, 50:] = 0
        ids[0, self.T // 4 : self.T // 4 + self.T // 12] = 0
        return ids.astype(np.int32)


VECTOR_SPECS = (  # of gates of every dim; degree 0 is Taylor's kernel
    ArgSpec(degree=2, gates="vector", T=37, D=6, Dv=5, H=4, K=2, segments=True, initial_state=True),
    ArgSpec(degree=4, gates="vector", T=1, D=5, H=2, K=1, segments=True, initial_state=True),
    ArgSpec(degree=0, gates="vector", T=96, D=7, Dv=5, H=4, K=2, segments=True, initial_state=True),
    ArgSpec(degree=4, gates="vector", T=96, D=4, Dv=5, H=2, K=2),
    ArgSpec(degree=2, gates="vector", T=1000, D=8, H=2, K=1, segments=True, initial_state=True),
)


def _directions(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Vectors around one line, pointing either way: scores of both signs, and rows that are well conditioned."""
    return (1.0 + 0.3 * rng.normal(size=shape)) * rng.choice([-1.0, 1.0], size=(*shape[:-1], 1))
