"""Results that a stranger wrote: nothing of them is markup, formula, script or traceback in the report."""

import base64
import hashlib
import io
import json
import re
import zipfile

import numpy as np
import pytest

from sympow_jax import report
from sympow_jax.evals.files import read_npz, write_json
from sympow_jax.files import FileError
from sympow_jax.plots.report import report_page
from tests.plots.results import remembrance_result
from tests.test_report import Page, make_run

MARKUP = "\"><script>alert(1)</script><img src=x onerror=alert(1)><a href='javascript:alert(1)'>&amp;"
RESULT = "eval/length_generalisation.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("report") / "run", "sympow")


@pytest.fixture
def folder(original, tmp_path):
    import shutil

    return shutil.copytree(original, tmp_path / "run")


def change(path, place, value):
    """Sets the entry at `place`, as in same_target.0.nll."""
    result = json.loads(path.read_text())
    *parents, last = [int(key) if key.isdigit() else key for key in place.split(".")]
    node = result
    for key in parents:
        node = node[key]
    node[last] = value
    path.write_text(json.dumps(result))


def test_free_text_is_escaped(folder):
    for place in ("data.store", "data.bos_rule", "data.digest", "dtype"):
        change(folder / RESULT, place, MARKUP)
    page = report_page(report.gather([str(folder)]))
    parsed = Page(page)
    assert {"img", "a"}.isdisjoint(parsed.tags) and parsed.tags.count("script") == 1
    script = re.findall(r"<script>(.*?)</script>", page, re.S)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "alert" not in script and f"script-src 'sha256-{digest}'" in page  # and the browser runs no other
    assert all(address.startswith("#") for address in parsed.addresses)
    assert "&lt;script&gt;" in page and not re.search(r"<[^>]*(onerror|javascript:)", page)


@pytest.mark.parametrize(
    "place", ["variant", "position_overrides.x", "same_target.0.nll", "train_length", "num_documents"]
)
@pytest.mark.parametrize("value", [MARKUP, "$\\frac{$", "\x1b[2J", ["a"], {"a": 1}, True, 1e305, -1])
def test_names_and_numbers_are_only_that(folder, place, value):
    if (place, value) in (("same_target.0.nll", -1), *(("position_overrides.x", legal) for legal in (True, -1, 1e305))):
        return
    change(folder / RESULT, place, value)
    with pytest.raises(FileError, match=r"length_generalisation\.json: ") as caught:
        report.gather([str(folder)])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "place", ["lengths", "same_target", "same_target_change.ci95", "contextwise.nll", "same_target.0.ci95", "data"]
)
@pytest.mark.parametrize("value", [[], None, 7, [[0.0]]])
def test_tables_have_their_columns(folder, place, value):
    change(folder / RESULT, place, value)
    with pytest.raises(FileError, match=r"length_generalisation\.json: "):
        report.gather([str(folder)])


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("variant", MARKUP), ("length", "long"), ("length", 256), ("num_targets", -1), ("train_length", 0),
        ("loss.nll", "low"), ("remembrance.position", []), ("remembrance.position.0", 0),
        ("remembrance.position.0", 10**9), ("remembrance.difference", [0.0]),
        ("remembrance.ci95.0", [0.0]), ("remembrance.total_variation.0", MARKUP),
        ("state_norms", None), ("state_norms.0.layer", "x"), ("state_norms.0.state", [1.0]), ("state_norms.1", 7),
    ],
)  # fmt: skip
def test_remembrance_has_its_columns(folder, place, value):
    path = folder / "eval" / "remembrance.json"
    write_json(path, remembrance_result("sympow"))
    assert len(report.gather([str(folder)])["remembrance"]) == 1
    change(path, place, value)
    with pytest.raises(FileError, match=r"remembrance\.json: "):
        report.gather([str(folder)])


class Payload:
    def __reduce__(self):
        return (open, ("/tmp/sympow_jax_payload", "w"))


def test_arrays_are_never_unpickled_nor_larger_than_their_file(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.array([Payload()], object))
    with pytest.raises(FileError, match=r"a\.npz: is no file of arrays .*pickle|Object arrays"):
        read_npz(path)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**9, 10**3)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", header.getvalue())
    with pytest.raises(FileError, match="shorter than its shape"):
        read_npz(path)
    monkeypatch.setattr("sympow_jax.evals.files.MAX_NPZ_BYTES", 2**20)
    np.savez_compressed(path, a=np.zeros(2**20))
    with pytest.raises(FileError, match="its arrays take more than"):
        read_npz(path)
    numbers = np.random.default_rng(0).standard_normal(2**18)  # 2 MiB that do not shrink, as the state of a long text
    np.savez_compressed(path, a=numbers)
    np.testing.assert_array_equal(read_npz(path)["a"], numbers)
    for content in (b"", b"PK\x03\x04", b"\x93NUMPY\x01\0"):
        path.write_bytes(content)
        with pytest.raises(FileError, match="is no file of arrays"):
            read_npz(path)
