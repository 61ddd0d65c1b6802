"""The Python standard library joined by its imports, under names that only the document knows: far context helps.

Each document is up to `max_bytes` of modules that use one another, the imported one before the one that imports it, and
what they define has names made up for this document (`renamed.py`): each can be read in the past only, up to thousands
of bytes away. Each module is in one document, so that nothing of a held-out document stands in training.
"""

import ast
import collections
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from sympow_jax.input_pipeline.prepare.renamed import rename, syntax_nodes
from sympow_jax.input_pipeline.prepare.sources import Document, PythonStdlib

Uses = dict[tuple[str, str], int]  # (importing module, imported module) -> how often its names stand in the first


@dataclasses.dataclass(frozen=True)
class PythonImports:
    """The modules of PythonStdlib as documents of related modules.

    Attributes:
      max_bytes: of a document; a module that is longer is one by itself.
    """

    max_bytes: int = 65_536

    def describe(self) -> dict[str, Any]:
        """That of PythonStdlib, and how it is joined."""
        return PythonStdlib().describe() | {"kind": "python-imports", "max_bytes": self.max_bytes}

    def documents(self) -> Iterator[Document]:
        """One document for each group of modules; a line `# MODULE` stands before each."""
        files = {document.key: str(document.content) for document in PythonStdlib().documents()}
        for names in join_by_imports(files, self.max_bytes):
            key = "+".join(names)
            yield Document(key, "".join(rename(key, [f"# {name}\n{files[name]}\n" for name in names])))


def join_by_imports(files: Mapping[str, str], max_bytes: int) -> list[list[str]]:
    """Names of modules in groups, those that use each other most together, an imported one before its importer."""
    uses = {pair: count for name, text in files.items() for pair, count in _uses(name, text, files).items()}
    group: dict[str, tuple[str, ...]] = {name: (name,) for name in files}
    size = {name: len(text.encode()) for name, text in files.items()}
    for importer, imported in sorted(uses, key=lambda pair: (-uses[pair], pair)):
        one, other = group[importer], group[imported]
        if one is not other and sum(size[name] for name in (*one, *other)) <= max_bytes:
            for name in (*one, *other):
                group[name] = (*one, *other)
    return [_in_order(sorted(names), uses) for names in sorted({tuple(sorted(g)) for g in group.values()})]


def _in_order(names: list[str], uses: Uses) -> list[str]:
    """Depth first from the modules that nobody of the group imports: what is used most stands closest before."""
    imported = {b for a, b in uses if a in names and b in names}
    placed: dict[str, None] = {}
    seen: set[str] = set()

    def place(name: str) -> None:
        if name in seen:
            return
        seen.add(name)
        for other in sorted(names, key=lambda n: (uses.get((name, n), 0), n)):
            if (name, other) in uses:
                place(other)
        placed[name] = None

    for name in sorted(names, key=lambda n: (n in imported, n)):
        place(name)
    return list(placed)


def _uses(name: str, text: str, files: Mapping[str, str]) -> Uses:
    """How often names that `name` imports from each other file stand in its text."""
    nodes = syntax_nodes(text)
    comes_from: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            pairs = [(alias.asname or alias.name.split(".")[0], alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(name, node.level, node.module)
            pairs = [(alias.asname or alias.name, module, alias.name) for alias in node.names]
        else:
            continue
        for local, module, inside in pairs:
            source = _file(f"{module}.{inside}", files) or _file(module, files)
            if source and source != name:
                comes_from[local] = source
    counts = collections.Counter(node.id for node in nodes if isinstance(node, ast.Name) and node.id in comes_from)
    found: Uses = collections.defaultdict(int)
    for local, source in comes_from.items():
        found[name, source] += 1 + counts[local]
    return found


def _absolute(name: str, level: int, module: str | None) -> str:
    package = name.split("/")[: -level or None] if level else []
    return ".".join([*package, *([module] if module else [])])


def _file(module: str, files: Mapping[str, str]) -> str | None:
    path = module.strip(".").replace(".", "/")
    return next((name for name in (f"{path}.py", f"{path}/__init__.py") if name in files), None)
