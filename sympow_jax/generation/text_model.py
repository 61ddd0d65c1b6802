"""A model of texts: what a harness asks of it, log-likelihoods of continuations and of whole texts, and greedy text."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sympow_jax.config import ConfigError
from sympow_jax.evals.continuations import ContinuationScorer
from sympow_jax.generation.decoder import Decoder
from sympow_jax.generation.sampling import Sampling
from sympow_jax.generation.side_by_side import greedy_texts
from sympow_jax.generation.text import generate
from sympow_jax.input_pipeline.tokenizers import Tokenizer
from sympow_jax.models.model import Model
from sympow_jax.typing import PyTree

_SAMPLING = ("temperature", "top_k", "top_p")
_LENGTH = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_WITHOUT_EFFECT = {  # options that are not offered, at the value that changes nothing
    "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1, "length_penalty": 1, "no_repeat_ngram_size": 0,
    "frequency_penalty": 0, "presence_penalty": 0, "min_p": 0, "typical_p": 1,
}  # fmt: skip
DEFAULT_NEW_TOKENS = 256


class TextModel:
    """Scores and continues texts.

    Args:
      model, params, tokenizer: of a run; see sympow_jax.loading.load.
      batch_size: rows that are scored, or continued, side by side.
      bos: whether texts begin with BOS, as the texts of training do.

    Attributes:
      scorer: of continuations.
    """

    def __init__(self, model: Model, params: PyTree, tokenizer: Tokenizer, *, batch_size: int = 16, bos: bool = True):
        self.tokenizer, self._bos, self._model = tokenizer, bos, model
        chunk_size = model.config.evaluation.chunk_size
        self.scorer = ContinuationScorer(model, params, batch_size=batch_size, chunk_size=chunk_size)
        self._decoder, self._batch = Decoder(*_on_one_device(model, params)), batch_size
        self._numbers = itertools.count()  # of requests for text

    @property
    def num_programs(self) -> int:
        """Programs compiled so far."""
        return self.scorer.num_programs + self._decoder.num_programs

    def encode(self, text: str, *, bos: bool | None = None) -> list[int]:
        """The ids of a text, after BOS unless that is off."""
        start = [self.tokenizer.bos_id] if (self._bos if bos is None else bos) else []
        return start + self.tokenizer.encode(text).tolist()

    def log_likelihoods(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """(log p(continuation | context) in nats, whether it is the greedy one) of pairs of ids.

        An empty context is BOS. Where positions are bounded (learned_absolute), the last tokens that fit are read.

        Raises:
          ConfigError: a continuation that is empty, or longer than the positions.
        """
        rows, counts = [], []
        for context, continuation in pairs:
            if not continuation:
                raise ConfigError("an empty continuation has no log-likelihood; leave the request out")
            row = [*(context or [self.tokenizer.bos_id]), *continuation]
            kept = row if self._model.max_length is None else row[-self._model.max_length - 1 :]
            if len(kept) <= len(continuation):
                raise ConfigError(
                    f"a continuation of {len(continuation):,} tokens: learned_absolute has {self._model.max_length:,} "
                    "positions (position.max_length); use a shorter one"
                )
            rows.append(np.asarray(kept, np.int32))
            counts.append(len(continuation))
        return self.scorer.scores(rows, counts)

    def whole(self, texts: Sequence[str]) -> list[float]:
        """log p(text) in nats, each in one pass from BOS; of an empty text 0.

        Where positions are bounded, a text is read in stretches of as many tokens, the last with all context that fits.
        """
        pieces = [list(self._stretches(self.encode(text, bos=False))) for text in texts]
        found = iter(self.log_likelihoods([pair for pairs in pieces for pair in pairs]))
        return [sum(next(found)[0] for _ in pairs) for pairs in pieces]

    def _stretches(self, ids: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """(context, ids to score) that cover `ids` once."""
        bound = self._model.max_length or max(1, len(ids))
        row = [self.tokenizer.bos_id, *ids]
        for start in range(0, len(ids), bound):
            stop = min(start + bound, len(ids))
            yield row[max(0, stop - bound) : start + 1], row[start + 1 : stop + 1]

    def continuations(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """The text after each prompt, up to a stop string, the end of the text, or the most new tokens.

        Greedy ones are continued side by side; drawn ones, and all on a mesh that cuts the model, one by one. The n-th
        request since this object was made draws with seed n: a repeated one differs, and the same calls give the same.

        Args:
          requests: (prompt, options): `until` (a text or several), `max_gen_toks`, `do_sample`, `temperature`, `top_k`,
            `top_p`, as tasks spell them; without do_sample, or at temperature 0, the most likely token is taken. Others
            are legal at the value that changes nothing, `num_beams` 1 for instance.

        Raises:
          ConfigError: an option that is not known, or out of range.
        """
        asked = [self._asked(prompt, options) for prompt, options in requests]
        mesh = self._decoder.model.mesh
        alone = mesh is not None and mesh.size > 1
        found = {n: self._alone(each) for n, each in enumerate(asked) if alone or each.sampling.temperature}
        greedy = sorted((n for n in range(len(asked)) if n not in found), key=lambda n: -asked[n].length)
        longest = max((each.length for each in asked), default=0)
        while greedy:
            room = asked[greedy[0]].length if self._model.depends_on_length else longest
            same = sum(asked[n].length == room for n in greedy) if self._model.depends_on_length else len(greedy)
            numbers, greedy = greedy[: min(self._batch, same)], greedy[min(self._batch, same) :]
            rows = [asked[n] for n in numbers]
            texts = greedy_texts(
                self._decoder,
                self.tokenizer,
                [row.ids for row in rows],
                max_new_tokens=[row.most for row in rows],
                stop=[row.stop for row in rows],
                max_length=room,
                batch_size=self._batch,
            )
            found |= dict(zip(numbers, texts, strict=True))
        return [found[n] for n in range(len(asked))]

    def _asked(self, prompt: str, options: Mapping[str, Any]) -> "_Asked":
        options = dict(options)
        until = options.pop("until", None) or []
        stop = [until] if isinstance(until, str) else list(until)
        lengths = [options.pop(name) for name in _LENGTH if name in options]
        most = int(lengths[0]) if lengths else DEFAULT_NEW_TOKENS
        chosen = {name: options.pop(name) for name in _SAMPLING if name in options} | {"seed": next(self._numbers)}
        sampling = Sampling(**chosen) if options.pop("do_sample", False) else Sampling(temperature=0.0)
        _check_others(options)
        ids = self.encode(prompt) or [self.tokenizer.bos_id]
        if self._model.max_length is not None:
            ids = ids[-max(1, self._model.max_length - most) :]
        return _Asked(ids, most, sampling, [text for text in stop if text])

    def _alone(self, asked: "_Asked") -> str:
        stream = self._decoder.start(1, asked.length)
        self._decoder.read(stream, np.asarray([asked.ids], np.int32))
        options = {"sampling": asked.sampling, "max_new_tokens": asked.most, "stop": asked.stop}
        return "".join(new[0] for new in generate(self._decoder, stream, self.tokenizer, **options))


def _check_others(options: Mapping[str, Any]) -> None:
    """Raises ConfigError for an option that is not known, or would change something."""
    for name, value in options.items():
        if name not in _WITHOUT_EFFECT:
            known = ", ".join(["until", "do_sample", *_LENGTH, *_SAMPLING])
            raise ConfigError(f"generation option {name!r} is not known; these are: {known}")
        if value != _WITHOUT_EFFECT[name]:
            legal = f"legal is {_WITHOUT_EFFECT[name]}, which changes nothing"
            raise ConfigError(f"generation option {name} = {value!r}: {legal}; take it out of the task")


def _on_one_device(model: Model, params: PyTree) -> tuple[Model, PyTree]:
    """The same where each device of this process, and of no other, has all of the model: decoding waits for memory."""
    mesh = model.mesh
    if mesh is None or mesh.size != mesh.shape["data"] or jax.process_count() > 1:
        return model, params
    return Model(model.config, model.vocab_size), jax.tree.map(lambda x: x.addressable_data(0), params)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A text to be continued."""

    ids: list[int]
    most: int
    sampling: Sampling
    stop: list[str]

    @property
    def length(self) -> int:
        """Tokens that its stream must hold."""
        return len(self.ids) + self.most
