import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from sympow_jax.input_pipeline import make_batches, open_batches, open_store
from sympow_jax.input_pipeline.address import AddressError
from sympow_jax.input_pipeline.chunked_array import StoreError
from sympow_jax.input_pipeline.opening import open_data
from sympow_jax.input_pipeline.prepare.build import Request, build
from sympow_jax.input_pipeline.prepare.sources import SourceError
from sympow_jax.input_pipeline.tfds import TfdsSource
from sympow_jax.input_pipeline.tokenizers import ByteTokenizer

TEXTS = [f"example {i} " + "x" * (3 * i) for i in range(12)]


class Texts(tfds.core.GeneratorBasedBuilder):
    """A dataset of texts."""

    VERSION = tfds.core.Version("1.0.0")
    FEATURES = {
        "text": tfds.features.Text(),
        "label": tfds.features.Scalar(np.int64),
        "score": tfds.features.Scalar(np.float32),
        "latin": tfds.features.Text(),
    }
    EXAMPLES = [{"text": text, "label": i, "score": 0.5, "latin": b"caf\xe9"} for i, text in enumerate(TEXTS)]

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self.FEATURES))

    def _split_generators(self, dl_manager):
        return {"train": list(enumerate(self.EXAMPLES)), "validation": list(enumerate(self.EXAMPLES[:5]))}

    def _generate_examples(self):
        raise NotImplementedError


class Tokens(Texts):
    """A dataset of tokens, one of them too large for bytes."""

    FEATURES = {"tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32)}
    EXAMPLES = [{"tokens": np.arange(i + 1, dtype=np.int32)} for i in range(5)] + [
        {"tokens": np.array([999], np.int32)}
    ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Both datasets as array_record, in folders that tfds reads back."""
    folder = tmp_path_factory.mktemp("tfds")
    tfds.core.utils.gcs_utils._is_gcs_disabled = True
    for builder in (Texts, Tokens):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_texts_are_tokenised_as_they_are_read(prepared):
    store = open_data(f"tfds:{prepared}/texts/1.0.0?field=text", "train", seq_len=24)
    assert store.num_documents == 12
    texts = sorted(TEXTS)
    found = []
    for row in range(12):
        batch = store.examples(slice(row, row + 1), slice(0, 24))
        count = int(batch["loss_mask"].sum())
        found.append(bytes(batch["targets"][0, :count].tolist()).decode())
        assert batch["inputs"][0, 0] == 256 and batch["segment_ids"][0].tolist() == [1] * count + [0] * (24 - count)
        assert batch["positions"][0, :count].tolist() == list(range(count))
    assert sorted(found) == sorted(text[:24] for text in texts)


def test_hosts_share_a_batch_and_names_default(prepared):
    name = f"tfds:{prepared}/texts/1.0.0?field=text"
    options = {"seq_len": 16, "batch_size": 4, "order": "shuffled_chunks", "seed": 3}
    whole = open_batches(name, "train", **options)
    for step in range(4):
        parts = [open_batches(name, "train", **options, process_index=i, process_count=2)[step] for i in range(2)]
        for field, values in whole[step].items():
            np.testing.assert_array_equal(np.concatenate([part[field] for part in parts]), values)
    assert whole.stores[0].digest.startswith("tfds:")
    assert whole.describe(0)[0]["text"].startswith("example")


def test_tokens_are_taken_as_they_are(prepared):
    store = open_data(f"tfds:{prepared}/tokens/1.0.0", "train", seq_len=4)
    rows = [store.examples(slice(row, row + 1), slice(0, 4)) for row in range(6) if not over(store, row)]
    assert sorted(int(row["loss_mask"].sum()) for row in rows) == [1, 2, 3, 4, 4]
    with pytest.raises(StoreError, match="holds token 999, but vocab_size = 257"):
        for step in range(6):
            make_batches(store, seq_len=4, batch_size=1)[step]


def test_a_split_of_several_parts_holds_them_all(prepared):
    for split, count in [("train+validation", 17), ("train[:25%]+validation[:2]", 5), ("train%5B%3A3%5D", 3)]:
        source = TfdsSource(f"tfds:{prepared}/texts/1.0.0?split={split}&field=text")
        assert len(list(source.documents())) == count and source.describe()["split"] == split.replace(
            "%5B%3A3%5D", "[:3]"
        )


def test_what_is_neither_text_nor_tokens_is_refused(prepared):
    for field, message in [
        ("latin", "example 0 is no text: byte 0xe9 at offset 3 of 'latin' is no UTF-8"),
        ("score", "field 'score' holds float.., but text or whole numbers"),
    ]:
        with pytest.raises(SourceError, match=message):
            next(TfdsSource(f"tfds:{prepared}/texts/1.0.0?field={field}").documents())


def over(store, row):
    return int(np.max(store._source.content(row))) > 256


def test_a_dataset_becomes_a_store(prepared, tmp_path):
    source = TfdsSource(f"tfds:{prepared}/texts/1.0.0?field=text")
    request = Request(documents="concatenate", document_length=32, heldout_fraction=0.0)
    made = build(source, tmp_path / "made", tokenizer=ByteTokenizer(), request=request)
    store = open_store(str(made / "train.zarr"))
    assert store.num_documents == sum(len(text) + 1 for text in TEXTS) // 32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("texts/1.0.0?split=test&field=text", "split 'test' cannot be read at random; splits are train"),
        ("texts/1.0.0?field=body", "no field 'body'; add \\?field= with one of"),
        (
            "texts/1.0.0?fields=text",
            "option 'fields=text' is unknown, without a value or given twice; options are split",
        ),
        ("texts/1.0.0?field=text&split=", "option 'split=' is unknown, without a value"),
        ("texts/1.0.0?split", "option 'split' is unknown, without a value"),
        ("texts/1.0.0?split=train&split=validation", "option 'split=validation' is unknown, .* or given twice"),
        ("nothing/1.0.0", "cannot be opened"),
    ],
)
def test_wrong_names_are_one_line(prepared, name, message):
    with pytest.raises((SourceError, AddressError), match=message) as caught:
        open_data(f"tfds:{prepared}/{name}", "train", seq_len=8)
    assert "\n" not in str(caught.value)


def test_tensorflow_is_never_imported(prepared):
    code = (
        "import sys; from sympow_jax.input_pipeline import open_batches; "
        f"open_batches('tfds:{prepared}/texts/1.0.0?field=text', 'train', seq_len=8, batch_size=2)[0]; "
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
