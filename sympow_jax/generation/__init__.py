"""Generation: read a prompt, sample from a state token by token, keep states, check that all forms agree.

model, params, tokenizer = sympow_jax.load("runs/first")
decoder = Decoder(model, params)
stream = decoder.start(batch_size=1, max_length=2048)
decoder.read(stream, prompt_tokens(tokenizer, "import jax"))
for pieces in generate(decoder, stream, tokenizer, sampling=Sampling(temperature=0.8), max_new_tokens=100):
    print(pieces[0], end="", flush=True)
"""

from sympow_jax.generation.decoder import Decoder, Stream
from sympow_jax.generation.sampling import Sampling, sample
from sympow_jax.generation.saved_state import load_state, save_state
from sympow_jax.generation.text import TextStream, check_stop, generate, prompt_tokens

__all__ = [
    "Decoder", "Sampling", "Stream", "TextStream", "check_stop", "generate", "load_state",
    "prompt_tokens", "sample", "save_state",
]  # fmt: skip
