"""`curate audit --attributes`: a second model asked about the images of a pool; who may not be asked, what is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import curate
from curate.auditing.attributes import read_attributes
from curate.cli import main
from curate.errors import UsageError
from curate.images.decode import decode_rgb
from curate.models.load import load_model
from curate.pipelines.auditing import audit
from curate.pipelines.predicting import scored_by
from curate.shards.samples import group_samples
from curate.shards.sources import expand_shards, shard_digest
from curate.shards.tarindex import index_tar
from tests.conftest import make_checkpoint
from tests.e2e.pools import make_bad_pool, make_pool, published
from tests.e2e.training_runs import SIZES, make_training

INLINE: dict[str, Any] = {"engine": "inline"}
COLUMN = "perceived shape"
PROMPTS = {"round": ["a ball", "the moon"], "long": ["a river"], "square": ["a box"]}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bad_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def selection(pool: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over shards of which two are damaged."""
    output = tmp_path_factory.mktemp("runs") / "out"
    curate.score(
        pool, output, reference=str(tiny_checkpoint), keep=0.4, super_batch=50, tolerance=1.0, batch_size=16, **INLINE
    )
    return output


@pytest.fixture(scope="module")
def answers(pool: Path, tiny_softmax_checkpoint: Path) -> dict[bytes, np.ndarray[Any, Any]]:
    """sample id -> the model's shares of the groups, from its own embeddings, rounded as score tables are."""
    encoder = load_model(str(tiny_softmax_checkpoint))
    texts = [encoder.embed_texts(encoder.tokenize(prompts)).numpy().mean(0) for prompts in PROMPTS.values()]
    group_GD = np.stack([text / np.linalg.norm(text) for text in texts])
    found = {}
    for source in expand_shards([pool]):
        data = memoryview(Path(source.url).read_bytes())
        for entry in group_samples(index_tar(data), shard_digest(data)):
            image = entry.image()
            if image is None or image.size < 300:
                continue
            pixels, _ = decode_rgb(data[image.offset : image.offset + image.size], min_side=encoder.min_side)
            vector = encoder.embed_images(encoder.preprocess_batch([pixels])).numpy()[0].astype(np.float16)
            power = np.exp(encoder.scale * (group_GD @ vector.astype(np.float32)))
            found[entry.sample_id] = power / power.sum()
    return found


def asked(path: Path, model: Path | str, threshold: float = 0.5, more: str = "") -> Path:
    groups = "".join(f"      - {{name: {name}, prompts: {prompts}}}\n" for name, prompts in PROMPTS.items())
    head = f"schema: 1\nmodel: {model}\nthreshold: {threshold}\ncolumns:\n"
    path.write_text(f"{head}  - column: {COLUMN}\n    groups:\n{groups}{more}")
    return path


def middle(answers: dict[bytes, np.ndarray[Any, Any]]) -> float:
    """A threshold that half of the samples reach, in the widest gap near the middle."""
    best = np.sort([share.max() for share in answers.values()])
    near = np.arange(len(best) // 3, 2 * len(best) // 3)
    widest = near[np.argmax(np.diff(best)[near])]
    return float(best[widest] + best[widest + 1]) / 2


def tables(place: Path) -> dict[str, int]:
    """Files of embeddings, and when they were written."""
    files = (place / "attributes").rglob("score/*.parquet")
    return {str(path.relative_to(place)): path.stat().st_mtime_ns for path in files}


def test_each_sample_is_in_the_group_that_the_model_takes_it_for(
    selection: Path, answers: dict[bytes, np.ndarray[Any, Any]], tiny_softmax_checkpoint: Path, tmp_path: Path
) -> None:
    """Row by row as the model's own embeddings say, abstained below the threshold; once with prompts alone."""
    threshold = middle(answers)
    file = asked(tmp_path / "a.yaml", tiny_softmax_checkpoint, threshold)
    result = audit(selection, attributes=file, columns=[COLUMN], to=tmp_path / "audit", **INLINE)
    rows = pq.read_table(tmp_path / "audit" / "assignments.parquet").to_pylist()
    names = list(PROMPTS)
    for row in rows:
        share = answers[row["sample_id"]]
        expected = names[share.argmax()] if share.max() >= threshold else None
        assert row[COLUMN] == expected or abs(share.max() - threshold) < 1e-6
    [column] = result.audit.columns
    assert column.kind == "zero-shot"
    assert 0.2 < column.unknown_share < 0.8
    assert f"abstained from {column.unknown_share:.1%}" in column.provenance
    assert any(f"abstained from {column.unknown_share:.1%} of {len(rows)}" in note for note in result.notes)
    before = tables(tmp_path / "audit" / "_curate")
    copy = shutil.copytree(tiny_softmax_checkpoint, tmp_path / "a copy")
    again = asked(tmp_path / "b.yaml", copy, threshold=0.01, more="    otherwise: [a wall]\n")
    audit(selection, attributes=again, columns=[COLUMN], to=tmp_path / "audit", **INLINE)
    assert tables(tmp_path / "audit" / "_curate") == before
    assert len(before) == 3


def test_predictions_cross_confound_and_carry_stated_errors(
    selection: Path, answers: dict[bytes, np.ndarray[Any, Any]], tiny_softmax_checkpoint: Path, tmp_path: Path
) -> None:
    """On the command line, in the output itself; the report and the data card say that it is a model's guess."""
    file = asked(tmp_path / "a.yaml", tiny_softmax_checkpoint, middle(answers))
    before = published(selection)
    arguments = ["audit", str(selection), "--attributes", str(file), "--columns", COLUMN, "image size"]
    arguments += ["--intersect", f"{COLUMN},image size", "--confounder", "caption length", COLUMN]
    assert main([*arguments, "--label-error", f"{COLUMN}=0.9,0.95", "--engine", "inline"]) == 0
    report = (selection / "_curate" / "audit" / "report.html").read_text()
    assert f"Predicted: {COLUMN}" in report
    assert "what it takes the others for is its guess" in report
    assert str(tiny_softmax_checkpoint) not in report
    value = json.loads((selection / "_curate" / "audit" / "audit.json").read_bytes())
    models = {column["name"]: column["model"] for column in value["audit"]["columns"]}
    assert models == {COLUMN: "softmax", "image size": None, f"{COLUMN} & image size": "softmax"}
    after = published(selection)
    assert {name for name in after if after[name] != before[name]} == {"README.md", "croissant.json"}
    assert "predicted, not known" in (selection / "README.md").read_text()
    assert curate.verify(selection).ok


def test_a_model_that_scored_is_refused(selection: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """By its weights, wherever they lie; nothing is embedded and nothing written."""
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    for model in (tiny_checkpoint, copy, f"local-dir:{copy}"):
        file = asked(tmp_path / "a.yaml", model)
        with pytest.raises(UsageError, match=r"a\.yaml:2: model: .* is the reference of this selection"):
            audit(selection, attributes=file, to=tmp_path / "audit", **INLINE)
    assert not list((tmp_path / "audit").rglob("*.html"))
    assert not tables(tmp_path / "audit" / "_curate")


def test_a_learner_is_refused_as_it_began_and_as_it_ended(
    tiny_checkpoint: Path, tiny_softmax_checkpoint: Path, tmp_path: Path
) -> None:
    """A training names its reference and its start; its own directory holds what became of that."""
    learned = make_checkpoint(tmp_path / "learned", "sigmoid", seed=9)
    settings = {"model": str(tiny_checkpoint), "loss": "sigmoid", "seed": 0, "reference": str(tiny_softmax_checkpoint)}
    made = make_training(tmp_path / "run", make_pool(tmp_path / "pool", samples=20), SIZES, settings=settings)
    made.write_log(12)
    for path in learned.iterdir():
        shutil.copy(path, made.run / path.name)
    assert set(scored_by(made.run)) == {"reference", "start of the learner", "learner"}
    copies = [shutil.copytree(one, tmp_path / f"copy of {one.name}") for one in (tiny_checkpoint, learned)]
    for model in (tiny_softmax_checkpoint, tiny_checkpoint, made.run, *copies):
        with pytest.raises(UsageError, match="of this selection, so its errors are what the audit looks for"):
            audit(made.run, attributes=asked(tmp_path / "a.yaml", model), to=tmp_path / "audit", **INLINE)
    other = asked(tmp_path / "a.yaml", make_checkpoint(tmp_path / "other", "sigmoid", seed=11), 0.001)
    result = audit(made.run, attributes=other, columns=[COLUMN], to=tmp_path / "audit", **INLINE)
    assert "sigmoid probability" in result.audit.columns[0].provenance
    assert result.audit.columns[0].coverage == 1


def test_pools_of_other_tools_have_no_images_to_ask_about(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The parquet of a pool names keys and captions only."""
    pq.write_table(pa.table({"key": ["a", "b"], "text": ["one", "two"]}), tmp_path / "pool.parquet")
    (tmp_path / "selected.txt").write_text("a\n")
    file = asked(tmp_path / "a.yaml", tiny_checkpoint)
    with pytest.raises(UsageError, match="--attributes asks a model about images"):
        audit(tmp_path / "pool.parquet", selected=tmp_path / "selected.txt", attributes=file, to=tmp_path / "audit")


def test_no_model_is_asked_about_a_column_that_nobody_wants(
    selection: Path, tiny_softmax_checkpoint: Path, tmp_path: Path
) -> None:
    """`--columns` without a column of the file embeds nothing; a wrong file is refused all the same."""
    file = asked(tmp_path / "a.yaml", tiny_softmax_checkpoint)
    assert read_attributes(file).names == (COLUMN,)
    result = audit(selection, attributes=file, columns=["gender"], to=tmp_path / "audit", **INLINE)
    assert [column.name for column in result.audit.columns] == ["gender"]
    assert not tables(tmp_path / "audit" / "_curate")
    with pytest.raises(UsageError, match=r"a\.yaml:3: threshold: 2"):
        audit(selection, attributes=asked(file, tiny_softmax_checkpoint, 2), to=tmp_path / "audit", **INLINE)
