"""Config files, which are code that their user chose to run: by path, or the package's own by name.

A config file imports others as `configs.NAME`. In a clone that is the folder beside the package; in an installed
package it is `sympow_jax/configs`.
"""

import contextlib
import importlib.util
import inspect
import pathlib
import sys
import traceback
import types
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from sympow_jax.config.errors import ConfigError, nearest, require

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]


def config_folder() -> pathlib.Path:
    """The folder with the package's own config files."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def config_names() -> dict[str, pathlib.Path]:
    """The package's own config files by name, `quickstart` or `figures/mqar_zoology`."""
    folder = config_folder()
    files = (path for path in sorted(folder.rglob("*.py")) if path.name != "__init__.py")
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def load_file(name: str) -> types.ModuleType:
    """The module of a config file.

    Args:
      name: a path, or the name of one of the package's own files.

    Raises:
      ConfigError: no such file, it defines no get_config, or what goes wrong inside it, with the line.
    """
    own = config_names()
    path = own.get(name, pathlib.Path(name))
    if not path.is_file():
        known = sorted({*own, *map(str, pathlib.Path("configs").rglob("[!_]*.py"))})
        raise ConfigError(f"--config = {name!r}: no such file{nearest(name, known)}; train.py --list shows them")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config = {name!r}: not a Python file; expected configs/NAME.py[:VARIANT]")
    _provide_configs(path.resolve())
    module = importlib.util.module_from_spec(spec)
    with _named_errors(name, path):
        spec.loader.exec_module(module)
    require(hasattr(module, "get_config"), f"--config = {name!r}: defines no get_config(arg)")
    return module


def load_values(name: str, arg: str = "") -> ml_collections.ConfigDict:
    """What get_config(arg), or get_config() without an argument, of a config file returns."""
    module = load_file(name)
    with _named_errors(name, pathlib.Path(str(module.__file__))):
        values = module.get_config(*([arg] if arg else []))
    legal = isinstance(values, ml_collections.ConfigDict)
    require(legal, f"--config = {name!r}: get_config returns {type(values).__name__}; it must return a ConfigDict")
    return values


def takes_variant(name: str) -> bool:
    """Whether the argument of a config file is a variant, as the parameter of its get_config is called."""
    get_config = getattr(load_file(name), "get_config", None)
    return get_config is not None and list(inspect.signature(get_config).parameters)[:1] == ["variant"]


def as_values(tree: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A nested mapping as what `load_values` returns."""
    return ml_collections.ConfigDict(tree)


@contextlib.contextmanager
def _named_errors(name: str, path: pathlib.Path) -> Iterator[None]:
    """What goes wrong inside a config file, as one line that names the file and the line."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        inside = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else inside[-1] if inside else None
        where = f"--config = {name!r}" + (f", line {line}" if line else "")
        raise ConfigError(f"{where}: {type(error).__name__}: {error}") from error


def _provide_configs(path: pathlib.Path) -> None:
    """Makes `configs` the folder that `path` lies in, if it is a whole one, or else the package's own."""
    folder = next((p for p in path.parents if p.name == "configs" and (p / "default.py").is_file()), config_folder())
    present = sys.modules.get("configs")
    if present is not None and [*present.__path__] == [str(folder)]:
        return
    for name in [name for name in sys.modules if name == "configs" or name.startswith("configs.")]:
        del sys.modules[name]
    init = folder / "__init__.py"
    spec = importlib.util.spec_from_file_location("configs", init, submodule_search_locations=[str(folder)])
    assert spec is not None and spec.loader is not None  # a Python file
    sys.modules["configs"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
