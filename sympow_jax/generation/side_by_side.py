"""The likeliest texts after several prompts, side by side: each row is a stream of its own, at a position of its own.

Prompts are read one after the other, by the programs that read any prompt; their states are then stacked, and one
program reads a token into each. So prompts of any lengths share few programs, and no row sees what pads another.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sympow_jax.generation.decoder import Decoder
from sympow_jax.generation.text import TextStream
from sympow_jax.input_pipeline.tokenizers import Tokenizer


def greedy_texts(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: Sequence[int],
    stop: Sequence[Sequence[str]],
    max_length: int,
    batch_size: int,
) -> list[str]:
    """The text after each of at most `batch_size` prompts, up to a stop string, the end, or the most new tokens.

    Args:
      decoder, tokenizer: of the model.
      prompts: token ids, at least one each.
      max_new_tokens: of each row.
      stop: texts that end each row.
      max_length: room of every row, prompt and new tokens.
      batch_size: rows that are read side by side; missing ones are copies of the first.
    """
    streams = []
    for ids in prompts:
        streams.append(decoder.start(1, max_length))
        decoder.read(streams[-1], np.asarray([ids], np.int32))
    texts = [TextStream(tokenizer, ends, ids) for ends, ids in zip(stop, prompts, strict=True)]
    pieces = [[] for _ in prompts]
    filled = [*streams, *[streams[0]] * (batch_size - len(streams))]
    state = _stack([stream.state for stream in filled])
    logits = jnp.concatenate([stream.logits for stream in filled])
    for count in range(max(max_new_tokens)):
        tokens = np.asarray(jnp.argmax(logits, axis=1), np.int32)
        for row, (text, most) in enumerate(zip(texts, max_new_tokens, strict=True)):
            if count < most:
                pieces[row].append(text.push(int(tokens[row])))
        if all(text.stopped or count + 1 >= most for text, most in zip(texts, max_new_tokens, strict=True)):
            break
        logits, state = decoder.read_each(state, tokens, streams[0].max_length)
    return ["".join([*parts, text.finish()]) for parts, text in zip(pieces, texts, strict=True)]


@jax.jit
def _stack(states: Sequence[object]) -> object:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
