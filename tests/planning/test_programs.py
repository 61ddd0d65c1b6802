"""Compiled programs that a folder keeps."""

import gzip
import os

import jax
import jax.numpy as jnp
import pytest

from sympow_jax.planning import targets
from sympow_jax.planning.programs import compile_lowered


def compiled(folder):
    lowered = jax.jit(lambda x: x + x).lower(jax.ShapeDtypeStruct((8,), jnp.float32))
    return compile_lowered(lowered, targets.find("cpu:1"), folder)


def test_a_kept_program_is_not_compiled_again(tmp_path):
    assert compiled(tmp_path / "new") == compiled(tmp_path / "new"), "the seconds of the first"


@pytest.mark.parametrize("name", ["LIBTPU_INIT_ARGS", "XLA_FLAGS"])
def test_other_flags_of_the_compiler_are_another_program(name, tmp_path, monkeypatch):
    monkeypatch.delenv(name, raising=False)
    for flags in ("", "--xla_a=1", "--xla_a=2", ""):
        monkeypatch.setenv(name, flags)
        compiled(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: b"",
        lambda kept: kept[: len(kept) // 2],
        lambda kept: kept[:20] + b"\xff" * 20 + kept[40:],
        lambda kept: gzip.compress(b'{"text": '),
        lambda kept: gzip.compress(b'{"text": ""}'),
    ],
    ids=["empty", "cut", "overwritten", "cut before", "of another version"],
)
def test_what_cannot_be_read_is_compiled_again(damage, tmp_path):
    first = compiled(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    second = compiled(tmp_path)
    assert (second.text, second.argument_bytes) == (first.text, first.argument_bytes)
    assert compiled(tmp_path) == second


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compiled(tmp_path)
    assert list(tmp_path.iterdir()) == []
