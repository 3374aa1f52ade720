"""`curate verify` and the price of a policy: reckoned again from the stored scores, or said to be unchecked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import curate
from curate import repriced
from curate.storage import canonical_json, readable_json
from tests.conftest import make_checkpoint
from tests.e2e.policies import certificate_of, make_captioned_pool, score, write_labels, write_policy


@pytest.fixture(scope="module")
def scored(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores with all that any criterion needs, and copies of samples in the pool."""
    folder = tmp_path_factory.mktemp("scored")
    pool = make_captioned_pool(folder / "pool", lambda n: f"a thing with number {n}")
    write_labels(folder / "labels.csv", {"half": lambda n: "ab"[n % 2]})
    write_policy(folder / "p.yaml", {"half": {"a": {"min_share": 0.75}}})
    learner = make_checkpoint(folder / "learner", "sigmoid", seed=5)
    score(pool, folder / "out", tiny_checkpoint, learner=str(learner), trusted=pool / "00000.tar")
    return folder / "out"


def ruled(scored: Path, output: Path, **options: Any) -> Path:
    """Drawn under the policy, and written."""
    files = {"policy": scored.parent / "p.yaml", "labels": scored.parent / "labels.csv"}
    curate.select(scored, to=output, engine="inline", **files, **options)
    curate.write(output, engine="inline", samples_per_shard=10)
    return output


@pytest.fixture
def drawn(scored: Path, tmp_path: Path) -> Path:
    return ruled(scored, tmp_path / "out", criterion="learnability")


def said_of(output: Path) -> tuple[bool | None, str]:
    [check] = [check for check in curate.verify(output, load=False).checks if check.name == "certificate"]
    return check.ok, check.detail


@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "learnability"},
        {"criterion": "easy-reference", "loss": "softmax", "chunks": 3},
        {"criterion": "hard-learner", "deduplicate": "near"},
        {"criterion": "alignment"},
    ],
)
def test_a_price_is_reckoned_again(scored: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """For each criterion and both losses, every draw of a policy that binds comes out at the price that is said."""
    output = ruled(scored, tmp_path / "out", **options)
    price = certificate_of(output)["price"]
    assert price["score_with_policy"] != price["score_without"]
    assert said_of(output) == (True, "1 groups counted again: 24 chosen of 120; price reckoned again in 3 of 3 draws")


@pytest.mark.parametrize("which", [0, 1])
def test_a_price_that_certificate_and_receipts_agree_on_is_still_found_wrong(drawn: Path, which: int) -> None:
    """One score of one draw is off by a thousandth, in its receipt and in the sum: verify names the sub-batch."""
    path = sorted((drawn / "_curate/commits").glob("selection-*.json"))[0]
    receipt = json.loads(path.read_bytes())
    price = receipt["facts"]["policy"]["price"]
    change = abs(price[which]) * 1e-3
    price[which] += change
    path.write_bytes(canonical_json(receipt))
    selected = [json.loads(one.read_bytes()) for one in (drawn / "_curate/commits").glob("selection-*.json")]
    _sum_again(drawn, [one["facts"] for one in selected])
    ok, detail = said_of(drawn)
    assert ok is False
    word = ("with", "without")[which]
    assert f"price of sub-batch {receipt['facts']['super_batch']}: it says a score of" in detail
    assert f"{word} the policy, reckoned again" in detail


def test_what_cannot_be_checked_is_said(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without score tables no price is; with other bits that of the plain draw is not; and of many draws some are."""
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(repriced, "_same_bits", lambda *_: False)
        ok, detail = said_of(drawn)
        assert ok
        with_it = "; price with the policy reckoned again in 3 of 3 draws"
        assert detail.endswith(f"{with_it}, without it not checked: this machine rounds otherwise")
    monkeypatch.setattr(repriced, "MOST_DRAWS", 2)
    assert said_of(drawn)[1].endswith("price reckoned again in 2 of 3 draws")
    copy = shutil.copytree(drawn, tmp_path / "copy")
    for path in (copy / "_curate/score").iterdir():
        path.unlink()
    assert said_of(copy) == (True, "1 groups counted again: 24 chosen of 120; price not checked: score tables are gone")


def test_other_scores_than_the_draws_are_found(drawn: Path) -> None:
    """A draw of which the selection file says another order of candidates than the score tables have is no proof."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    receipt = json.loads(sorted((drawn / "_curate/commits").glob("score-*.json"))[0].read_bytes())
    path = drawn / "_curate" / receipt["outputs"][0]["path"]
    table = pq.read_table(path)
    rolled = pa.array(np.roll(np.array(table["sample_id"].to_pylist(), object), 1).tolist(), table["sample_id"].type)
    moved = table.set_column(table.column_names.index("sample_id"), "sample_id", rolled)
    pq.write_table(moved, path, compression="none", use_dictionary=False)
    data = path.read_bytes()
    receipt["outputs"][0]["size"] = len(data)
    (drawn / "_curate/commits" / f"{receipt['unit']}.json").write_bytes(canonical_json(receipt))
    assert "the score tables have other samples than the draws" in said_of(drawn)[1]


def _sum_again(output: Path, facts: list[dict[str, Any]]) -> None:
    """The certificate as it would be of these draws."""
    facts = sorted(facts, key=lambda one: one["super_batch"])
    prices = [one["policy"]["price"] for one in facts]
    own, plain = 0.0, 0.0
    for one in prices:
        own, plain = own + one[0], plain + one[1]
    members = sum(one[2] for one in prices)
    price = {"score_with_policy": own, "score_without": plain, "members": members}
    price["given_up_per_member"] = (plain - own) / members
    (output / "certificate.json").write_bytes(readable_json(certificate_of(output) | {"price": price}))
