"""Every loss against the formula of its paper, implemented again in double precision.

The formulas take flat lists of the pixels that are not ignored, so they are independent of ignored
pixels, of batches, and of how a loss is computed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args, get_type_hints

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers.command import no_device_sync
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from segtrain.config.schema import LossConfig
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
    """Pixels that are not ignored: logits P 2, labels P in {0, 1}, border P in 0..1."""

    logits: Doubles
    labels: npt.NDArray[np.intp]
    border: Doubles

    def probs(self) -> Doubles:
        exps = np.exp(self.logits - self.logits.max(1, keepdims=True))
        return np.asarray(exps / exps.sum(1, keepdims=True))


def mean_over_classes(
    pixels: Pixels, config: LossConfig, term: Callable[[float], float], extra: float = 0.0
) -> float:
    """Weighted mean of the terms of both classes under the smoothed target."""
    weights = config.class_weights or (1.0, 1.0)
    total = norm = 0.0
    for p, label, border in zip(pixels.probs(), pixels.labels, pixels.border, strict=True):
        for c in (0, 1):
            target = (1 - config.label_smoothing) * (c == label) + config.label_smoothing / 2
            total += target * (weights[c] + extra * border) * term(p[c])
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
    p = pixels.probs()[:, 1]
    return 1 - (2 * p @ pixels.labels + 1) / (p.sum() + pixels.labels.sum() + 1)


def formula_ce_dice(pixels: Pixels, config: LossConfig) -> float:
    return formula_ce(pixels, config) + formula_dice(pixels)


def jaccard_loss(persons: set[int], wrong: set[int]) -> float:
    """1 - IoU of a prediction that is wrong at the given pixels."""
    preds = persons ^ wrong
    union = persons | preds
    return 1 - len(persons & preds) / len(union) if union else 0.0


def formula_lovasz(pixels: Pixels, config: LossConfig) -> float:
    """The definition of the Lovasz extension, over sets."""
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


def config_id(config: LossConfig) -> str:
    default = LossConfig()
    names = ("class_weights", "label_smoothing", "focal_gamma", "border_weight")
    changed = [n for n in names if getattr(config, n) != getattr(default, n)]
    return " ".join([config.name, *changed])


every_loss = pytest.mark.parametrize("config", CONFIGS, ids=config_id)
every_name = pytest.mark.parametrize("name", list(LOSSES))


# --- Batches ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossInputs:
    """Arguments of a loss."""

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

    def counted_pixels(self) -> Pixels:
        counted = self.mask.flatten() != 255
        return Pixels(
            logits=self.logits.double().movedim(1, -1).reshape(-1, 2)[counted].numpy(),
            labels=self.mask.flatten()[counted].long().numpy(),
            border=self.border.flatten()[counted].double().numpy() / 255,
        )


def random_inputs(
    seed: int = 0,
    shape: tuple[int, int, int] = (3, 5, 7),
    *,
    labels: tuple[int, ...] = (0, 0, 1, 255),
    spread: float = 2.0,
) -> LossInputs:
    rng = np.random.default_rng(seed)
    n, height, width = shape
    logits = rng.normal(0, spread, (n, 2, height, width)).astype(np.float32)
    mask = rng.choice(labels, shape).astype(np.uint8)
    # Mostly 0, as in a real map; ignored pixels also have values, which must not count.
    border = rng.integers(0, 256, shape) * (rng.random(shape) < 0.4)
    return LossInputs(
        torch.from_numpy(logits), torch.from_numpy(mask), torch.from_numpy(border.astype(np.uint8))
    )


# --- Equal to the formulas ----------------------------------------------------------------------


def test_every_name_in_the_configuration_has_a_loss() -> None:
    names = get_args(get_type_hints(LossConfig)["name"])
    assert sorted(names) == sorted(LOSSES) == sorted(FORMULAS)
    assert {config.name for config in CONFIGS} == set(names)


@every_loss
@pytest.mark.parametrize("seed", range(4))
def test_a_loss_equals_its_formula(config: LossConfig, seed: int) -> None:
    inputs = random_inputs(seed)
    assert (inputs.mask == 255).any()
    expected = FORMULAS[config.name](inputs.counted_pixels(), config)
    assert inputs.loss(config).item() == pytest.approx(expected, rel=1e-5)


@every_loss
def test_gradients_equal_the_slopes_of_the_formula(config: LossConfig) -> None:
    """Central differences in double precision; a kink within 1e-5 is practically impossible."""
    inputs = random_inputs(9, (2, 3, 4))
    _, gradient = inputs.loss_and_gradient(config)
    step = 1e-5
    for index in np.ndindex(*inputs.logits.shape):
        values = []
        for sign in (1, -1):
            logits = inputs.logits.double()
            logits[index] += sign * step
            pixels = replace(inputs, logits=logits).counted_pixels()
            values.append(FORMULAS[config.name](pixels, config))
        slope = (values[0] - values[1]) / (2 * step)
        assert gradient[index].item() == pytest.approx(slope, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_cross_entropy_equals_the_mean_of_torch(
    num_classes: int, weighted: bool, smoothing: float
) -> None:
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
    """The function itself, without the overhead of a wrapper."""
    assert build_loss(LossConfig()) is cross_entropy


# --- Computed by hand ---------------------------------------------------------------------------


def single_row(odds: list[float], labels: list[int], border: list[int] | None = None) -> LossInputs:
    """An image of one row, given logit(person) - logit(background) of each pixel."""
    person = torch.tensor(odds, dtype=torch.float32)
    return LossInputs(
        torch.stack([torch.full_like(person, 3.0), person + 3.0])[None, :, None],
        torch.tensor(labels, dtype=torch.uint8)[None, None],
        torch.tensor(border or [0] * len(odds), dtype=torch.uint8)[None, None],
    )


def test_cross_entropy_by_hand() -> None:
    """Probabilities of the right class: 3/4, 1/2, 1/5."""
    inputs = single_row([math.log(3), 0.0, math.log(4), 7.0], [1, 0, 0, 255])
    losses = [math.log(4 / 3), math.log(2), math.log(5)]
    assert inputs.loss(LossConfig()).item() == pytest.approx(sum(losses) / 3)
    weighted = (2 * losses[0] + 1 * losses[1] + 1 * losses[2]) / 4
    assert inputs.loss(LossConfig(class_weights=(1, 2))).item() == pytest.approx(weighted)


def test_focal_by_hand() -> None:
    """With gamma 2, a pixel with probability 9/10 counts a hundredth, as stated in the paper."""
    easy = single_row([math.log(9)], [1])
    assert easy.loss(LossConfig(name="focal")).item() == pytest.approx(-math.log(0.9) / 100)
    inputs = single_row([math.log(9), math.log(9), 0.0], [1, 0, 255])
    expected = (0.1 * -math.log(0.9) + 0.9 * -math.log(0.1)) / 2
    assert inputs.loss(LossConfig(name="focal", focal_gamma=1)).item() == pytest.approx(expected)


def test_dice_by_hand() -> None:
    """p = 3/4, 1/2, 1/5 and one person pixel: 1 - (2 * 0.75 + 1) / (1.45 + 1 + 1)."""
    inputs = single_row([math.log(3), 0.0, -math.log(4), 9.0], [1, 0, 0, 255])
    assert soft_dice(inputs.logits, inputs.mask).item() == pytest.approx(1 - 2.5 / 3.45)


def test_dice_of_a_wrong_prediction_and_without_a_person() -> None:
    wrong = single_row([-200.0, -200.0, 200.0, 200.0], [1, 1, 0, 0])
    assert soft_dice(wrong.logits, wrong.mask).item() == pytest.approx(1 - 1 / 5)
    empty = single_row([-200.0, -200.0], [0, 0])
    assert soft_dice(empty.logits, empty.mask).item() == 0


def test_the_border_weight_by_hand() -> None:
    """w0 10: weights 1 and 11, and 1 for the person; the border of the ignored pixel is unused."""
    inputs = single_row([0.0, math.log(4), 0.0, 1.0], [0, 0, 1, 255], [0, 255, 0, 255])
    expected = (1 * math.log(2) + 11 * math.log(5) + 1 * math.log(2)) / 13
    assert inputs.loss(LossConfig(name="border_ce")).item() == pytest.approx(expected)
    half = replace(inputs, border=torch.tensor([0, 51, 0, 255], dtype=torch.uint8)[None, None])
    expected = (1 * math.log(2) + 2 * math.log(5) + 1 * math.log(2)) / 4
    config = LossConfig(name="border_ce", border_weight=5)
    assert half.loss(config).item() == pytest.approx(expected)


def test_lovasz_by_hand() -> None:
    """Errors 3 (background), 2 (person), 0.5 (person), 0; 1 - IoU grows by 1/3, 1/3, 1/3, 0."""
    inputs = single_row([2.0, -1.0, 0.5, -4.0, 50.0], [0, 1, 1, 0, 255])
    assert inputs.loss(LossConfig(name="lovasz")).item() == pytest.approx((3 + 2 + 0.5) / 3)


def test_lovasz_without_persons_is_the_largest_error() -> None:
    inputs = single_row([-3.0, 0.25, -0.5, 9.0], [0, 0, 0, 255])
    loss, gradient = inputs.loss_and_gradient(LossConfig(name="lovasz"))
    assert loss == 1.25
    assert gradient[0, 1, 0].tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_lovasz_of_errors_of_1_is_1_minus_iou(seed: int) -> None:
    """The extension equals the set function if every error is 0 or 1."""
    rng = np.random.default_rng(seed)
    labels, wrong = rng.choice([0, 1, 255], 60), rng.random(60) < 0.4
    odds = np.where(wrong, 0.0, np.where(labels == 1, 1.0, -1.0))
    inputs = single_row(odds.tolist(), labels.tolist())
    preds = np.where(wrong, labels == 0, labels == 1)[labels != 255]
    person = labels[labels != 255] == 1
    expected = 1 - (preds & person).sum() / (preds | person).sum()
    assert inputs.loss(LossConfig(name="lovasz")).item() == pytest.approx(expected, rel=1e-6)


def test_lovasz_stays_precise_over_a_million_pixels() -> None:
    """The IoU increments are a millionth each; as float32 differences they would have one digit."""
    inputs = random_inputs(3, (4, 512, 512))
    loss, gradient = inputs.loss_and_gradient(LossConfig(name="lovasz"))
    pixels = inputs.counted_pixels()
    odds, person = pixels.logits[:, 1] - pixels.logits[:, 0], pixels.labels == 1
    errors = np.maximum(0, 1 - np.where(person, odds, -odds))
    order = np.argsort(-errors)
    false_negatives, false_positives = np.cumsum(person[order]), np.cumsum(~person[order])
    jaccard = 1 - (person.sum() - false_negatives) / (person.sum() + false_positives)
    weights = np.diff(jaccard, prepend=0.0)
    assert loss == pytest.approx(errors[order] @ weights, rel=1e-6)
    slopes = np.zeros(len(errors))
    slopes[order] = weights * (errors[order] > 0)
    actual = gradient[:, 1].flatten()[inputs.mask.flatten() != 255].abs().numpy()
    # Errors that are equal in float32 may be sorted differently, which changes weights slightly.
    assert np.mean(~np.isclose(actual, slopes, rtol=1e-4, atol=0)) < 0.01


# --- Special cases ------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, (0.3, 2.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_focal_with_gamma_0_and_border_ce_without_borders_equal_cross_entropy(
    weights: tuple[float, float] | None, smoothing: float
) -> None:
    inputs = random_inputs(5)
    inputs = replace(inputs, border=torch.zeros_like(inputs.border))
    config = LossConfig(class_weights=weights, label_smoothing=smoothing, focal_gamma=0)
    loss, gradient = inputs.loss_and_gradient(config)
    for name in ("focal", "border_ce"):
        other, other_gradient = inputs.loss_and_gradient(replace(config, name=name))
        assert other == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(other_gradient, gradient)


@pytest.mark.parametrize("name", ["lovasz", "focal", "ce", "border_ce", "ce_dice"])
@pytest.mark.parametrize("labels", [(0, 1), (0, 1, 255), (0,), (1,)])
def test_the_loss_of_a_perfect_prediction_is_0(name: str, labels: tuple[int, ...]) -> None:
    inputs = random_inputs(6, labels=labels)
    odds = torch.where(inputs.mask == 1, 200.0, -200.0)
    inputs = replace(inputs, logits=torch.stack([torch.zeros_like(odds), odds], dim=1))
    loss, gradient = inputs.loss_and_gradient(LossConfig(name=name))
    assert loss == pytest.approx(0, abs=1e-6)
    assert gradient.abs().max() < 1e-6


@every_name
def test_only_border_ce_uses_the_border(name: str) -> None:
    inputs = random_inputs(7)
    config = LossConfig(name=name)
    if name == "border_ce":
        with pytest.raises(ValueError, match="border_sigma"):
            build_loss(config)(inputs.logits, inputs.mask, None)
        return
    expected = build_loss(config)(inputs.logits, inputs.mask, None)
    assert torch.equal(inputs.loss(config), expected)


@pytest.mark.parametrize("name", ["ce", "ce_dice", "focal"])
def test_only_the_ratio_of_class_weights_matters(name: str) -> None:
    inputs = random_inputs(8)
    small, large = (
        LossConfig(name=name, class_weights=(factor * 1, factor * 4)) for factor in (1e-3, 1e3)
    )
    assert inputs.loss(small).item() == pytest.approx(inputs.loss(large).item(), rel=1e-5)


def test_a_single_pixel_with_a_small_weight_counts_fully() -> None:
    """The sum of the weights is far below 1 and must not be clamped to 1."""
    inputs = single_row([0.0, 3.0], [1, 255])
    for name in ("ce", "focal", "border_ce"):
        config = LossConfig(name=name, class_weights=(1e-4, 1e-4), focal_gamma=0)
        assert inputs.loss(config).item() == pytest.approx(math.log(2), rel=1e-5)


# --- Ignored pixels -----------------------------------------------------------------------------

inputs_strategy = st.builds(
    random_inputs,
    st.integers(0, 2**32 - 1),
    st.sampled_from([(1, 1, 1), (1, 1, 2), (2, 3, 5), (3, 5, 7)]),
    labels=st.sampled_from([(0, 1, 255), (0, 255), (1, 255), (1, 255, 255, 255, 255)]),
    spread=st.sampled_from([0.1, 2.0, 30.0]),
)


@every_loss
@settings(deadline=None, max_examples=30)
@given(inputs=inputs_strategy, data=st.data())
def test_the_values_of_ignored_pixels_do_not_matter(
    config: LossConfig, inputs: LossInputs, data: st.DataObject
) -> None:
    """The results are equal bit for bit, and ignored pixels have no gradient."""
    ignored = inputs.mask == 255
    seed, scale = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([1.0, 1e3, 1e37]))
    other = random_inputs(seed, tuple(inputs.mask.shape))
    changed = LossInputs(
        torch.where(ignored[:, None], other.logits * scale, inputs.logits),
        inputs.mask,
        torch.where(ignored, other.border, inputs.border),
    )
    loss, gradient = inputs.loss_and_gradient(config)
    changed_loss, changed_gradient = changed.loss_and_gradient(config)
    assert changed_loss == loss
    assert torch.equal(changed_gradient, gradient)
    assert torch.equal(changed_gradient.movedim(1, -1)[ignored], torch.zeros(int(ignored.sum()), 2))


@every_loss
@settings(deadline=None, max_examples=30)
@given(inputs=inputs_strategy)
def test_ignoring_pixels_equals_removing_them(config: LossConfig, inputs: LossInputs) -> None:
    """The loss and gradients equal those of a batch of the counted pixels only."""
    counted = inputs.mask != 255
    if not counted.any():
        return
    counted_only = LossInputs(
        inputs.logits.movedim(1, -1)[counted].T[None, :, None].contiguous(),
        inputs.mask[counted][None, None],
        inputs.border[counted][None, None],
    )
    loss, gradient = inputs.loss_and_gradient(config)
    expected, expected_gradient = counted_only.loss_and_gradient(config)
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-7)
    torch.testing.assert_close(
        gradient.movedim(1, -1)[counted].T, expected_gradient[0, :, 0], rtol=1e-4, atol=1e-7
    )


@every_loss
@settings(deadline=None, max_examples=30)
@given(inputs=inputs_strategy, seed=st.integers(0, 99))
def test_the_order_of_the_pixels_does_not_matter(
    config: LossConfig, inputs: LossInputs, seed: int
) -> None:
    """Over the whole batch: pixels may even move to other images."""
    n, height, width = inputs.mask.shape
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n * height * width))

    def shuffled(values: Tensor) -> Tensor:
        return values.flatten()[order].view(n, height, width)

    moved = LossInputs(
        torch.stack([shuffled(inputs.logits[:, 0]), shuffled(inputs.logits[:, 1])], dim=1),
        shuffled(inputs.mask),
        shuffled(inputs.border),
    )
    loss, gradient = inputs.loss_and_gradient(config)
    moved_loss, moved_gradient = moved.loss_and_gradient(config)
    assert moved_loss == pytest.approx(loss, rel=1e-5, abs=1e-7)
    torch.testing.assert_close(moved_gradient[:, 1], shuffled(gradient[:, 1]), rtol=1e-4, atol=1e-7)


@every_loss
@pytest.mark.parametrize("scale", [1.0, 2.0**24])
def test_with_all_pixels_ignored_the_loss_and_gradients_are_0(
    config: LossConfig, scale: float
) -> None:
    """Also with the largest factor of a gradient scaler: no inf times 0."""
    inputs = random_inputs(1, labels=(255,))
    loss, gradient = inputs.loss_and_gradient(config, scale)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


# --- Precision ----------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_any_precision_are_computed_in_float32(
    config: LossConfig, dtype: torch.dtype
) -> None:
    inputs = random_inputs(2)
    logits = inputs.logits.to(dtype).requires_grad_()
    loss = replace(inputs, logits=logits).loss(config)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert torch.equal(loss, replace(inputs, logits=logits.detach().float()).loss(config))
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.dtype == dtype


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_over_many_half_precision_pixels_stay_exact(
    config: LossConfig, dtype: torch.dtype
) -> None:
    """200,000 pixels exceed the fp16 maximum of 65,504, and the 257 up to which bf16 can count."""
    small, large = (
        LossInputs(
            torch.zeros(1, 2, *shape, dtype=dtype),
            torch.tensor([0, 1], dtype=torch.uint8).repeat(1, *shape[:1], shape[1] // 2),
            torch.zeros(1, *shape, dtype=torch.uint8),
        )
        for shape in ((20, 20), (400, 500))
    )
    # The smoothing of Dice changes the small one by 0.001.
    assert large.loss(config).item() == pytest.approx(small.loss(config).item(), rel=2e-3)


@every_loss
@pytest.mark.parametrize("size", [50.0, 1e4, 1e30])
def test_extreme_logits_give_finite_losses_and_gradients(config: LossConfig, size: float) -> None:
    """Very right and very wrong logits, next to ordinary ones."""
    signs = torch.tensor([[1.0, -1.0, 1.0, -1.0, 0.0, 1.0], [-1.0, 1.0, -1.0, 1.0, 0.0, 1.0]])
    inputs = LossInputs(
        (size * signs)[None, :, None],
        torch.tensor([0, 0, 1, 1, 1, 255], dtype=torch.uint8)[None, None],
        torch.tensor([0, 255, 0, 0, 0, 0], dtype=torch.uint8)[None, None],
    )
    loss, gradient = inputs.loss_and_gradient(config)
    assert math.isfinite(loss)
    assert loss >= 0
    assert gradient.isfinite().all()
    # Wrong predictions have a gradient in the right direction, however large the error is.
    assert gradient[0, 1, 0, 1] > 0
    assert gradient[0, 1, 0, 2] < 0


def test_the_loss_of_very_wrong_logits_is_their_difference() -> None:
    inputs = single_row([-2e4], [1])
    for name in ("ce", "focal", "border_ce"):
        assert inputs.loss(LossConfig(name=name)).item() == 2e4
    assert inputs.loss(LossConfig(name="lovasz")).item() == 20_001


def test_focal_stays_precise_for_right_predictions() -> None:
    """1 - p is 4e-11 here; computed in float32 it would be 0."""
    inputs = single_row([24.0], [1])
    p = math.exp(-24) / (1 + math.exp(-24))
    config = LossConfig(name="focal", focal_gamma=1)
    assert inputs.loss(config).item() == pytest.approx(p * p, rel=1e-5)


# --- The device ---------------------------------------------------------------------------------


@every_loss
def test_losses_do_not_read_values_from_the_device(config: LossConfig) -> None:
    """Meta tensors have no values: item(), nonzero(), boolean indices and cpu() raise on them."""
    inputs = random_inputs()
    logits = inputs.logits.to("meta").requires_grad_()
    loss = LossInputs(logits, inputs.mask.to("meta"), inputs.border.to("meta")).loss(config)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.shape == inputs.logits.shape


def test_losses_can_be_called_without_a_border() -> None:
    inputs = random_inputs()
    losses: list[Callable[..., Any]] = [cross_entropy, lovasz_hinge]
    assert all(loss(inputs.logits, inputs.mask).isfinite() for loss in losses)
    assert focal(inputs.logits, inputs.mask, gamma=2.0).isfinite()


# --- On a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@every_loss
def test_losses_and_gradients_on_cuda_equal_those_of_the_cpu(
    config: LossConfig, dtype: torch.dtype
) -> None:
    inputs = random_inputs()
    inputs = replace(inputs, logits=inputs.logits.to(dtype))
    on_cuda = LossInputs(inputs.logits.cuda(), inputs.mask.cuda(), inputs.border.cuda())

    loss, gradient = on_cuda.loss_and_gradient(config)
    expected, expected_gradient = inputs.loss_and_gradient(config)

    assert loss == pytest.approx(expected, rel=1e-5)
    # The gradient has the precision of the logits. The Lovasz weights of equal errors depend on
    # their order.
    torch.testing.assert_close(gradient.cpu(), expected_gradient, rtol=1e-2, atol=1e-6)


@pytest.mark.gpu
@every_loss
def test_losses_on_cuda_do_not_wait(config: LossConfig) -> None:
    inputs = random_inputs()
    logits = inputs.logits.cuda().requires_grad_()
    on_cuda = LossInputs(logits, inputs.mask.cuda(), inputs.border.cuda())
    on_cuda.loss(config).backward()

    with no_device_sync():
        on_cuda.loss(config).backward()
