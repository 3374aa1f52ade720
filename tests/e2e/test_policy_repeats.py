"""A policy over stored scores: `select`, `write`, back without it; and `verify` counts a certificate anew."""

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
from curate.cli import main
from curate.errors import UsageError
from tests.e2e.policies import certificate_of, make_captioned_pool, score, write_labels, write_policy
from tests.e2e.pools import check_run, published


@pytest.fixture(scope="module")
def plain(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    make_captioned_pool(folder / "pool", lambda n: f"{('a woman', 'a man', 'a dog')[n % 3]} with number {n}")
    write_labels(folder / "labels.csv", {"half": lambda n: "ab"[n % 2]})
    write_policy(folder / "p.yaml", {"half": {"a": {"min_share": 0.7}}, "gender": {"female": {"min_ratio": 1}}})
    score(folder / "pool", folder / "out", tiny_checkpoint)
    return folder / "out"


@pytest.fixture(scope="module")
def ruled(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy drawn from the stored scores into another directory, and written."""
    output = tmp_path_factory.mktemp("ruled") / "out"
    ruled_select(plain, output)
    curate.write(output, engine="inline", samples_per_shard=10)
    return output


def ruled_select(plain: Path, output: Path | None, **options: Any) -> Any:
    files = {"policy": plain.parent / "p.yaml", "labels": plain.parent / "labels.csv"}
    return curate.select(plain, to=output, engine="inline", **files | options)


def failed(output: Path) -> list[tuple[str, str]]:
    checks = curate.verify(output, load=False).checks
    return [(check.name, check.detail) for check in checks if check.ok is False]


def test_select_draws_under_a_policy_from_stored_scores(
    plain: Path, ruled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line and Python draw the same, the certificate is there before anything is written, price printed."""
    files = ["--policy", str(plain.parent / "p.yaml"), "--labels", str(plain.parent / "labels.csv"), "--on", "key"]
    assert main(["select", str(plain), "-o", str(tmp_path / "out"), "--engine", "inline", *files]) == 0
    said = capsys.readouterr().err
    assert "policy: half=a: 17 of 60 chosen, at least 17: at its floor" in said
    assert "policy: price" in said
    assert certificate_of(tmp_path / "out") == certificate_of(ruled)
    check_run(ruled)
    assert failed(ruled) == []


def test_write_keeps_the_policy_without_its_files(plain: Path, ruled: Path, tmp_path: Path) -> None:
    """With policy and label file gone, `write` and `select --keep` still draw under them, from what is stored."""
    copy = shutil.copytree(ruled, tmp_path / "out")
    aside = (plain.parent / "labels.csv").rename(tmp_path / "labels.csv")
    try:
        curate.write(copy, engine="inline", samples_per_shard=12)
        assert certificate_of(copy) == certificate_of(ruled)
        result = curate.select(copy, keep=0.5, engine="inline")
    finally:
        aside.rename(plain.parent / "labels.csv")
    assert result.certificate is not None
    assert [row["L"] for row in result.certificate["groups"]] == [42, 20]
    curate.write(copy, engine="inline", samples_per_shard=12)
    check_run(copy)
    assert failed(copy) == []


def test_labels_are_asked_for_again_where_nothing_of_them_is_left(ruled: Path, tmp_path: Path) -> None:
    """Without memberships and without the file there is nothing to draw by, and the message says what to give."""
    copy = shutil.copytree(ruled, tmp_path / "out")
    for path in (*copy.glob("_curate/policy/*"), *copy.glob("_curate/commits/policy-*")):
        path.unlink()
    with pytest.raises(UsageError, match=r"the labels of its policy .* are needed again; give --policy and --labels"):
        curate.select(copy, keep=0.5, engine="inline")
    assert (copy / "00000.tar").exists()


def test_what_is_said_of_coverage_is_that_of_the_policy_now(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same groups under another min_coverage: memberships are found again, and the note comes and goes with it."""
    labels = write_labels(tmp_path / "l.csv", {"half": lambda n: "a" if n % 2 else ""})
    for least, notes in ((0.0, 0), (0.9, 1), (0.0, 0)):
        path = write_policy(tmp_path / "p.yaml", {"half": {"a": {"min_ratio": 0.5}}}, f"    min_coverage: {least}\n")
        curate.select(plain, to=tmp_path / "out", policy=path, labels=labels, engine="inline", quiet=False)
        assert capsys.readouterr().err.count("half: 50.0% of the samples are known, below min_coverage 90.0%") == notes
    assert len(list((tmp_path / "out/_curate/commits").glob("policy-*"))) == 1


def test_without_its_policy_a_selection_is_the_plain_one(plain: Path, ruled: Path, tmp_path: Path) -> None:
    """`select --no-policy` and `write` give the plain run's bytes, and no certificate."""
    copy = shutil.copytree(ruled, tmp_path / "out")
    assert main(["select", str(copy), "--no-policy", "--engine", "inline"]) == 0
    curate.write(copy, engine="inline", samples_per_shard=10)
    assert not (copy / "certificate.json").exists()
    assert published(copy) == published(plain)


def test_a_policy_in_place_replaces_the_shards(plain: Path, ruled: Path, tmp_path: Path) -> None:
    """Drawn into the same directory: the same bytes as in another one."""
    copy = shutil.copytree(plain, tmp_path / "out")
    files = {"policy": plain.parent / "p.yaml", "labels": plain.parent / "labels.csv"}
    curate.select(copy, engine="inline", **files)
    assert not list(copy.glob("*.tar"))
    curate.write(copy, engine="inline", samples_per_shard=10)
    assert published(copy) == published(ruled)


def test_verify_counts_a_certificate_anew(ruled: Path, tmp_path: Path) -> None:
    """A count that is off by one, another policy, a changed membership: each is found, and where."""
    copy = shutil.copytree(ruled, tmp_path / "out")
    said = certificate_of(copy)
    change(copy, said | {"groups": [said["groups"][0] | {"C": 18}, said["groups"][1]]})
    [detail] = [detail for name, detail in failed(copy) if name == "certificate"]
    assert "'C': 18" in detail.split("counted again")[0]
    assert "'C': 17" in detail.split("counted again")[1]
    change(copy, said | {"candidates": 119})
    assert ("certificate", "VerificationError: certificate.json, candidates: it says 119, counted again 120") in failed(
        copy
    )
    change(copy, said | {"policy": said["policy"] | {"author": "B. Other"}})
    assert any("is of another policy" in detail for _, detail in failed(copy))
    change(copy, said)
    assert [name for name, _ in failed(copy)] == ["digests"]
    for name, wrong in {"price": None, "draws_with_conflict": 3, "columns": [], "more": 1}.items():
        change(copy, said | {name: wrong})
        assert any(f"{name}: the receipts of its draws say" in detail for _, detail in failed(copy))
    change(copy, said | {"memberships": None} | dict.fromkeys(("draws", "candidates", "chosen"), 0))
    assert any("names no memberships, but" in detail for _, detail in failed(copy))
    change(copy, [])
    assert ("certificate", "TypeError: list indices must be integers or slices, not str") in failed(copy)
    change(copy, said)
    flip_a_member(copy / said["memberships"]["file"])
    assert any("its bytes are not those that the certificate was made of" in detail for _, detail in failed(copy))


def test_memberships_of_other_samples_are_refused(ruled: Path, tmp_path: Path) -> None:
    """A membership file whose samples are not those of the score tables never gives a selection."""
    from curate.errors import VerificationError
    from curate.pipelines.ruling import read_members

    path = next(ruled.glob("_curate/policy/*.parquet"))
    table = pq.read_table(path)
    asked = table.select(["sample_id", "shard", "row"]).take([5, 0, 77])
    assert read_members(path, asked, 2).tolist() == [[table[g][n].as_py() for g in ("0", "1")] for n in (5, 0, 77)]
    moved = table.set_column(table.column_names.index("row"), "row", pa.array(np.roll(table["row"].to_numpy(), 1)))
    pq.write_table(moved, tmp_path / "moved.parquet")
    for wrong in (moved, table.slice(0, 50), table.slice(0, 0)):
        pq.write_table(wrong, tmp_path / "wrong.parquet")
        with pytest.raises(VerificationError, match="has other samples than the score tables"):
            read_members(tmp_path / "wrong.parquet", asked, 2)


def change(output: Path, certificate: Any) -> None:
    (output / "certificate.json").write_text(json.dumps(certificate))


def flip_a_member(path: Path) -> None:
    table = pq.read_table(path)
    flipped = table["0"].to_numpy(zero_copy_only=False).copy()
    flipped[0] = not flipped[0]
    pq.write_table(table.set_column(table.column_names.index("0"), "0", pa.array(flipped)), path)
