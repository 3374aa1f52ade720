"""Joint example selection inside somebody else's training loop: super-batch in, sub-batch out.

Costs one forward of the learner and one of the reference per candidate, without gradients, plus 8 B b D FLOPs for the
draw (Evans et al. 2024, arXiv 2406.17711). At keep=0.2 a step then costs 4.33 times a plain one where both models
are of one size, 2.67 times where the reference is negligibly small: it pays only if it saves more steps than that.
"""

# B super-batch, b sub-batch, D width, T tokens

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor, nn

from curate.errors import UsageError
from curate.kernels import gpu
from curate.selection.criteria import Criterion, LossName, check_loss, require_models
from curate.selection.joint import Pairs, draw_joint

Inputs = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_HASHED_ROWS = 64


class JointSelector:
    """Picks from each super-batch the sub-batch that the learner can learn most from now.

    reference, learner: modules with `encode_image`, `encode_text` and `logit_scale` (and `logit_bias` for a sigmoid
    loss), as open_clip builds them, also wrapped in DistributedDataParallel; the reference may be a model spec such as
    "ViT-B-32:laion2b_s34b_b79k". The learner is used live, with its weights of the moment; its training mode, its
    batch-norm statistics and the random state are afterwards what they were before.
    keep: share of the super-batch to keep; sub_batch: the exact number instead.
    criterion: "learnability" (default), "easy-reference" (no learner needed) or "hard-learner" (no reference needed).
    loss: "sigmoid", "softmax", or "auto": sigmoid if the model that is trained has a logit bias.
    gain, chunks, seed: as in `curate.selection.joint.draw_joint`.
    reference_inputs: turns (images, texts) as prepared for the learner into what the reference wants, where image size,
    normalisation or tokenizer differ.
    forward_batch: candidates per forward.

    Under DistributedDataParallel each rank selects from its own super-batch. Raises `UsageError` for sizes that cannot
    be met and for models whose inputs differ without a `reference_inputs`.

    >>> selector = curate.JointSelector(reference, model, keep=0.2)                           # doctest: +SKIP
    >>> for images, texts in selector.wrap(loader):          # super-batches in, sub-batches out # doctest: +SKIP
    ...     loss = clip_loss(model, images, texts)
    """

    def __init__(
        self,
        reference: nn.Module | str | Any | None,
        learner: nn.Module | Any | None,
        *,
        keep: float = 0.2,
        sub_batch: int | None = None,
        criterion: Criterion = "learnability",
        loss: LossName | Literal["auto"] = "auto",
        gain: float = 100.0,
        chunks: int = 16,
        seed: int = 0,
        reference_inputs: Inputs | None = None,
        forward_batch: int = 256,
    ) -> None:
        _check_sizes(keep, sub_batch, forward_batch)
        weight = require_models(criterion, reference=reference is not None, learner=learner is not None)
        self._keep, self._sub_batch = keep, sub_batch
        self._criterion, self._gain, self._chunks, self._seed = criterion, gain, chunks, seed
        self._reference_inputs, self._forward_batch = reference_inputs, forward_batch
        # a model that the criterion does not weigh is never run
        self._learner = _tower(learner) if weight.learner else None
        self._reference = _reference_tower(reference) if weight.reference else None
        leading = self._learner if self._learner is not None else self._reference
        self._loss: LossName = _loss_of(leading) if loss == "auto" else loss
        check_loss(self._loss)

    def __call__(
        self, images: Tensor, texts: Tensor, *, step: int, sample_ids: Sequence[Any] | NDArray[Any] | None = None
    ) -> Tensor:
        """Positions [b] of the chosen rows of images [B, ...] and texts [B, T], in the order drawn, on their device.

        step: the training step, part of the noise: the same rows at another step are drawn anew. sample_ids: B of
        bytes, str or int (or uint8 [B, 16]); without them a hash of each row's image and tokens stands in, so that the
        order of rows never matters (on a GPU that copies 32 bytes a row, not the images).
        """
        size = self._size(len(images))
        if len(texts) != len(images):
            raise UsageError(f"{len(images)} images but {len(texts)} texts: a super-batch holds pairs")
        id_B = _distinct(_content_hashes(images, texts) if sample_ids is None else _given_ids(sample_ids, len(images)))
        draw = draw_joint(
            self._pairs(self._reference, *self._for_reference(images, texts)),
            self._pairs(self._learner, images, texts),
            id_B,
            size=size,
            chunks=min(self._chunks, size),
            criterion=self._criterion,
            loss=self._loss,
            gain=self._gain,
            seed=self._seed,
            step=step,
        )
        return torch.from_numpy(np.asarray(draw.index_b)).to(images.device)

    def wrap(self, loader: Iterable[Any], *, first_step: int = 0) -> ChosenBatches:
        """A loader of sub-batches from a loader of super-batches (tuples or lists that start with images and texts).

        Further tensors and lists of B rows in a batch are cut alike. Steps count on over epochs, from `first_step`.
        """
        return ChosenBatches(self, loader, first_step)

    def _size(self, candidates: int) -> int:
        if self._sub_batch is None:
            return max(1, round(self._keep * candidates))
        if self._sub_batch > candidates:
            raise UsageError(
                f"sub_batch={self._sub_batch} of a super-batch of {candidates}: raise the loader's batch size, and let "
                "it drop an incomplete last batch (drop_last=True)"
            )
        return self._sub_batch

    def _for_reference(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        if self._reference is None:
            return images, texts
        if self._reference_inputs is not None:
            return self._reference_inputs(images, texts)
        _check_inputs(self._reference, images, texts)
        return images, texts

    def _pairs(self, model: Any | None, images: Tensor, texts: Tensor) -> Pairs | None:
        if model is None:
            return None
        weight = _first_weight(model)
        with _undisturbed(model, weight.device), torch.no_grad():
            parts = zip(images.split(self._forward_batch), texts.split(self._forward_batch), strict=True)
            rows = [_embed(model, image.to(weight), text.to(weight.device)) for image, text in parts]
        image_BD, text_BD = (torch.cat(side) for side in zip(*rows, strict=True))
        bias = getattr(model, "logit_bias", None)
        scale = float(model.logit_scale.detach().exp())
        return Pairs(image_BD, text_BD, scale, 0.0 if bias is None else float(bias.detach()))


class ChosenBatches:
    """Iterable of sub-batches over a loader of super-batches; made by `JointSelector.wrap`."""

    def __init__(self, selector: JointSelector, loader: Iterable[Any], first_step: int) -> None:
        self._selector, self._loader, self.step = selector, loader, first_step

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]  # TypeError where the loader has no length, as for any iterable

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            if not isinstance(batch, tuple | list) or len(batch) < 2:
                raise UsageError(f"the loader yields {type(batch).__name__}; it must yield (images, texts, ...) tuples")
            index_b = self._selector(batch[0], batch[1], step=self.step)
            self.step += 1
            yield type(batch)(_rows(part, index_b, len(batch[0])) for part in batch)


def _rows(part: Any, index_b: Tensor, candidates: int) -> Any:
    if not isinstance(part, Tensor | list | tuple) or len(part) != candidates:
        raise UsageError(f"a part of the super-batch is no tensor or list of {candidates} rows, so it cannot be cut")
    return part[index_b.to(part.device)] if isinstance(part, Tensor) else [part[index] for index in index_b.tolist()]


# Models -------------------------------------------------------------------------------------------------------------


def _tower(model: Any) -> Any:
    """The module itself: out of DistributedDataParallel, or out of a curate `DualEncoder`."""
    while not hasattr(model, "encode_image") and hasattr(model, "module"):
        model = model.module
    missing = [name for name in ("encode_image", "encode_text", "logit_scale") if not hasattr(model, name)]
    if missing:
        raise UsageError(
            f"{type(model).__name__} has no {', '.join(missing)}: JointSelector takes modules like open_clip's"
        )
    return model


def _reference_tower(reference: Any) -> Any:
    if not isinstance(reference, str):
        return _tower(reference)
    from curate.models.load import load_model

    return _tower(load_model(reference))


def _loss_of(model: Any) -> LossName:
    return "softmax" if getattr(model, "logit_bias", None) is None else "sigmoid"


def _first_weight(model: nn.Module) -> Tensor:
    """The weight that meets the images, which take its device and dtype; in half precision others stay fp32."""
    tower = getattr(model, "visual", model)
    layers = (module.weight for module in tower.modules() if isinstance(module, nn.Conv2d | nn.Linear))
    weight = next(layers, None)
    return next(model.parameters()) if weight is None else weight


def _embed(model: Any, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    image_BD, text_BD = model.encode_image(images), model.encode_text(texts)
    unit = (F.normalize(features.float(), dim=-1) for features in (image_BD, text_BD))
    image_BD, text_BD = (features if gpu.usable(features) else features.cpu() for features in unit)
    return image_BD, text_BD


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode inside; the mode of every submodule and the random states as before, outside."""
    modes = {module: module.training for module in model.modules()}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training


# Sample ids ---------------------------------------------------------------------------------------------------------


def _content_hashes(images: Tensor, texts: Tensor) -> list[bytes]:
    """16 bytes per row from its image and its tokens, the same on any device: integer sums, no floating point."""
    image_B2, text_B2 = _fingerprints(images), _fingerprints(texts)
    return [row.tobytes() for row in torch.cat([image_B2, text_B2], dim=1).cpu().numpy()]


def _fingerprints(rows: Tensor) -> Tensor:
    """int64 [B, 2]: two random linear maps modulo 2^64 of the row's 64-bit words (a universal hash).

    0.8 ms for an image of 3 x 224 x 224 floats on one slow core. A collision costs nothing but a little order: the
    later of the two rows is taken for a duplicate.
    """
    flat = rows.detach().reshape(len(rows), -1)
    flat = flat if flat.element_size() in (4, 8) else flat.float()
    odd_width = flat.element_size() == 4 and flat.shape[1] % 2
    word_Bn = (F.pad(flat, (0, 1)) if odd_width else flat).contiguous().view(torch.int64)
    generator = np.random.Generator(np.random.Philox(word_Bn.shape[1]))
    odd_n2 = generator.integers(-(2**63), 2**63 - 1, (word_Bn.shape[1], 2), dtype=np.int64) | 1
    return _matmul(word_Bn, torch.from_numpy(odd_n2).to(rows.device))


def _matmul(word_Bn: Tensor, odd_n2: Tensor) -> Tensor:
    """word_Bn @ odd_n2 modulo 2^64, in parts, since CUDA multiplies no matrices of integers."""
    if not word_Bn.is_cuda:
        return word_Bn @ odd_n2
    parts = word_Bn.split(_HASHED_ROWS)
    return torch.cat([torch.stack([(part * odd_n).sum(1) for odd_n in odd_n2.T], dim=1) for part in parts])


def _given_ids(sample_ids: Sequence[Any] | NDArray[Any], candidates: int) -> list[bytes]:
    if len(sample_ids) != candidates:
        raise UsageError(f"{len(sample_ids)} sample ids for {candidates} samples")
    return [each.tobytes() if isinstance(each, np.ndarray) else _id_bytes(each) for each in sample_ids]


def _id_bytes(sample_id: Any) -> bytes:
    if isinstance(sample_id, bytes):
        return sample_id
    if isinstance(sample_id, str):
        return sample_id.encode("utf-8", "surrogateescape")
    if isinstance(sample_id, int | np.integer) or (isinstance(sample_id, Tensor) and sample_id.ndim == 0):
        return str(int(sample_id)).encode()
    raise UsageError(f"a sample id is bytes, str or int, not {type(sample_id).__name__}")


def _distinct(ids: Sequence[bytes]) -> NDArray[np.uint8]:
    """uint8 [B, 16]; a counter tells a repeated id from its first occurrence, so that both draw noise of their own."""
    seen: Counter[bytes] = Counter()
    digests = bytearray()
    for each in ids:
        digests += blake2b(each, digest_size=16, salt=seen[each].to_bytes(8, "little")).digest()
        seen[each] += 1
    return np.frombuffer(bytes(digests), dtype=np.uint8).reshape(len(ids), 16)


# Checks -------------------------------------------------------------------------------------------------------------


def _check_sizes(keep: float, sub_batch: int | None, forward_batch: int) -> None:
    if not 0 < keep <= 1:
        raise UsageError(f"keep={keep}: the share of a super-batch to keep lies in (0, 1]")
    if sub_batch is not None and sub_batch < 1:
        raise UsageError(f"sub_batch={sub_batch}: at least one sample must be kept")
    if forward_batch < 1:
        raise UsageError(f"forward_batch={forward_batch}: a forward needs at least one candidate")


def _check_inputs(reference: Any, images: Tensor, texts: Tensor) -> None:
    """What can be told from shapes; a difference in normalisation cannot, and is the caller's to know."""
    size = getattr(getattr(reference, "visual", None), "image_size", None)
    size = (size, size) if isinstance(size, int) else size
    context = getattr(reference, "context_length", None)
    if size is not None and tuple(images.shape[-2:]) != tuple(size):
        raise UsageError(
            f"the reference takes images of {size[0]} x {size[1]}, these are {images.shape[-2]} x {images.shape[-1]}; "
            "pass reference_inputs=lambda images, texts: (resized images, texts)"
        )
    if isinstance(context, int) and texts.shape[-1] > context:
        raise UsageError(
            f"the reference reads {context} tokens, these texts have {texts.shape[-1]}; pass reference_inputs=... that "
            "tokenizes for the reference"
        )
