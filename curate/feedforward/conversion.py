"""Turn a dense feedforward layer into a tree of leaves without training: split the inputs, pick neurons, refit.

    nodes    balanced recursive bisection of calibration inputs, across the widest direction of what the neurons see
    shared   the neurons with large E|a_j| |w2_j| that differs little between leaves
    leaves   of the others, each leaf the `leaf_width` with the largest E_leaf|a_j| |w2_j|, copied
    refit    W2 and b2 of a leaf by ridge towards the copied W2, against dense(x) - shared(x)

The dense layer is evaluated once and its first half once more, a leaf at a time; a leaf takes one singular value
decomposition of [n / L, leaf_width]. Measured on one busy core with AVX2: 19 s for width 768, 3,072 neurons, 32 leaves
of 96 and 8,192 inputs, of which the bisection is 6. Where a leaf holds every neuron nothing is refitted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from curate.errors import UsageError
from curate.feedforward.config import FeedforwardConfig
from curate.feedforward.dense import Dense
from curate.feedforward.leaf import FastFeedforward

# n calibration inputs, r those of one leaf, D width in, H dense neurons, h neurons of a leaf, S shared, E width out,
# N nodes, L leaves
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # in units of the mean squared singular value


@dataclass(frozen=True, slots=True)
class Tree:
    """Hyperplanes [N, D] and [N] in breadth-first order, and the leaf of every input that made them, [n]."""

    weight_ND: Tensor
    bias_N: Tensor
    leaf_n: Tensor


def upcycle(
    dense: Dense, config: FeedforwardConfig, inputs_nD: Tensor, *, ridge: float | None = None, refit: bool = True
) -> FastFeedforward:
    """A leaf layer that imitates `dense` on inputs like these; in the dtype of `dense` on its device.

    `ridge` in units of the mean squared singular value of a leaf's activations; None chooses one of `RIDGES` for every
    leaf by generalised cross-validation (Golub, Heath & Wahba 1979). `refit=False` leaves the copied weights.

    Example: a dense layer of 8 neurons and FeedforwardConfig(depth=3, leaf_width=8) give the dense output to rounding,
    from any 8 inputs. Errors: UsageError for fewer inputs than leaves, for more neurons than the dense layer has, and
    for a configuration whose output cannot start at the dense one (variant "path", gate "probability").
    """
    check_config(config, dense.width)
    _check_inputs(dense, config, inputs_nD)
    with torch.no_grad():
        inputs_nD = inputs_nD.to(dense.w1_DH)
        tree = bisect(inputs_nD, config.depth, metric_DH=dense.w1_DH * dense.w2_HE.norm(dim=1))
        shared_S, chosen_Lh = _choose_neurons(dense, config, inputs_nD, tree.leaf_n)
        layer = _copied(dense, config, tree, shared_S, chosen_Lh)
        if refit and config.leaf_width + config.shared_width < dense.width:
            _refit(layer, dense, inputs_nD, tree.leaf_n, ridge)
    return layer


def bisect(inputs_nD: Tensor, depth: int, *, metric_DH: Tensor | None = None) -> Tree:
    """Halve the inputs `depth` times; leaf counts differ by at most one where the projections are distinct.

    A node is the direction of largest variance among its own inputs (of x M, if a metric M is given: w = M u), with
    the threshold half-way between the two middle projections, scaled so that its logits have variance 1.

    Example: inputs 0, 1, 2, 3 of width 1 and depth 1 are parted between 1 and 2.
    """
    D = inputs_nD.shape[1]
    weight_ND, bias_N = inputs_nD.new_zeros(2**depth - 1, D), inputs_nD.new_zeros(2**depth - 1)
    node_n = torch.zeros(len(inputs_nD), dtype=torch.int64, device=inputs_nD.device)
    for node in range(2**depth - 1):
        here_r = (node_n == node).nonzero().squeeze(1)
        if len(here_r) < 2:
            node_n[here_r] = 2 * node + 1
            continue
        weight_ND[node], bias_N[node] = _split(inputs_nD[here_r], metric_DH)
        right_r = torch.mv(inputs_nD[here_r], weight_ND[node]) + bias_N[node] > 0
        node_n[here_r] = 2 * node + 1 + right_r.long()
    return Tree(weight_ND, bias_N, node_n - (2**depth - 1))


def unexplained(layer: nn.Module, dense: Dense, inputs_nD: Tensor) -> float:
    """Share of the variance of the dense output that the layer misses: 0 is exact, 1 is the mean output for all."""
    with torch.no_grad():
        x_nD = inputs_nD.to(dense.w1_DH)
        y_nE = torch.cat([dense(rows) for rows in x_nD.split(4096)])
        imitated_nE = torch.cat([layer(rows) for rows in x_nD.split(4096)])
        scatter = (y_nE - y_nE.mean(0)).square().sum()
        return float((imitated_nE - y_nE).square().sum() / scatter.clamp(min=torch.finfo(scatter.dtype).tiny))


def distil(
    layer: FastFeedforward,
    dense: Dense,
    inputs_nD: Tensor,
    *,
    steps: int = 200,
    lr: float = 1e-3,
    batch: int = 1024,
    nodes: bool = False,
    generator: torch.Generator | None = None,
) -> None:
    """Adam on the squared error against the dense output, in place; one dense and one fast step per `steps`.

    The rate falls linearly to 0. `nodes=False` keeps the tree: in a few hundred steps a moved hyperplane unsettles
    more leaves than it helps (0.19 of the variance unexplained with nodes, 0.12 without, after 200 steps on a teacher
    of 128 neurons and 8 leaves of 16). Frozen parameters learn too, and are frozen afterwards as before.
    """
    generator = generator or torch.Generator().manual_seed(0)
    x_nD = inputs_nD.to(dense.w1_DH)
    scale = _spread(dense, x_nD)
    before = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
    tree = () if nodes else (layer.node_weight, layer.node_bias)
    for parameter, _ in before:
        parameter.requires_grad_(not any(parameter is node for node in tree))
    optimizer = torch.optim.Adam([parameter for parameter, _ in before if parameter.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(steps, 1))
    training = layer.training
    layer.eval()  # no region leak; gate and gradients are the same in both modes
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(x_nD), (min(batch, len(x_nD)),), generator=generator).to(x_nD.device)
            loss = (layer(x_nD[rows]) - dense(x_nD[rows])).square().mean() / scale
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    layer.train(training).zero_grad(set_to_none=True)
    for parameter, learns in before:
        parameter.requires_grad_(learns)


def _spread(dense: Dense, x_nD: Tensor) -> Tensor:
    y_nE = dense(x_nD[:4096])
    return (y_nE - y_nE.mean(0)).square().mean().clamp(min=torch.finfo(y_nE.dtype).tiny)


def check_config(config: FeedforwardConfig, neurons: int) -> None:
    """UsageError where a dense layer of so many neurons cannot be turned into this configuration."""
    if config.variant != "leaf":
        raise UsageError("only variant 'leaf' can start from dense weights; use init='random' for 'path'")
    if config.gate == "probability" and config.depth:
        raise UsageError("gate 'probability' scales the output below the dense one; use 'log' or 'none'")
    if config.leaf_width + config.shared_width > neurons:
        raise UsageError(
            f"leaf_width {config.leaf_width} and shared_width {config.shared_width} ask for more neurons than the "
            f"{neurons} of the dense layer; use smaller ones, or init='random'"
        )


def _check_inputs(dense: Dense, config: FeedforwardConfig, inputs_nD: Tensor) -> None:
    if inputs_nD.ndim != 2 or inputs_nD.shape[1] != len(dense.w1_DH):
        raise UsageError(f"inputs of shape {tuple(inputs_nD.shape)}, not [n, {len(dense.w1_DH)}]")
    if len(inputs_nD) < 2**config.depth:
        raise UsageError(f"{len(inputs_nD)} calibration inputs for {2**config.depth} leaves; give several per leaf")
    if not bool(torch.isfinite(inputs_nD).all()):
        raise UsageError("calibration inputs are not all finite")


def _split(x_rD: Tensor, metric_DH: Tensor | None) -> tuple[Tensor, Tensor]:
    """A hyperplane through the middle of its inputs; all zeros (everything left) where they are all alike."""
    weight_D = _widest(x_rD - x_rD.mean(0), metric_DH)
    along_r = torch.mv(x_rD, weight_D)
    spread = along_r.std(correction=0)
    if not spread > 0:
        return torch.zeros_like(weight_D), x_rD.new_zeros(())
    weight_D = weight_D / spread
    ordered_r = torch.mv(x_rD, weight_D).sort().values
    return weight_D, -_middle(ordered_r)


def _middle(ordered_r: Tensor) -> Tensor:
    """Half-way across the gap nearest the median, so that ties stay together; ceil(r / 2) left where there is none."""
    gap_at = (ordered_r[1:] > ordered_r[:-1]).nonzero().squeeze(1)
    half = (len(ordered_r) + 1) // 2 - 1
    left = gap_at[(gap_at - half).abs().argmin()]
    return ordered_r[left] + (ordered_r[left + 1] - ordered_r[left]) / 2


def _widest(centred_rD: Tensor, metric_DH: Tensor | None, *, steps: int = 24) -> Tensor:
    """The direction w of largest variance by power iteration, from the farthest input; with a metric M, w = M u."""

    def through(direction: Tensor) -> Tensor:
        return direction if metric_DH is None else metric_DH @ (metric_DH.T @ direction)

    weight_D = through(centred_rD[centred_rD.norm(dim=1).argmax()])
    for _ in range(steps):
        weight_D = functional.normalize(weight_D, dim=0)
        weight_D = through(torch.mv(centred_rD.T, torch.mv(centred_rD, weight_D)))
    return functional.normalize(weight_D, dim=0)


def _choose_neurons(
    dense: Dense, config: FeedforwardConfig, inputs_nD: Tensor, leaf_n: Tensor
) -> tuple[Tensor, Tensor]:
    """Indices of the shared neurons [S] and of each leaf's own [L, h], in ascending order."""
    weight_H = dense.w2_HE.norm(dim=1)
    use_LH = torch.stack(
        [
            dense.hidden(inputs_nD[_rows_of(leaf_n, leaf, config.depth)]).abs().mean(0) * weight_H
            for leaf in range(2**config.depth)
        ]
    )
    mean_H, spread_H = use_LH.mean(0), use_LH.std(0, correction=0)
    # large everywhere: the mean, less as it varies
    always_H = mean_H.square() / (mean_H + spread_H).clamp(min=torch.finfo(mean_H.dtype).tiny)
    shared_S = always_H.topk(config.shared_width).indices.sort().values
    use_LH[:, shared_S] = -1
    return shared_S, use_LH.topk(config.leaf_width, dim=1).indices.sort(dim=1).values


def _rows_of(leaf_n: Tensor, leaf: int, depth: int) -> Tensor:
    """The inputs of a leaf; where duplicates left it empty, those of the smallest subtree that has some."""
    for above in range(depth + 1):
        rows_r = (leaf_n >> above == leaf >> above).nonzero().squeeze(1)
        if len(rows_r):
            break
    return rows_r


def _copied(
    dense: Dense, config: FeedforwardConfig, tree: Tree, shared_S: Tensor, chosen_Lh: Tensor
) -> FastFeedforward:
    """The layer with the dense weights of the chosen neurons; the output bias sits in every leaf."""
    layer = config.build(
        len(dense.w1_DH), width_out=len(dense.b2_E), activation=dense.activation, generator=torch.Generator()
    )
    assert isinstance(layer, FastFeedforward)
    layer.to(dense.w1_DH)
    layer.node_weight.copy_(tree.weight_ND)
    layer.node_bias.copy_(tree.bias_N)
    layer.w1.copy_(dense.w1_DH.T[chosen_Lh].transpose(1, 2))
    layer.b1.copy_(dense.b1_H[chosen_Lh])
    layer.w2.copy_(dense.w2_HE[chosen_Lh])
    layer.b2.copy_(dense.b2_E.expand_as(layer.b2))
    if layer.shared_in is not None and layer.shared_out is not None:
        layer.shared_in.weight.copy_(dense.w1_DH.T[shared_S])
        layer.shared_in.bias.copy_(dense.b1_H[shared_S])
        layer.shared_out.weight.copy_(dense.w2_HE[shared_S].T)
    return layer


def _refit(layer: FastFeedforward, dense: Dense, inputs_nD: Tensor, leaf_n: Tensor, ridge: float | None) -> None:
    """Fit W2 and b2 of every leaf to what the copied ones leave over."""
    for leaf in range(2**layer.depth):
        x_rD = inputs_nD[_rows_of(leaf_n, leaf, layer.depth)]
        own = Dense(layer.w1[leaf], layer.b1[leaf], layer.w2[leaf], layer.b2[leaf], dense.activation)
        left_rE = dense(x_rD) - own(x_rD)
        if layer.shared_in is not None and layer.shared_out is not None:
            shared = Dense(layer.shared_in.weight.T, layer.shared_in.bias, layer.shared_out.weight.T,
                           torch.zeros_like(dense.b2_E), dense.activation)  # fmt: skip
            left_rE = left_rE - shared(x_rD)
        change_hE, shift_E = ridge_fit(own.hidden(x_rD), left_rE, ridge)
        layer.w2[leaf] += change_hE
        layer.b2[leaf] += shift_E


def ridge_fit(a_rh: Tensor, left_rE: Tensor, ridge: float | None = None) -> tuple[Tensor, Tensor]:
    """(C [h, E], c [E]) that minimise |a C + c - left|^2 + ridge |C|^2; the shift c is not penalised.

    `ridge` is in units of the mean squared singular value of the centred a; None takes the one of `RIDGES` with the
    smallest generalised cross-validation error, r |residual|^2 / (r - degrees of freedom)^2.
    """
    a_mean_h, left_mean_E = a_rh.mean(0), left_rE.mean(0)
    # float64 on the CPU: squared singular values of activations span more than float32 resolves
    u_rk, s_k, v_kh = torch.linalg.svd((a_rh - a_mean_h).double().cpu(), full_matrices=False)
    unit = float(s_k.square().mean())
    if unit <= 0:
        return a_rh.new_zeros(a_rh.shape[1], left_rE.shape[1]), left_mean_E
    centred_rE = (left_rE - left_mean_E).double().cpu()
    target_kE = u_rk.T @ centred_rE
    if ridge is None:
        ridge = min(RIDGES, key=lambda one: _cross_validation(s_k, target_kE, centred_rE, one * unit))
    solved_hE = v_kh.T @ ((s_k / (s_k.square() + ridge * unit))[:, None] * target_kE)
    change_hE = solved_hE.to(a_rh)
    return change_hE, left_mean_E - a_mean_h @ change_hE


def _cross_validation(s_k: Tensor, target_kE: Tensor, centred_rE: Tensor, penalty: float) -> float:
    kept_k = s_k.square() / (s_k.square() + penalty)
    fitted = (kept_k * (2 - kept_k)) @ target_kE.square().sum(1)
    free = len(centred_rE) - 1 - float(kept_k.sum())  # the shift takes one
    if free <= 0:
        return float("inf")
    return float(centred_rE.square().sum() - fitted) / free**2
