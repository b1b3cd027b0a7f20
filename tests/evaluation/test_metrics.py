"""Metrics and threshold curves against worked examples and torchmetrics."""

import numpy as np
import pytest
import torch
from helpers.evaluation import new_accumulator, smooth_case, smooth_totals
from torch import Tensor
from torchmetrics import classification as tm

from segtrain.evaluation.confusion import metrics_from_counts
from segtrain.evaluation.counts import Records, Totals, count_image
from segtrain.evaluation.metrics import (
    CONFUSION_METRICS,
    METRICS,
    compute_metrics,
    constant_prediction,
    image_ious,
    metric_columns,
    reliability,
    sum_columns,
)
from segtrain.evaluation.thresholds import threshold_curves
from segtrain.types import Mask, Probs

NUM = 6


def metrics_of(records: Records) -> dict[str, float]:
    return compute_metrics(sum_columns(metric_columns(records)))


def count_totals(*images: tuple[Probs, Mask]) -> Totals:
    accumulator = new_accumulator(len(images))
    for index, image in enumerate(images):
        accumulator.add(index, count_image(*image))
    return accumulator.totals()


def known_pixels() -> tuple[Tensor, Tensor]:
    """Probabilities and ground truth of all pixels that are not ignored, as vectors."""
    cases = [smooth_case(seed) for seed in range(NUM)]
    probs = np.concatenate([probs[mask != 255] for probs, mask in cases])
    truth = np.concatenate([mask[mask != 255] for _, mask in cases])
    return torch.from_numpy(probs), torch.from_numpy(truth).long()


# --- Against torchmetrics -------------------------------------------------------------------------


def test_pixel_metrics_agree_with_torchmetrics() -> None:
    probs, truth = known_pixels()
    ours = metrics_of(smooth_totals(NUM).records)
    theirs = {
        "person_iou": tm.BinaryJaccardIndex(),
        "dice": tm.BinaryF1Score(),
        "precision": tm.BinaryPrecision(),
        "recall": tm.BinaryRecall(),
        "pixel_accuracy": tm.BinaryAccuracy(),
        "mean_iou": tm.MulticlassJaccardIndex(num_classes=2, average="macro"),
    }
    # At the threshold itself, ours is person and theirs is not.
    assert not (probs == 0.5).any()
    for name, metric in theirs.items():
        predicted = (probs >= 0.5).long()
        assert ours[name] == pytest.approx(metric(predicted, truth).item(), abs=1e-6), name


def test_calibration_error_agrees_with_torchmetrics_and_sums_over_pixels() -> None:
    probs, truth = known_pixels()
    assert probs.max() < 1  # theirs has a separate bin for 1
    ours = metrics_of(smooth_totals(NUM).records)["ece"]
    theirs = tm.BinaryCalibrationError(n_bins=16, norm="l1")(probs, truth).item()
    assert ours == pytest.approx(theirs, abs=1e-6)

    exact, person = probs.double().numpy(), truth.numpy()
    bins = (exact * 16).astype(int)
    distances = [abs((exact - person)[bins == number].sum()) for number in range(16)]
    assert ours == pytest.approx(sum(distances) / len(exact), abs=1e-7)
    assert ours > 0.05  # far enough from 0 to be meaningful


def test_curves_agree_with_torchmetrics() -> None:
    probs, truth = known_pixels()
    ours = threshold_curves(smooth_totals(NUM).histogram)
    thresholds = torch.arange(256) / 256
    precision, recall, _ = tm.BinaryPrecisionRecallCurve(thresholds=thresholds)(probs, truth)
    has_positives = np.array([(probs >= t).any().item() for t in thresholds])
    np.testing.assert_allclose(ours.recall, recall[:-1], atol=1e-6)
    # Without positive predictions, theirs is 0.
    np.testing.assert_allclose(
        ours.precision[has_positives], precision[:-1][has_positives], atol=1e-6
    )
    assert (ours.precision[~has_positives] == 1).all()
    average = tm.BinaryAveragePrecision(thresholds=thresholds)(probs, truth).item()
    assert ours.average_precision == pytest.approx(average, abs=1e-6)
    ious = [tm.BinaryJaccardIndex()((probs >= t).long(), truth).item() for t in thresholds]
    np.testing.assert_allclose(ours.person_iou, ious, atol=1e-6)
    assert ours.best == pytest.approx((int(np.argmax(ious)) / 256, max(ious)), abs=1e-6)


def test_average_precision_of_bins_is_close_to_that_of_all_thresholds() -> None:
    """Not equal, because all probabilities above 255/256 share a bin."""
    probs, truth = known_pixels()
    exact = tm.BinaryAveragePrecision(thresholds=None)(probs, truth).item()
    assert threshold_curves(smooth_totals(NUM).histogram).average_precision == pytest.approx(
        exact, abs=5e-3
    )


def test_validation_metrics_are_the_same() -> None:
    records = smooth_totals(NUM).records
    validation = vars(metrics_from_counts(records["confusion"].sum(axis=0).tolist()))
    ours = metrics_of(records)
    assert {name: ours[name] for name in validation} == pytest.approx(validation, abs=1e-12)


# --- Worked examples ------------------------------------------------------------------------------


def probs_row(*values: float) -> Probs:
    return np.array([values], dtype=np.float32)


def mask_row(*values: int) -> Mask:
    return np.array([values], dtype=np.uint8)


def test_image_means_weight_images_equally_and_count_empty_ones_as_1() -> None:
    totals = count_totals(
        (probs_row(1, 1, 0, 0), mask_row(1, 1, 1, 1)),  # 1/2
        (probs_row(0, 0, 0, 0, 0, 0), mask_row(0, 0, 0, 0, 0, 0)),  # no person, none predicted: 1
        (probs_row(1, 0), mask_row(0, 0)),  # false positive: 0
        (probs_row(1, 0), mask_row(255, 255)),  # all ignored: 1
        (probs_row(0, 0, 0), mask_row(0, 1, 1)),  # false negatives: 0
    )
    assert image_ious(totals.records).tolist() == [0.5, 1, 0, 1, 0]
    found = metrics_of(totals.records)
    assert found["image_iou"] == pytest.approx((0.5 + 1 + 0 + 1 + 0) / 5, abs=1e-9)
    assert found["person_iou"] == 2 / 7
    assert found["precision"] == 2 / 3
    assert found["recall"] == 2 / 6
    assert found["all_person_iou"] == 6 / 15
    assert found["all_background_iou"] == 0


def test_image_means_of_boundary_metrics_are_means_of_ratios() -> None:
    records = smooth_totals(NUM).records
    found = metrics_of(records)
    ious = records["boundary"][:, 0] / records["boundary"][:, 1]
    assert found["image_boundary_iou"] == pytest.approx(ious.mean(), abs=1e-8)
    assert (
        found["boundary_iou"] == records["boundary"][:, 0].sum() / records["boundary"][:, 1].sum()
    )
    pred_matched, pred, true_matched, true = records["contour"].T
    p, r = pred_matched / pred, true_matched / true
    f1 = 2 * p * r / (p + r)
    assert found["image_boundary_f1"] == pytest.approx(f1.mean(), abs=1e-8)
    p, r = pred_matched.sum() / pred.sum(), true_matched.sum() / true.sum()
    assert found["boundary_f1"] == pytest.approx(2 * p * r / (p + r), abs=1e-12)
    assert (found["boundary_precision"], found["boundary_recall"]) == (p, r)
    assert 0 < found["boundary_f1"] < 1


def test_calibration_error_of_a_worked_example() -> None:
    """Four pixels at 0.75, three of them person, are calibrated; two at 0.25 are not."""
    totals = count_totals(
        (probs_row(0.75, 0.75, 0.75, 0.75), mask_row(1, 1, 1, 0)),
        (probs_row(0.25, 0.25, 0.9), mask_row(1, 1, 255)),
    )
    assert metrics_of(totals.records)["ece"] == pytest.approx(2 / 6 * 0.75, abs=1e-12)
    share, mean, person = reliability(sum_columns(metric_columns(totals.records)))
    assert share[[4, 12]].tolist() == [2 / 6, 4 / 6]
    assert mean[[4, 12]].tolist() == [0.25, 0.75]
    assert person[[4, 12]].tolist() == [1, 0.75]
    assert share.sum() == 1
    assert mean[0] == person[0] == 1 / 32  # an empty bin


def test_curves_of_a_worked_example() -> None:
    totals = count_totals((probs_row(0.125, 0.5, 0.5, 0.875), mask_row(0, 1, 0, 1)))
    curves = threshold_curves(totals.histogram)
    assert curves.thresholds[[0, 32, 33, 128, 129, 224, 225]].tolist() == pytest.approx(
        [0, 0.125, 33 / 256, 0.5, 129 / 256, 0.875, 225 / 256]
    )
    indices = [0, 32, 33, 128, 129, 224, 225]
    assert curves.precision[indices].tolist() == [2 / 4, 2 / 4, 2 / 3, 2 / 3, 1, 1, 1]
    assert curves.recall[indices].tolist() == [1, 1, 1, 1, 0.5, 0.5, 0]
    assert curves.person_iou[indices].tolist() == [2 / 4, 2 / 4, 2 / 3, 2 / 3, 1 / 2, 1 / 2, 0]
    assert curves.average_precision == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert curves.best == (81 / 256, 2 / 3)  # the middle of 33..128


@pytest.mark.parametrize("probs", [probs_row(0, 0), probs_row(1, 1), probs_row(0.5, 0.2)])
def test_curves_without_person_pixels(probs: Probs) -> None:
    curves = threshold_curves(count_totals((probs, mask_row(0, 0))).histogram)
    assert curves.average_precision == 1
    assert (curves.recall == 1).all()


def test_metrics_without_images_follow_the_empty_rule() -> None:
    empty = metrics_of(smooth_totals(NUM, []).records)
    zeros = {"predicted_share", "ece"}
    assert empty == {name: 0.0 if name in zeros else 1.0 for name in METRICS}


@pytest.mark.parametrize(("label", "prob"), [(0, 0.0), (1, 1.0)], ids=["background", "person"])
def test_constant_predictions_equal_counted_ones(label: int, prob: float) -> None:
    masks = [smooth_case(seed)[1] for seed in range(NUM)] + [mask_row(0, 0), mask_row(255)]
    images = [(np.full(mask.shape, 1 - prob, dtype=np.float32), mask) for mask in masks]
    constant = [(np.full(mask.shape, prob, dtype=np.float32), mask) for mask in masks]
    baseline = constant_prediction(label, count_totals(*images).records)
    expected = metrics_of(count_totals(*constant).records)
    found = metrics_of(baseline)
    for name in CONFUSION_METRICS:
        assert found[name] == expected[name], name
    name = "all_person_iou" if label else "all_background_iou"
    assert found["person_iou"] == found[name]


def test_all_metrics_are_in_0_to_1_and_differ() -> None:
    found = metrics_of(smooth_totals(NUM).records)
    assert all(0 <= value <= 1 for value in found.values())
    assert len({round(value, 9) for value in found.values()}) == len(found)
