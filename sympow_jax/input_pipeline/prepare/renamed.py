"""Names that are made up anew in each document: what they are can be read in its past only, however far that is."""

import ast
import builtins
import hashlib
import keyword
import re
import warnings
from collections.abc import Iterable

from sympow_jax.input_pipeline.tasks.words import NUM_TEXT_WORDS, spell

KEPT = {*keyword.kwlist, *keyword.softkwlist, *dir(builtins), "self", "cls"}
_WORD = re.compile(r"[A-Za-z_]\w*")


def rename(key: str, texts: Iterable[str]) -> list[str]:
    """The texts of one document with every name that they define, of three letters and more, made up from `key`.

    A name is the same word wherever it stands in the document, comments and strings included, and another one in
    the next document. Keywords, builtins and names with two underscores in front stay.
    """
    texts = list(texts)
    defined = {name for text in texts for name in _defined(text)}
    words = {name: _made_up(key, name) for name in defined}
    return [_WORD.sub(lambda found: words.get(found[0], found[0]), text) for text in texts]


def syntax_nodes(text: str) -> list[ast.AST]:
    """All nodes of a module, none where it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old spellings in the files
            return list(ast.walk(ast.parse(text)))
    except SyntaxError:
        return []


def _made_up(key: str, name: str) -> str:
    number = int.from_bytes(hashlib.sha256(f"{key}\0{name}".encode()).digest()[:8], "big")
    return spell(number % NUM_TEXT_WORDS)


def _defined(text: str) -> set[str]:
    """Functions, classes, arguments, variables and attributes that are assigned to."""
    names = set()
    for node in syntax_nodes(text):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return {name for name in names if len(name) > 2 and not name.startswith("__")} - KEPT
