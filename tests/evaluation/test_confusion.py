"""Confusion matrix and metrics against worked examples and torchmetrics; evaluate_batches."""

import contextlib
import os
import signal
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn

from segtrain.evaluation.confusion import (
    ConfusionMatrix,
    SegmentationMetrics,
    evaluate_batches,
    metrics_from_counts,
)
from segtrain.inference.options import InferenceOptions
from segtrain.runtime.signals import Stopped, handle_signals


def confusion_of(preds: Tensor, mask: Tensor) -> ConfusionMatrix:
    confusion = ConfusionMatrix()
    confusion.update(preds, mask)
    return confusion


def random_case(seed: int, num: int = 6, ignored: float = 0.2) -> tuple[Tensor, Tensor]:
    """Predictions and ground truth, N 20 30, that agree more often than by chance."""
    rng = np.random.default_rng(seed)
    mask = (rng.random((num, 20, 30)) < 0.3).astype(np.uint8)
    preds = np.where(rng.random(mask.shape) < 0.2, 1 - mask, mask)
    mask[rng.random(mask.shape) < ignored] = 255
    return torch.from_numpy(preds), torch.from_numpy(mask)


# --- Counting -------------------------------------------------------------------------------------


def test_counts_are_indexed_by_truth_then_prediction() -> None:
    mask = torch.tensor([[0, 0, 0, 1, 1, 255]], dtype=torch.uint8)
    preds = torch.tensor([[0, 0, 1, 0, 1, 1]])
    assert confusion_of(preds, mask).counts.tolist() == [[2, 1], [1, 1]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_predictions_of_any_integer_type_count_the_same(dtype: torch.dtype) -> None:
    preds, mask = random_case(0)
    expected = [
        [int(((mask == t) & (preds == p)).sum()) for p in range(2)]  # 255 equals neither
        for t in range(2)
    ]
    assert confusion_of(preds.to(dtype), mask).counts.tolist() == expected


def test_ignored_pixels_are_not_counted() -> None:
    preds, mask = random_case(1)
    flipped = torch.where(mask == 255, 1 - preds, preds)
    assert (mask == 255).any()
    assert torch.equal(confusion_of(preds, mask).counts, confusion_of(flipped, mask).counts)
    assert confusion_of(preds, mask).counts.sum() == (mask != 255).sum()


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 4], [5, 1], [6]])
def test_batches_add_up_to_the_whole(sizes: list[int]) -> None:
    preds, mask = random_case(2)
    confusion = ConfusionMatrix()
    for batch_preds, batch_mask in zip(preds.split(sizes), mask.split(sizes), strict=True):
        confusion.update(batch_preds, batch_mask)
    whole = confusion_of(preds, mask)
    assert torch.equal(confusion.counts, whole.counts)
    assert confusion.compute() == whole.compute()


def test_counts_of_many_classes() -> None:
    rng = np.random.default_rng(3)
    mask, preds = rng.integers(0, 5, 1000), rng.integers(0, 5, 1000)
    expected = np.zeros((5, 5), dtype=int)
    np.add.at(expected, (mask, preds), 1)
    confusion = ConfusionMatrix(num_classes=5)
    confusion.update(torch.from_numpy(preds), torch.from_numpy(mask).to(torch.uint8))
    assert confusion.counts.tolist() == expected.tolist()


def test_counts_do_not_overflow_at_2_to_the_31() -> None:
    """COCO's 5,000 validation images have 1.4e9 pixels; a float32 count stops at 1.7e7."""
    confusion = ConfusionMatrix()
    confusion.counts += torch.tensor([[2**40, 2**31], [2**31 - 1, 2**33]])
    confusion.update(torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1]))
    expected = [[2**40 + 1, 2**31 + 1], [2**31, 2**33 + 1]]
    assert confusion.counts.tolist() == expected
    assert confusion.compute().person_iou == (2**33 + 1) / (2**33 + 2 + 2**32)


# --- Metrics --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        pytest.param(
            # 50 + 10 background pixels, 20 + 40 person pixels.
            [[50, 10], [20, 40]],
            {
                "person_iou": 40 / 70,
                "mean_iou": (50 / 80 + 40 / 70) / 2,
                "dice": 80 / 110,
                "precision": 40 / 50,
                "recall": 40 / 60,
                "pixel_accuracy": 90 / 120,
                "all_person_iou": 60 / 120,
                "all_background_iou": 0,
            },
            id="mixed",
        ),
        pytest.param(
            [[90, 0], [0, 10]],
            {
                "person_iou": 1,
                "mean_iou": 1,
                "dice": 1,
                "precision": 1,
                "recall": 1,
                "pixel_accuracy": 1,
                "all_person_iou": 0.1,
                "all_background_iou": 0,
            },
            id="perfect",
        ),
        pytest.param(
            [[0, 30], [70, 0]],
            {
                "person_iou": 0,
                "mean_iou": 0,
                "dice": 0,
                "precision": 0,
                "recall": 0,
                "pixel_accuracy": 0,
                "all_person_iou": 0.7,
                "all_background_iou": 0,
            },
            id="all wrong",
        ),
        pytest.param(
            [[100, 0], [0, 0]],
            {
                "person_iou": 1,
                "mean_iou": 1,
                "dice": 1,
                "precision": 1,
                "recall": 1,
                "pixel_accuracy": 1,
                "all_person_iou": 0,
                "all_background_iou": 1,
            },
            id="no person, none predicted",
        ),
        pytest.param(
            [[99, 1], [0, 0]],
            {
                "person_iou": 0,
                "mean_iou": 0.99 / 2,
                "dice": 0,
                "precision": 0,
                "recall": 1,
                "pixel_accuracy": 0.99,
                "all_person_iou": 0,
                "all_background_iou": 1,
            },
            id="no person, one predicted",
        ),
        pytest.param(
            [[0, 0], [0, 5]],
            {
                "person_iou": 1,
                "mean_iou": 1,
                "dice": 1,
                "precision": 1,
                "recall": 1,
                "pixel_accuracy": 1,
                "all_person_iou": 1,
                "all_background_iou": 0,
            },
            id="only person",
        ),
        pytest.param(
            [[0, 0], [0, 0]],
            {
                "person_iou": 1,
                "mean_iou": 1,
                "dice": 1,
                "precision": 1,
                "recall": 1,
                "pixel_accuracy": 1,
                "all_person_iou": 1,
                "all_background_iou": 1,
            },
            id="every pixel ignored",
        ),
    ],
)
def test_metrics_of_worked_examples(counts: list[list[int]], expected: dict[str, float]) -> None:
    metrics = vars(metrics_from_counts(counts))
    predicted_share = metrics.pop("predicted_share")

    assert metrics == pytest.approx(expected, abs=1e-15)
    total = np.sum(counts)
    assert predicted_share == pytest.approx(np.sum(counts, axis=0)[1] / max(total, 1))


@pytest.mark.parametrize("seed", range(5))
def test_metrics_agree_with_torchmetrics(seed: int) -> None:
    preds, mask = random_case(seed + 10)
    ours = confusion_of(preds, mask).compute()
    multi: dict[str, Any] = {"task": "multiclass", "num_classes": 2, "ignore_index": 255}

    def theirs(metric: torchmetrics.Metric) -> Tensor:
        # torchmetrics rejects 255 as a class index in uint8, so it gets int64.
        return metric(preds.long(), mask.long()).double()

    ious = theirs(torchmetrics.JaccardIndex(average="none", **multi))
    f1 = theirs(torchmetrics.F1Score(average="none", **multi))
    accuracy = theirs(torchmetrics.Accuracy(average="micro", **multi))
    # torchmetrics divides in float32, so it is accurate to 1e-6 only.
    assert ours.person_iou == pytest.approx(ious[1].item(), abs=1e-6)
    assert ours.mean_iou == pytest.approx(ious.mean().item(), abs=1e-6)
    assert ours.dice == pytest.approx(f1[1].item(), abs=1e-6)
    assert ours.pixel_accuracy == pytest.approx(accuracy.item(), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_metrics_agree_with_sets_of_pixels(seed: int) -> None:
    preds, mask = random_case(seed + 20)
    known = (mask != 255).numpy()
    truth, predicted = mask.numpy()[known] == 1, preds.numpy()[known] == 1
    person = (truth & predicted).sum() / (truth | predicted).sum()
    background = (~truth & ~predicted).sum() / (~truth | ~predicted).sum()
    ours = confusion_of(preds, mask).compute()
    assert ours.person_iou == pytest.approx(person, abs=1e-12)
    assert ours.mean_iou == pytest.approx((person + background) / 2, abs=1e-12)
    assert ours.dice == pytest.approx(2 * person / (1 + person), abs=1e-12)
    assert ours.pixel_accuracy == pytest.approx((truth == predicted).mean(), abs=1e-12)


@pytest.mark.parametrize(
    ("label", "field"), [(1, "all_person_iou"), (0, "all_background_iou")], ids=["all", "none"]
)
def test_baselines_are_the_person_iou_of_constant_predictions(label: int, field: str) -> None:
    preds, mask = random_case(30)
    constant = confusion_of(torch.full_like(preds, label), mask).compute()
    assert getattr(confusion_of(preds, mask).compute(), field) == constant.person_iou


def test_person_iou_is_global_and_not_a_mean_over_images() -> None:
    """A large wrong image has more weight than a small correct one."""
    confusion = ConfusionMatrix()
    confusion.update(torch.ones(1, 2), torch.ones(1, 2))
    confusion.update(torch.zeros(10, 10), torch.ones(10, 10))
    assert confusion.compute().person_iou == 2 / 102


# --- evaluate_batches() ---------------------------------------------------------------------------


class RedIsPerson(nn.Module):
    """A known function: the person logit is (red - 100) / 2, the background logit 0."""

    def forward(self, image: Tensor) -> Tensor:
        red = (image[:, :1].float() - 100) / 2
        return torch.cat([torch.zeros_like(red), red], dim=1)


def evaluate(images: Tensor, masks: Tensor, batch_size: int, **kwargs: Any) -> ConfusionMatrix:
    batches = [
        {"image": image, "mask": mask}
        for image, mask in zip(images.split(batch_size), masks.split(batch_size), strict=True)
    ]
    kwargs.setdefault("model", RedIsPerson())
    return evaluate_batches(
        batches=batches,
        options=InferenceOptions(tile=None, size=2),
        device=torch.device("cpu"),
        autocast=contextlib.nullcontext,
        **kwargs,
    )


def red_images(red: Tensor) -> Tensor:
    """N H W red values as N 3 H W images; the other channels would give the opposite result."""
    return torch.stack([red, 200 - red, 200 - red], dim=1).to(torch.uint8)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_every_pixel_is_counted_once_at_any_batch_size(batch_size: int) -> None:
    rng = np.random.default_rng(4)
    red = torch.from_numpy(rng.choice([0, 200], (5, 9, 7)))
    masks = torch.from_numpy(rng.choice([0, 1, 255], (5, 9, 7)).astype(np.uint8))
    expected = [[int(((masks == t) & (red == r)).sum()) for r in (0, 200)] for t in (0, 1)]
    assert evaluate(red_images(red), masks, batch_size).counts.tolist() == expected


def test_pixels_are_counted_at_the_resolution_of_the_mask() -> None:
    """The left half is person; the model sees 4x4, the masks have 40x40 and 10x30."""
    red = torch.zeros(1, 4, 4, dtype=torch.int64)
    red[:, :, :2] = 200
    for height, width in ((40, 40), (10, 30)):
        mask = torch.zeros(1, height, width, dtype=torch.uint8)
        mask[:, :, : width // 2] = 1
        half = height * width // 2
        assert evaluate(red_images(red), mask, 1).counts.tolist() == [[half, 0], [0, half]]


def test_probabilities_are_upsampled_before_thresholding() -> None:
    """Confident person beside unsure background: the edge is where the probability crosses 0.5.

    Two pixels upsampled to eight without aligned corners: the weight of the left one is 1, 1, 7/8,
    5/8, 3/8, 1/8, 0, 0. Upsampling the mask or the logits would move the edge.
    """
    confident, unsure = 1.0, torch.sigmoid(torch.tensor(-0.5)).item()
    weights = [1, 1, 7 / 8, 5 / 8, 3 / 8, 1 / 8, 0, 0]
    person = [w * confident + (1 - w) * unsure >= 0.5 for w in weights]
    assert sum(person) == 5  # upsampling a mask gives 4; logits, or aligned corners, 6
    red = torch.tensor([[[200, 99]]])
    counts = evaluate(red_images(red), torch.ones(1, 1, 8, dtype=torch.uint8), 1).counts
    assert counts.tolist() == [[0, 0], [3, 5]]


def test_a_probability_of_one_half_is_person() -> None:
    red = torch.full((1, 2, 2), 100)
    assert evaluate(red_images(red), torch.ones(1, 2, 2, dtype=torch.uint8), 1).counts[1, 1] == 4


def test_the_model_is_in_eval_mode_and_unchanged() -> None:
    class Recording(RedIsPerson):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.modes: list[tuple[bool, bool]] = []

        def forward(self, image: Tensor) -> Tensor:
            self.norm(image.float())
            self.modes.append((self.training, torch.is_grad_enabled()))
            return super().forward(image)

    model = Recording().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    red = torch.full((2, 2, 2), 200)
    evaluate(red_images(red), torch.ones(2, 2, 2, dtype=torch.uint8), 1, model=model)
    assert model.modes == [(False, False)] * 2
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_on_batch_gets_the_number_of_images_of_each_batch() -> None:
    sizes: list[int] = []
    red = torch.zeros(5, 2, 2)
    evaluate(red_images(red), torch.zeros(5, 2, 2, dtype=torch.uint8), 2, on_batch=sizes.append)
    assert sizes == [2, 2, 1]


def test_evaluating_stops_at_a_signal() -> None:
    images, masks = red_images(torch.zeros(2, 4, 4)), torch.zeros(2, 4, 4, dtype=torch.uint8)
    with handle_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            evaluate(images, masks, 1)


def test_no_batches_give_zero_counts() -> None:
    confusion = evaluate_batches(
        RedIsPerson(),
        [],
        options=InferenceOptions(tile=None, size=2),
        device=torch.device("cpu"),
        autocast=contextlib.nullcontext,
    )
    assert confusion.counts.tolist() == [[0, 0], [0, 0]]
    assert isinstance(confusion.compute(), SegmentationMetrics)
