"""The probe's figures, where they can be known beforehand, and its verdict."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from curate.errors import UsageError
from curate.estimators.memory import peak_bytes
from curate.estimators.names import make_estimator
from curate.estimators.probe import probe, render
from curate.estimators.problem import DualEncoderProblem
from tests.oracle.estimator_cases import dual_encoder, pairs


def test_backprop_is_as_good_as_itself() -> None:
    """Cosine and ratio are 1 with an interval of no width; d counts every number; gradients and modes come back."""
    problem = DualEncoderProblem(dual_encoder())
    kept = torch.ones(())
    problem.module.logit_scale.grad = kept
    report = probe(make_estimator("backprop"), problem, pairs(), seeds=2, repeats=1)
    assert report.dimensions == sum(p.numel() for p in problem.module.parameters())
    assert (report.cosine, report.ratio) == (pytest.approx(1), pytest.approx(1))
    assert (report.ratio_low, report.ratio_high) == (pytest.approx(1), pytest.approx(1))
    assert report.peak_mib == pytest.approx(report.backprop_peak_mib, rel=0.05)
    assert problem.module.logit_scale.grad is kept
    assert problem.module.visual.proj.grad is None


def test_a_full_forward_gradient_is_hopeless() -> None:
    """R is of the order of d, the verdict says so, and the control of exact heads does better."""
    report = probe(make_estimator("forward"), DualEncoderProblem(dual_encoder()), pairs(), seeds=6, repeats=1)
    assert report.hopeless
    assert report.dimensions / 100 < report.ratio < report.dimensions * 10
    assert report.ratio_low <= report.ratio <= report.ratio_high
    assert report.progress == pytest.approx(report.backprop_milliseconds / report.milliseconds / report.ratio)
    assert report.heads_progress is not None
    assert report.heads_progress > report.progress
    shown = render(report)
    assert f"d = {report.dimensions:,}, K = 1" in shown
    assert "hopeless" in shown


def test_render_knows_three_verdicts() -> None:
    """Hopeless, beaten by the heads alone, and neither."""
    report = probe(make_estimator("backprop"), DualEncoderProblem(dual_encoder()), pairs(), seeds=2, repeats=1)
    assert "hopeless" in render(replace(report, progress=0.49))
    assert "heads alone" in render(replace(report, progress=0.7, heads_progress=0.9))
    assert len(render(replace(report, progress=0.9, heads_progress=0.7)).splitlines()) == 8
    with pytest.raises(UsageError, match="1 seeds"):
        probe(make_estimator("backprop"), DualEncoderProblem(dual_encoder()), pairs(), seeds=1)


def test_peak_memory_counts_what_was_held_at_once() -> None:
    """Three tensors of 4 KiB alive together and one after the other."""

    def together() -> list[torch.Tensor]:
        return [torch.zeros(1024) for _ in range(3)]

    def in_turn() -> None:
        for _ in range(3):
            torch.zeros(1024)

    assert peak_bytes(together, torch.device("cpu")) == 3 * 4096
    assert peak_bytes(in_turn, torch.device("cpu")) == 4096
