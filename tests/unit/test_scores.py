"""The score table: embeddings as fixed-size binary, members, facts and text that every table can hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate import scores
from curate.reading import Sample
from curate.score_rows import score_rows, score_schema, spread
from curate.shards.samples import SampleEntry
from curate.shards.tarindex import Member


@dataclass(frozen=True)
class Model:
    loss: str = "sigmoid"
    scale: float = 10.0
    bias: float = -5.0
    width: int = 4


def embeddings(rows: int, width: int = 4, seed: int = 0) -> np.ndarray:
    vector_ND = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return vector_ND / np.linalg.norm(vector_ND, axis=1, keepdims=True)


def sample(number: int, reason: str | None = None) -> Sample:
    entry = SampleEntry(number, bytes([number]) * 16, f"key{number}", (Member(f"key{number}.jpg", 512, 9),), reason, "")
    return Sample(entry, reason, "", None if reason else "a caption")


@given(st.integers(0, 20), st.integers(1, 40), st.integers(0, 20), st.integers(0, 20))
def test_embeddings_survive_packing_and_slicing(rows: int, width: int, start: int, length: int) -> None:
    """What is unpacked is what was packed, rounded to fp16, of a slice and of a chunked column too."""
    vector_ND = np.random.default_rng(rows).normal(size=(rows, width)).astype(np.float32)
    half_ND = vector_ND.astype(np.float16)
    packed = scores.pack(vector_ND)
    assert np.array_equal(scores.unpack(packed.slice(start, length)), half_ND[start : start + length])
    chunked = pa.chunked_array([packed, packed.slice(start, length)])
    assert np.array_equal(scores.unpack(chunked), np.concatenate([half_ND, half_ND[start : start + length]]))


@given(st.lists(st.booleans(), max_size=40))
def test_spread_puts_rows_where_they_were_read(readable: list[bool]) -> None:
    """Embeddings of readable samples stand in their rows; the other rows are null."""
    good_N = np.array(readable, bool)
    vector_MD = embeddings(int(good_N.sum()))
    column = spread(vector_MD, good_N)
    assert column.is_valid().to_pylist() == readable
    assert np.array_equal(scores.unpack(column.drop_null()), vector_MD.astype(np.float16))


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    """Rows, nulls and facts come back from parquet as they were, and a filtered column unpacks."""
    models = {"reference": Model(), "learner": Model(width=8)}
    samples = [sample(0), sample(1, "caption-missing"), sample(2)]
    good_N = np.array([True, False, True])
    towers = {f"ref_{t}": spread(embeddings(2, 4, seed), good_N) for seed, t in enumerate(("image", "text"))}
    towers |= {f"learner_{t}": spread(embeddings(2, 8, seed), good_N) for seed, t in enumerate(("image", "text"))}
    table = score_rows(samples, towers, models)
    with open(tmp_path / "t.parquet", "wb") as file:
        scores.write_table(file, table, {"rows": 3, "a": None})
    read = scores.read_table(tmp_path / "t.parquet")
    assert scores.read_facts(tmp_path / "t.parquet") == {"rows": 3, "a": None}
    assert read.equals(table.replace_schema_metadata(None))
    assert read.schema.names == score_schema(models).names
    assert read["learner_image"].null_count == 1
    kept = read.filter(pa.compute.is_null(read["reason"]))
    assert np.array_equal(scores.unpack(kept["ref_image"]), embeddings(2).astype(np.float16))
    assert scores.members_of(read["members"][0].as_py()) == (Member("key0.jpg", 512, 9),)
    assert scores.ids_to_array(read["sample_id"]).tolist() == [[n] * 16 for n in range(3)]


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_similarity_and_loss_of_each_pair(loss: str) -> None:
    """Similarity is the dot product of the stored pair; its loss is -log sigmoid(a s + b), or -a s with softmax."""
    image_ND, text_ND = embeddings(5, seed=1), embeddings(5, seed=2)
    good_N = np.ones(5, bool)
    towers = {"ref_image": spread(image_ND, good_N), "ref_text": spread(text_ND, good_N)}
    model = Model(loss, 10.0, -5.0 if loss == "sigmoid" else 0.0)
    table = score_rows([sample(n) for n in range(5)], towers, {"reference": model})
    expected = (image_ND * text_ND).sum(1)
    assert np.allclose(table["reference_similarity"], expected, atol=2e-3)
    logit = model.scale * expected + model.bias
    losses = np.log1p(np.exp(-logit)) if loss == "sigmoid" else -logit
    assert np.allclose(table["reference_loss"], losses, atol=2e-2)
    assert table["learner_similarity"].null_count == 5


def test_an_empty_shard_is_an_empty_table() -> None:
    """No samples give no rows, with every column."""
    empty = spread(np.zeros((0, 4), np.float32), np.zeros(0, bool))
    table = score_rows([], {"ref_image": empty, "ref_text": empty}, {"reference": Model()})
    assert (len(table), table.schema.names) == (0, score_schema({"reference": Model()}).names)


def test_towers_without_a_model_are_null_columns() -> None:
    """A run without a learner has its columns all the same, so that every table has one layout."""
    schema = scores.schema({"ref_image": 4, "ref_text": 4})
    assert [schema.field(name).type for name in scores.TOWERS] == [pa.binary(8)] * 2 + [pa.null()] * 2


def test_names_that_are_not_utf8_are_spelled_out() -> None:
    """A member name of arbitrary bytes becomes text that parquet takes, and other text is unchanged."""
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    assert scores.safe_text(name) == "caf\\xe9.jpg"
    assert scores.safe_text("naïve ☃") == "naïve ☃"
    pa.array([scores.safe_text(name)], pa.string())
