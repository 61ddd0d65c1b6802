"""A family of models of another library: its configuration and its tensors, each as a table read in both directions."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sympow_jax.config import Config, ConfigError
from sympow_jax.convert.layouts import Layout
from sympow_jax.convert.parts import REQUIRED, NotExactError, Part

METADATA = frozenset((  # of no effect on the logits
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "unk_token_id", "_name_or_path", "name_or_path", "initializer_range",
    "attention_dropout", "hidden_dropout", "residual_dropout", "embedding_dropout", "resid_pdrop", "embd_pdrop",
    "attn_pdrop", "classifier_dropout", "summary_type", "summary_use_proj", "summary_activation",
    "summary_proj_to_labels", "summary_first_dropout", "task_specific_params", "id2label", "label2id",
    "gradient_checkpointing", "pretraining_tp", "slow_but_exact", "return_dict", "problem_type", "output_attentions",
    "output_hidden_states", "torchscript", "finetuning_task", "prefix", "do_sample", "max_length", "temperature",
    "top_k", "top_p", "_attn_implementation_autoset",
))  # fmt: skip
_NEUTRAL = {
    "is_encoder_decoder": False, "add_cross_attention": False, "chunk_size_feed_forward": 0, "is_decoder": False,
    "tie_encoder_decoder": False, "use_bfloat16": False, "pruned_heads": {}, "use_bidirectional_attention": False,
    "rope_interleaved": False, "use_mrope": False,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One of their tensors and the arrays of ours that it holds.

    Attributes:
      theirs: its name, {} standing for the number of a layer; "" where they have no such tensor and zeros are meant.
      ours: names by layer, "layers/{}/mixer/query/kernel" or "embedding/embedding".
      layout: how the arrays lie in it.
    """

    theirs: str
    ours: tuple[str, ...]
    layout: Layout


@dataclasses.dataclass(frozen=True)
class Family:
    """A family.

    Attributes:
      model_type: its name in config.json.
      architecture: the class that its models are.
      parts: the table of its configuration.
      settings: keys of ours that are the same for all its models.
      tensors: the table of its tensors, for a configuration of ours. Rows whose arrays a model does not have do not
        count.
      duplicate: (name, name of the tensor that it must equal) of what some files hold twice.
      prefix: the beginning of names that files of the bare model lack.
      buffers: ends of the names of tensors that are no parameters.
      metadata: further keys of its configuration of no effect on the logits.
      aliases: another name of a key -> the name in the table.
    """

    model_type: str
    architecture: str
    parts: tuple[Part, ...]
    settings: Mapping[str, Any]
    tensors: Callable[[Config], Sequence[Tensor]]
    duplicate: tuple[str, str]
    prefix: str
    buffers: tuple[str, ...] = ()
    metadata: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """Our values of a foreign configuration.

        Raises:
          ConfigError: a key that is not understood and not at its default, or a value that cannot be expressed.
        """
        theirs = {self.aliases.get(name, name): value for name, value in theirs.items()}
        ours = dict(self.settings)
        for part in self.parts:
            ours |= part.read(theirs)
        known = {*itertools.chain.from_iterable(part.names for part in self.parts)} | METADATA | self.metadata
        for name, value in theirs.items():
            if name not in known and value is not None and value != _NEUTRAL.get(name, REQUIRED):
                raise ConfigError(f"{name} = {str(value)[:60]!r}: this key of {self.model_type} is not understood")
        return ours

    def write(self, ours: Mapping[str, Any]) -> dict[str, Any]:
        """The foreign configuration of our values; NotExactError for what it has no key for."""
        theirs: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        for part in self.parts:
            theirs |= part.write(ours)
        return theirs


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor of one model: its name ("" for zeros), our arrays in it, their shapes and their layout."""

    theirs: str
    ours: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    layout: Layout

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.layout.shape(self.shapes)


def pieces(family: Family, config: Config, shapes: Mapping[str, tuple[int, ...]]) -> list[Piece]:
    """The tensors that hold our arrays, given by layer with their shapes, each of them once.

    Raises:
      NotExactError: an array of ours that the family has no tensor for.
    """
    found, left = [], dict(shapes)
    for row in family.tensors(config):
        for layer in range(config.model.num_layers) if "{}" in row.ours[0] else (0,):
            ours = tuple(name.format(layer) for name in row.ours)
            if not all(name in left for name in ours):
                continue
            found.append(Piece(row.theirs.format(layer), ours, tuple(left.pop(name) for name in ours), row.layout))
    if left:
        raise NotExactError(f"the parameter {next(iter(left))}")
    return found
