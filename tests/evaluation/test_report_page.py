"""The page of a report, without a browser: its content, plots, and safety."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers.report import NoiseDataset, smooth_result
from hypothesis import given
from hypothesis import strategies as st

from segtrain.evaluation.bootstrap import compare
from segtrain.evaluation.metrics import METRICS, image_ious
from segtrain.evaluation.options import EvalOptions
from segtrain.evaluation.report import plots
from segtrain.evaluation.report.format import METRIC_LABELS
from segtrain.evaluation.report.page import render, write_report
from segtrain.evaluation.result import EvalData, EvalResult, ModelInfo
from segtrain.inference.options import InferenceOptions

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&{{ 7*7 }}.jpg"
DASH = "\N{EN DASH}"
VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text; checks that every tag is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.tags if name in attrs]


@pytest.fixture(scope="module")
def result() -> EvalResult:
    return smooth_result(8)


@pytest.fixture(scope="module")
def page(result: EvalResult) -> Page:
    return Page(render(result))


def gallery_data(html: str) -> dict[str, list[object]]:
    """The embedded JSON of the gallery."""
    found = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', html, re.DOTALL)
    assert found is not None
    data: dict[str, list[object]] = json.loads(found[1])
    return data


# --- Content --------------------------------------------------------------------------------------


def test_headline_metrics_and_baselines_are_shown(result: EvalResult, page: Page) -> None:
    headline = result.metrics["person_iou"]
    assert f"{100 * headline.value:.1f} %" in page.text
    assert f"{100 * headline.low:.1f}{DASH}{100 * headline.high:.1f} %" in page.text
    for name, interval in result.metrics.items():
        if name not in ("all_person_iou", "all_background_iou"):
            label, meaning = METRIC_LABELS[name]
            row = f"{label} {meaning} {100 * interval.value:.2f} {100 * interval.low:.2f}{DASH}"
            assert row in page.text
    for name in ("all person", "all background"):
        assert f"{100 * result.baselines[name]['person_iou'].value:.2f}" in page.text
    assert "an image without people has IoU 1 if no pixel is predicted as person" in page.text


def test_every_metric_has_a_label() -> None:
    assert METRIC_LABELS.keys() | {"all_person_iou", "all_background_iou"} == METRICS.keys()


def test_every_slice_is_shown_also_empty_ones(result: EvalResult, page: Page) -> None:
    assert any(part.num_images == 0 for part in result.slices)
    for part in result.slices:
        if part.num_images:
            iou = part.metrics["person_iou"].value
            assert f"{part.name} {part.num_images} {100 * iou:.2f}" in page.text
        else:
            assert f"{part.name} 0 no images" in page.text


def test_the_gallery_data_lists_every_image(result: EvalResult) -> None:
    data = gallery_data(render(result))
    records = result.totals.records
    assert data["name"] == list(result.image_ids)
    np.testing.assert_allclose(data["iou"], image_ious(records), atol=1e-6)
    for name, cell in {"false_negatives": (1, 0), "false_positives": (0, 1)}.items():
        for at, record in enumerate(records):
            fraction = record["confusion"][cell] / record["size"].prod()
            assert data[name][at] == pytest.approx(fraction, abs=1e-6)
    groups = list(dict.fromkeys(part.group for part in result.slices))
    assert groups[1] == "people"
    assert data["slices"][1] == [min(people, 3) for people in records["num_people"].tolist()]
    for number, group in enumerate(groups):
        sizes = [part.num_images for part in result.slices if part.group == group]
        assert np.bincount(data["slices"][number], minlength=len(sizes)).tolist() == sizes


def test_provenance_and_warnings() -> None:
    data = EvalData(
        roots=(Path("/data/here"),), split="train", manifest="f00d", num_damaged=1, num_trained_on=2
    )
    inference = InferenceOptions(size=224, bn="batch", tta="flip", tile=512)
    options = EvalOptions(inference=inference, limit=3)
    text = Page(render(smooth_result(3, data=data, options=options))).text
    assert "2 of 3 images were trained on" in text
    assert "1 image left out because of read errors." in text
    for fact in (
        *("Checkpoint runs/people/checkpoints/best.pt", "Data /data/here", "Split train"),
        *("Selection f00d", "short side 224 pixels", "batch statistics", "512 x 512 pixels"),
        *("Test-time augmentation flip", "3 images, evenly spaced", "unet on train"),
    ):
        assert fact in text
    assert "trained on" not in Page(render(smooth_result(1))).text


@pytest.mark.parametrize(
    ("first_better", "second_better", "expected"),
    [
        (False, True, "Better than the other run by"),
        (True, False, "Worse than the other run by"),
        (True, True, "No significant difference from the other run: 0.0 ± 0.0 points"),
    ],
)
def test_a_comparison_states_which_run_is_better(
    first_better: bool, second_better: bool, expected: str
) -> None:
    records = smooth_result(8).totals.records
    better = records.copy()
    better["confusion"][:, 1, 1] += better["confusion"][:, 1, 0]
    better["confusion"][:, 1, 0] = 0
    comparison = compare(
        better if first_better else records, (better if second_better else records)[1:]
    )
    text = Page(render(smooth_result(8, comparison=comparison))).text
    assert expected in text
    assert "Over the 7 images of both runs. Left out: 1 only in the other" in text
    assert "Comparison with another run" not in Page(render(smooth_result(2))).text


def test_binary_masks_have_no_threshold_curves() -> None:
    model_info = ModelInfo(kind="predictions", path=Path("masks"), model=None)
    binary, soft = (
        smooth_result(3, model_info=model_info, binary=binary) for binary in (True, False)
    )
    assert [plot.title for plot in plots.build_plots(binary)] == ["Images by person IoU"]
    assert len(list(plots.build_plots(soft))) == 4
    text = Page(render(binary)).text
    assert "Every probability is 0 or 1" in text
    assert "masks on val" in text
    assert "these masks" in text


def test_a_page_without_images(tmp_path: Path) -> None:
    assert "0 images" in Page(write_report(tmp_path, smooth_result(0)).read_text()).text


# --- Plots ----------------------------------------------------------------------------------------


def test_markers_are_at_the_metrics(result: EvalResult) -> None:
    plot = plots.threshold_plot(result)
    best, used = plot.markers
    # Convert pixels of the canvas back: 0..1 is drawn at x = 56..428 and y = 246..12.
    assert (used.x - 56) / 372 == pytest.approx(0.5, abs=1e-4)
    assert (246 - used.y) / 234 == pytest.approx(result.metrics["person_iou"].value, abs=1e-4)
    assert (best.x - 56) / 372 == pytest.approx(result.curves.best[0], abs=1e-4)
    assert best.y <= used.y
    points = [tuple(map(float, point.split())) for point in plot.curves[1].path[1:].split(" L")]
    assert len(points) == 256
    assert points[128] == (used.x, used.y)
    all_person_iou = result.baselines["all person"]["person_iou"].value
    assert (246 - points[0][1]) / 234 == pytest.approx(all_person_iou, abs=1e-4)

    [marker] = plots.precision_recall_plot(result).markers
    assert (marker.x - 56) / 372 == pytest.approx(result.metrics["recall"].value, abs=1e-4)
    assert (246 - marker.y) / 234 == pytest.approx(result.metrics["precision"].value, abs=1e-4)


def test_reliability_bars_and_points_match_the_histogram(result: EvalResult) -> None:
    plot = plots.reliability_plot(result)
    fractions = result.totals.histogram.sum(axis=0).reshape(16, 16).sum(axis=1)
    fractions = fractions[fractions > 0] / fractions.sum()
    np.testing.assert_allclose([bar.height / 234 for bar in plot.bars], fractions, atol=1e-4)
    ece = sum(
        fraction * abs((marker.x - 56) / 372 - (246 - marker.y) / 234)
        for fraction, marker in zip(fractions, plot.markers, strict=True)
    )
    assert ece == pytest.approx(result.metrics["ece"].value, abs=1e-4)


def test_the_histogram_counts_every_image_once(result: EvalResult) -> None:
    plot = plots.histogram_plot(result)
    counts = [int(number) for _, number in plot.rows]
    assert sum(counts) == 8
    ious = image_ious(result.totals.records)
    assert counts[-1] == np.count_nonzero(ious >= 0.95)
    top = int(plot.y_ticks[-1].label)
    drawn = [round(bar.height / 234 * top) for bar in plot.bars]
    assert drawn == [number for number in counts if number]


@given(st.integers(0, 10**7))
def test_the_axis_of_counts_ends_at_a_round_number_above_them(highest: int) -> None:
    top = plots._axis_top(highest)
    assert highest <= top <= max(4, 2.5 * highest + 4)
    assert re.fullmatch(r"[125]0*", str(top // 4))
    assert top % 4 == 0


# --- Safety and validity --------------------------------------------------------------------------


def test_no_name_can_inject_html() -> None:
    names = [HOSTILE, "<!--<script>", "\u2028\u202e\x00", "ok"]
    model_info = ModelInfo(kind="checkpoint", path=Path(HOSTILE), model=HOSTILE)
    data = EvalData(
        roots=(Path(HOSTILE), Path("/b")),
        split="val",
        manifest=HOSTILE,
        num_damaged=0,
        num_trained_on=0,
    )
    html = render(smooth_result(4, names=names, model_info=model_info, data=data))
    plain = render(smooth_result(4, names=["a", "b", "c", "d"]))

    assert gallery_data(html)["name"] == names
    # The same kinds of tags with the same attributes as in a page with harmless names.
    found, expected = (
        [(tag, sorted(attrs)) for tag, attrs in Page(text).tags if tag != "dd" and tag != "div"]
        for text in (html, plain)
    )
    assert [entry for entry in expected if entry not in found] == []
    assert {tag for tag, _ in found} == {tag for tag, _ in expected}
    assert "onerror" not in Page(html).attributes("onerror")
    assert "<img src=x" not in html
    assert "{{ 7*7 }}" in Page(html).text


def test_a_name_that_is_not_valid_text_is_replaced(tmp_path: Path) -> None:
    data = EvalData(
        roots=(Path("/data/\udcff"),), split="val", manifest="f", num_damaged=0, num_trained_on=0
    )
    path = write_report(tmp_path, smooth_result(1, names=["\udcfe"], data=data))
    assert "/data/?" in path.read_text(encoding="utf-8")


def test_equal_results_give_the_same_bytes(result: EvalResult) -> None:
    assert render(smooth_result(8)) == render(result)
    assert render(replace(result, image_ids=["?"] * 8)) != render(result)


def test_the_page_fetches_nothing(result: EvalResult, page: Page) -> None:
    html = render(result)
    assert re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest|sendBeacon", html) is None
    assert page.attributes("src") == []
    assert all(link.startswith("#") or link == "data:," for link in page.attributes("href"))
    policy = next(attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "unsafe-inline" not in policy.partition("script-src")[2]


def test_labels_and_links_have_targets(page: Page) -> None:
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    for link in page.attributes("href"):
        assert link == "data:," or link[1:] in ids
    for reference in page.attributes("aria-labelledby"):
        assert reference in ids
    assert all("alt" in attrs for tag, attrs in page.tags if tag == "img")
    for tag, attrs in page.tags:
        if tag == "svg":
            assert attrs.get("aria-label") or attrs.get("aria-hidden") == "true"
    assert page.tags[0] == ("html", {"lang": "en"})


def test_the_noise_dataset_has_the_sizes_of_the_result() -> None:
    records = smooth_result(3).totals.records
    assert records["size"].tolist() == [
        list(NoiseDataset(3).sample(index).image.shape[:2]) for index in range(3)
    ]
