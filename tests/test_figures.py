"""Figures and curves against hand-made counts, the formulas in use before, and torchmetrics."""

import numpy as np
import pytest
import torch
from evaluation_cases import smooth_case, tally_of, totals_of
from torch import Tensor
from torchmetrics import classification as tm

from segtrain.evaluation.curves import curves_of
from segtrain.evaluation.figures import (
    CONFUSION_FIGURES,
    FIGURES,
    as_if_all,
    columns_of,
    figures_of,
    image_ious,
    reliability,
    sums_of,
)
from segtrain.evaluation.metrics import metrics_from_counts
from segtrain.evaluation.picture import Probs, count_picture
from segtrain.evaluation.records import Records
from segtrain.evaluation.totals import Totals
from segtrain.images import Pixels

NUM = 6


def figures(records: Records) -> dict[str, float]:
    return figures_of(sums_of(columns_of(records)))


def totals_of_pictures(*pictures: tuple[Probs, Pixels]) -> Totals:
    tally = tally_of(len(pictures))
    for index, picture in enumerate(pictures):
        tally.add(index, count_picture(*picture))
    return tally.totals()


def known_pixels() -> tuple[Tensor, Tensor]:
    """Probabilities and truth of all pictures, one long row without the ignored ones."""
    cases = [smooth_case(seed) for seed in range(NUM)]
    probs = np.concatenate([probs[mask != 255] for probs, mask in cases])
    truth = np.concatenate([mask[mask != 255] for _, mask in cases])
    return torch.from_numpy(probs), torch.from_numpy(truth).long()


# --- Against others -----------------------------------------------------------------------------


def test_figures_of_pixels_agree_with_torchmetrics() -> None:
    probs, truth = known_pixels()
    ours = figures(totals_of(NUM).records)
    theirs = {
        "person_iou": tm.BinaryJaccardIndex(),
        "dice": tm.BinaryF1Score(),
        "precision": tm.BinaryPrecision(),
        "recall": tm.BinaryRecall(),
        "pixel_accuracy": tm.BinaryAccuracy(),
        "mean_iou": tm.MulticlassJaccardIndex(num_classes=2, average="macro"),
    }
    # Where a probability equals the threshold, ours is person and theirs not; none does here.
    assert not (probs == 0.5).any()
    for name, metric in theirs.items():
        predicted = (probs >= 0.5).long()
        assert ours[name] == pytest.approx(metric(predicted, truth).item(), abs=1e-6), name


def test_calibration_error_agrees_with_torchmetrics_and_with_sums_of_pixels() -> None:
    probs, truth = known_pixels()
    assert probs.max() < 1  # for which theirs has a bin of its own
    ours = figures(totals_of(NUM).records)["ece"]
    theirs = tm.BinaryCalibrationError(n_bins=16, norm="l1")(probs, truth).item()
    assert ours == pytest.approx(theirs, abs=1e-6)

    exact, person = probs.double().numpy(), truth.numpy()
    bins = (exact * 16).astype(int)
    distances = [abs((exact - person)[bins == number].sum()) for number in range(16)]
    assert ours == pytest.approx(sum(distances) / len(exact), abs=1e-7)
    assert ours > 0.05  # something is there to be measured


def test_curves_agree_with_torchmetrics() -> None:
    probs, truth = known_pixels()
    ours = curves_of(totals_of(NUM).histogram)
    thresholds = torch.arange(256) / 256
    precision, recall, _ = tm.BinaryPrecisionRecallCurve(thresholds=thresholds)(probs, truth)
    called = np.array([(probs >= t).any().item() for t in thresholds])
    np.testing.assert_allclose(ours.recall, recall[:-1], atol=1e-6)
    # Where nothing is called person theirs is 0.
    np.testing.assert_allclose(ours.precision[called], precision[:-1][called], atol=1e-6)
    assert (ours.precision[~called] == 1).all()
    average = tm.BinaryAveragePrecision(thresholds=thresholds)(probs, truth).item()
    assert ours.average_precision == pytest.approx(average, abs=1e-6)
    ious = [tm.BinaryJaccardIndex()((probs >= t).long(), truth).item() for t in thresholds]
    np.testing.assert_allclose(ours.person_iou, ious, atol=1e-6)
    assert ours.best == pytest.approx((int(np.argmax(ious)) / 256, max(ious)), abs=1e-6)


def test_average_precision_of_bins_is_close_to_that_of_all_thresholds() -> None:
    """Not the same: what is surer than 255/256 is not told apart."""
    probs, truth = known_pixels()
    exact = tm.BinaryAveragePrecision(thresholds=None)(probs, truth).item()
    assert curves_of(totals_of(NUM).histogram).average_precision == pytest.approx(exact, abs=5e-3)


def test_the_formulas_of_validation_give_the_same() -> None:
    records = totals_of(NUM).records
    before = vars(metrics_from_counts(records["confusion"].sum(axis=0).tolist()))
    ours = figures(records)
    assert {name: ours[name] for name in before} == pytest.approx(before, abs=1e-12)


# --- By hand ------------------------------------------------------------------------------------


def row(*values: float) -> Probs:
    return np.array([values], dtype=np.float32)


def truth(*values: int) -> Pixels:
    return np.array([values], dtype=np.uint8)


def test_means_over_images_weigh_all_images_alike_and_count_nobody_as_one() -> None:
    totals = totals_of_pictures(
        (row(1, 1, 0, 0), truth(1, 1, 1, 1)),  # 1/2
        (row(0, 0, 0, 0, 0, 0), truth(0, 0, 0, 0, 0, 0)),  # nobody, and none predicted: 1
        (row(1, 0), truth(0, 0)),  # invented: 0
        (row(1, 0), truth(255, 255)),  # nothing to judge: 1
        (row(0, 0, 0), truth(0, 1, 1)),  # missed: 0
    )
    assert image_ious(totals.records).tolist() == [0.5, 1, 0, 1, 0]
    found = figures(totals.records)
    assert found["image_iou"] == pytest.approx((0.5 + 1 + 0 + 1 + 0) / 5, abs=1e-9)
    assert found["person_iou"] == 2 / 7
    assert found["precision"] == 2 / 3
    assert found["recall"] == 2 / 6
    assert found["all_person_iou"] == 6 / 15
    assert found["all_background_iou"] == 0


def test_means_over_images_of_boundaries_are_those_of_the_quotients() -> None:
    records = totals_of(NUM).records
    found = figures(records)
    ious = records["boundary"][:, 0] / records["boundary"][:, 1]
    assert found["image_boundary_iou"] == pytest.approx(ious.mean(), abs=1e-8)
    assert (
        found["boundary_iou"] == records["boundary"][:, 0].sum() / records["boundary"][:, 1].sum()
    )
    matched, of, met, there = records["contour"].T
    f1 = 2 * (matched / of) * (met / there) / (matched / of + met / there)
    assert found["image_boundary_f1"] == pytest.approx(f1.mean(), abs=1e-8)
    p, r = matched.sum() / of.sum(), met.sum() / there.sum()
    assert found["boundary_f1"] == pytest.approx(2 * p * r / (p + r), abs=1e-12)
    assert (found["boundary_precision"], found["boundary_recall"]) == (p, r)
    assert 0 < found["boundary_f1"] < 1


def test_calibration_error_by_hand() -> None:
    """Four pixels at 0.75, of which three are person, are calibrated; two at 0.25 are not."""
    totals = totals_of_pictures(
        (row(0.75, 0.75, 0.75, 0.75), truth(1, 1, 1, 0)), (row(0.25, 0.25, 0.9), truth(1, 1, 255))
    )
    assert figures(totals.records)["ece"] == pytest.approx(2 / 6 * 0.75, abs=1e-12)
    share, mean, person = reliability(sums_of(columns_of(totals.records)))
    assert share[[4, 12]].tolist() == [2 / 6, 4 / 6]
    assert mean[[4, 12]].tolist() == [0.25, 0.75]
    assert person[[4, 12]].tolist() == [1, 0.75]
    assert share.sum() == 1
    assert mean[0] == person[0] == 1 / 32  # an empty bin


def test_curves_by_hand() -> None:
    totals = totals_of_pictures((row(0.125, 0.5, 0.5, 0.875), truth(0, 1, 0, 1)))
    curves = curves_of(totals.histogram)
    assert curves.thresholds[[0, 32, 33, 128, 129, 224, 225]].tolist() == pytest.approx(
        [0, 0.125, 33 / 256, 0.5, 129 / 256, 0.875, 225 / 256]
    )
    at = [0, 32, 33, 128, 129, 224, 225]
    assert curves.precision[at].tolist() == [2 / 4, 2 / 4, 2 / 3, 2 / 3, 1, 1, 1]
    assert curves.recall[at].tolist() == [1, 1, 1, 1, 0.5, 0.5, 0]
    assert curves.person_iou[at].tolist() == [2 / 4, 2 / 4, 2 / 3, 2 / 3, 1 / 2, 1 / 2, 0]
    assert curves.average_precision == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert curves.best == (81 / 256, 2 / 3)  # the middle of 33..128


@pytest.mark.parametrize("probs", [row(0, 0), row(1, 1), row(0.5, 0.2)])
def test_curves_where_nobody_is_to_be_found(probs: Probs) -> None:
    curves = curves_of(totals_of_pictures((probs, truth(0, 0))).histogram)
    assert curves.average_precision == 1
    assert (curves.recall == 1).all()


def test_figures_of_nothing_are_those_of_the_empty_rule() -> None:
    empty = figures(totals_of(NUM, []).records)
    zeros = {"predicted_share", "ece"}
    assert empty == {name: 0.0 if name in zeros else 1.0 for name in FIGURES}


@pytest.mark.parametrize(("answer", "prob"), [(0, 0.0), (1, 1.0)], ids=["background", "person"])
def test_trivial_answers_get_what_that_prediction_would_get(answer: int, prob: float) -> None:
    masks = [smooth_case(seed)[1] for seed in range(NUM)] + [truth(0, 0), truth(255)]
    pictures = [(np.full(mask.shape, 1 - prob, dtype=np.float32), mask) for mask in masks]
    answered = [(np.full(mask.shape, prob, dtype=np.float32), mask) for mask in masks]
    trivial = as_if_all(answer, totals_of_pictures(*pictures).records)
    expected = figures(totals_of_pictures(*answered).records)
    found = figures(trivial)
    for name in CONFUSION_FIGURES:
        assert found[name] == expected[name], name
    name = "all_person_iou" if answer else "all_background_iou"
    assert found["person_iou"] == found[name]


def test_all_figures_are_in_zero_to_one_and_differ() -> None:
    found = figures(totals_of(NUM).records)
    assert all(0 <= value <= 1 for value in found.values())
    assert len({round(value, 9) for value in found.values()}) == len(found)
