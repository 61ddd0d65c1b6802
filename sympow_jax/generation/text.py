"""Text as it is generated: whole characters only, and nothing from a stop string on."""

import re
from collections.abc import Iterator, Sequence

import numpy as np

from sympow_jax.config import ConfigError
from sympow_jax.generation.decoder import Decoder, Stream
from sympow_jax.generation.sampling import Sampling, sample
from sympow_jax.input_pipeline.tokenizers import Tokenizer

MAX_STOP_LENGTH = 256  # characters; as many are held back while they may be the start of a stop string
_WINDOW = 64  # tokens that are decoded together: a token's text may depend on its neighbours
_UNSETTLED = re.compile("\ufffd?(?:\\\\(?:u[0-9a-fA-F]{0,3})?)?$")  # half a character, or half an escape of one


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

    Attributes:
      stopped: a stop string, or BOS (the start of another text), has come; everything later is ignored.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        check_stop(stop)
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._known = ""  # the text of _ids that was settled so far
        self._held = ""  # settled, but it may be the start of a stop string

    def push(self, token: int) -> str:
        """The text that is certain now that `token` has come; empty after a stop."""
        if self.stopped:
            return ""
        if token == self._tokenizer.bos_id:
            return self.finish()
        self._ids.append(int(token))
        text = self._tokenizer.decode(self._ids)
        unsettled = _UNSETTLED.search(text)
        settled = text[: unsettled.start()] if unsettled else text
        new, self._known = settled[len(self._known) :], settled
        if settled == text and len(self._ids) >= 2 * _WINDOW:
            self._ids = self._ids[-_WINDOW:]
            self._known = self._tokenizer.decode(self._ids)
        return self._before_stop(new)

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
    texts = [TextStream(tokenizer, stop) for _ in range(stream.batch_size)]
    for _ in range(max_new_tokens):
        if stream.logits is None:
            raise ConfigError("the stream is empty: read at least BOS before generating")
        tokens = np.asarray(sample(stream.logits, stream.tokens_read, sampling))
        decoder.read(stream, tokens[:, None])
        yield [text.push(token) for text, token in zip(texts, tokens, strict=True)]
        if all(text.stopped for text in texts):
            return
    yield [text.finish() for text in texts]
