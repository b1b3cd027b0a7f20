"""The page of a report, without a browser: what it says, that it is safe, and that it is whole."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_cases import DrawnSource, drawn_judgement

from segtrain.evaluation.bootstrap import compare
from segtrain.evaluation.figures import FIGURES, image_ious
from segtrain.evaluation.judgement import Exam, Judgement, Manner, Subject
from segtrain.evaluation.report import plots
from segtrain.evaluation.report.page import render, write_report
from segtrain.evaluation.report.words import FIGURE_WORDS

NASTY = "</script><img src=x onerror=alert(1)>\"'&{{ 7*7 }}.jpg"
DASH = "\N{EN DASH}"
VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """What is in a page: tags with their attributes, text, and whether every tag is closed."""

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
def judgement() -> Judgement:
    return drawn_judgement(8)


@pytest.fixture(scope="module")
def page(judgement: Judgement) -> Page:
    return Page(render(judgement))


def embedded(html: str) -> dict[str, list[object]]:
    """What the gallery is told."""
    found = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', html, re.DOTALL)
    assert found is not None
    data: dict[str, list[object]] = json.loads(found[1])
    return data


# --- What it says -------------------------------------------------------------------------------


def test_headline_figures_and_trivial_answers_are_there(judgement: Judgement, page: Page) -> None:
    headline = judgement.figures["person_iou"]
    assert f"{100 * headline.value:.1f} %" in page.text
    assert f"{100 * headline.low:.1f}{DASH}{100 * headline.high:.1f} %" in page.text
    for name, interval in judgement.figures.items():
        if name not in ("all_person_iou", "all_background_iou"):
            label, meaning = FIGURE_WORDS[name]
            row = f"{label} {meaning} {100 * interval.value:.2f} {100 * interval.low:.2f}{DASH}"
            assert row in page.text
    for name in ("all person", "all background"):
        assert f"{100 * judgement.trivial[name]['person_iou'].value:.2f}" in page.text
    assert "a picture without a person in which none is seen has IoU 1" in page.text


def test_every_figure_has_words() -> None:
    assert FIGURE_WORDS.keys() | {"all_person_iou", "all_background_iou"} == FIGURES.keys()


def test_every_slice_is_there_and_empty_ones_say_so(judgement: Judgement, page: Page) -> None:
    assert any(part.num_images == 0 for part in judgement.slices)
    for part in judgement.slices:
        if part.num_images:
            iou = part.figures["person_iou"].value
            assert f"{part.name} {part.num_images} {100 * iou:.2f}" in page.text
        else:
            assert f"{part.name} 0 no pictures" in page.text


def test_the_gallery_is_told_each_picture(judgement: Judgement) -> None:
    told = embedded(render(judgement))
    records = judgement.totals.records
    assert told["name"] == list(judgement.image_ids)
    np.testing.assert_allclose(told["iou"], image_ious(records), atol=1e-6)
    for name, (truth, called) in {"missed": (1, 0), "invented": (0, 1)}.items():
        for at, record in enumerate(records):
            share = record["confusion"][truth, called] / (record["size"][0] * record["size"][1])
            assert told[name][at] == pytest.approx(share, abs=1e-6)
    groups = list(dict.fromkeys(part.group for part in judgement.slices))
    assert groups[1] == "people"
    assert told["parts"][1] == [min(people, 3) for people in records["num_people"].tolist()]
    for number, group in enumerate(groups):
        sizes = [part.num_images for part in judgement.slices if part.group == group]
        assert np.bincount(told["parts"][number], minlength=len(sizes)).tolist() == sizes


def test_provenance_and_warnings() -> None:
    exam = Exam(
        data=(Path("/data/here"),), split="train", manifest="f00d", num_damaged=1, num_trained_on=2
    )
    text = Page(
        render(
            drawn_judgement(
                3, exam=exam, manner=Manner(size=224, bn="batch", tta="flip", tile=512, limit=3)
            )
        )
    ).text
    assert "2 of 3 pictures were trained on" in text
    assert "1 picture left out, for it could not be read." in text
    for fact in (
        *("Checkpoint runs/people/checkpoints/best.pt", "Data /data/here", "Split train"),
        *("Selection f00d", "short side 224 pixels", "batch statistics", "512 pixels a side"),
        *("Test-time augmentation flip", "3 pictures, evenly spread", "unet on train"),
    ):
        assert fact in text
    assert "trained on" not in Page(render(drawn_judgement(1))).text


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (False, True, "Better than the other run by"),
        (True, False, "Worse than the other run by"),
        (True, True, "No better and no worse than the other run: 0.0 ± 0.0 points"),
    ],
)
def test_a_comparison_says_who_is_better(first: bool, second: bool, said: str) -> None:
    records = drawn_judgement(8).totals.records
    right = records.copy()
    right["confusion"][:, 1, 1] += right["confusion"][:, 1, 0]
    right["confusion"][:, 1, 0] = 0
    comparison = compare(right if first else records, (right if second else records)[1:])
    text = Page(render(drawn_judgement(8, comparison=comparison))).text
    assert said in text
    assert "Over the 7 pictures that both runs have judged. Left out: 1 only in the other" in text
    assert "Against another run" not in Page(render(drawn_judgement(2))).text


def test_masks_have_no_curves_over_thresholds() -> None:
    subject = Subject(kind="predictions", path=Path("masks"), model=None)
    hard, soft = (drawn_judgement(3, subject=subject, hard=hard) for hard in (True, False))
    assert [plot.title for plot in plots.plots_of(hard)] == ["Pictures by their IoU"]
    assert len(list(plots.plots_of(soft))) == 4
    text = Page(render(hard)).text
    assert "Every probability is 0 or 1" in text
    assert "masks on val" in text
    assert "these masks" in text


def test_of_no_pictures_there_is_a_page(tmp_path: Path) -> None:
    assert "0 pictures" in Page(write_report(tmp_path, drawn_judgement(0)).read_text()).text


# --- Plots --------------------------------------------------------------------------------------


def test_marks_lie_where_the_figures_are(judgement: Judgement) -> None:
    plot = plots.threshold_plot(judgement)
    best, used = plot.marks
    # Back from pixels of the canvas, on which 0..1 is 56..428 and 246..12.
    assert (used.x - 56) / 372 == pytest.approx(0.5, abs=1e-4)
    assert (246 - used.y) / 234 == pytest.approx(judgement.figures["person_iou"].value, abs=1e-4)
    assert (best.x - 56) / 372 == pytest.approx(judgement.curves.best[0], abs=1e-4)
    assert best.y <= used.y
    points = [tuple(map(float, point.split())) for point in plot.curves[1].path[1:].split(" L")]
    assert len(points) == 256
    assert points[128] == (used.x, used.y)
    everyone = judgement.trivial["all person"]["person_iou"].value
    assert (246 - points[0][1]) / 234 == pytest.approx(everyone, abs=1e-4)

    [mark] = plots.precision_recall_plot(judgement).marks
    assert (mark.x - 56) / 372 == pytest.approx(judgement.figures["recall"].value, abs=1e-4)
    assert (246 - mark.y) / 234 == pytest.approx(judgement.figures["precision"].value, abs=1e-4)


def test_bars_of_reliability_are_shares_and_points_the_means(judgement: Judgement) -> None:
    plot = plots.reliability_plot(judgement)
    shares = judgement.totals.histogram.sum(axis=0).reshape(16, 16).sum(axis=1)
    shares = shares[shares > 0] / shares.sum()
    np.testing.assert_allclose([box.height / 234 for box in plot.boxes], shares, atol=1e-4)
    ece = sum(
        share * abs((mark.x - 56) / 372 - (246 - mark.y) / 234)
        for share, mark in zip(shares, plot.marks, strict=True)
    )
    assert ece == pytest.approx(judgement.figures["ece"].value, abs=1e-4)


def test_every_picture_is_in_the_histogram_once(judgement: Judgement) -> None:
    plot = plots.histogram_plot(judgement)
    counts = [int(number) for _, number in plot.rows]
    assert sum(counts) == 8
    ious = image_ious(judgement.totals.records)
    assert counts[-1] == np.count_nonzero(ious >= 0.95)
    top = int(plot.y_ticks[-1].label)
    drawn = [round(box.height / 234 * top) for box in plot.boxes]
    assert drawn == [number for number in counts if number]


@given(st.integers(0, 10**7))
def test_the_axis_of_counts_ends_above_them_at_a_round_number(highest: int) -> None:
    top = plots._round_top(highest)
    assert highest <= top <= max(4, 2.5 * highest + 4)
    assert re.fullmatch(r"[125]0*", str(top // 4))
    assert top % 4 == 0


# --- Safe and whole -----------------------------------------------------------------------------


def test_no_name_can_break_out() -> None:
    names = [NASTY, "<!--<script>", "\u2028\u202e\x00", "ok"]
    subject = Subject(kind="checkpoint", path=Path(NASTY), model=NASTY)
    exam = Exam(
        data=(Path(NASTY), Path("/b")),
        split="val",
        manifest=NASTY,
        num_damaged=0,
        num_trained_on=0,
    )
    html = render(drawn_judgement(4, names=names, subject=subject, exam=exam))
    plain = render(drawn_judgement(4, names=["a", "b", "c", "d"]))

    assert embedded(html)["name"] == names
    # No tag more than in a page with harmless names, none of another kind, none with more to it.
    found, wanted = (
        [(tag, sorted(attrs)) for tag, attrs in Page(text).tags if tag != "dd" and tag != "div"]
        for text in (html, plain)
    )
    one_more_row = [entry for entry in wanted if entry not in found]
    assert one_more_row == []
    assert {entry[0] for entry in found} == {entry[0] for entry in wanted}
    assert "onerror" not in Page(html).attributes("onerror")
    assert "<img src=x" not in html
    assert "{{ 7*7 }}" in Page(html).text


def test_a_name_that_is_no_text_is_written_all_the_same(tmp_path: Path) -> None:
    exam = Exam(
        data=(Path("/data/\udcff"),), split="val", manifest="f", num_damaged=0, num_trained_on=0
    )
    path = write_report(tmp_path, drawn_judgement(1, names=["\udcfe"], exam=exam))
    assert "/data/?" in path.read_text(encoding="utf-8")


def test_the_same_judgement_gives_the_same_bytes(judgement: Judgement) -> None:
    assert render(drawn_judgement(8)) == render(judgement)
    assert render(replace(judgement, image_ids=["?"] * 8)) != render(judgement)


def test_nothing_is_fetched_from_anywhere(judgement: Judgement, page: Page) -> None:
    html = render(judgement)
    assert re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest|sendBeacon", html) is None
    assert page.attributes("src") == []
    assert all(link.startswith("#") or link == "data:," for link in page.attributes("href"))
    policy = next(attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "unsafe-inline" not in policy.partition("script-src")[2]


def test_labels_and_links_lead_somewhere(page: Page) -> None:
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


def test_the_source_of_the_drawn_pictures_has_their_sizes() -> None:
    records = drawn_judgement(3).totals.records
    assert records["size"].tolist() == [
        list(DrawnSource(3).sample(index).image.shape[:2]) for index in range(3)
    ]
