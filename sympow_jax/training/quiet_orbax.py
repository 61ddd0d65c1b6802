"""Orbax reports one failure a dozen times; here it is made to leave the reporting to those who call it."""

import logging
import sys
import traceback
import warnings
from typing import Any

TEMPORARY = ".orbax-checkpoint-tmp"  # in the names of folders that Orbax has not finished
_ORBAX_MARKS = ("/orbax/", TEMPORARY, "OCDBT")  # its code, its folders, its format


def _not_from_orbax(record: logging.LogRecord) -> bool:
    frames = traceback.walk_tb(record.exc_info[2] if record.exc_info else None)
    texts = [record.getMessage(), record.pathname, *(frame.f_code.co_filename for frame, _ in frames)]
    return not any(mark in text for mark in _ORBAX_MARKS for text in texts)


def quieten_orbax() -> None:
    """Hides the dozen tracebacks about one failure of Orbax, which `save` and `restore` report in a line.

    Orbax logs some; others come from asyncio, which reports each write of an abandoned save when it is collected, and
    from Python, about writes that were never started: a warning, or what kept it from warning.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_not_from_orbax)  # adding it again changes nothing
    warnings.filterwarnings("ignore", r"coroutine '.*' was never awaited", RuntimeWarning)
    previous = sys.unraisablehook
    if getattr(previous, "drops_late_news", False):
        return

    def hook(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        text = str(unraisable.exc_value)
        loop = text == "Event loop is closed" or "'_ssock'" in text  # the latter where files ran out as it was made
        if not loop and "/orbax/" not in getattr(code, "co_filename", ""):
            previous(unraisable)

    hook.drops_late_news = True  # pyright: ignore[reportFunctionMemberAccess]
    sys.unraisablehook = hook
