"""Every loss against its paper's formula, written again in double precision over lists of pixels.

The formulas get the counted pixels alone, so they know nothing of ignored ones, of batches, or of
how a loss is computed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args, get_type_hints

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import no_waiting
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from segtrain.config import LossConfig
from segtrain.training.losses import (
    LOSSES,
    build_loss,
    cross_entropy,
    focal,
    lovasz_hinge,
    soft_dice,
)

pytestmark = pytest.mark.usefixtures("one_thread")

Doubles = npt.NDArray[np.float64]

# --- The formulas -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pixels:
    """Counted pixels: logits P 2, labels P in {0, 1}, border P in 0..1."""

    logits: Doubles
    labels: npt.NDArray[np.intp]
    border: Doubles

    def probabilities(self) -> Doubles:
        powers = np.exp(self.logits - self.logits.max(1, keepdims=True))
        return np.asarray(powers / powers.sum(1, keepdims=True))


def mean_over_classes(
    pixels: Pixels, config: LossConfig, term: Callable[[float], float], extra: float = 0.0
) -> float:
    """Each class's term of the target's share of it, weighted; over the sum of the weights."""
    weights = config.class_weights or (1.0, 1.0)
    total = norm = 0.0
    for p, label, border in zip(pixels.probabilities(), pixels.labels, pixels.border, strict=True):
        for c in (0, 1):
            share = (1 - config.label_smoothing) * (c == label) + config.label_smoothing / 2
            total += share * (weights[c] + extra * border) * term(p[c])
        norm += weights[label] + extra * border
    return total / norm


def formula_ce(pixels: Pixels, config: LossConfig) -> float:
    return mean_over_classes(pixels, config, lambda p: -math.log(p))


def formula_focal(pixels: Pixels, config: LossConfig) -> float:
    gamma = config.focal_gamma
    return mean_over_classes(pixels, config, lambda p: -((1 - p) ** gamma) * math.log(p))


def formula_border_ce(pixels: Pixels, config: LossConfig) -> float:
    return mean_over_classes(pixels, config, lambda p: -math.log(p), config.border_weight)


def formula_dice(pixels: Pixels) -> float:
    p = pixels.probabilities()[:, 1]
    return 1 - (2 * p @ pixels.labels + 1) / (p.sum() + pixels.labels.sum() + 1)


def formula_ce_dice(pixels: Pixels, config: LossConfig) -> float:
    return formula_ce(pixels, config) + formula_dice(pixels)


def jaccard_loss(persons: set[int], wrong: set[int]) -> float:
    """1 - IoU of persons and a prediction that is wrong at the given pixels."""
    predicted = persons ^ wrong
    union = persons | predicted
    return 1 - len(persons & predicted) / len(union) if union else 0.0


def formula_lovasz(pixels: Pixels, config: LossConfig) -> float:
    """The Lovasz extension as it is defined, over sets."""
    signs = np.where(pixels.labels == 1, 1, -1)
    errors = np.maximum(0, 1 - (pixels.logits[:, 1] - pixels.logits[:, 0]) * signs)
    persons = set(np.flatnonzero(pixels.labels).tolist())
    total, wrong = 0.0, set[int]()
    for index in np.argsort(-errors).tolist():
        before = jaccard_loss(persons, wrong)
        wrong.add(index)
        total += errors[index] * (jaccard_loss(persons, wrong) - before)
    return float(total)


FORMULAS: dict[str, Callable[[Pixels, LossConfig], float]] = {
    "ce": formula_ce,
    "ce_dice": formula_ce_dice,
    "focal": formula_focal,
    "lovasz": formula_lovasz,
    "border_ce": formula_border_ce,
}

CONFIGS = [
    LossConfig(name="ce"),
    LossConfig(name="ce", class_weights=(0.3, 2.5)),
    LossConfig(name="ce", label_smoothing=0.2),
    LossConfig(name="ce", class_weights=(3.0, 0.7), label_smoothing=0.3),
    LossConfig(name="ce_dice"),
    LossConfig(name="ce_dice", class_weights=(3.0, 0.7), label_smoothing=0.3),
    LossConfig(name="focal"),
    LossConfig(name="focal", focal_gamma=0.5, class_weights=(0.25, 0.75)),
    LossConfig(name="focal", focal_gamma=3.5, class_weights=(3.0, 0.7), label_smoothing=0.3),
    LossConfig(name="lovasz"),
    LossConfig(name="border_ce"),
    LossConfig(name="border_ce", border_weight=3.0, class_weights=(0.3, 2.5)),
    LossConfig(name="border_ce", border_weight=3.0, class_weights=(3, 0.7), label_smoothing=0.3),
]


def described(config: LossConfig) -> str:
    default = LossConfig()
    names = ("class_weights", "label_smoothing", "focal_gamma", "border_weight")
    changed = [n for n in names if getattr(config, n) != getattr(default, n)]
    return " ".join([config.name, *changed])


every_loss = pytest.mark.parametrize("config", CONFIGS, ids=described)
every_name = pytest.mark.parametrize("name", list(LOSSES))


# --- Batches ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lot:
    """What a loss is called with."""

    logits: Tensor
    mask: Tensor
    border: Tensor

    def loss(self, config: LossConfig) -> Tensor:
        return build_loss(config)(self.logits, self.mask, self.border)

    def loss_and_gradient(self, config: LossConfig, scale: float = 1.0) -> tuple[float, Tensor]:
        logits = self.logits.clone().requires_grad_()
        loss = replace(self, logits=logits).loss(config)
        (loss * scale).backward()
        assert logits.grad is not None
        return loss.item(), logits.grad

    def counted(self) -> Pixels:
        counted = self.mask.flatten() != 255
        return Pixels(
            logits=self.logits.double().movedim(1, -1).reshape(-1, 2)[counted].numpy(),
            labels=self.mask.flatten()[counted].long().numpy(),
            border=self.border.flatten()[counted].double().numpy() / 255,
        )


def random_lot(
    seed: int = 0,
    shape: tuple[int, int, int] = (3, 5, 7),
    *,
    labels: tuple[int, ...] = (0, 0, 1, 255),
    spread: float = 2.0,
) -> Lot:
    rng = np.random.default_rng(seed)
    n, height, width = shape
    logits = rng.normal(0, spread, (n, 2, height, width)).astype(np.float32)
    mask = rng.choice(labels, shape).astype(np.uint8)
    # As in a real map most of it is 0; but ignored pixels have some, for they must not count.
    border = rng.integers(0, 256, shape) * (rng.random(shape) < 0.4)
    return Lot(
        torch.from_numpy(logits), torch.from_numpy(mask), torch.from_numpy(border.astype(np.uint8))
    )


# --- The same numbers ---------------------------------------------------------------------------


def test_every_name_of_the_configuration_has_a_loss() -> None:
    names = get_args(get_type_hints(LossConfig)["name"])
    assert sorted(names) == sorted(LOSSES) == sorted(FORMULAS)
    assert {config.name for config in CONFIGS} == set(names)


@every_loss
@pytest.mark.parametrize("seed", range(4))
def test_a_loss_is_the_formula_over_the_counted_pixels(config: LossConfig, seed: int) -> None:
    lot = random_lot(seed)
    assert (lot.mask == 255).any()
    expected = FORMULAS[config.name](lot.counted(), config)
    assert lot.loss(config).item() == pytest.approx(expected, rel=1e-5)


@every_loss
def test_gradients_are_the_slopes_of_the_formula(config: LossConfig) -> None:
    """Central differences in double precision; a kink within 1e-5 is as good as impossible."""
    lot = random_lot(9, (2, 3, 4))
    _, gradient = lot.loss_and_gradient(config)
    step = 1e-5
    for index in np.ndindex(*lot.logits.shape):
        values = []
        for sign in (1, -1):
            logits = lot.logits.double()
            logits[index] += sign * step
            moved = replace(lot, logits=logits).counted()
            values.append(FORMULAS[config.name](moved, config))
        slope = (values[0] - values[1]) / (2 * step)
        assert gradient[index].item() == pytest.approx(slope, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_cross_entropy_is_torchs_mean(num_classes: int, weighted: bool, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, num_classes, 5, 7, generator=generator)
    mask = torch.randint(num_classes + 1, (3, 5, 7), generator=generator).to(torch.uint8)
    mask[mask == num_classes] = 255
    weights = (0.5, 3.0, 1.25, 0.1)[:num_classes] if weighted else None
    expected = F.cross_entropy(
        logits.double(),
        mask.long(),
        torch.tensor(weights, dtype=torch.float64) if weights else None,
        ignore_index=255,
        label_smoothing=smoothing,
    )
    actual = cross_entropy(logits, mask, class_weights=weights, label_smoothing=smoothing)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_default_is_plain_cross_entropy() -> None:
    """Itself, so it costs what it cost before there were others."""
    assert build_loss(LossConfig()) is cross_entropy


# --- By hand ------------------------------------------------------------------------------------


def row(odds: list[float], labels: list[int], border: list[int] | None = None) -> Lot:
    """A picture of one row: logit(person) - logit(background) of each pixel."""
    person = torch.tensor(odds, dtype=torch.float32)
    return Lot(
        torch.stack([torch.full_like(person, 3.0), person + 3.0])[None, :, None],
        torch.tensor(labels, dtype=torch.uint8)[None, None],
        torch.tensor(border or [0] * len(odds), dtype=torch.uint8)[None, None],
    )


def test_cross_entropy_by_hand() -> None:
    """Probabilities of the right class: 3/4, 1/2, 1/5."""
    lot = row([math.log(3), 0.0, math.log(4), 7.0], [1, 0, 0, 255])
    losses = [math.log(4 / 3), math.log(2), math.log(5)]
    assert lot.loss(LossConfig()).item() == pytest.approx(sum(losses) / 3)
    weighted = (2 * losses[0] + 1 * losses[1] + 1 * losses[2]) / 4
    assert lot.loss(LossConfig(class_weights=(1, 2))).item() == pytest.approx(weighted)


def test_focal_by_hand() -> None:
    """A pixel that is right with 9/10 counts a hundredth, as the paper says of gamma 2."""
    easy = row([math.log(9)], [1])
    assert easy.loss(LossConfig(name="focal")).item() == pytest.approx(-math.log(0.9) / 100)
    lot = row([math.log(9), math.log(9), 0.0], [1, 0, 255])
    expected = (0.1 * -math.log(0.9) + 0.9 * -math.log(0.1)) / 2
    assert lot.loss(LossConfig(name="focal", focal_gamma=1)).item() == pytest.approx(expected)


def test_dice_by_hand() -> None:
    """p = 3/4, 1/2, 1/5 and one person: 1 - (2 * 0.75 + 1) / (1.45 + 1 + 1)."""
    lot = row([math.log(3), 0.0, -math.log(4), 9.0], [1, 0, 0, 255])
    assert soft_dice(lot.logits, lot.mask).item() == pytest.approx(1 - 2.5 / 3.45)


def test_dice_of_all_wrong_and_of_nobody() -> None:
    wrong = row([-200.0, -200.0, 200.0, 200.0], [1, 1, 0, 0])
    assert soft_dice(wrong.logits, wrong.mask).item() == pytest.approx(1 - 1 / 5)
    nobody = row([-200.0, -200.0], [0, 0])
    assert soft_dice(nobody.logits, nobody.mask).item() == 0


def test_the_border_weight_by_hand() -> None:
    """w0 10: weights 1 and 11, of a person 1; an ignored pixel's border counts nowhere."""
    lot = row([0.0, math.log(4), 0.0, 1.0], [0, 0, 1, 255], [0, 255, 0, 255])
    expected = (1 * math.log(2) + 11 * math.log(5) + 1 * math.log(2)) / 13
    assert lot.loss(LossConfig(name="border_ce")).item() == pytest.approx(expected)
    half = replace(lot, border=torch.tensor([0, 51, 0, 255], dtype=torch.uint8)[None, None])
    expected = (1 * math.log(2) + 2 * math.log(5) + 1 * math.log(2)) / 4
    config = LossConfig(name="border_ce", border_weight=5)
    assert half.loss(config).item() == pytest.approx(expected)


def test_lovasz_by_hand() -> None:
    """Errors 3 (background), 2 (person), 0.5 (person), 0; 1 - IoU grows by 1/3, 1/3, 1/3, 0."""
    lot = row([2.0, -1.0, 0.5, -4.0, 50.0], [0, 1, 1, 0, 255])
    assert lot.loss(LossConfig(name="lovasz")).item() == pytest.approx((3 + 2 + 0.5) / 3)


def test_lovasz_without_persons_is_the_largest_error() -> None:
    lot = row([-3.0, 0.25, -0.5, 9.0], [0, 0, 0, 255])
    loss, gradient = lot.loss_and_gradient(LossConfig(name="lovasz"))
    assert loss == 1.25
    assert gradient[0, 1, 0].tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_lovasz_of_errors_of_1_is_1_minus_iou(seed: int) -> None:
    """An extension has the set function's values where each pixel is right or wrong."""
    rng = np.random.default_rng(seed)
    labels, wrong = rng.choice([0, 1, 255], 60), rng.random(60) < 0.4
    odds = np.where(wrong, 0.0, np.where(labels == 1, 1.0, -1.0))
    lot = row(odds.tolist(), labels.tolist())
    predicted = np.where(wrong, labels == 0, labels == 1)[labels != 255]
    person = labels[labels != 255] == 1
    expected = 1 - (predicted & person).sum() / (predicted | person).sum()
    assert lot.loss(LossConfig(name="lovasz")).item() == pytest.approx(expected, rel=1e-6)


def test_lovasz_holds_its_digits_over_a_million_pixels() -> None:
    """The steps are a millionth each: differences of float32 would have one digit."""
    lot = random_lot(3, (4, 512, 512))
    loss, gradient = lot.loss_and_gradient(LossConfig(name="lovasz"))
    pixels = lot.counted()
    odds, person = pixels.logits[:, 1] - pixels.logits[:, 0], pixels.labels == 1
    errors = np.maximum(0, 1 - np.where(person, odds, -odds))
    order = np.argsort(-errors)
    found, others = np.cumsum(person[order]), np.cumsum(~person[order])
    jaccard = 1 - (person.sum() - found) / (person.sum() + others)
    growth = np.diff(jaccard, prepend=0.0)
    assert loss == pytest.approx(errors[order] @ growth, rel=1e-6)
    slopes = np.zeros(len(errors))
    slopes[order] = growth * (errors[order] > 0)
    actual = gradient[:, 1].flatten()[lot.mask.flatten() != 255].abs().numpy()
    # Errors that float32 cannot tell apart may change places; a weight then moves a little.
    assert np.mean(~np.isclose(actual, slopes, rtol=1e-4, atol=0)) < 0.01


# --- Limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, (0.3, 2.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_focal_with_gamma_0_and_border_ce_without_borders_are_cross_entropy(
    weights: tuple[float, float] | None, smoothing: float
) -> None:
    lot = random_lot(5)
    lot = replace(lot, border=torch.zeros_like(lot.border))
    config = LossConfig(class_weights=weights, label_smoothing=smoothing, focal_gamma=0)
    loss, gradient = lot.loss_and_gradient(config)
    for name in ("focal", "border_ce"):
        other, other_gradient = lot.loss_and_gradient(replace(config, name=name))
        assert other == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(other_gradient, gradient)


@pytest.mark.parametrize("name", ["lovasz", "focal", "ce", "border_ce", "ce_dice"])
@pytest.mark.parametrize("labels", [(0, 1), (0, 1, 255), (0,), (1,)])
def test_a_perfect_prediction_costs_nothing(name: str, labels: tuple[int, ...]) -> None:
    lot = random_lot(6, labels=labels)
    odds = torch.where(lot.mask == 1, 200.0, -200.0)
    lot = replace(lot, logits=torch.stack([torch.zeros_like(odds), odds], dim=1))
    loss, gradient = lot.loss_and_gradient(LossConfig(name=name))
    assert loss == pytest.approx(0, abs=1e-6)
    assert gradient.abs().max() < 1e-6


@every_name
def test_other_losses_do_not_look_at_the_border(name: str) -> None:
    lot = random_lot(7)
    config = LossConfig(name=name)
    if name == "border_ce":
        with pytest.raises(ValueError, match="border_sigma"):
            build_loss(config)(lot.logits, lot.mask, None)
        return
    alone = build_loss(config)(lot.logits, lot.mask, None)
    assert torch.equal(lot.loss(config), alone)


@pytest.mark.parametrize("name", ["ce", "ce_dice", "focal"])
def test_only_the_ratio_of_class_weights_counts(name: str) -> None:
    lot = random_lot(8)
    small, large = (
        LossConfig(name=name, class_weights=(factor * 1, factor * 4)) for factor in (1e-3, 1e3)
    )
    assert lot.loss(small).item() == pytest.approx(lot.loss(large).item(), rel=1e-5)


def test_a_single_light_pixel_counts_in_full() -> None:
    """The sum of weights is far below 1 here, and no clamp may take its place."""
    lot = row([0.0, 3.0], [1, 255])
    for name in ("ce", "focal", "border_ce"):
        config = LossConfig(name=name, class_weights=(1e-4, 1e-4), focal_gamma=0)
        assert lot.loss(config).item() == pytest.approx(math.log(2), rel=1e-5)


# --- Ignored pixels -----------------------------------------------------------------------------

lots = st.builds(
    random_lot,
    st.integers(0, 2**32 - 1),
    st.sampled_from([(1, 1, 1), (1, 1, 2), (2, 3, 5), (3, 5, 7)]),
    labels=st.sampled_from([(0, 1, 255), (0, 255), (1, 255), (1, 255, 255, 255, 255)]),
    spread=st.sampled_from([0.1, 2.0, 30.0]),
)


@every_loss
@settings(deadline=None, max_examples=30)
@given(lot=lots, data=st.data())
def test_ignored_pixels_may_be_anything(config: LossConfig, lot: Lot, data: st.DataObject) -> None:
    """The same bits come out, and no gradient goes back to them."""
    ignored = lot.mask == 255
    seed, scale = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([1.0, 1e3, 1e37]))
    other = random_lot(seed, tuple(lot.mask.shape))
    changed = Lot(
        torch.where(ignored[:, None], other.logits * scale, lot.logits),
        lot.mask,
        torch.where(ignored, other.border, lot.border),
    )
    loss, gradient = lot.loss_and_gradient(config)
    changed_loss, changed_gradient = changed.loss_and_gradient(config)
    assert changed_loss == loss
    assert torch.equal(changed_gradient, gradient)
    assert torch.equal(changed_gradient.movedim(1, -1)[ignored], torch.zeros(int(ignored.sum()), 2))


@every_loss
@settings(deadline=None, max_examples=30)
@given(lot=lots)
def test_ignoring_pixels_is_leaving_them_out(config: LossConfig, lot: Lot) -> None:
    """The loss and the gradients of a batch that has the counted pixels alone."""
    counted = lot.mask != 255
    if not counted.any():
        return
    without = Lot(
        lot.logits.movedim(1, -1)[counted].T[None, :, None].contiguous(),
        lot.mask[counted][None, None],
        lot.border[counted][None, None],
    )
    loss, gradient = lot.loss_and_gradient(config)
    expected, expected_gradient = without.loss_and_gradient(config)
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-7)
    torch.testing.assert_close(
        gradient.movedim(1, -1)[counted].T, expected_gradient[0, :, 0], rtol=1e-4, atol=1e-7
    )


@every_loss
@settings(deadline=None, max_examples=30)
@given(lot=lots, seed=st.integers(0, 99))
def test_the_order_of_the_pixels_does_not_count(config: LossConfig, lot: Lot, seed: int) -> None:
    """Over the whole batch: pixels may change pictures."""
    n, height, width = lot.mask.shape
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n * height * width))

    def shuffled(values: Tensor) -> Tensor:
        return values.flatten()[order].view(n, height, width)

    moved = Lot(
        torch.stack([shuffled(lot.logits[:, 0]), shuffled(lot.logits[:, 1])], dim=1),
        shuffled(lot.mask),
        shuffled(lot.border),
    )
    loss, gradient = lot.loss_and_gradient(config)
    moved_loss, moved_gradient = moved.loss_and_gradient(config)
    assert moved_loss == pytest.approx(loss, rel=1e-5, abs=1e-7)
    torch.testing.assert_close(moved_gradient[:, 1], shuffled(gradient[:, 1]), rtol=1e-4, atol=1e-7)


@every_loss
@pytest.mark.parametrize("scale", [1.0, 2.0**24])
def test_nothing_but_ignored_pixels_gives_zero_and_zero_gradients(
    config: LossConfig, scale: float
) -> None:
    """Under the largest factor of a gradient scaler, too: no inf times 0."""
    lot = random_lot(1, labels=(255,))
    loss, gradient = lot.loss_and_gradient(config, scale)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


# --- Precision ----------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_any_precision_are_computed_in_float32(
    config: LossConfig, dtype: torch.dtype
) -> None:
    lot = random_lot(2)
    logits = lot.logits.to(dtype).requires_grad_()
    loss = replace(lot, logits=logits).loss(config)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert torch.equal(loss, replace(lot, logits=logits.detach().float()).loss(config))
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.dtype == dtype


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_over_many_half_precision_pixels_hold(config: LossConfig, dtype: torch.dtype) -> None:
    """200,000 pixels are beyond fp16's 65,504 and far beyond the 257 that bf16 can count to."""
    one, many = (
        Lot(
            torch.zeros(1, 2, *shape, dtype=dtype),
            torch.tensor([0, 1], dtype=torch.uint8).repeat(1, *shape[:1], shape[1] // 2),
            torch.zeros(1, *shape, dtype=torch.uint8),
        )
        for shape in ((20, 20), (400, 500))
    )
    # Dice's smoothing counts for 0.001 in the small one.
    assert many.loss(config).item() == pytest.approx(one.loss(config).item(), rel=2e-3)


@every_loss
@pytest.mark.parametrize("size", [50.0, 1e4, 1e30])
def test_extreme_logits_give_finite_losses_and_gradients(config: LossConfig, size: float) -> None:
    """Very right and very wrong ones, beside ordinary ones."""
    signs = torch.tensor([[1.0, -1.0, 1.0, -1.0, 0.0, 1.0], [-1.0, 1.0, -1.0, 1.0, 0.0, 1.0]])
    lot = Lot(
        (size * signs)[None, :, None],
        torch.tensor([0, 0, 1, 1, 1, 255], dtype=torch.uint8)[None, None],
        torch.tensor([0, 255, 0, 0, 0, 0], dtype=torch.uint8)[None, None],
    )
    loss, gradient = lot.loss_and_gradient(config)
    assert math.isfinite(loss)
    assert loss >= 0
    assert gradient.isfinite().all()
    # What is wrong is pulled the right way, however far it is.
    assert gradient[0, 1, 0, 1] > 0
    assert gradient[0, 1, 0, 2] < 0


def test_very_wrong_logits_give_their_difference() -> None:
    lot = row([-2e4], [1])
    for name in ("ce", "focal", "border_ce"):
        assert lot.loss(LossConfig(name=name)).item() == 2e4
    assert lot.loss(LossConfig(name="lovasz")).item() == 20_001


def test_focal_keeps_digits_where_all_is_right() -> None:
    """1 - p is 4e-11 there, and 1 - p of float32 would be 0."""
    lot = row([24.0], [1])
    p = math.exp(-24) / (1 + math.exp(-24))
    config = LossConfig(name="focal", focal_gamma=1)
    assert lot.loss(config).item() == pytest.approx(p * p, rel=1e-5)


# --- The device ---------------------------------------------------------------------------------


@every_loss
def test_nothing_depends_on_values_that_a_device_would_have_to_tell(config: LossConfig) -> None:
    """Tensors without values: item(), nonzero(), boolean indices and cpu() raise on them."""
    lot = random_lot()
    logits = lot.logits.to("meta").requires_grad_()
    loss = Lot(logits, lot.mask.to("meta"), lot.border.to("meta")).loss(config)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.shape == lot.logits.shape


def test_losses_can_be_called_without_a_border() -> None:
    lot = random_lot()
    calls: list[Callable[..., Any]] = [cross_entropy, lovasz_hinge]
    assert all(call(lot.logits, lot.mask).isfinite() for call in calls)
    assert focal(lot.logits, lot.mask, gamma=2.0).isfinite()


# --- On a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@every_loss
def test_on_cuda_a_loss_and_its_gradient_are_those_of_the_cpu(
    config: LossConfig, dtype: torch.dtype
) -> None:
    lot = random_lot()
    lot = replace(lot, logits=lot.logits.to(dtype))
    on_cuda = Lot(lot.logits.cuda(), lot.mask.cuda(), lot.border.cuda())

    loss, gradient = on_cuda.loss_and_gradient(config)
    expected, expected_gradient = lot.loss_and_gradient(config)

    assert loss == pytest.approx(expected, rel=1e-5)
    # The gradient has the logits' precision; equal errors share Lovasz's weights by their order.
    torch.testing.assert_close(gradient.cpu(), expected_gradient, rtol=1e-2, atol=1e-6)


@pytest.mark.gpu
@every_loss
def test_on_cuda_no_loss_waits(config: LossConfig) -> None:
    lot = random_lot()
    logits = lot.logits.cuda().requires_grad_()
    on_cuda = Lot(logits, lot.mask.cuda(), lot.border.cuda())
    on_cuda.loss(config).backward()

    with no_waiting():
        on_cuda.loss(config).backward()
