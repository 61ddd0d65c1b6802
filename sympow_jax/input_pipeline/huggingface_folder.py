"""The folder in which transformers saves a tokenizer: tokenizer.json, and which of its tokens begin and end a text."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from sympow_jax.input_pipeline.huggingface import TOKENIZER_FILE, HuggingFaceTokenizer
from sympow_jax.input_pipeline.tokenizer_base import TokenizerError, one_line

_NAMED_IN = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")  # the first that does
_MODEL = "config.json"  # of the model: asked where none of those names any


def read_huggingface_folder(folder: str | pathlib.Path) -> HuggingFaceTokenizer:
    """The tokenizer of a folder with tokenizer.json, with the BOS, and all EOS, that its configuration files name.

    What those of the tokenizer leave open config.json says, if its ids are special tokens: the class of a model fills
    in numbers that nobody chose. Without a BOS there, EOS is what stands between documents, as in GPT-2; without both
    the rule of a lone tokenizer.json holds.
    """
    folder = pathlib.Path(folder)
    tokenizer = HuggingFaceTokenizer((folder / TOKENIZER_FILE).read_bytes())
    configs = {name: _read_object(folder / name) for name in (*_NAMED_IN, _MODEL) if (folder / name).is_file()}
    bos, eos = (_find(folder, configs, which, tokenizer) for which in ("bos_token", "eos_token"))
    first = [*bos, *eos][:1]
    return tokenizer.with_special(bos_id=first[0], eos_ids=eos) if first else tokenizer


def _read_object(path: pathlib.Path) -> dict[str, Any]:
    try:  # links (of a download cache) and control characters (in chat templates) are usual here, so no files.read_json
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"tokenizer = {str(path)!r}: no JSON ({one_line(error)})") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"tokenizer = {str(path)!r}: a JSON object is needed, not {type(value).__name__}")
    return value


def _find(
    folder: pathlib.Path, configs: Mapping[str, dict[str, Any]], which: str, tokenizer: HuggingFaceTokenizer
) -> list[int]:
    """The ids of the tokens that the files name, in their order: `bos_token` by its text, `bos_token_id` by numbers."""
    ids: list[int] = []
    for file, config in configs.items():
        name, numbers = config.get(which), config.get(f"{which}_id")
        name = name.get("content") if isinstance(name, dict) else name
        numbers = [] if numbers is None else numbers if isinstance(numbers, list) else [numbers]
        if file == _MODEL:
            name, numbers = None, [] if ids else [number for number in numbers if tokenizer.is_special(number)]
        named = {repr(name): tokenizer.id_of(name)} if name is not None else {str(n): n for n in numbers}
        for text, number in named.items():
            if number is None or not tokenizer.has_id(number):
                raise TokenizerError(
                    f"tokenizer = {str(folder / file)!r}: {which} {text} is no token of {TOKENIZER_FILE}; correct the "
                    "file, or save the tokenizer again"
                )
            ids += [number] if number not in ids else []
    return ids
