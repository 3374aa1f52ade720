"""The training report: what it says of logs that are whole, torn, resumed, unfinished or hostile, and who has won."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from curate.costs.energy import Energy, Joules
from curate.costs.ledger import CostLedger
from curate.errors import UsageError
from curate.learner.report import write_report
from curate.learner.report.history import last_ledger, read_history

HOSTILE = '<script>alert("1")</script>\u202egnp.exe<img src=x onerror=alert(2)>'
CPU = Energy(
    processor=Joules(measured=3100.0, measured_seconds=60.0),
    memory=Joules(unavailable_seconds=60.0, reasons=("no RAPL domain for memory",)),
    accelerator=Joules(unavailable_seconds=60.0, reasons=("no NVIDIA driver",)),
)


@dataclass(frozen=True)
class Run:
    """A synthetic run: accuracy rises as 1 - exp(-step / pace), up to `top`."""

    seed: int = 0
    criterion: str = "learnability"
    steps: int = 300
    pace: float = 40.0
    top: float = 0.46
    model: str = "curate-tiny"
    ledgers: bool = True
    finished: bool = True
    lag: bool = False
    estimator: float | None = None

    @property
    def selects(self) -> bool:
        return self.criterion != "uniform"

    def ledger(self, step: int) -> CostLedger:
        ledger = CostLedger("node").add(
            "training", samples=128 * step, flops=step * 5.6e11, optimiser=step * 1e9, seconds=0.15 * step, energy=CPU
        )
        if not self.selects:
            return ledger
        ledger = ledger.add("scoring", samples=640 * step, flops=step * 9.4e11, seconds=0.2 * step)
        return ledger.add("reference", samples=2500, flops=3.6e12, seconds=9.0).add("evaluation", flops=step * 1e10)

    def accuracy(self, step: int) -> float:
        fall = 0.03 * max(step - 200, 0) / 100 if not self.selects else 0.0
        return round(self.top * (1 - math.exp(-step / self.pace)) - fall + 0.004 * math.sin(7 * self.seed + step), 4)

    def records(self) -> Iterator[dict[str, Any]]:
        settings = {"model": self.model, "criterion": self.criterion, "seed": self.seed, "lr": 2e-3, "gain": 100.0,
                    "betas": [0.9, 0.95], "augment": False, "eval_shards": [HOSTILE]}  # fmt: skip
        factor = {"factor": 2.67, "factor_text": "without reuse: 2/3 + 5/3"} if self.selects else {"factor": 1.0}
        yield {"kind": "start", "model": self.model, "reference": "local-dir:ref" if self.selects else None,
               "criterion": self.criterion, "settings": settings, "samples": 2500, "steps": self.steps,
               "super_batch": 640 if self.selects else 128, "sub_batch": 128, "chunks": 16, "parameters": 1234567,
               "flops_per_sample": 1.46e9, **factor}  # fmt: skip
        if self.estimator is not None:
            yield {"kind": "probe", "estimator": "forward", "progress": self.estimator, "cosine": 0.002, "seeds": 16,
                   "heads_progress": 0.08}  # fmt: skip
        for step in range(1, self.steps + 1):
            yield self.step(step)
            yield from self.measurements(step)
        if self.finished:
            repeats = {"1": 900, "2": 330, "3": 60, "11": 4} if self.selects else {"1": 1100, "2": 400, "3": 5}
            yield {"kind": "end", "steps": self.steps, "seconds": 0.35 * self.steps, "loss": 1.9, "factor": 2.71,
                   "repeats": repeats, "ledger": self.ledger(self.steps).as_json()}  # fmt: skip

    def step(self, step: int) -> dict[str, Any]:
        late = step / self.steps
        selecting = self.selects and step <= 200
        wave = math.sin(step * 12.9898 + self.seed)
        chunks = [round((1.2 - late) * (1 - 0.03 * n) - 0.02 * n + 0.05 * wave, 4) for n in range(16)]
        return {
            "kind": "step", "step": step, "samples": 128 * step, "candidates": 640 * step if self.selects else 0,
            "loss": 1.8 + 3.0 * math.exp(-step / self.pace) + 0.15 * wave, "lr": 1e-3 * (1 - late),
            "phase": "selecting" if selecting else "uniform", "gain": 100.0 if selecting else 0.0,
            "keep": 0.2 if selecting else 1.0, "chunk_scores": chunks if selecting else None,
            "effective": 6 + 180 * late**2 + 3 * wave if selecting else None,
            "clean": 0.9 - 0.2 * late + 0.04 * wave if self.selects else 0.2, "clean_pool": 0.2 + 0.02 * wave,
            "flops": self.ledger(step).flops(), "seconds": (0.35 if self.selects else 0.15) * step,
        }  # fmt: skip

    def measurements(self, step: int) -> Iterator[dict[str, Any]]:
        if self.selects and step % 50 == 0:
            learner = {"loss": 2.2 * math.exp(-step / 150) + 0.9, "recall": 0.5 * (1 - math.exp(-step / 120))}
            yield {"kind": "watch", "step": step, "learner": learner, "reference": {"loss": 1.48, "recall": 0.41},
                   "noise": 0.31, "phase": "selecting"}  # fmt: skip
        if self.selects and step == 200:
            yield {"kind": "handover", "step": 200, "from": "selecting", "to": "uniform",
                   "why": "the learner's loss on the trusted set (1.42) is below the reference's (1.48)"}  # fmt: skip
        if self.lag and step % 50 == 0:
            yield {"kind": "lag", "step": step, "lag": 4, "rank_correlation": 0.97, "overlap": 0.91}
        if step % 20 == 0:
            accuracy = self.accuracy(step)
            ways = {"image_to_text": accuracy * 0.8, "text_to_image": accuracy * 0.7}
            record: dict[str, Any] = {
                "kind": "eval", "step": step, "samples": 128 * step, "flops": self.ledger(step).flops(),
                "seconds": (0.35 if self.selects else 0.15) * step,
                "retrieval": {"pairs": 500, "pool": 100, **ways},
                "zeroshot": {"samples": 2000, "classes": 10, "accuracy": accuracy},
            }  # fmt: skip
            yield record | ({"ledger": self.ledger(step).as_json()} if self.ledgers else {})

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in self.records()))
        return folder


class Reader(HTMLParser):
    """Text, tags and attributes of a page; every tag that is opened is closed."""

    VOID = ("meta", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.titles: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self._open += [] if tag in self.VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open and self._open[-1] == "h3":
            self.titles.append(data)

    def finding(self, lead: str) -> str:
        """What stands beside a lead word."""
        return self.text.partition(f"\n{lead}")[2].partition("\n")[0]


def report(folder: Path, runs: list[Path], baselines: list[Path] | None = None, **options: Any) -> Reader:
    page = write_report(runs, folder / "report.html", baselines=baselines or [], **options)
    return Reader(page.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """Three seeds of JEST against three of IID."""
    folder = tmp_path_factory.mktemp("three")
    jest = [Run(seed=n, pace=30 + 3 * n, model=HOSTILE, lag=True, estimator=0.002) for n in range(3)]
    iid = [Run(seed=n, criterion="uniform", pace=110 + 4 * n, top=0.43) for n in range(3)]
    sides = ([run.write(folder / f"{run.criterion}-{run.seed}") for run in side] for side in (jest, iid))
    return report(folder, *sides)


def test_the_page_has_every_chart(three: Reader) -> None:
    """Loss, watch, scores by chunk and over time, sharpness, clean share, repeats, schedule, lag, the metric thrice."""
    metric = {f"Zero-shot accuracy against {cost}" for cost in ("samples", "FLOPs", "wall-clock")}
    wanted = {"Training loss", "Learner and reference: loss", "Score per chunk", "Score over time", "Lag", "Repeats",
              "Effective candidates", "Clean share", "Kept share"} | metric  # fmt: skip
    assert wanted <= set(three.titles)


def test_nothing_of_a_log_becomes_markup(three: Reader) -> None:
    """A model named like a script is text; no element or attribute of the page could load or run anything."""
    assert '<script>alert("1")</script>gnp.exe<img src=x onerror=alert(2)>' in three.text
    assert not {"script", "img", "link", "iframe", "object", "embed", "form", "a"} & set(three.tags)
    assert not {name for name in three.attributes if name.startswith("on") or name in ("src", "href", "style")}


def test_the_findings_say_what_was_measured(three: Reader) -> None:
    """Size, cost by phase, factor, energy with its marks, handover, repeats, clean share, a hopeless estimator."""
    assert "(1,234,567 parameters) on 2,500 samples for 300 steps of 128 pairs out of 640" in three.text
    assert "0.002 of backprop's progress per second" in three.finding("Hopeless estimator")
    assert "scoring 282.0 TFLOP (62.1\u00a0%), reference 3.6 TFLOP (0.8\u00a0%)" in three.finding("Cost")
    assert "expected 2.67 (without reuse: 2/3 + 5/3); measured 2.71" in three.finding("Factor over IID")
    assert "processor 9.3 kJ measured, memory unavailable (no RAPL domain for memory)" in three.finding("Energy")
    assert "At step 200 from selecting to uniform: the learner's loss" in three.finding("Handover")
    assert "(seeds 0, 1, 2)" in three.finding("Handover")
    assert "Of 2,500 samples 900 were trained on once, 394 more often (up to 11 times), and 1,206 never" in three.text
    assert "71.0\u00a0% of the chosen pairs were clean, of the candidates 20.0\u00a0%" in three.finding("Clean share")
    assert "correlation of 0.970 to fresh ones; 0.910 of a draw" in three.finding("Lag")


def test_co2_stands_only_where_an_intensity_is_stated(three: Reader, tmp_path: Path) -> None:
    """3,100 J at 400 g/kWh are 0.344 g, a lower bound where a part has no counter; without an intensity nothing."""
    assert "CO2" not in three.text
    page = report(tmp_path, [Run().write(tmp_path / "run")], grams_per_kwh=400)
    assert page.finding("CO2") == "At least 0.344 g at the stated 400 g/kWh, from energy that is measured."
    assert "energyCO2 at 400 g/kWh" in page.text.replace("\n", "")
    assert "3,100 J measured, in part0.344 g, in part" in page.text.replace("\n", "")
    with pytest.raises(UsageError, match="-1 g/kWh: an intensity is"):
        report(tmp_path, [tmp_path / "run"], grams_per_kwh=-1)


def test_a_win_is_stated_with_its_interval(three: Reader) -> None:
    """The statement of curate.costs, the target's origin, and the ratio without the reference."""
    said = three.finding("Against IID")
    assert re.search(r"JEST reached zero-shot accuracy 0\.36\d* with \S+ \(training\) \+ \S+ \(scoring\) \+", said)
    assert "95 % interval of the ratio" in said
    assert "JEST won." in said
    assert "the lowest of the baselines' best values" in said
    assert "Without the reference's cost the ratio is" in said
    assert "equal iterations300" in three.text


def test_the_statement_charges_up_to_the_first_evaluation_at_the_target(tmp_path: Path) -> None:
    """With a target of 0.30 and one pair the FLOPs are those of the ledgers there, recomputed by hand."""
    ours, theirs = Run(pace=20.0), Run(criterion="uniform", pace=110.0, top=0.43)
    page = report(tmp_path, [ours.write(tmp_path / "a")], [theirs.write(tmp_path / "b")], target=0.3)
    steps = [next(step for step in range(20, 301, 20) if run.accuracy(step) >= 0.3) for run in (ours, theirs)]
    mine, iid = ours.ledger(steps[0]), theirs.ledger(steps[1])
    said = page.finding("Against IID")
    assert (
        f"{mine.training.flops + mine.training.optimiser:.3g} (training) + {mine.scoring.flops:.3g} (scoring)" in said
    )
    assert f"against IID {iid.flops():.3g}: {iid.flops() / mine.flops():.2f} times fewer, from one seed" in said
    assert "The target was given." in said


def test_a_loss_is_said_plainly(tmp_path: Path) -> None:
    """A run that needs more FLOPs than IID has lost, in words."""
    slow = [Run(seed=n, pace=80, top=0.44).write(tmp_path / f"j{n}") for n in range(3)]
    iid = [Run(seed=n, criterion="uniform", pace=110, top=0.43).write(tmp_path / f"i{n}") for n in range(3)]
    said = report(tmp_path, slow, iid).finding("Against IID")
    assert "times more (ratio 0." in said
    assert "JEST lost: IID was cheaper or got further." in said


def test_a_run_that_misses_the_target_has_lost(tmp_path: Path) -> None:
    """Where only IID got there no ratio is made up."""
    page = report(tmp_path, [Run(top=0.2).write(tmp_path / "a")],
                  [Run(criterion="uniform", pace=60, top=0.43).write(tmp_path / "b")])  # fmt: skip
    said = page.finding("Against IID")
    assert "never both reached" in said
    assert "JEST lost" in said


@pytest.mark.parametrize(
    ("ours", "theirs", "reason"),
    [
        (Run(ledgers=False), Run(criterion="uniform"), "an evaluation in the logs has no cost ledger"),
        (Run(seed=1), Run(criterion="uniform"), "no run and baseline have the same seed"),
        (Run(steps=10), Run(criterion="uniform"), "the logs have no common metric"),
    ],
)
def test_no_statement_without_its_figures(tmp_path: Path, ours: Run, theirs: Run, reason: str) -> None:
    """Where logs do not allow a comparison the report says why, and is written all the same."""
    said = report(tmp_path, [ours.write(tmp_path / "a")], [theirs.write(tmp_path / "b")]).finding("Against IID")
    assert f"No statement is possible: {reason}" in said


def test_two_runs_of_one_seed_are_refused(tmp_path: Path) -> None:
    """They are not two observations."""
    paths = [Run().write(tmp_path / name) for name in "ab"]
    with pytest.raises(UsageError, match="two runs with seed 0"):
        report(tmp_path, paths, [Run(criterion="uniform").write(tmp_path / "c")])


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    """No run, a directory without a log, a log of something else, an unknown metric."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "log.jsonl").write_text("hello\n[1, 2]\n{}\n")
    run = Run(steps=40).write(tmp_path / "run")
    for paths, options, message in (
        ([], {}, "at least one run"),
        ([tmp_path / "empty"], {}, r"no log.jsonl can be read .*; is it the directory of a training run\?"),
        ([tmp_path / "other"], {}, "no line of it is a record"),
        ([run], {"metric": "fid"}, "metric 'fid' is unknown; choose one of accuracy"),
    ):
        with pytest.raises(UsageError, match=message):
            report(tmp_path, paths, **options)


def test_an_unfinished_run_with_a_torn_line(tmp_path: Path) -> None:
    """The last line is left out without a word; that the run has not ended is said."""
    run = Run(finished=False, steps=130).write(tmp_path / "run")
    log = run / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-40])
    history = read_history(run)
    assert (history.last_step, history.unreadable, history.end) == (129, 0, None)
    page = report(tmp_path, [run])
    assert "The log of run run ends at step 129 of 130." in page.finding("Unfinished")
    assert "Repeats" not in page.titles


def test_a_resumed_run_counts_each_step_once(tmp_path: Path) -> None:
    """A log that was not cut back repeats steps 21 to 40: what came later holds, whatever else was logged there."""
    records = list(Run(steps=60).records())
    first = [record for record in records if (record.get("step") or 0) <= 40 and record["kind"] != "end"]
    again = [record for record in records if (record.get("step") or 61) > 20 or record["kind"] == "start"]
    (tmp_path / "run").mkdir()
    lines = [json.dumps(record) for record in [*first, *again]]
    (tmp_path / "run" / "log.jsonl").write_text("\n".join(lines) + "\n")
    history = read_history(tmp_path / "run")
    assert [record["step"] for record in history.steps] == list(range(1, 61))
    assert [record["step"] for record in history.evals] == [20, 40, 60]
    assert (history.resumed, history.end is not None) == (1, True)
    ledger = last_ledger(history)
    assert ledger is not None
    assert ledger == Run(steps=60).ledger(60)
    assert "Once;" in report(tmp_path, [tmp_path / "run"]).finding("Resumed")


def test_figures_that_are_none_leave_gaps(tmp_path: Path) -> None:
    """NaN, null, texts and objects where numbers belong, damaged lines, unknown kinds: a report, and it says so."""
    odd = [
        '{"kind":"start","settings":null,"samples":"many","super_batch":null}',
        '{"kind":"step","step":1,"loss":NaN,"chunk_scores":[null,1],"clean":{}}',
        '{"kind":"step","step":2,"loss":null,"chunk_scores":"x","effective":1e400}',
        '{"kind":"eval","step":2,"zeroshot":{"accuracy":true,"classes":0},"retrieval":{"image_to_text":0.1}}',
        '{"kind":"step","st',
        '{"kind":"watch","step":2,"learner":null,"reference":3}',
        '{"kind":"handover","step":2}',
        '{"kind":"probe","progress":null}',
        '{"kind":"weather","step":2}',
        '{"kind":"end","repeats":{"a":1,"2":null},"ledger":{"format":"other"},"loss":-Infinity}',
    ]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("\n".join(odd) + "\n")
    page = report(tmp_path, [tmp_path / "run"])
    assert "1 line could not be read" in page.finding("Damaged log")
    assert "a model that the log does not name for 2 steps" in page.finding("Trained")
    assert "hold no evaluation" not in page.text
    assert page.titles == ["Runs"]


def test_settings_that_differ_between_seeds_are_named(tmp_path: Path) -> None:
    """A mean over runs of different configurations is announced as one."""
    runs = [Run(seed=0, steps=40).write(tmp_path / "a"), Run(seed=1, steps=40, model="other").write(tmp_path / "b")]
    assert "The runs also differ in model" in report(tmp_path, runs).finding("Trained")


def test_equal_logs_give_equal_bytes(tmp_path: Path) -> None:
    """The page has no date and no random name in it, and a long run's page is not longer than a short one's."""
    run = Run(steps=60).write(tmp_path / "run")
    first, second = (write_report(run, tmp_path / name) for name in ("a.html", "deep/b.html"))
    assert first.read_bytes() == second.read_bytes()
    long = write_report(Run(steps=3000, pace=400).write(tmp_path / "long"), tmp_path / "c.html")
    assert long.stat().st_size < 200_000
