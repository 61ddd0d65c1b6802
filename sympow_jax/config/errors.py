"""What the user of a command can mend: a wrong configuration, or a run that cannot go on."""

import difflib
from collections.abc import Sequence


class ConfigError(ValueError):
    """A wrong flag, key or value; the message is one line that says how to fix it."""


class RunError(RuntimeError):
    """A run that cannot start or go on, with nothing wrong in the program; the message says what to do."""


def nearest(word: str, options: Sequence[str]) -> str:
    """`; did you mean 'x'?` for the closest option, or an empty string."""
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_known(message: str, word: str, options: Sequence[str]) -> None:
    """Raises ConfigError, with the closest option, unless `word` is one of `options`."""
    if word not in options:
        raise ConfigError(f"{message}{nearest(word, options)}")
