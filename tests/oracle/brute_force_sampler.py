"""Algorithms 2 and 3 of Evans et al. 2024 (arXiv 2406.17711), errata mended, in fp64, full matrices, loops.

Written from the formulas, sharing nothing with the sampler but the noise. O(B^2 d) time and memory: small B only.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

# B candidates, N chunks, D width; a model is (images, texts, scale, bias)
Model = tuple[NDArray[np.float64], NDArray[np.float64], float, float]


def softplus(x: float) -> float:
    """-log sigmoid(-x)."""
    return x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x))


def pair_losses(model: Model) -> NDArray[np.float64]:
    """M[i, j] = -log sigmoid(+-(a s_ij + b)), + on the diagonal."""
    image, text, scale, bias = model
    logits = scale * (image @ text.T) + bias
    size = len(logits)
    return np.array([[softplus(-logits[i, j] if i == j else logits[i, j]) for j in range(size)] for i in range(size)])


def score_matrix(reference: Model | None, learner: Model | None, criterion: str, gain: float) -> NDArray[np.float64]:
    """S of the sigmoid loss."""
    if criterion == "learnability":
        return gain * (pair_losses(learner) - pair_losses(reference))
    return -gain * pair_losses(reference) if criterion == "easy-reference" else gain * pair_losses(learner)


def sigmoid_logit(score: NDArray[np.float64], i: int, chosen: list[int]) -> float:
    """S_ii + sum over chosen k of (S_ik + S_ki)."""
    return float(score[i, i] + math.fsum(score[i, k] + score[k, i] for k in chosen))


def log_sum_exp(values: list[float]) -> float:
    """log sum exp, 0 for the empty list: without chosen ones there is no conditional term."""
    if not values:
        return 0.0
    top = max(values)
    return top + math.log(math.fsum(math.exp(value - top) for value in values))


def softmax_loss(similarity: NDArray[np.float64], i: int, chosen: list[int]) -> float:
    """1/2 (LSE over chosen texts + LSE over chosen images) - a s_ii, for similarities already times the scale."""
    texts = log_sum_exp([float(similarity[i, k]) for k in chosen])
    images = log_sum_exp([float(similarity[k, i]) for k in chosen])
    return (texts + images) / 2 - float(similarity[i, i])


def similarities(model: Model | None) -> NDArray[np.float64]:
    """a s_ij."""
    return np.zeros((0, 0)) if model is None else model[2] * (model[0] @ model[1].T)


def softmax_logit(
    reference: NDArray[np.float64], learner: NDArray[np.float64], criterion: str, gain: float, i: int, chosen: list[int]
) -> float:
    """Learner's loss minus reference's, or one of the two."""
    if criterion == "learnability":
        return gain * (softmax_loss(learner, i, chosen) - softmax_loss(reference, i, chosen))
    if criterion == "easy-reference":
        return -gain * softmax_loss(reference, i, chosen)
    return gain * softmax_loss(learner, i, chosen)


def sample(
    reference: Model | None,
    learner: Model | None,
    noise_NB: NDArray[np.float64],
    *,
    size: int,
    criterion: str,
    loss: str,
    gain: float,
) -> tuple[list[int], list[float]]:
    """(rows in the order drawn, their logits when drawn); one row of noise per chunk."""
    chunks = min(len(noise_NB), size)
    if loss == "sigmoid":
        score = score_matrix(reference, learner, criterion, gain)
    else:
        similarity_reference, similarity_learner = similarities(reference), similarities(learner)
    count = noise_NB.shape[1]
    chosen: list[int] = []
    logits_when_drawn: list[float] = []
    for chunk in range(chunks):
        draws = size // chunks + (1 if chunk < size % chunks else 0)
        logits = {}
        for i in range(count):
            if i in chosen:
                continue
            if loss == "sigmoid":
                logits[i] = sigmoid_logit(score, i, chosen)
            else:
                logits[i] = softmax_logit(similarity_reference, similarity_learner, criterion, gain, i, chosen)
        best = sorted(logits, key=lambda i: -(logits[i] + noise_NB[chunk, i]))[:draws]
        logits_when_drawn += [logits[i] for i in best]
        chosen += best
    return chosen, logits_when_drawn
