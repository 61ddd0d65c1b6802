"""Modules joined by their imports under made-up names: each once, definitions first, and far context tells more."""

import re

import numpy as np
import pytest

from sympow_jax.input_pipeline.prepare import sources
from sympow_jax.input_pipeline.prepare.import_graph import PythonImports, join_by_imports
from sympow_jax.input_pipeline.prepare.renamed import rename

FILES = {
    "a.py": "from pack import tool\nfrom pack.base import Base, other\nBase(other(Base))\n",
    "pack/__init__.py": "",
    "pack/base.py": "class Base: pass\ndef other(x): return x\n",
    "pack/tool.py": "from .base import Base\nfrom . import base\nimport z\nz.thing(Base)\n",
    "z.py": "def thing(x): return x\n",
    "broken.py": "def (",
}
MADE_UP = re.compile(r"\b(?:[bdfgklmnprstvz][aeiou]){3}\b")


def test_modules_stand_once_and_after_what_they_import():
    groups = join_by_imports(FILES, 10_000)
    assert sorted(name for group in groups for name in group) == sorted(FILES)
    assert ["broken.py"] in groups and ["pack/__init__.py"] in groups
    (joined,) = [group for group in groups if "a.py" in group]
    for importer, imported in (("a.py", "pack/tool.py"), ("pack/tool.py", "pack/base.py"), ("pack/tool.py", "z.py")):
        assert joined.index(imported) < joined.index(importer)
    most_used = len(FILES["a.py"] + FILES["pack/base.py"])
    assert ["pack/base.py", "a.py"] in join_by_imports(FILES, most_used)  # and nothing more fits


def test_names_are_made_up_for_their_document():
    one, two = rename("d", ["def reach(self, n): return len(n)\n", "# reach\nreach(top)\n"])
    name = MADE_UP.search(one)[0]
    assert one == f"def {name}(self, n): return len(n)\n" and two == f"# {name}\n{name}(top)\n"
    assert rename("e", ["def reach(self, n): return len(n)\n"])[0] != one


@pytest.fixture(scope="module")
def documents():
    """Those of a few packages, twice."""
    paths = sources.PythonStdlib.paths
    kept = re.compile("(json|logging|email|http|concurrent)/")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources.PythonStdlib, "paths", lambda self: [p for p in paths(self) if kept.match(p[0])])
        made, again = (list(PythonImports().documents()) for _ in range(2))
    assert made == again
    return [document.content for document in made]


@pytest.mark.slow
def test_a_memory_of_more_context_knows_more_of_the_names(documents):
    """A cache of words knows a name if it stands in its context; before the document nothing does."""
    known = []
    for text in documents:
        for end in range(16_384, len(text), 8_192):
            names = MADE_UP.findall(text[end - 1_024 : end])
            past = [{*MADE_UP.findall(text[end - 1_024 - k : end - 1_024])} for k in (256, 1_024, 4_096, 15_360)]
            known.append([len(names), *(sum(name in seen for name in names) for seen in past)])
    total, *found = np.sum(known, axis=0)
    assert total > 300 and (np.diff(np.array(found) / total) > 0.05).all() and 0.6 < found[-1] / total < 0.95
    vocabularies = [{*MADE_UP.findall(text)} for text in documents if len(text) > 16_384]
    shared = [len(a & b) / len(a) for a in vocabularies for b in vocabularies if a is not b]
    assert np.mean(shared) < 0.02
