"""Text as it is generated: whole characters only, and nothing from a stop string on."""

import re
from collections.abc import Iterator, Sequence

import numpy as np

from sympow_jax.config import ConfigError
from sympow_jax.generation.decoder import RECENT, Decoder, Stream
from sympow_jax.generation.sampling import Sampling, sample
from sympow_jax.input_pipeline.tokenizers import Tokenizer

MAX_STOP_LENGTH = 256  # characters; as many are held back while they may be the start of a stop string
# What later tokens may change: part of an escape, or of a character, whose bytes may show as U+FFFD each, and with byte
# fallback those of whole characters before it too.
_UNSETTLED = re.compile("\ufffd*(?:\\\\(?:u[0-9a-fA-F]{0,3})?)?\\Z")


def prompt_tokens(tokenizer: Tokenizer, text: str, *, batch_size: int = 1, bos: bool = True) -> np.ndarray:
    """[B, T] int32, BOS and the tokens of `text`, the same in every row; an empty text is BOS alone."""
    ids = np.concatenate([[tokenizer.bos_id] if bos else [], tokenizer.encode(text)]).astype(np.int32)
    return np.broadcast_to(ids, (batch_size, len(ids)))


def check_stop(stop: Sequence[str]) -> None:
    """Raises ConfigError for a stop string that is empty or longer than MAX_STOP_LENGTH."""
    for text in stop:
        if not 1 <= len(text) <= MAX_STOP_LENGTH:
            raise ConfigError(f"--stop has {len(text):,} characters: legal are 1 to {MAX_STOP_LENGTH}")


class TextStream:
    """The text of one growing row of tokens.

    Args:
      tokenizer: of the tokens.
      stop: texts that end the row; one that is the name of a special token stands for that token.
      context: the tokens before the first one pushed. What a token says depends on those before it: a word that
        begins a text has no space before it in many tokenisers, and a character may be cut.

    Attributes:
      stopped: a stop string, EOS, or BOS (the start of another text), has come; everything later is ignored.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), context: Sequence[int] = ()):
        check_stop(stop)
        self.stopped = False
        special = [tokenizer.special_id(text) for text in stop]
        self._tokenizer = tokenizer
        self._stop = tuple(text for text, number in zip(stop, special, strict=True) if number is None)
        self._ends = {tokenizer.bos_id, *tokenizer.eos_ids, *special} - {None}
        self._ids = _whole_start(tokenizer, list(context)[-RECENT:])
        self._known = _UNSETTLED.sub("", tokenizer.decode(self._ids))  # the text of _ids that has been told
        self._waited = 0  # tokens without anything told
        self._held = ""  # settled, but it may be the start of a stop string

    def push(self, token: int) -> str:
        """The text that is certain now that `token` has come; empty after a stop."""
        if self.stopped:
            return ""
        if token in self._ends:
            return self.finish()
        self._ids.append(int(token))
        text = self._tokenizer.decode(self._ids)
        settled = _UNSETTLED.sub("", text)
        self._waited += 1
        if settled != text and len(settled) <= len(self._known):
            if self._waited < RECENT:
                return ""
            settled = text[:-3]  # bytes of no character; the last three may still become one
        self._waited = 0
        new, self._known = settled[len(self._known) :], max(settled, self._known, key=len)
        if len(self._ids) >= 2 * RECENT and settled == text:
            self._forget(text)
        return self._before_stop(new)

    def _forget(self, text: str) -> None:
        """Drops the oldest tokens, where the rest alone has the text that it has among them."""
        for start in range(len(self._ids) - RECENT, len(self._ids) - RECENT + 4):
            rest = self._tokenizer.decode(self._ids[start:])
            if text.endswith(rest):
                self._ids, self._known = self._ids[start:], rest
                return

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        if self.stopped:
            return ""
        text = self._before_stop(self._tokenizer.decode(self._ids)[len(self._known) :])
        if not self.stopped:
            text, self.stopped = text + self._held, True
        return text

    def _before_stop(self, new: str) -> str:
        text = self._held + new
        ends = [text.find(stop) for stop in self._stop if stop in text]
        if ends:
            self.stopped = True
            return text[: min(ends)]
        held = max((n for stop in self._stop for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _whole_start(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """`ids` without the rest of a character that was cut at their start."""
    starts = (ids[start:] for start in range(min(4, len(ids))))
    return next((rest for rest in starts if not tokenizer.decode(rest).startswith("\ufffd")), ids)


def generate(
    decoder: Decoder,
    stream: Stream,
    tokenizer: Tokenizer,
    *,
    sampling: Sampling,
    max_new_tokens: int,
    stop: Sequence[str] = (),
) -> Iterator[list[str]]:
    """Samples tokens, reads each into the stream, and yields the new text of every row, "" where there is none.

    Ends after max_new_tokens or when all rows have stopped. The stream has then read all that was sampled, a stop
    string included; rows that stopped early have read on until the last one stopped.
    """
    texts = [TextStream(tokenizer, stop, row) for row in stream.recent.tolist()]
    for _ in range(max_new_tokens):
        if stream.logits is None:
            raise ConfigError("the stream is empty: read at least BOS before generating")
        tokens = np.asarray(sample(stream.logits, stream.tokens_read, sampling))
        decoder.read(stream, tokens[:, None])
        yield [text.push(token) for text, token in zip(texts, tokens.tolist(), strict=True)]
        if all(text.stopped for text in texts):
            return
    yield [text.finish() for text in texts]
