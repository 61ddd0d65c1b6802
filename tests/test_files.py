"""Files of strangers: what is refused, in one line, and what never happens."""

import os
import resource

import pytest

from sympow_jax import files
from sympow_jax.files import (
    FileError,
    entry,
    inside,
    open_regular,
    parse_json,
    printable,
    read_json,
    write_bytes_atomic,
    write_json_atomic,
)


def test_json_round_trip_and_no_leftovers(tmp_path):
    write_json_atomic(tmp_path / "a.json", {"x": [1, 2.5, None], "y": "é"})
    write_json_atomic(tmp_path / "a.json", {"x": 2})
    assert read_json(tmp_path / "a.json") == {"x": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    write_json_atomic(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json_atomic(tmp_path / "a.json", {"x": float("nan")})
    assert read_json(tmp_path / "a.json") == {"x": 1}


def test_a_full_disk_keeps_the_old_file(tmp_path):
    write_json_atomic(tmp_path / "a.json", {"x": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_json_atomic(tmp_path / "a.json", {"x": "y" * (1 << 18)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_json(tmp_path / "a.json") == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("contents", "message"), [(None, "does not exist"), (b"{", "is no JSON"), (b"\xff", "is no JSON")]
)
def test_missing_and_damaged_json_are_named_in_one_line(tmp_path, contents, message):
    path = tmp_path / "config.json"
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(FileError, match=message) as caught:
        read_json(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_pickle_is_refused_not_run(tmp_path):
    import pickle

    (tmp_path / "config.json").write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(FileError, match="is no JSON"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": ' + b"[" * 3000 + b"]" * 3000 + b"}", "nested deeper than 32 levels"),
        (b'{"a": ' + b"[" * 33 + b"]" * 33 + b"}", "nested deeper than 32 levels"),
        (b"[1]", "holds a list where an object is needed"),
        (b"null", "holds null where an object is needed"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": 1e999}', "beyond the range"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is no JSON"),
        (b'{"a": "\\u001b[2J"}', "control character"),
        (b'{"a": [{"\\u009b": 1}]}', "control character"),
        ('{"a": "\u202e"}'.encode(), "control character"),
        (b'{"a": "' + b"x" * 1000 + b'"}', "at most 500 are read"),
    ],
)
def test_json_of_a_stranger_is_refused_in_one_line(content, message):
    with pytest.raises(FileError, match=message) as caught:
        parse_json(content, "x/a.json", max_bytes=len(content) if len(content) > 1010 else 500)
    assert str(caught.value).startswith("x/a.json: ") and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_json_at_the_bounds_is_read():
    nested = b"[" * 31 + b"]" * 31
    assert parse_json(b'{"a": %s, "b": "tab\\t \\u00e9", "c": 1e308}' % nested, "a")["b"] == "tab\t \u00e9"
    assert parse_json(b'{"a": NaN}', "a", allow_nan=True)["a"] != parse_json(b'{"a": 0}', "a")["a"]


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [("7", int, "whole number"), (7.0, int, "whole number"), (True, int, "whole number"),
     (-1, int, r"outside \[0, 9\]"), (None, dict, "object"), ("x", float, "a number")],
)  # fmt: skip
def test_an_entry_has_its_kind_and_range(value, kind, message):
    with pytest.raises(FileError, match=message):
        entry({"n": value}, "n", kind, "data.json", least=0, most=9)
    with pytest.raises(FileError, match=r"data\.json: has no 'm'"):
        entry({"n": value}, "m", kind, "data.json")
    assert entry({"n": 7}, "n", int, "data.json", least=7, most=7) == 7


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "", "a\0b", "link", "link/x", "dangling"])
def test_names_and_links_do_not_leave_their_folder(tmp_path, name):
    (tmp_path / "outside").mkdir()
    (tmp_path / "real").mkdir()
    folder = tmp_path / "folder"
    folder.symlink_to("real")  # the folder itself may be a link
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "dangling").symlink_to("nowhere")
    with pytest.raises(FileError, match=r"leaves the folder|is a link") as caught:
        inside(folder, name)
    assert "\n" not in str(caught.value)
    assert inside(folder, "eval/x.json") == folder / "eval" / "x.json"


def test_writing_does_not_go_through_a_link_nor_to_what_has_two_names(tmp_path):
    outside, link = tmp_path / "outside.json", tmp_path / "link.json"
    outside.write_text("theirs")
    link.symlink_to(outside)
    for write in (write_bytes_atomic, lambda path, content: open_regular(path, os.O_WRONLY | os.O_CREAT)):
        with pytest.raises(FileError, match=r"link\.json: is a link to '.*outside\.json'"):
            write(link, b"mine")
    link.unlink()
    os.link(outside, link)
    with pytest.raises(FileError, match="second name"):
        open_regular(link, os.O_WRONLY)
    write_bytes_atomic(link, b"mine")  # a rename leaves the other name alone
    assert outside.read_text() == "theirs" and link.read_text() == "mine"


def test_reading_neither_follows_links_nor_waits_for_a_pipe(tmp_path):
    (tmp_path / "link").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("link", "is a link"), ("pipe", "no regular file"), ("", "no regular file")):
        with pytest.raises(FileError, match=message):
            read_json(tmp_path / name)


def test_a_place_that_cannot_be_written_is_named_before_the_work(tmp_path, monkeypatch):
    files.check_place(tmp_path / "a" / "b" / "c.json", "--output")
    assert [*tmp_path.iterdir()] == []
    with pytest.raises(FileError, match=f"--output: {tmp_path} is a folder; name a file"):
        files.check_place(tmp_path, "--output")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileError, match="is a link to"):
        files.check_place(tmp_path / "link", "--output")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(FileError, match=f"--output: {tmp_path} cannot be written; name another place"):
        files.check_place(tmp_path / "a" / "c.json", "--output")


def test_what_a_terminal_obeys_is_shown_instead():
    assert printable("a\x1b[2J\tb\n\x9b\x7f\r\u202ec é") == "a\\x1b[2J\tb\n\\x9b\\x7f\\r\\u202ec é"
