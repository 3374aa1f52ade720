"""Zero-shot attributes: the file and its mistakes, probabilities and abstention against slow ones, the words."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from curate.auditing.assembling import Assembled, assemble
from curate.auditing.attributes import Attribute, Group, read_attributes
from curate.auditing.audit import audit_columns
from curate.auditing.columns import Column, LabelError
from curate.auditing.request import AuditRequest
from curate.auditing.sentences import findings
from curate.auditing.traits import caption_reader, with_facts
from curate.auditing.zero_shot import (
    PREDICTED,
    group_vectors,
    guesses,
    predicted_columns,
    probabilities,
    with_model,
)
from curate.errors import UsageError

FILE = """schema: 1
model: {model}
threshold: 0.8
templates: ["a photo of {{c}}.", "{{c}}"]
columns:
  - column: perceived setting
    groups:
      - {{name: indoors, prompts: [a room, a kitchen]}}
      - {{name: outdoors, prompts: [a street]}}
    otherwise: [a drawing]
"""
CHECKPOINT = "ab" * 32
COLUMN = "perceived setting"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file that asks a checkpoint directory, of which only the configuration is there."""
    (tmp_path / "clever").mkdir()
    (tmp_path / "clever" / "open_clip_config.json").write_text("{}")
    path = tmp_path / "a.yaml"
    path.write_text(FILE.format(model=tmp_path / "clever"))
    return path


def test_a_file_says_which_model_is_asked_what(file: Path) -> None:
    """Model, threshold, templates, and each column with its groups and what is in none of them."""
    found = read_attributes(file)
    assert (found.model.kind, found.model_name, found.threshold) == ("directory", "clever", 0.8)
    assert found.templates == ("a photo of {c}.", "{c}")
    groups = (Group("indoors", ("a room", "a kitchen")), Group("outdoors", ("a street",)))
    assert found.columns == (Attribute("perceived setting", groups, ("a drawing",)),)
    assert json.loads(json.dumps(found.as_json()))["columns"][0]["groups"][1] == ["outdoors", "a street"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("threshold: 0.8", "threshold: 1.5", "a.yaml:3: threshold: 1.5: Input should be less than 1"),
        ("threshold: 0.8", "threshold: high", "a.yaml:3: threshold: 'high': Input should be a valid number"),
        ("threshold: 0.8", "treshold: 0.8", "a.yaml:3: treshold: unknown; did you mean 'threshold'"),
        ("threshold: 0.8", "", "a.yaml:1: threshold: is missing"),
        ('"{c}"]', '"plain"]', "a.yaml:4: templates.1: 'plain' has no place for a prompt"),
        ("outdoors, prompts", "indoors, prompts", "columns.0.groups: 'indoors' stands in two of them"),
        ("[a street]", "[a room]", "columns.0.groups: 'a room' stands in two of them"),
        ("[a drawing]", "[a street]", "columns.0.groups: 'a street' stands in two of them"),
        ("prompts: [a street]", "prompts: []", "a.yaml:9: columns.0.groups.1.prompts"),
        ("prompts: [a street]", "prompts: a street", "a.yaml:9: columns.0.groups.1.prompts: a list expected here"),
        ("prompts: [a street]", "words: [a street]", "columns.0.groups.1.words: unknown; there are name, prompts"),
        ("      - {name: outdoors, prompts: [a street]}\n", "", "columns.0.groups: 2 groups or more are needed"),
        ("clever", "stupid", "a.yaml:2: model: model '"),
    ],
)
def test_what_is_wrong_is_told_with_its_line_and_field(file: Path, old: str, new: str, said: str) -> None:
    """Misspelt keys, numbers out of range, groups that cannot be told apart, models that are not there."""
    text = file.read_text()
    assert text.count(old) >= 1
    file.write_text(text.replace(old, new))
    with pytest.raises(UsageError) as error:
        read_attributes(file)
    assert said in str(error.value)


def test_a_model_without_weights_is_refused(file: Path) -> None:
    """An untrained architecture would guess, so it is no answer."""
    file.write_text(FILE.format(model="curate-tiny"))
    with pytest.raises(UsageError, match=r"a\.yaml:2: model: 'curate-tiny' names no weights"):
        read_attributes(file)


def unit(vectors: NDArray[np.float64]) -> NDArray[np.float32]:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def slowly(
    image: Sequence[float],
    groups: Sequence[Sequence[float]],
    threshold: float,
    known: int,
    *,
    scale: float,
    bias: float,
) -> tuple[list[float], list[float], int]:
    """One image at a time in plain Python: softmax, sigmoid, and the group by the first of them."""
    logits = [scale * math.fsum(a * b for a, b in zip(image, group, strict=True)) + bias for group in groups]
    total = math.fsum(math.exp(logit) for logit in logits)
    shares = [math.exp(logit) / total for logit in logits]
    best = max(range(len(groups)), key=shares.__getitem__)
    return shares, [1 / (1 + math.exp(-x)) for x in logits], best if best < known and shares[best] >= threshold else -1


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.95])
def test_groups_and_abstention_are_those_of_the_slow_derivation(threshold: float) -> None:
    """The best group where it reaches the threshold; none below it, and none where `otherwise` is nearest."""
    random = np.random.default_rng(3)
    image_nD, group_GD = unit(random.normal(size=(500, 8))), unit(random.normal(size=(4, 8)))
    shares_nG = probabilities(image_nD, group_GD, loss="softmax", scale=4.0, bias=0.0)
    single_nG = probabilities(image_nD, group_GD, loss="sigmoid", scale=4.0, bias=-1.0)
    codes_n = guesses(shares_nG, threshold, 3)
    for row, image in enumerate(image_nD.tolist()):
        shares, _, code = slowly(image, group_GD.tolist(), threshold, 3, scale=4.0, bias=0.0)
        _, single, _ = slowly(image, group_GD.tolist(), threshold, 3, scale=4.0, bias=-1.0)
        assert shares_nG[row] == pytest.approx(shares, abs=1e-5)
        assert single_nG[row] == pytest.approx(single, abs=1e-5)
        assert codes_n[row] == code or abs(max(shares) - threshold) < 1e-5
    assert 0 < (codes_n == -1).sum() < 500


def test_the_threshold_itself_is_enough() -> None:
    """A probability of exactly the threshold names its group, one just below it or of `otherwise` none."""
    assert guesses(np.array([[0.75, 0.25], [0.7499, 0.2501], [0.25, 0.75]]), 0.75, 2).tolist() == [0, -1, 1]
    assert guesses(np.array([[0.2, 0.8]]), 0.5, 1).tolist() == [-1]
    assert guesses(np.zeros((0, 2)), 0.5, 2).tolist() == []


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_large_scales_do_not_overflow(loss: Literal["softmax", "sigmoid"]) -> None:
    """Logits of a thousand give probabilities of 0 and 1."""
    with np.errstate(all="raise", under="ignore"):
        found = probabilities(np.array([[1.0, 0.0]]), unit(np.array([[1.0, 0], [-1, 0]])), loss=loss, scale=1e3, bias=0)
    assert found.tolist() == [[1.0, 0.0]]


def test_a_groups_prompts_are_averaged_in_all_templates() -> None:
    """The normalised mean of what each prompt gives in each template; `otherwise` comes last."""
    asked: list[str] = []

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        asked.extend(texts)
        return unit(np.array([[len(text), text.count("a"), 1.0] for text in texts]))

    attribute = Attribute("setting", (Group("in", ("a room", "an attic")), Group("out", ("a street",))), ("ink",))
    found_GD = group_vectors(attribute, ("{c}", "photo of {c}"), embed)
    assert asked == [text for p in ("a room", "an attic", "a street", "ink") for text in (p, f"photo of {p}")]
    each = embed(asked)
    for group, (start, stop) in enumerate([(0, 4), (4, 6), (6, 8)]):
        mean = each[start:stop].mean(0)
        assert found_GD[group] == pytest.approx(mean / np.linalg.norm(mean), abs=1e-6)


def guessed(codes: list[int | None], name: str = COLUMN) -> pa.Table:
    ids = [n.to_bytes(16, "big") for n in range(len(codes))]
    columns = {"sample_id": pa.array(ids, pa.binary(16)), PREDICTED + name: pa.array(codes, pa.int32())}
    return with_model(pa.table(columns), CHECKPOINT, "softmax")


def test_a_column_says_who_guessed_and_how_often_it_abstained(file: Path) -> None:
    """Provenance: model, digest, threshold, abstained share of what was seen; unseen images are unknown as well."""
    [column], [note] = predicted_columns(read_attributes(file), guessed([0, 1, -1, None, 0]), None)
    assert (column.name, column.kind, column.model) == ("perceived setting", "zero-shot", "clever")
    assert column.codes_N is not None
    assert column.codes_N.tolist() == [0, 1, -1, -1, 0]
    for word in ("predicted, not known", "clever", f"sha256:{CHECKPOINT[:12]} ".strip(), "0.8 or more", "25.0%"):
        assert word in column.provenance, word
    assert "abstained from 25.0% of 4 samples" in note
    assert "1 images had no embedding" in note
    assert predicted_columns(read_attributes(file), guessed([0]), {"gender"}) == ((), ())


def assembled(
    request: AuditRequest, codes: list[int | None], wanted: set[str] | None = None, name: str = COLUMN
) -> Assembled:
    """A pool whose predictions come in another order than its rows."""
    captions: list[str | None] = ["a woman"] * len(codes)
    reader = caption_reader(request.traits)
    rows = pa.table({"sample_id": pa.array([n.to_bytes(16, "big") for n in range(len(codes))], pa.binary(16))})
    read = reader.read(captions)
    made = {"sample_id": rows["sample_id"], "caption": captions} | {name: read[name] for name in read.column_names}
    traits = with_facts(pa.table(made), reader.facts | {"json_fields": []})
    table = guessed(codes, name)
    backwards = table.take(list(range(len(codes)))[::-1])
    return assemble(rows, traits, request, wanted=wanted, predictions=backwards)


def test_predictions_are_columns_and_confounders_like_others(file: Path) -> None:
    """Joined by sample id, named in `columns` and `confounders`, with the errors that are stated for them."""
    name = COLUMN
    error = LabelError(0.9, 0.8)
    request = AuditRequest(attributes=file, columns=(name,), confounders=(name,), label_errors={name: error})
    found = assembled(request, [0, 1, -1, 0])
    column = found.named()[name]
    assert column.codes_N is not None
    assert column.codes_N.tolist() == [0, 1, -1, 0]
    assert column.label_error == error
    assert found.strata[name].tolist() == ["indoors", "outdoors", None, "indoors"]
    assert any("abstained from 25.0%" in note for note in found.notes)
    assert name not in assembled(AuditRequest(attributes=file), [0, 1, -1, 0], {"gender"}).named()
    assert AuditRequest(attributes=file).digest != AuditRequest().digest


def test_a_name_that_labels_have_too_is_refused(file: Path, tmp_path: Path) -> None:
    """Nobody could tell which of the two an audit speaks of."""
    labels = tmp_path / "labels.csv"
    labels.write_text("key,perceived setting\na,b\n")
    with pytest.raises(UsageError, match="'perceived setting' is a column of the labels and of the attributes"):
        AuditRequest(attributes=file, labels=labels)


def test_a_name_of_curates_own_goes_to_the_file(file: Path) -> None:
    """Mentions of gender then take a longer name, and a note says so."""
    file.write_text(file.read_text().replace(f"column: {COLUMN}", "column: gender"))
    found = assembled(AuditRequest(attributes=file), [0, 1], name="gender")
    assert [found.named()[name].kind for name in ("gender", "caption mentions: gender")] == ["zero-shot", "mention"]
    assert any("the audit's own is called 'caption mentions: gender'" in note for note in found.notes)


def test_findings_say_whose_guess_a_group_is() -> None:
    """Alone and crossed; never that anything or anyone is what a model took it for."""
    random, N = np.random.default_rng(0), 4000
    codes_N = random.integers(-1, 2, N).astype(np.int32)
    column = Column("perceived setting", "zero-shot", "a model", ("indoors", "outdoors"), codes_N, model="clever")
    other = Column("tone", "label", "a file", ("dark", "light"), random.integers(0, 2, N).astype(np.int32))
    selected_N = random.random(N) < np.where(codes_N == 0, 0.1, 0.3)
    crossed = [("perceived setting", "tone")]
    audited = audit_columns([column, other], selected_N, intersections=crossed, placebos=2)
    said = findings(audited)
    assert any(line.startswith("Samples that clever takes for indoors were kept 0.3") for line in said)
    assert any("in part as clever takes them were kept" in line for line in said)
    assert [one.model for one in audited.columns] == ["clever", None, "clever"]
    codes_N[:] = np.where(codes_N == 0, -1, codes_N)
    unsure = findings(audit_columns([column], random.random(N) < np.where(codes_N == -1, 0.1, 0.3), placebos=2))
    assert any("samples whose perceived setting clever leaves open" in line.lower() for line in unsure)


def test_paths_above_a_model_are_in_no_sentence(file: Path) -> None:
    """A weight file is named with its architecture, a directory by its last part."""
    weights = file.parent / "epoch_20.pt"
    weights.write_bytes(b"")
    file.write_text(file.read_text().replace(str(file.parent / "clever"), f"ViT-B-32:{weights}"))
    assert read_attributes(file).model_name == "ViT-B-32:epoch_20.pt"
