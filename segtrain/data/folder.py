"""Folders of masks: `images/` and `masks/`, a mask for each picture of the same name."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from segtrain.classes import PERSON
from segtrain.cores import usable_cores
from segtrain.data.cache import Arrays, cached_arrays
from segtrain.data.folder_layout import Pair, find_pairs, is_folder, read_manifest
from segtrain.data.mask_files import (
    CODING_NAMES,
    Facts,
    Kind,
    coding_of,
    facts_of,
    ignores_255,
    inverted,
    load_mask,
    meaning,
    obey,
    people_in,
)
from segtrain.data.sample import Catalog, LabelRules, Sample, identity, tolerated
from segtrain.errors import DataError
from segtrain.images import FORMATS, decoding, read_sized_image, resize_image, scaled_size
from segtrain.progress import progress_bar

__all__ = ["FolderPeople", "is_folder"]

SCAN_VERSION = 1

_FINE, _OTHER_SIZE, _DAMAGED, _PHOTO = range(4)
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
_PROBLEMS = {
    _OTHER_SIZE: "mask has another size than its picture",
    _DAMAGED: "picture or mask damaged",
    _PHOTO: "mask is a photo",
}
_AT_ONCE = 2000

Mask = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Scan:
    """What a look at every pair has found; arrays of a row a pair.

    status: _FINE or what is wrong. sizes: N 2, height and width of the sample. upright: whether the
    picture has to be turned as its EXIF orientation says. The others are those of `Facts`.
    """

    status: npt.NDArray[np.uint8]
    sizes: npt.NDArray[np.int32]
    upright: npt.NDArray[np.bool_]
    kind: npt.NDArray[np.uint8]
    present: npt.NDArray[np.bool_]
    extremes: npt.NDArray[np.float32]
    border: npt.NDArray[np.float32]
    middle: npt.NDArray[np.float32]

    def facts(self, row: int) -> Facts:
        return Facts(
            kind=Kind(int(self.kind[row])),
            present=self.present[row],
            extremes=float(self.extremes[row]),
            border=float(self.border[row]),
            middle=float(self.middle[row]),
        )


class FolderPeople:
    """Person masks from a folder; what their values mean is found out from all of them.

    Args:
        root: holds images/ and masks/; see `segtrain.data.folder_layout` for the splits.
        split: "train" or "val".
        rules: whether masks are inverted and which people are ignored; of crowds a folder knows
            nothing but what `segtrain prepare` has written down.

    Raises:
        DataError: the folders do not fit each other, or more than 1 % of the pairs are unusable.
            Fewer are left out and counted in `skipped`.
    """

    def __init__(self, root: Path, split: str, rules: LabelRules = LabelRules()) -> None:  # noqa: B008
        self.root, self.split, self.rules = root, split, rules
        self.skipped: Counter[str] = Counter()
        self.notes: list[str] = []
        self._manifest = read_manifest(root)
        pairs = find_pairs(root, split, self.skipped)
        digest = _digest(pairs)
        scan = _scan(pairs, digest)
        fine = self._usable(pairs, scan)
        self._pairs: list[Pair] = [pairs[row] for row in fine]
        self._upright = scan.upright[fine]
        facts = [scan.facts(row) for row in fine]
        self._tables = self._tables_of(facts)
        self._codings = [coding_of(fact) for fact in facts]
        self._look_for_mistakes(facts)
        self.catalog = self._catalog(scan.sizes[fine], digest)

    def __len__(self) -> int:
        return len(self._pairs)

    def sample(self, index: int, short_side: int | None = None) -> Sample:
        """As `Source.sample`."""
        pair = self._pairs[index]
        image, size = read_sized_image(
            pair.picture, upright=bool(self._upright[index]), short_side=short_side
        )
        mask = self._mask(index)
        if size != mask.shape:
            raise DataError(f"{pair.mask} and {pair.picture} differ in size; restore the originals")
        if short_side is not None:
            size = scaled_size(*size, short_side)
            image = resize_image(image, size)
            if size != mask.shape:
                mask = _nearest(mask, size)
        return Sample(image=image, mask=mask, image_id=pair.stem)

    def picture_path(self, index: int) -> Path:
        return self._pairs[index].picture

    def mask_path(self, index: int) -> Path:
        """The file of the mask, for messages."""
        return self._pairs[index].mask

    def stem(self, index: int) -> str:
        return self._pairs[index].stem

    def _mask(self, index: int) -> Mask:
        """H W uint8 in {0, 1, 255}."""
        mask = load_mask(self._pairs[index].mask)
        table = self._tables[index]
        meant = np.asarray(cv2.LUT(mask.levels, table), dtype=np.uint8)
        if self.rules.largest_only or self.rules.min_person_area > 0:
            people = people_in(mask, self._codings[index], table)
            meant = obey(meant, people, self.rules)
        return meant

    def _usable(self, pairs: list[Pair], scan: _Scan) -> npt.NDArray[np.intp]:
        """Rows of the pairs that can be used; many that cannot are an error."""
        for status, reason in _PROBLEMS.items():
            rows = np.flatnonzero(scan.status == status)
            if not len(rows):
                continue
            if len(rows) > tolerated(len(pairs)):
                names = ", ".join(pairs[row].mask.name for row in rows[:5])
                remedy = "mend or remove them"
                if status == _PHOTO:
                    remedy = "are images/ and masks/ exchanged?"
                raise DataError(
                    f"{self.root}: {reason} in {len(rows)} of {len(pairs)} pairs, first "
                    f"{names}; {remedy}"
                )
            self.skipped[reason] = len(rows)
        return np.flatnonzero(scan.status == _FINE)

    def _tables_of(self, facts: list[Facts]) -> list[Mask]:
        """For each mask the meaning of its values."""
        if self._manifest is not None:
            table = self._manifest.table()
            self.notes.append("masks as manifest.json says")
            return [inverted(table) if self.rules.invert_masks else table] * len(facts)
        codings = [coding_of(fact) for fact in facts]
        ignore_255 = ignores_255(facts)
        counts = Counter(
            "alpha" if fact.kind == Kind.ALPHA else "colours" if fact.kind == Kind.COLOUR
            else CODING_NAMES[coding]
            for fact, coding in zip(facts, codings, strict=True)
            if fact.present[1:].any()
        )  # fmt: skip
        found = ", ".join(f"{name} ({count})" for name, count in counts.most_common())
        ignored = "; 255 is ignored" if ignore_255 else ""
        self.notes.append(f"masks: {found or 'all empty'}{ignored}")
        return [
            meaning(coding, fact.present, ignore_255=ignore_255, invert=self.rules.invert_masks)
            for fact, coding in zip(facts, codings, strict=True)
        ]

    def _look_for_mistakes(self, facts: list[Facts]) -> None:
        border, middle = (
            float(np.mean([getattr(f, k) for f in facts])) for k in ("border", "middle")
        )
        if self.rules.invert_masks:
            border, middle = 1 - border, 1 - middle
        if border > 0.5 and border > middle:
            wanted = str(not self.rules.invert_masks).lower()
            self.notes.append(
                "masks look inverted: people fill the borders and not the middle; "
                f"try --set data.invert_masks={wanted}"
            )

    def _catalog(self, sizes: npt.NDArray[np.int32], digest: str) -> Catalog:
        measured = self._measured(digest)
        pictures = self._manifest.pictures if self._manifest else {}
        known = [pictures.get(f"{self.split}/{pair.stem}") for pair in self._pairs]
        num_people = measured["num_people"].astype(np.int32)
        has_crowd = np.zeros(len(known), dtype=bool)
        identities = np.zeros(len(known), dtype=np.uint64)
        for row, (pair, picture) in enumerate(zip(self._pairs, known, strict=True)):
            if picture:
                identities[row] = picture.identity
                num_people[row], has_crowd[row] = picture.num_people, picture.has_crowd
            else:
                identities[row] = identity("folder", pair.stem, pair.num_bytes)
        return Catalog(
            sizes=sizes,
            person_share=measured["person_share"].astype(np.float32),
            num_people=num_people,
            has_crowd=has_crowd,
            identities=identities,
        )

    def _measured(self, digest: str) -> Arrays:
        """Share of person and number of people of every mask under the rules."""

        def measure() -> Arrays:
            shares = np.zeros(len(self), dtype=np.float32)
            counts = np.zeros(len(self), dtype=np.int32)

            def look_at(index: int) -> None:
                mask = load_mask(self._pairs[index].mask)
                table, coding = self._tables[index], self._codings[index]
                people = people_in(mask, coding, table)
                counts[index] = len(np.unique(people[people > 0]))
                meant = obey(np.asarray(cv2.LUT(mask.levels, table)), people, self.rules)
                shares[index] = (meant == PERSON).mean()

            for _ in _in_threads(look_at, range(len(self)), "measuring people"):
                pass
            return {"person_share": shares, "num_people": counts}

        table = self._manifest.table().tobytes() if self._manifest else b""
        of = hashlib.sha256(f"{digest} {self.rules} {table!r}".encode()).hexdigest()
        return cached_arrays(f"folder-people-v{SCAN_VERSION}-{of}", measure)


def _nearest(mask: Mask, size: tuple[int, int]) -> Mask:
    return np.asarray(cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST), dtype=np.uint8)


def _digest(pairs: list[Pair]) -> str:
    """Of names, sizes and times: an edited file is looked at anew."""
    sha = hashlib.sha256()
    for pair in pairs:
        sha.update(f"{pair.picture}\0{pair.mask}\0{pair.num_bytes}\0{pair.stamp}\n".encode(
            "utf-8", "surrogateescape"
        ))  # fmt: skip
    return sha.hexdigest()


def _scan(pairs: list[Pair], digest: str) -> _Scan:
    """Look at every pair, or take what the cache holds of the same files."""

    def scan() -> Arrays:
        n = len(pairs)
        found = _Scan(
            status=np.zeros(n, dtype=np.uint8),
            sizes=np.zeros((n, 2), dtype=np.int32),
            upright=np.ones(n, dtype=bool),
            kind=np.zeros(n, dtype=np.uint8),
            present=np.zeros((n, 256), dtype=bool),
            extremes=np.zeros(n, dtype=np.float32),
            border=np.zeros(n, dtype=np.float32),
            middle=np.zeros(n, dtype=np.float32),
        )
        for _ in _in_threads(lambda row: _look_at(pairs[row], row, found), range(n), "scanning"):
            pass
        return vars(found)

    kept: dict[str, Any] = dict(cached_arrays(f"folder-v{SCAN_VERSION}-{digest}", scan))
    return _Scan(**kept)


def _look_at(pair: Pair, row: int, found: _Scan) -> None:
    """Fill in one row."""
    try:
        mask = load_mask(pair.mask)
        stored, orientation = _stored_size(pair.picture)
    except DataError:
        found.status[row] = _DAMAGED
        return
    upright = stored[::-1] if orientation in _TURNED else stored
    if mask.levels.shape not in {stored, upright}:
        found.status[row] = _OTHER_SIZE
        return
    facts = facts_of(mask)
    if facts.kind == Kind.PHOTO:
        found.status[row] = _PHOTO
    found.sizes[row] = mask.levels.shape
    # Of a square picture, or one turned by 180 degrees, the mask lies on the upright one.
    found.upright[row] = mask.levels.shape == upright
    found.kind[row], found.present[row] = facts.kind, facts.present
    found.extremes[row], found.border[row] = facts.extremes, facts.border
    found.middle[row] = facts.middle


def _stored_size(path: Path) -> tuple[tuple[int, int], int]:
    """Height and width as stored, and the EXIF orientation."""
    with decoding(path), Image.open(path, formats=FORMATS) as picture:
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
        return (picture.height, picture.width), orientation


def _in_threads(work: Any, rows: range, desc: str) -> Iterator[None]:
    """Decoding leaves the interpreter's lock alone, so threads are enough."""
    with (
        progress_bar(total=len(rows), desc=desc) as bar,
        ThreadPoolExecutor(usable_cores()) as pool,
    ):
        for start in range(0, len(rows), _AT_ONCE):
            for done in pool.map(work, rows[start : start + _AT_ONCE]):
                bar.update()
                yield done
