"""Kinds of pictures that a network may be good or bad at."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from segtrain.classes import PERSON
from segtrain.evaluation.records import Records

Members = npt.NDArray[np.bool_]

_SHARE_EDGES = (0, 2, 10, 20, 70)
_MOST_PEOPLE = 3


@dataclass(frozen=True)
class Slice:
    """Some of the records.

    group: what the pictures are parted by; the slices of a group have no picture in common, and
        together all.
    name: which part this is.
    members: N bool.
    """

    group: str
    name: str
    members: Members


def slices_of(records: Records, source_names: Sequence[str]) -> list[Slice]:
    """All slices, also those that are empty.

    Args:
        source_names: of each data set, by its number.
    """
    return [
        Slice(group, name, members)
        for group, parts in _GROUPS.items()
        for name, members in parts(records).items()
    ] + [
        Slice("source", name, records["source"] == number)
        for number, name in enumerate(source_names)
    ]


def person_shares(records: Records) -> npt.NDArray[np.float64]:
    """Share of the frame, ignored pixels included, that is person in the truth."""
    return np.asarray(_person_pixels(records) / _frame_pixels(records))


def _by_share(records: Records) -> dict[str, Members]:
    """Lower edges belong to a part; 70 % does not belong to the last one."""
    # In whole numbers, so that 10 % is in the part that begins with it.
    person, frame = 100 * _person_pixels(records), _frame_pixels(records)
    at_least = [person >= edge * frame for edge in _SHARE_EDGES[:-1]]
    at_least.append(person > _SHARE_EDGES[-1] * frame)
    names = ["<2 %", "2-10 %", "10-20 %", "20-70 %", ">70 %"]
    beyond = [*at_least[1:], np.zeros(len(records), dtype=bool)]
    return {n: low & ~high for n, low, high in zip(names, at_least, beyond, strict=True)}


def _by_people(records: Records) -> dict[str, Members]:
    people = np.minimum(records["num_people"], _MOST_PEOPLE)
    names = [*map(str, range(_MOST_PEOPLE)), f"{_MOST_PEOPLE}+"]
    return {name: people == number for number, name in enumerate(names)}


def _yes_no(field: str) -> Callable[[Records], dict[str, Members]]:
    return lambda records: {"yes": records[field], "no": ~records[field]}


def _person_pixels(records: Records) -> npt.NDArray[np.int64]:
    return np.asarray(records["confusion"][:, PERSON].sum(axis=1))


def _frame_pixels(records: Records) -> npt.NDArray[np.int64]:
    return np.asarray(records["size"].astype(np.int64).prod(axis=1))


_GROUPS: dict[str, Callable[[Records], dict[str, Members]]] = {
    "share of frame": _by_share,
    "people": _by_people,
    "touches frame": _yes_no("touches_frame"),
    "crowd": _yes_no("has_crowd"),
}
