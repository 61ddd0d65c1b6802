"""From a config to a model: pure functions on a plain nested dict of parameters."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from sympow_jax import ops, sharding
from sympow_jax.config import Config, ConfigError, LayerSpec, absolute_position, layer_specs, linear_specs
from sympow_jax.layers.state_specs import state_specs
from sympow_jax.models.flops import expansion
from sympow_jax.models.loss import token_distance, token_logits, token_nll, token_scores
from sympow_jax.models.transformer import Transformer
from sympow_jax.ops.linear_attention import accelerators, dispatch
from sympow_jax.ops.platform import target_platform
from sympow_jax.typing import AnyArray, Array, Bool, Float, Int, PyTree


def resolve_implementation(config: Config) -> Config:
    """Replaces attention.implementation = "auto" by the cheapest form for the trained length and the kernel.

    One form serves all linear kernels: a quadratic one where a bias needs it, else that of the kernel for which a
    linear form pays first. "pallas" is the kernel of a TPU, or of a program that is being compiled for one.
    Softmax alone stays "auto" on accelerators: each call has the platform's kernel if that can do it, and tiles if not.
    """
    if config.attention.implementation != "auto":
        return config
    specs = linear_specs(config)
    forms = [_cheapest(spec, config) for spec in specs]
    chosen = next(iter(forms), "blockwise" if target_platform() == "cpu" else "auto")
    if any(spec.attention.has_additive_bias for spec in specs):
        chosen = "blockwise"
    elif "chunked" in forms:
        preferred = (accelerators.preferred(expansion(spec, config.model)[0], **_sizes(spec, config)) for spec in specs)
        chosen = "pallas" if all(preferred) else "chunked"
    return _with_implementation(config, chosen)


def _cheapest(spec: LayerSpec, config: Config) -> str:
    kernel, num_features = expansion(spec, config.model)
    has_bias = spec.attention.has_additive_bias
    return dispatch.cheapest(kernel, config.data.seq_len, num_features, has_bias=has_bias)


def on_this_platform(config: Config) -> Config:
    """A trained model's config with the same sums in XLA's form where its "pallas" kernel does not run."""
    if config.attention.implementation != "pallas":
        return config
    specs, m = linear_specs(config), config.model
    obstacles = [accelerators.obstacle(expansion(spec, m)[0], **_sizes(spec, config)) for spec in specs]
    return _with_implementation(config, "chunked") if any(obstacles) else config


def _with_implementation(config: Config, chosen: str) -> Config:
    return dataclasses.replace(config, attention=dataclasses.replace(config.attention, implementation=chosen))


def _sizes(spec: LayerSpec, config: Config) -> dict[str, Any]:
    """Of a layer's call, as the kernels of accelerators judge it."""
    m = config.model
    sizes = {"head_dim": spec.qk_head_dim(m), "value_dim": m.head_dim}
    return sizes | {"dtype": jnp.dtype(m.dtype), "vector_gates": spec.attention.gate == "vector"}


@dataclasses.dataclass(frozen=True)
class Model:
    """The functions of one architecture. Parameters and states are arguments, never attributes.

    Attributes:
      config: the resolved run configuration.
      vocab_size: size of the token alphabet. V, the number of logits, is model.vocab_size where that is set.
      mesh: devices that all functions with parameters and all states are spread over, as far as their axes divide rows
        and tokens; None is one device. `init` gives arrays of one device unless it is compiled with shardings, as
        `create_train_state` does.
    """

    config: Config
    vocab_size: int
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        rows = self.config.model.vocab_size
        if 0 < rows < self.vocab_size:
            raise ConfigError(
                f"model.vocab_size = {rows}: the tokenizer has {self.vocab_size} ids; use 0, or at least that"
            )

    @functools.cached_property
    def _abstract(self) -> tuple[Any, Any]:
        return nnx.split(nnx.eval_shape(lambda: Transformer(self.config, self.vocab_size, rngs=nnx.Rngs(0))))

    def bind(self, params: PyTree) -> Transformer:
        """The Flax module with these parameters, to look inside."""
        graph, state = self._abstract
        state = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    def init(self, key: Array) -> PyTree:
        """Fresh parameters, a nested dict with stable names."""

        @jax.jit
        def create(key):
            return nnx.to_pure_dict(nnx.state(Transformer(self.config, self.vocab_size, rngs=nnx.Rngs(key)), nnx.Param))

        return create(key)

    @property
    def streams_constant(self) -> bool:
        """True when the state of a stream has a size that does not depend on its length."""
        return all(spec.streams_constant for spec in layer_specs(self.config))

    @property
    def streams(self) -> bool:
        """True when every layer can read a stream; a linear kernel with an additive bias cannot."""
        return all(spec.streams for spec in layer_specs(self.config))

    @property
    def max_length(self) -> int | None:
        """Most tokens that a sequence can have, the rows of a table of positions; None where nothing bounds it."""
        learned = absolute_position(self.config) == "learned_absolute"
        return self.config.position.max_length if learned else None

    @property
    def depends_on_length(self) -> bool:
        """True when the longest context of the stream changes the result (dynamic NTK scaling)."""
        return self.config.position.scaling == "dynamic_ntk"

    def initial_state(self, batch_size: int, max_length: int, *, differentiable: bool = False) -> PyTree:
        """The empty state of `batch_size` streams of at most max_length tokens.

        Of constant size for linear kernels, windows and convolutions; a cache of max_length keys and values for
        softmax attention. No two of its arrays share a buffer. Gradients flow through all of it but the exact
        positions of learned_rope, unless it is `differentiable`: then they have float twins, zeros.
        """
        return self._create_state(batch_size, max_length, differentiable)

    def abstract_state(self, batch_size: int, max_length: int) -> PyTree:
        """Shapes, dtypes and, on the mesh, shardings of `initial_state`."""
        state = jax.eval_shape(lambda: self.initial_state(batch_size, max_length))
        if self.mesh is None:
            return state
        with sharding.use_mesh(self.mesh):
            return sharding.with_shardings(state, sharding.named_shardings(state_specs(state), self.mesh))

    @functools.cached_property
    def _create_state(self) -> Callable[[int, int, bool], PyTree]:
        def create(batch_size: int, max_length: int, differentiable: bool) -> PyTree:
            model = nnx.eval_shape(lambda: Transformer(self.config, self.vocab_size, rngs=nnx.Rngs(0)))
            with sharding.use_mesh(self.mesh):
                state = model.initial_state(batch_size, max_length)
                return self._lay_out(ops.positions.differentiable(state) if differentiable else state)

        return jax.jit(create, static_argnums=(0, 1, 2))

    def _lay_out(self, state: PyTree) -> PyTree:
        """The state where it lives on the mesh; runs inside `use_mesh`."""
        if self.mesh is None:
            return state
        return jax.lax.with_sharding_constraint(state, sharding.named_shardings(state_specs(state), self.mesh))

    @property
    def _logit_options(self) -> dict[str, float]:
        m = self.config.model
        return {"scale": m.logit_scale, "softcap": m.logit_softcap}

    @property
    def _loss_options(self) -> dict[str, Any]:
        return {"block": self.config.model.loss_block, **self._logit_options}

    def _hidden(self, params, tokens, segment_ids, positions, state, length):
        """Final hidden states, the output projection and the next state; runs inside `use_mesh`."""
        model = self.bind(params)
        if state is None:
            length = length or max(tokens.shape[1], self.config.position.original_length)
        hidden, state = model(tokens, segment_ids=segment_ids, positions=positions, state=state, length=length)
        return hidden, model.output_kernel(), None if state is None else self._lay_out(state)

    def logits(
        self,
        params: PyTree,
        inputs: Int[AnyArray, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        state: PyTree | None = None,
        length: int = 0,
    ) -> tuple[Float[Array, "B T V"], PyTree | None]:
        """Next-token logits, float32, and the next state when one is given.

        Args:
          params: from `init`, or a checkpoint.
          inputs: token ids.
          segment_ids: packed documents; 0 is padding.
          positions: absolute positions; None continues the stream's, or counts from 0.
          state: from `initial_state` or an earlier call: the tokens before `inputs`.
          length: the longest context of the stream, which dynamic_ntk scales to; 0 = what was read with this call.
        """
        with sharding.use_mesh(self.mesh):
            hidden, kernel, state = self._hidden(params, inputs, segment_ids, positions, state, length)
        return token_logits(hidden, kernel, **self._logit_options), state

    def next_logits(
        self, params: PyTree, inputs: Int[AnyArray, "B T"], state: PyTree, *, length: int = 0
    ) -> tuple[Float[Array, "B vocab_size"], PyTree]:
        """The logits after the last of `inputs`, float32, and the next state; other arguments as in `logits`.

        They are those of the token alphabet: a surplus row of the embedding is no token to be drawn.
        """
        with sharding.use_mesh(self.mesh):
            hidden, kernel, state = self._hidden(params, inputs, None, None, state, length)
        return token_logits(hidden[:, -1], kernel[:, : self.vocab_size], **self._logit_options), state

    def nll(
        self,
        params: PyTree,
        inputs: Int[AnyArray, "B T"],
        targets: Int[AnyArray, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        state: PyTree | None = None,
        length: int = 0,
    ) -> tuple[Float[Array, "B T"], PyTree | None]:
        """Loss of each target, nats, float32; other arguments as in `logits`."""
        with sharding.use_mesh(self.mesh):
            hidden, kernel, state = self._hidden(params, inputs, segment_ids, positions, state, length)
            return token_nll(hidden, kernel, targets, **self._loss_options)[0], state

    def scores(
        self,
        params: PyTree,
        inputs: Int[AnyArray, "B T"],
        targets: Int[AnyArray, "B T"],
        *,
        state: PyTree | None = None,
        length: int = 0,
    ) -> tuple[tuple[Float[Array, "B T"], Bool[Array, "B T"]], PyTree | None]:
        """((loss of each target, whether it is the most likely token), next state); arguments as in `logits`."""
        with sharding.use_mesh(self.mesh):
            hidden, kernel, state = self._hidden(params, inputs, None, None, state, length)
            return token_scores(hidden, kernel, targets, **self._loss_options), state

    def losses(
        self,
        params: PyTree,
        inputs: Int[AnyArray, "B T"],
        targets: Int[AnyArray, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        softmax_share: Float[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        """(nll, log Z) of each target, float32; Z is the softmax's normaliser, which z-loss keeps near 1.

        softmax_share is that of `features`.
        """
        features = self.features(params, inputs, segment_ids, positions, softmax_share=softmax_share)
        return self.token_losses(features, targets)

    def token_losses(
        self, features: "Features", targets: Int[AnyArray, "B T"]
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        """`losses` of what `features` gave."""
        with sharding.use_mesh(self.mesh):
            return token_nll(features.hidden, features.kernel, targets, **self._loss_options)

    def features(
        self,
        params: PyTree,
        inputs: Int[AnyArray, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        *,
        softmax_share: Float[Array, ""] | None = None,
        with_layers: bool = False,
        state: PyTree | None = None,
        length: int = 0,
    ) -> "Features":
        """What a model makes of whole sequences before the logits; arguments as in `losses`.

        softmax_share is alpha of attention.blend_steps, the weight of the attention that this one grows out of; None,
        as in all other functions, is the model without it. `state` and `length` as in `logits`.
        """
        outputs: list[Array] = []
        if state is None:
            length = length or max(inputs.shape[1], self.config.position.original_length)
        options: dict[str, Any] = {"length": length, "softmax_share": softmax_share}
        with sharding.use_mesh(self.mesh):
            model = self.bind(params)
            known = {"segment_ids": segment_ids, "positions": positions}
            hidden, state = model(inputs, **known, state=state, outputs=outputs if with_layers else None, **options)
            state = None if state is None else self._lay_out(state)
            return Features(hidden, model.output_kernel(), tuple(outputs), state)

    def divergence(self, features: "Features", others: "Features") -> Float[Array, "B T"]:
        """KL(others' distribution of the next token || this one's) at each token, nats, float32."""
        return self._distance("divergence", features, others)

    def variation(self, features: "Features", others: "Features") -> Float[Array, "B T"]:
        """Total variation distance of the two distributions of the next token at each token, from 0 to 1, float32."""
        return self._distance("variation", features, others)

    def _distance(self, name: str, features: "Features", others: "Features") -> Float[Array, "B T"]:
        with sharding.use_mesh(self.mesh):
            pair = (features.hidden, others.hidden), (features.kernel, others.kernel)
            return token_distance(name, *pair, **self._loss_options)


class Features(NamedTuple):
    """Final hidden states [B, T, E], projection to logits [E, V], layer outputs, [depth, B, T, E] a run, next state."""

    hidden: Array
    kernel: Array
    layers: tuple[Array, ...]
    state: PyTree = None
