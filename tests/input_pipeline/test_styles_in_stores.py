"""Text prepared with tokenizers in the styles of known models: a store gives back what was put in."""

import numpy as np
import pytest

from sympow_jax import prepare
from sympow_jax.input_pipeline.opening import open_data
from tests.input_pipeline.tokenizer_styles import STYLES, TEXT


@pytest.mark.slow
@pytest.mark.quick
@pytest.mark.parametrize("style", STYLES)
def test_a_text_comes_back_from_a_store(style, tmp_path):
    (tmp_path / "tokenizer.json").write_text(STYLES[style]())
    texts = [f"{number} {TEXT}{number}" for number in range(1, 5)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    flags = [f"--output={tmp_path / 'store'}", f"--tokenizer={tmp_path}", "--heldout_fraction=0.5"]
    assert (
        prepare.run(["text", str(tmp_path / "?.txt"), *flags, "--documents=split", "--document_length=1"]) == 0
    )  # no row is cut
    found = []
    for split in ("train", "heldout"):
        store = open_data(str(tmp_path / "store"), split=split, seq_len=1)
        rows = store.read(slice(0, store.num_documents), slice(0, 1))
        for cluster in np.unique(store.clusters):
            ids = rows[store.clusters == cluster].reshape(-1)
            found.append(store.tokenizer.decode(ids))
    assert sorted(found) == sorted(texts)
