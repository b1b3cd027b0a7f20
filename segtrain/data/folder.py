"""Folders of masks: `images/` and `masks/`, a mask for each picture of the same name."""

import hashlib
from collections import Counter, deque
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from segtrain.classes import PERSON
from segtrain.data.cache import Arrays, cached_arrays
from segtrain.data.folder_layout import Manifest, Pair, find_pairs, read_manifest
from segtrain.data.folder_scan import (
    DAMAGED,
    FINE,
    OTHER_SIZE,
    PHOTO,
    SCAN_VERSION,
    Scan,
    digest_of,
    scan_pairs,
)
from segtrain.data.mask_files import (
    CODING_NAMES,
    FACTS_VERSION,
    Coding,
    Facts,
    Reading,
    are_gray_photos,
    are_mixed,
    count_people,
    inverted,
    load_mask,
    meaning,
    obey,
    people_in,
    read_values,
)
from segtrain.data.sample import Catalog, LabelRules, Sample, identity, tolerated
from segtrain.data.threads import in_threads
from segtrain.errors import DataError
from segtrain.images import Pixels, decode_plain_jpeg, read_sized_image, resize_image, scaled_size

Mask = npt.NDArray[np.uint8]

_OTHER_VALUES = 100  # beside the numbers of `Scan.status`
_PROBLEMS = {
    OTHER_SIZE: "mask has another size than its picture",
    DAMAGED: "picture or mask damaged",
    PHOTO: "mask is a photo",
    _OTHER_VALUES: "mask has values that manifest.json does not name",
}
_REMEDIES = {
    PHOTO: "are images/ and masks/ exchanged?",
    _OTHER_VALUES: "prepare the folder anew or remove manifest.json",
}


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
        scan = _scanned(pairs)
        fine = self._usable(pairs, scan)
        self._pairs: list[Pair] = [pairs[row] for row in fine]
        self._upright, self._plain = scan.upright[fine], scan.plain[fine]
        facts = [scan.facts(row) for row in fine]
        self._tables, self._numbered = self._understand(facts)
        self._look_for_inversion(facts)
        self.catalog = self._catalog(scan.sizes[fine])
        if not self.catalog.person_share.any():
            self.notes.append("no mask has a person; look at the files or try other rules")

    def __len__(self) -> int:
        return len(self._pairs)

    def sample(self, index: int, short_side: int | None = None) -> Sample:
        """As `Source.sample`."""
        pair = self._pairs[index]
        mask = self._mask(index)
        image, size = self._image(index, short_side)
        if size != mask.shape:
            raise DataError(f"{pair.mask} and {pair.picture} differ in size; restore the originals")
        if short_side is not None:
            size = scaled_size(*size, short_side)
            image = resize_image(image, size)
            if size != mask.shape:
                mask = _nearest(mask, size)
        return Sample(image=image, mask=mask, image_id=pair.stem)

    def _image(self, index: int, short_side: int | None) -> tuple[Pixels, tuple[int, int]]:
        """As `read_sized_image`, without a second look at what the scan has seen."""
        path, upright = self._pairs[index].picture, bool(self._upright[index])
        if self._plain[index]:
            height, width = self.catalog.sizes[index].tolist()
            image = decode_plain_jpeg(path, (height, width), short_side)
            if image is not None:
                return image, (height, width)
        return read_sized_image(path, upright=upright, short_side=short_side)

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
            people = people_in(mask, table, numbered=bool(self._numbered[index]))
            meant = obey(meant, people, self.rules)
        return meant

    def _usable(self, pairs: list[Pair], scan: Scan) -> npt.NDArray[np.intp]:
        """Rows of the pairs that can be used; many that cannot are an error."""
        found = scan.status.copy()
        if self._manifest is not None:
            other = scan.present[:, ~_named_levels(self._manifest, self.root)].any(axis=1)
            found[other & (found == FINE)] = _OTHER_VALUES
        for status, reason in _PROBLEMS.items():
            rows = np.flatnonzero(found == status)
            if not len(rows):
                continue
            if len(rows) > tolerated(len(pairs)):
                names = ", ".join(pairs[row].mask.name for row in rows[:5])
                remedy = _REMEDIES.get(status, "mend or remove them")
                raise DataError(
                    f"{self.root}: {reason} in {len(rows)} of {len(pairs)} pairs, first "
                    f"{names}; {remedy}"
                )
            self.skipped[reason] = len(rows)
        fine = np.flatnonzero(found == FINE)
        if not len(fine):
            raise DataError(f"{self.root} has no usable pair for {self.split}; mend the files")
        return fine

    def _understand(self, facts: list[Facts]) -> tuple[list[Mask], npt.NDArray[np.bool_]]:
        """For each mask the meaning of its values, and whether they tell people apart."""
        invert = self.rules.invert_masks
        if self._manifest is not None:
            self.notes.append("masks as manifest.json says")
            table = self._manifest.table()
            table = inverted(table) if invert else table
            return [table] * len(facts), np.zeros(len(facts), dtype=bool)
        if are_gray_photos(facts):
            raise DataError(f"{self.root}: the masks are gray photos; {_REMEDIES[PHOTO]}")
        # What values mean holds for the whole data set, not for one split of it.
        readings = read_values([*facts, *self._other_facts()])[: len(facts)]
        counts = Counter(readings)
        self._note_readings(counts)
        # A hundred thousand files share a handful of tables.
        tables = {reading: meaning(reading, invert=invert) for reading in counts}
        numbered = np.array([reading.numbered for reading in readings])
        return [tables[reading] for reading in readings], numbered

    def _other_facts(self) -> list[Facts]:
        """Facts of the masks of the other split; none if there is no such split."""
        try:
            pairs = find_pairs(self.root, "val" if self.split == "train" else "train", Counter())
        except DataError:
            return []
        scan = _scanned(pairs)
        return [scan.facts(row) for row in np.flatnonzero(scan.status == FINE).tolist()]

    def _note_readings(self, counts: Counter[Reading]) -> None:
        used = [(reading, n) for reading, n in counts.most_common() if reading.coding]
        found = ", ".join(f"{CODING_NAMES[reading.coding]} ({n})" for reading, n in used)
        self.notes.append(f"masks: {found or 'all empty'}")
        if are_mixed(counts):
            self.notes.append("mixed encodings: each mask is read by its own values")
        if any(r.ignores_255 and r.coding == Coding.BLACK_WHITE for r, _ in used):
            self.notes.append("255 is ignored, also in masks that hold nothing else but 0")

    def _look_for_inversion(self, facts: list[Facts]) -> None:
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

    def _catalog(self, sizes: npt.NDArray[np.int32]) -> Catalog:
        measured = self._measured()
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

    def _measured(self) -> Arrays:
        """Share of person and number of people of every mask under the rules."""

        def measure() -> Arrays:
            shares = np.zeros(len(self), dtype=np.float32)
            counts = np.zeros(len(self), dtype=np.int32)

            def look_at(index: int) -> None:
                mask = load_mask(self._pairs[index].mask)
                table = self._tables[index]
                people = people_in(mask, table, numbered=bool(self._numbered[index]))
                counts[index] = count_people(people)
                meant = obey(np.asarray(cv2.LUT(mask.levels, table)), people, self.rules)
                shares[index] = (meant == PERSON).mean()

            deque(in_threads(look_at, range(len(self)), desc="measuring people"), maxlen=0)
            return {"person_share": shares, "num_people": counts}

        sha = hashlib.sha256(f"{digest_of(self._pairs)} {self.rules}".encode())
        sha.update(self._numbered.tobytes())
        for table in self._tables:
            sha.update(table.tobytes())
        name = f"folder-people-v{SCAN_VERSION}-{FACTS_VERSION}-{sha.hexdigest()}"
        return cached_arrays(name, measure)


def _scanned(pairs: list[Pair]) -> Scan:
    return scan_pairs(pairs, f"{FACTS_VERSION}-{digest_of(pairs)}")


def _named_levels(manifest: Manifest, root: Path) -> npt.NDArray[np.bool_]:
    """256 bool, the levels that a prepared folder's masks may hold."""
    values = manifest.mask_values
    named = [values.background, values.person, values.ignore]
    if len(set(named)) < len(named):
        raise DataError(
            f"{root / 'manifest.json'} is damaged (mask values are not different); prepare the "
            "folder anew or remove it"
        )
    return np.isin(np.arange(256), named)


def _nearest(mask: Mask, size: tuple[int, int]) -> Mask:
    # Plain INTER_NEAREST moves the mask against the image by half a pixel.
    scaled = cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(scaled, dtype=np.uint8)
