"""The rows of the tables of a report."""

from collections.abc import Iterator
from dataclasses import dataclass

from segtrain.evaluation.bootstrap import Comparison, Interval
from segtrain.evaluation.judgement import Judgement, SliceFigures
from segtrain.evaluation.report.words import FIGURE_WORDS, TRIVIAL_WORDS, percent, span

SLICE_FIGURES = ("image_iou", "precision", "recall", "boundary_iou")
"""What a slice shows beside the headline."""

# Those of the trivial answers, which have columns of their own.
_ELSEWHERE = {"all_person_iou", "all_background_iou"}


@dataclass(frozen=True, kw_only=True)
class FigureRow:
    """One figure: of the subject, and of each trivial answer, "" where that has none."""

    name: str
    meaning: str
    value: str
    span: str
    trivial: list[str]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A figure to look at, in 0..1."""

    name: str
    meaning: str
    interval: Interval


@dataclass(frozen=True, kw_only=True)
class SliceGroup:
    """The parts that pictures are parted into by one criterion; `number` as in the gallery."""

    number: int
    name: str
    parts: list[SliceFigures]


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One figure of two runs."""

    name: str
    first: str
    second: str
    difference: str
    span: str
    certain: bool


def figure_name(figure: str) -> str:
    """A figure that nobody has found words for goes by its own name."""
    return FIGURE_WORDS.get(figure, (figure.replace("_", " "), ""))[0]


def trivial_names(judgement: Judgement) -> list[str]:
    """The trivial answers at hand, the strongest kind first."""
    known = [name for name in TRIVIAL_WORDS if name in judgement.trivial]
    return known + [name for name in judgement.trivial if name not in known]


def headline_bars(judgement: Judgement) -> Iterator[Bar]:
    """The headline, and what the trivial answers would have got."""
    subject = "these masks" if judgement.subject.kind == "predictions" else "this network"
    yield Bar(name=subject, meaning="", interval=judgement.figures["person_iou"])
    for name in trivial_names(judgement):
        interval = judgement.trivial[name]["person_iou"]
        yield Bar(name=name, meaning=TRIVIAL_WORDS.get(name, ""), interval=interval)


def figure_rows(judgement: Judgement) -> Iterator[FigureRow]:
    """Every figure of the judgement, in its order."""
    trivial = [judgement.trivial[name] for name in trivial_names(judgement)]
    for figure, interval in judgement.figures.items():
        if figure in _ELSEWHERE:
            continue
        yield FigureRow(
            name=figure_name(figure),
            meaning=FIGURE_WORDS.get(figure, ("", ""))[1],
            value=percent(interval.value),
            span=span(interval),
            trivial=[percent(got[figure].value) if figure in got else "" for got in trivial],
        )


def slice_groups(judgement: Judgement) -> list[SliceGroup]:
    """The slices of a judgement, group by group, in its order."""
    return [
        SliceGroup(number=number, name=name, parts=parts)
        for number, (name, parts) in enumerate(judgement.slice_groups.items())
    ]


def comparison_rows(comparison: Comparison) -> Iterator[ComparisonRow]:
    """The other run, this one, and the difference."""
    for figure, difference in comparison.differences.items():
        if figure in _ELSEWHERE:
            continue
        plus = "+" if difference.value > 0 else ""
        yield ComparisonRow(
            name=figure_name(figure),
            first=percent(comparison.first[figure]),
            second=percent(comparison.second[figure]),
            difference=f"{plus}{percent(difference.value)} ± {percent(difference.half_width)}",
            span=span(difference),
            certain=not difference.low <= 0 <= difference.high,
        )
