"""Pages that are not files of docs/: those kept elsewhere in the repository, and one API page a module."""

import ast
import pathlib
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sympow_jax"
SHOWN = {  # nothing is said twice: these files are pages as they are
    "RESULTS.md": "results.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "extending.md",
    "data/README.md": "data.md",
    "sympow_jax/ops/README.md": "kernels.md",
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fills the API part of the navigation, a section for each room of the package."""
    sections: dict[str, list[str]] = {}
    for module in modules():
        name = module.split(".")[1]
        room = name if (PACKAGE / name).is_dir() else "files at the top"
        sections.setdefault(room, []).append(page_of(module))
    reference = next(entry for entry in config.nav or [] if "API reference" in entry)
    reference["API reference"] = [{room: pages} for room, pages in sorted(sections.items())]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are kept elsewhere, and one for each module."""
    for source, page in SHOWN.items():
        text = localise((ROOT / source).read_text(), source)
        files.append(File.generated(config, page, content=text))
    for module in modules():
        require_docstrings(module)
        files.append(File.generated(config, page_of(module), content=f"# {module}\n\n::: {module}\n"))
    return files


def modules() -> list[str]:
    """Every module of the package but empty `__init__` files, dotted."""
    paths = sorted(PACKAGE.rglob("*.py"))
    names = [path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in paths]
    return [name.removesuffix(".__init__") for name in names if name != "sympow_jax.__init__"]


def page_of(module: str) -> str:
    """Where the page of a module is."""
    return f"reference/{module.removeprefix('sympow_jax.')}.md"


def require_docstrings(module: str) -> None:
    """Raises PluginError for a public function, class or method without a docstring."""
    path = ROOT / (module.replace(".", "/") + ".py")
    path = path if path.is_file() else path.with_suffix("") / "__init__.py"
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    tree = ast.parse(path.read_text())
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    inside = [n for c in public if isinstance(c, ast.ClassDef) for n in c.body if isinstance(n, kinds)]
    for node in [tree, *public, *(n for n in inside if not n.name.startswith("_"))]:
        if not ast.get_docstring(node):
            raise PluginError(f"{path.relative_to(ROOT)}: {getattr(node, 'name', 'the module')} has no docstring")


def localise(text: str, source: str) -> str:
    """Links of a file of the repository as links of its page; a link to what is no page names the file only."""
    folder = (ROOT / source).parent

    def link(match: re.Match) -> str:
        image, label, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, _, anchor = target.partition("#")
        file = (folder / path).resolve()
        if not file.exists():
            raise PluginError(f"{source}: {target} does not exist")
        name = file.relative_to(ROOT).as_posix()
        page = SHOWN.get(name, name.removeprefix("docs/") if name.startswith("docs/") else "")
        if not page:
            return f"`{name}`"
        return f"{image}[{label}]({page}{'#' + anchor if anchor else ''})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", link, text)
