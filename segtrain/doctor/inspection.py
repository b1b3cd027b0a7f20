"""Opens the data as training would, and looks at its pictures."""

import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from segtrain.classes import IGNORE, PERSON
from segtrain.config import DataConfig
from segtrain.data import Pictures, data_roots, kind_of, label_rules, open_dataset
from segtrain.data.sample import Source
from segtrain.data.selection import Indices, select
from segtrain.data.threads import in_threads
from segtrain.doctor.duplicates import Fingerprint, fingerprint
from segtrain.doctor.findings import Finding
from segtrain.errors import DataError
from segtrain.images import decoding

SPLITS = ("train", "val")
MOST_LOOKS = 2000

# A large JPEG decodes several times as fast at this size, and a mask shows all it is asked for.
SHORT_SIDE = 128
_SECONDS_A_SPLIT = 20.0


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one picture and its mask are like.

    person, ignored: shares of the frame. border: share of the outermost pixels that is person.
    orientation: EXIF's, 1 where there is none.
    """

    index: int
    person: float
    ignored: float
    border: float
    orientation: int
    print: Fingerprint


@dataclass(frozen=True, kw_only=True)
class Part:
    """One data set's share of a split."""

    root: Path
    kind: str
    num_pictures: int
    num_selected: int


@dataclass(frozen=True, kw_only=True)
class Split:
    """The pictures of one split that training would take.

    damaged: index → message. num_wanted: how many pictures it was about to look at.
    """

    name: str
    parts: list[Part]
    pictures: Pictures
    looks: list[Look] = field(default_factory=list)
    damaged: dict[int, str] = field(default_factory=dict)
    num_wanted: int = 0
    seconds: float = 0.0

    @property
    def num_looked(self) -> int:
        return len(self.looks) + len(self.damaged)

    def name_of(self, index: int) -> str:
        """The picture's path below its data set."""
        part = self._part(index)
        path = self.pictures.picture_path(index)
        return str(path.relative_to(part.root)) if path.is_relative_to(part.root) else str(path)

    def kind(self, index: int) -> str:
        """The kind of data set the picture belongs to."""
        return self._part(index).kind

    def _part(self, index: int) -> Part:
        return self.parts[int(np.searchsorted(self.pictures.ends, index, side="right"))]


def open_split(config: DataConfig, name: str) -> tuple[Split | None, list[Finding]]:
    """What training would open, and what keeps it from that; never raises DataError."""
    rules = label_rules(config)
    findings: list[Finding] = []
    parts: list[Part] = []
    sources: list[tuple[Source, Indices]] = []
    for root in data_roots(config):
        try:
            kind = kind_of(root)
            source = open_dataset(root, name, rules)
        except DataError as error:
            message, _, remedy = str(error).partition("; ")
            findings.append(Finding(level="error", check="opening", message=message, remedy=remedy))
            continue
        chosen = select(source.catalog, config)
        if not len(chosen):
            findings.append(
                Finding(
                    level="error",
                    check="selection",
                    message=f"none of the {len(source)} {name} pictures in {root} is selected",
                    remedy="widen data.person_area, data.max_people or data.negatives",
                )
            )
            continue
        sources.append((source, chosen))
        parts.append(Part(root=root, kind=kind, num_pictures=len(source), num_selected=len(chosen)))
    if not sources:
        return None, findings
    return Split(name=name, parts=parts, pictures=Pictures(sources, rules)), findings


def look_at(split: Split) -> Split:
    """The split with its looks: at most `MOST_LOOKS` pictures, as many as time allows."""
    chosen = _spread(len(split.pictures))
    started = time.perf_counter()
    looks: list[Look] = []
    damaged: dict[int, str] = {}
    with closing(
        in_threads(lambda i: _look(split, i), chosen, desc=f"looking at {split.name}")
    ) as results:
        for index, look in results:
            if isinstance(look, Look):
                looks.append(look)
            else:
                damaged[index] = look
            if time.perf_counter() - started > _SECONDS_A_SPLIT:
                break
    return Split(
        name=split.name,
        parts=split.parts,
        pictures=split.pictures,
        looks=sorted(looks, key=lambda look: look.index),
        damaged=dict(sorted(damaged.items())),
        num_wanted=len(chosen),
        seconds=time.perf_counter() - started,
    )


def _spread(num_pictures: int) -> list[int]:
    """Evenly chosen, in random order: whenever time is up, those seen are spread over all."""
    even = np.linspace(0, num_pictures - 1, min(MOST_LOOKS, num_pictures)).round().astype(int)
    return np.random.default_rng(0).permutation(even).tolist()  # type: ignore[no-any-return]


def _look(split: Split, index: int) -> Look | str:
    """What the picture is like, or why it cannot be used."""
    try:
        sample = split.pictures.sample(index, SHORT_SIDE)
        orientation = _orientation(split.pictures.picture_path(index))
    except DataError as error:
        return str(error)
    person = sample.mask == PERSON
    return Look(
        index=index,
        person=float(person.mean()),
        ignored=float((sample.mask == IGNORE).mean()),
        border=float(_border(person).mean()),
        orientation=orientation,
        print=fingerprint(sample.image),
    )


def _orientation(path: Path) -> int:
    """EXIF's, 1..8; 1 where it is missing or nonsense."""
    with decoding(path), Image.open(path) as picture:
        value = picture.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in range(1, 9) else 1


def _border(person: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The outermost pixels of H W, corners twice."""
    return np.concatenate([person[0], person[-1], person[:, 0], person[:, -1]])
