"""How much workers with tangents of their own gain: sum |g_w|^2 / |g|^2 over W parts g_w of a batch's gradient g.

    python examples/estimators/agreement.py

1 / W where the parts agree, 1 where they are orthogonal: the variance of data-parallel forward gradients with a seed
for each worker, relative to one seed for all. Of the towers' parameters, while backprop trains them.
"""

# B batch, D embedding width, P numbers of the towers, W workers

from __future__ import annotations

import argparse
import itertools
import statistics
from typing import Any

import torch
from task import Task, problem_of, read_task
from torch import Tensor, nn

from curate.estimators.backprop import Backprop
from curate.estimators.problem import DualEncoderProblem, trainable

WORKERS = (2, 4, 8)


def parts(problem: DualEncoderProblem, batch: Any, workers: int) -> Tensor:
    """The gradient through each worker's examples, the other embeddings held fixed, [W, P]."""
    towers = [p for name, p in trainable(problem.module).items() if problem.side(name) is not None]
    embeddings = problem.embed(batch)
    size, found = len(embeddings[0]), []
    for first, last in itertools.pairwise(size * w // workers for w in range(workers + 1)):
        own_B1 = torch.zeros(size, 1, dtype=torch.bool)
        own_B1[first:last] = True
        loss = problem.loss(*(torch.where(own_B1, z_BD, z_BD.detach()) for z_BD in embeddings))
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, towers, retain_graph=True)]))
    return torch.stack(found)


def agreement(problem: DualEncoderProblem, task: Task, workers: int, batches: int = 4) -> float:
    """Mean over fresh batches of 64."""
    every = (parts(problem, task.batch(64, 10_000 + n), workers) for n in range(batches))
    return statistics.fmean(float(g_WP.square().sum() / g_WP.sum(0).square().sum()) for g_WP in every)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2_000)
    parser.add_argument("--steps", type=int, nargs="+", default=(0, 20, 50, 100, 200))
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = read_task((), args.samples, 100)
    problem = problem_of(64, 3, task.words)
    optimiser = torch.optim.AdamW(problem.module.parameters(), lr=2e-3, betas=(0.9, 0.95))
    print(f"| step | {' | '.join(f'{w} workers' for w in WORKERS)} |\n|{'---|' * (1 + len(WORKERS))}")
    for step in range(max(args.steps) + 1):
        if step in args.steps:
            print(f"| {step} | {' | '.join(f'{agreement(problem, task, w):.2f}' for w in WORKERS)} |", flush=True)
        Backprop().estimate(problem, task.batch(64, step), seed=0, step=step)
        nn.utils.clip_grad_norm_(problem.module.parameters(), 1.0)
        optimiser.step()


if __name__ == "__main__":
    main()
