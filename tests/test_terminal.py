"""What a terminal would obey is shown, wherever it comes from."""

import logging
import pathlib
import re

from sympow_jax.command_line import one_line_errors
from sympow_jax.config import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[1]


def fail(message):
    def run(argv):
        logging.getLogger("sympow_jax").warning("file %s", message)
        raise ConfigError(message)

    return run


def test_errors_and_warnings_show_what_a_terminal_would_obey(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert one_line_errors(fail("a\x1b]0;title\x07\x9b2J\u202eb\nc"), []) == 1
    warning, second, error = capsys.readouterr().err.splitlines()
    assert warning == "WARNING: file a\\x1b]0;title\\x07\\x9b2J\\u202eb" and second == "c"
    assert error == "error: a\\x1b]0;title\\x07\\x9b2J\\u202eb c"


def test_a_value_of_megabytes_makes_no_line_of_megabytes(capsys):
    assert one_line_errors(fail("first " + "x" * 10**6 + " last"), []) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: first ") and line.endswith(" last") and len(line) < 2100


def test_the_page_on_security_names_tests_that_exist():
    rows = [line for line in (ROOT / "docs" / "security.md").read_text().splitlines() if line.startswith("| ")]
    named = [re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row) for row in rows]
    assert sum(map(bool, named)) == len(rows) - 2 - 5  # two heads, five rows of what is trusted
    for path, name in (test for tests in named for test in tests):
        assert f"def {name}(" in (ROOT / path).read_text(), (path, name)
