"""Subsets of the images for which metrics are reported separately."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from segtrain.evaluation.counts import Records
from segtrain.types import PERSON

Members = npt.NDArray[np.bool_]
"""N bool: whether an image belongs to a slice."""

_FRACTION_EDGES = (0, 2, 10, 20, 70)  # percent
_MAX_PEOPLE = 3


@dataclass(frozen=True)
class Slice:
    """Some of the records.

    group: the criterion; every image belongs to exactly one slice of a group.
    name: of the slice within its group.
    members: N bool.
    """

    group: str
    name: str
    members: Members


def build_slices(records: Records, source_names: Sequence[str]) -> list[Slice]:
    """All slices, also empty ones.

    Args:
        source_names: the names of the data sets, by their number.
    """
    return [
        Slice(group, name, members)
        for group, split in _GROUPS.items()
        for name, members in split(records).items()
    ] + [
        Slice("source", name, records["source"] == number)
        for number, name in enumerate(source_names)
    ]


def person_fractions(records: Records) -> npt.NDArray[np.float64]:
    """Fraction of the frame that is person in the ground truth, ignored pixels included."""
    return np.asarray(_person_pixels(records) / _frame_pixels(records))


def _by_person_fraction(records: Records) -> dict[str, Members]:
    """Slices include their lower edge, except that 70 % belongs to the slice below."""
    # Integer arithmetic, so that exactly 10 % is in the slice that begins there.
    person, frame = 100 * _person_pixels(records), _frame_pixels(records)
    above = [person >= edge * frame for edge in _FRACTION_EDGES[:-1]]
    above.append(person > _FRACTION_EDGES[-1] * frame)
    names = ["<2 %", "2-10 %", "10-20 %", "20-70 %", ">70 %"]
    above_next = [*above[1:], np.zeros(len(records), dtype=bool)]
    return {name: low & ~high for name, low, high in zip(names, above, above_next, strict=True)}


def _by_people(records: Records) -> dict[str, Members]:
    people = np.minimum(records["num_people"], _MAX_PEOPLE)
    names = [*map(str, range(_MAX_PEOPLE)), f"{_MAX_PEOPLE}+"]
    return {name: people == number for number, name in enumerate(names)}


def _yes_no(field: str) -> Callable[[Records], dict[str, Members]]:
    return lambda records: {"yes": records[field], "no": ~records[field]}


def _person_pixels(records: Records) -> npt.NDArray[np.int64]:
    return np.asarray(records["confusion"][:, PERSON].sum(axis=1))


def _frame_pixels(records: Records) -> npt.NDArray[np.int64]:
    return np.asarray(records["size"].astype(np.int64).prod(axis=1))


_GROUPS: dict[str, Callable[[Records], dict[str, Members]]] = {
    "share of frame": _by_person_fraction,
    "people": _by_people,
    "touches frame": _yes_no("touches_frame"),
    "crowd": _yes_no("has_crowd"),
}
