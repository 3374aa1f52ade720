"""What a trained tree sorts by: the information its leaves carry about a token's place and its image's class.

    python examples/feedforward_quality/routing.py cifar10.parquet weights fff-32

Prints for every block the effective leaves, the mean probability of the path taken, and bits of mutual information
between leaf and place (4 bits at most) and between leaf and class (3.3), on 2,000 test images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from arms import ARMS
from study import build, effective_leaves, trees
from torch import Tensor
from vit import load, normalised

from curate.feedforward.penalties import log_path_probability
from curate.feedforward.surgery import inputs_of


def information(one_n: Tensor, other_n: Tensor) -> float:
    """Mutual information of two labels in bits."""
    joint = torch.zeros(int(one_n.max()) + 1, int(other_n.max()) + 1, dtype=torch.float64)
    joint.index_put_((one_n, other_n), torch.ones(len(one_n), dtype=torch.float64), accumulate=True)
    joint /= joint.sum()
    independent = joint.sum(1, keepdim=True) * joint.sum(0)
    return float(torch.special.xlogy(joint, joint / independent.clamp(min=1e-300)).sum() / torch.log(torch.tensor(2.0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="as for study.py")
    parser.add_argument("weights", type=Path, help="the folder given to study.py as --save")
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)
    images, labels = load(args.data, "test", 2000)
    model = build(ARMS[args.arm], args.seed).eval()
    model.load_state_dict(torch.load(args.weights / f"{args.arm}-{args.seed}.pt"))
    layers = {f"block {number + 1}": layer for number, layer in enumerate(trees(model))}
    with inputs_of(layers, most=16 * len(labels)) as kept, torch.no_grad():
        for rows in images.split(500):
            model(normalised(rows))
    place_n, class_n = torch.arange(16).repeat(len(labels)), labels.repeat_interleave(16)
    for name, layer in layers.items():
        logits_nN = kept[name] @ layer.node_weight.T.detach() + layer.node_bias.detach()
        leaf_n = layer.leaf_indices(kept[name])
        leaves = effective_leaves(torch.bincount(leaf_n).tolist())
        sure = float(log_path_probability(logits_nN, leaf_n).exp().mean())
        place, of_class = information(leaf_n, place_n), information(leaf_n, class_n)
        found = f"{leaves:.1f} leaves, path probability {sure:.2f}, place {place:.2f} bits, class {of_class:.2f} bits"
        print(f"{name}: {found}")


if __name__ == "__main__":
    main()
