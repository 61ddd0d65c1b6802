"""Tiny tokenizers built as those of known models are, each trained on a text of a few hundred characters."""

import json
from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = (
    "The quick brown fox, they say, jumps over 12,345 lazy dogs.\n\n  def f(x):\n\treturn x ** 2  # naïve\n"
    "Größe 日本語 🙂 is one text; the fox and the dogs are in the next one.  Two  spaces, three   spaces.\n"
)
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _train(tokenizer: Tokenizer, trainer: trainers.Trainer) -> dict:
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return json.loads(tokenizer.to_str())


def _byte_level(special: Sequence[str], splits: Sequence[str], normalizer: normalizers.Normalizer | None = None) -> str:
    library = Tokenizer(models.BPE(ignore_merges=True))
    if normalizer is not None:
        library.normalizer = normalizer
    steps: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splits]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=[*special], initial_alphabet=alphabet, show_progress=False
    )
    return json.dumps(_train(library, trainer))


def _byte_fallback(
    normalizer: normalizers.Normalizer | None,
    pre_tokenizer: pre_tokenizers.PreTokenizer | None,
    *,
    strip: bool,
    special: Sequence[str | AddedToken] = (),
) -> str:
    """A BPE of ASCII pieces with U+2581 for the space; other characters are bytes, as most are in a large text."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("▁*[^▁]+"), "isolated")
    model = _train(trained, trainers.BpeTrainer(vocab_size=120, show_progress=False))["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces = names + [piece for piece in model["vocab"] if piece.isascii() or piece.replace("▁", "").isascii()]
    merges = [tuple(pair) for pair in model["merges"] if "".join(pair).replace("▁", "").isascii()]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    bpe = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    library = Tokenizer(bpe)
    if normalizer is not None:
        library.normalizer = normalizer
    if pre_tokenizer is not None:
        library.pre_tokenizer = pre_tokenizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    library.add_special_tokens(["<unk>", "<s>", "</s>", *special])
    return library.to_str()


def _spaces() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def llama3() -> str:
    """Byte-level BPE, numbers in threes."""
    return _byte_level(["<|begin_of_text|>", "<|eot_id|>"], [_WORDS % r"\p{N}{1,3}"])


def qwen() -> str:
    """Byte-level BPE of NFC text, digits one by one."""
    return _byte_level(["<|endoftext|>", "<|im_end|>"], [_WORDS % r"\p{N}"], normalizers.NFC())


def deepseek() -> str:
    """Byte-level BPE after a chain of splits."""
    splits = [r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _WORDS % r"\p{N}+"]
    return _byte_level(["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"], splits)


def llama2() -> str:
    """Byte fallback; the normalizer puts a space in front, which the decoder takes away."""
    return _byte_fallback(_spaces(), None, strip=True)


def mistral() -> str:
    """Byte fallback; a Metaspace step puts the space in front of the first word only."""
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    return _byte_fallback(None, metaspace, strip=True)


def gemma() -> str:
    """Byte fallback without a space in front."""
    split = pre_tokenizers.Split(" ", "merged_with_previous")
    return _byte_fallback(normalizers.Replace(" ", "▁"), split, strip=False)


def phi3() -> str:
    """Llama 2's with special tokens that take the spaces behind them."""
    special = [AddedToken(name, rstrip=True, special=True) for name in ("<|user|>", "<|end|>")]
    return _byte_fallback(_spaces(), None, strip=True, special=special)


def unigram() -> str:
    """SentencePiece's Unigram: pieces with scores, every space kept as U+2581."""
    library = Tokenizer(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    library.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=160, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    return json.dumps(_train(library, trainer))


STYLES = {
    make.__name__: make for make in (llama3, qwen, deepseek, llama2, mistral, gemma, phi3, unigram)
}  # the function that makes each tokenizer.json
