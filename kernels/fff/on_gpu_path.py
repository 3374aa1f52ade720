"""The path variant on a GPU: a program per token walks all trees; gradients of weights are sums over sorted pairs.

Forward moves K P (D + E) weights per token, mostly from the second-level cache: a tree of 11 levels of width 768 is
6 MB in half precision. Backward sorts the T K P pairs (token, node) by node and cuts each node's pairs into spans of
512, since the root has all tokens and a node of the last level few: one kernel sums spans, another the spans of a node.
No atomic additions, and no wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from curate.kernels.fff import Activation, Paths, PathTangents, check_paths, depth_of
from curate.kernels.fff.on_gpu_layout import Tiles, cdiv, power_of_two, sort_by, tiles_of

# T tokens, D width in, E width out, N nodes of a tree, K trees, P levels of a path
_SPAN = 512
_BLOCK = 8192  # weights a program holds at a time: 64 registers of each of 128 threads


def path_forward(x_TD: Tensor, paths: Paths, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """See `PathKernel`."""
    check_paths(x_TD, paths, activation)
    from curate.kernels.fff.on_gpu_trees import walk

    (T, D), (K, N), E = x_TD.shape, paths.w1.shape[:2], paths.w2.shape[-1]
    P, x_TD = depth_of(N + 1), _rows(x_TD)
    y_TE, pre_TKP = x_TD.new_empty(T, E), x_TD.new_empty(T, K, P)
    node_TKP = torch.empty(T, K, P, dtype=torch.int64, device=x_TD.device)
    w = _contiguous(paths)
    if T:
        with torch.cuda.device_of(x_TD):
            walk[(T,)](
                y_TE, pre_TKP, node_TKP, x_TD, w.w1, w.b1, w.w2, w.b2, x_TD.stride(0), D, E, K, N, P,
                ACTIVATION=activation, TREES=_side_by_side(K, D, E), **_widths(D, E),
            )  # fmt: skip
    return y_TE, pre_TKP, node_TKP


def path_backward(
    grad_TE: Tensor, x_TD: Tensor, pre_TKP: Tensor, node_TKP: Tensor, paths: Paths, activation: Activation
) -> tuple[Tensor, Paths]:
    """See `PathKernel`."""
    from curate.kernels.fff.on_gpu_trees import walk_backward

    (T, K, P), N, (D, E) = pre_TKP.shape, paths.w1.shape[1], (x_TD.shape[1], grad_TE.shape[1])
    x_TD, grad_TE, pre_TKP, node_TKP = _rows(x_TD), _rows(grad_TE), pre_TKP.contiguous(), node_TKP.contiguous()
    dx_TD, dpre_TKP = x_TD.new_empty(T, D), torch.empty(T, K, P, dtype=torch.float32, device=x_TD.device)
    w = _contiguous(paths)
    with torch.cuda.device_of(x_TD):
        if not T:
            return dx_TD, Paths(*(torch.zeros_like(each) for each in (w.w1, w.b1, w.w2, w.b2)))
        walk_backward[(T,)](
            dx_TD, dpre_TKP, grad_TE, pre_TKP, node_TKP, w.w1, w.w2, grad_TE.stride(0), D, E, K, N, P,
            ACTIVATION=activation, PAIRS=_side_by_side(K * P, D, E), **_widths(D, E),
        )  # fmt: skip
        tree_K1 = torch.arange(K, device=node_TKP.device)[:, None]
        by_node = sort_by((node_TKP + N * tree_K1).flatten(), K * N)
        tiles = tiles_of(by_node, _SPAN)
        spans = torch.nn.functional.pad(cdiv_each(by_node.starts.diff(), _SPAN).cumsum(0), (1, 0))
        dw1, db1 = _sum_by_node(tiles, spans, dpre_TKP, x_TD, None)
        dw2, _ = _sum_by_node(tiles, spans, pre_TKP, grad_TE, activation)
        db2 = grad_TE.sum(0, dtype=torch.float32).to(w.b2.dtype)
        dtype = w.w1.dtype
        return dx_TD, Paths(dw1.view(w.w1.shape), db1.view(K, N).to(dtype), dw2.view(w.w2.shape), db2)


def path_jvp(
    tangents: PathTangents,
    x_TD: Tensor,
    pre_TKP: Tensor,
    node_TKP: Tensor,
    paths: Paths,
    activation: Activation,
) -> Tensor:
    """See `PathKernel`."""
    from curate.kernels.fff.on_gpu_trees import walk_jvp

    (T, K, P), N, D, E = pre_TKP.shape, paths.w1.shape[1], x_TD.shape[1], paths.w2.shape[-1]
    x_TD, dx_TD = _rows(x_TD), None if tangents.x is None else _rows(tangents.x)
    dw1, db1, dw2, db2 = (
        None if each is None else each.contiguous() for each in (tangents.w1, tangents.b1, tangents.w2, tangents.b2)
    )
    dy_TE, w = x_TD.new_empty(T, E), _contiguous(paths)
    if T:
        with torch.cuda.device_of(x_TD):
            walk_jvp[(T,)](
                dy_TE, x_TD, dx_TD, pre_TKP.contiguous(), node_TKP.contiguous(), w.w1, dw1, db1, w.w2, dw2, db2,
                x_TD.stride(0), 0 if dx_TD is None else dx_TD.stride(0), D, E, K, N, P,
                ACTIVATION=activation, PAIRS=_side_by_side(K * P, D, E), **_widths(D, E),
            )  # fmt: skip
    return dy_TE


def cdiv_each(n: Tensor, by: int) -> Tensor:
    """Quotients, rounded up."""
    return (n + by - 1) // by


def _sum_by_node(
    tiles: Tiles, spans: Tensor, factor_TKP: Tensor, rows_TW: Tensor, activation: Activation | None
) -> tuple[Tensor, Tensor]:
    """([nodes, W], fp32 [nodes]): sums of factor row, and of factor, over the pairs of a node."""
    from curate.kernels.fff.on_gpu_trees import sum_nodes, sum_tiles

    W, nodes, pairs = rows_TW.shape[1], len(spans) - 1, factor_TKP[0].numel()
    part = torch.empty(len(tiles.leaf), W, dtype=torch.float32, device=rows_TW.device)
    part_bias = torch.empty(len(tiles.leaf), 1, dtype=torch.float32, device=rows_TW.device)
    wide = min(256, power_of_two(W))
    sum_tiles[(len(tiles.leaf), cdiv(W, wide))](
        part, part_bias, factor_TKP, rows_TW, tiles.order_T, tiles.leaf, tiles.first, tiles.end, rows_TW.stride(0), W,
        pairs, ACTIVATION=activation, SPAN=_SPAN, STEP=32, BW=wide, num_warps=4, num_stages=3,
    )  # fmt: skip
    out, bias = rows_TW.new_empty(nodes, W), torch.empty(nodes, 1, dtype=torch.float32, device=rows_TW.device)
    sum_nodes[(nodes, cdiv(W, wide))](out, part, spans, W, BW=wide, num_warps=4)
    sum_nodes[(nodes, 1)](bias, part_bias, spans, 1, BW=16, num_warps=1)
    return out, bias


def _side_by_side(rows: int, D: int, E: int) -> int:
    """How many rows of weights a program holds at once."""
    return min(power_of_two(rows, 1), max(1, _BLOCK // max(power_of_two(D), power_of_two(E))))


def _widths(D: int, E: int) -> dict[str, int]:
    return {"BD": power_of_two(D), "BE": power_of_two(E), "num_warps": 4, "num_stages": 1}


def _contiguous(paths: Paths) -> Paths:
    return Paths(*(each.contiguous() for each in (paths.w1, paths.b1, paths.w2, paths.b2)))


def _rows(a: Tensor) -> Tensor:
    return a if a.stride(1) == 1 else a.contiguous()
