"""JointSelector in a loop that is not ours: sizes, order, side effects, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curate.errors import UsageError
from curate.loaders.joint import JointSelector, _content_hashes

WIDTH, WORDS = 8, 50


class Towers(nn.Module):
    """A dual encoder with batch norm and dropout, the two things that a careless forward disturbs."""

    def __init__(self, seed: int, *, bias: float | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.word = nn.Embedding(WORDS, WIDTH)
        self.image = nn.Sequential(nn.Flatten(), nn.Linear(12, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))
        self.seen = 0

    def encode_image(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return self.image(images)

    def encode_text(self, texts: Tensor) -> Tensor:
        return self.word(texts).mean(1)


class Matching(nn.Module):
    """A reference that knows the truth: image and text are the same one-hot vector where they match."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def encode_image(self, images: Tensor) -> Tensor:
        return nn.functional.one_hot(images.flatten(1)[:, 0].long(), WORDS).float()

    def encode_text(self, texts: Tensor) -> Tensor:
        return nn.functional.one_hot(texts[:, 0], WORDS).float()


def super_batch(size: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 2, 2, generator=generator), torch.randint(0, WORDS, (size, 5), generator=generator)


@pytest.mark.parametrize(
    ("arguments", "size"), [({}, 8), ({"keep": 0.5}, 20), ({"sub_batch": 7}, 7), ({"keep": 1.0}, 40)]
)
def test_sub_batch_has_the_size_asked_for(arguments: dict[str, Any], size: int) -> None:
    """Indices are distinct and as many as keep or sub_batch say."""
    chosen = JointSelector(Towers(1), Towers(2), **arguments)(*super_batch(), step=0)
    assert chosen.shape == (size,)
    assert len(set(chosen.tolist())) == size


def test_row_order_does_not_matter() -> None:
    """A shuffled super-batch gives the same samples in the same order."""
    images, texts = super_batch()
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    selector = JointSelector(Towers(1), Towers(2), gain=0.1)
    plain = selector(images, texts, step=3)
    assert shuffled[selector(images[shuffled], texts[shuffled], step=3)].tolist() == plain.tolist()
    assert selector(images, texts, step=4).tolist() != plain.tolist()


@pytest.mark.parametrize("ids", [list(range(40)), [f"key{at}" for at in range(40)], [bytes([at]) for at in range(40)]])
def test_given_ids_make_the_noise(ids: list[Any]) -> None:
    """With sample ids the noise follows them: other ids, another draw; the same ids, the same draw."""
    images, texts = super_batch()
    selector = JointSelector(Towers(1), Towers(2), gain=0.0)
    first = selector(images, texts, step=0, sample_ids=ids).tolist()
    assert selector(images + 1, texts, step=0, sample_ids=ids).tolist() == first
    assert selector(images, texts, step=0, sample_ids=ids[::-1]).tolist() == [39 - row for row in first]


def test_duplicates_are_separate_candidates() -> None:
    """Repeated rows neither fail nor share their noise."""
    images, texts = super_batch(4)
    selector = JointSelector(Towers(1), Towers(2), sub_batch=4, gain=0.0)
    chosen = selector(images.repeat(10, 1, 1, 1), texts.repeat(10, 1), step=0)
    assert len(set(chosen.tolist())) == 4
    assert len({row // 4 for row in chosen.tolist()}) > 1


def test_learner_is_left_as_it_was() -> None:
    """Mode of each submodule, batch-norm statistics, gradients and random state survive a selection."""
    reference, learner = Towers(1), Towers(2).train()
    learner.image[2].eval()
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    random_state = torch.get_rng_state()
    JointSelector(reference, learner)(*super_batch(), step=0)
    assert [module.training for module in learner.image] == [True, True, False, True]
    assert learner.training
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())
    assert all(parameter.grad is None for parameter in learner.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_learner_is_used_live() -> None:
    """A change of the learner's weights changes what is selected."""
    learner = Towers(2)
    selector = JointSelector(Towers(1), learner)
    before = selector(*super_batch(), step=0).tolist()
    with torch.no_grad():
        learner.word.weight.neg_()
    assert selector(*super_batch(), step=0).tolist() != before


def test_easy_reference_picks_the_matching_pairs() -> None:
    """A reference that knows the truth keeps the matching half, and the learner is not run."""
    word_B = torch.arange(40)
    texts = word_B[:, None].clone()
    texts[::2] = (texts[::2] + 1) % 40
    learner = Towers(2)
    selector = JointSelector(Matching(), learner, criterion="easy-reference", keep=0.5)
    chosen = selector(word_B.float().view(40, 1, 1, 1), texts, step=0)
    assert set(chosen.tolist()) == set(range(1, 40, 2))
    assert learner.seen == 0
    assert JointSelector(Matching(), None, criterion="easy-reference")(
        word_B.view(40, 1, 1, 1), texts, step=0
    ).shape == (8,)


def test_loss_follows_the_learner() -> None:
    """auto means the loss that the learner trains with, whatever the reference's."""
    images, texts = super_batch()
    draws = {
        (bias, loss): JointSelector(Towers(1, bias=-2.0), Towers(2, bias=bias), loss=loss)(
            images, texts, step=0
        ).tolist()
        for bias in (None, -2.0)
        for loss in ("auto", "sigmoid", "softmax")
    }
    assert draws[None, "auto"] == draws[None, "softmax"] != draws[None, "sigmoid"]
    assert draws[-2.0, "auto"] == draws[-2.0, "sigmoid"] != draws[-2.0, "softmax"]


def test_wrapped_modules_are_opened() -> None:
    """A module inside `.module`, as DistributedDataParallel and DualEncoder hold it, selects as itself."""
    learner, holder = Towers(2), nn.Module()
    holder.module = learner
    plain = JointSelector(Towers(1), learner)(*super_batch(), step=0)
    assert torch.equal(JointSelector(Towers(1), holder)(*super_batch(), step=0), plain)


def test_reference_inputs_reach_the_reference() -> None:
    """What `reference_inputs` returns is what the reference sees; the learner sees the batch itself."""
    reference, shapes = Towers(1), []
    selector = JointSelector(
        reference, Towers(2), reference_inputs=lambda images, texts: (shapes.append(images.shape) or images * 2, texts)
    )
    selector(*super_batch(), step=0)
    assert shapes == [(40, 3, 2, 2)]


def test_wrapped_loader_yields_sub_batches() -> None:
    """Each super-batch becomes its sub-batch, further parts are cut alike, steps count over epochs."""
    loader = [[*super_batch(seed=seed), list(range(40))] for seed in range(3)]
    chosen = JointSelector(Towers(1), Towers(2), gain=0.1).wrap(loader)
    first, second = list(chosen), list(chosen)
    assert len(chosen) == len(first) == 3
    assert chosen.step == 6
    for (images, texts, _), (image_b, text_b, row_b) in zip(loader, first, strict=True):
        assert torch.equal(image_b, images[row_b])
        assert torch.equal(text_b, texts[row_b])
    assert [batch[2] for batch in first] != [batch[2] for batch in second]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0.0}, "keep=0.0"),
        ({"sub_batch": 0}, "at least one"),
        ({"forward_batch": 0}, "forward_batch"),
        ({"criterion": "best"}, "choose one of"),
        ({"loss": "hinge"}, "choose one of"),
        ({"learner": None}, "needs a learner"),
        ({"learner": nn.Linear(2, 2)}, "no encode_image"),
        ({"reference": None}, "needs a reference"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    """What cannot be met is a UsageError that says so before the first batch."""
    with pytest.raises(UsageError, match=message):
        JointSelector(**{"reference": Towers(1), "learner": Towers(2), **arguments})


def test_impossible_batches_are_refused() -> None:
    """Batches that do not fit are UsageErrors, not broken indices."""
    images, texts = super_batch()
    selector = JointSelector(Towers(1), Towers(2), sub_batch=50)
    with pytest.raises(UsageError, match="drop_last"):
        selector(images, texts, step=0)
    with pytest.raises(UsageError, match="pairs"):
        JointSelector(Towers(1), Towers(2))(images, texts[:3], step=0)
    with pytest.raises(UsageError, match="3 sample ids"):
        JointSelector(Towers(1), Towers(2))(images, texts, step=0, sample_ids=[1, 2, 3])
    with pytest.raises(UsageError, match="tuples"):
        next(iter(JointSelector(Towers(1), Towers(2)).wrap([images])))


def test_reference_of_another_size_needs_its_own_inputs() -> None:
    """A reference that declares another image size is refused unless reference_inputs is given."""
    reference = Towers(1)
    reference.visual = nn.Identity()
    reference.visual.image_size = (4, 4)
    with pytest.raises(UsageError, match=r"4 x 4.*reference_inputs"):
        JointSelector(reference, Towers(2))(*super_batch(), step=0)


@pytest.mark.parametrize("width", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8, torch.int64])
def test_content_hash_tells_rows_apart(width: int, dtype: torch.dtype) -> None:
    """Rows that differ in one element have different hashes, equal rows equal ones, for any width and type."""
    images = torch.zeros(width + 2, width, dtype=dtype)
    images[:width].fill_diagonal_(1)
    hashes = _content_hashes(images, torch.zeros(width + 2, 3, dtype=torch.long))
    assert len(set(hashes)) == width + 1
    assert hashes[-1] == hashes[-2]


def test_half_precision_models_get_images_of_their_type() -> None:
    """A reference with bf16 layers and fp32 embeddings, as open_clip makes them, takes float images."""
    reference = Towers(1)
    reference.image.bfloat16()
    assert JointSelector(reference, Towers(2))(*super_batch(), step=0).shape == (8,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_batches_select_like_cpu_ones() -> None:
    """Models and batches on a GPU give the selection of the CPU, as indices on the GPU."""
    plain = JointSelector(Towers(1), Towers(2), gain=1.0)(*super_batch(), step=0)
    images, texts = super_batch()
    chosen = JointSelector(Towers(1).cuda(), Towers(2).cuda(), gain=1.0)(images.cuda(), texts.cuda(), step=0)
    assert chosen.is_cuda
    assert chosen.tolist() == plain.tolist()
