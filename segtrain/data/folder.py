"""Folders of masks: `images/` and `masks/`, a mask for each picture of the same name."""

import hashlib
from collections import Counter, deque
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from segtrain.classes import PERSON
from segtrain.data.cache import Arrays, cached_arrays
from segtrain.data.folder_layout import Pair, find_pairs, read_manifest
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
    Coding,
    Facts,
    Kind,
    coding_of,
    ignores_255,
    inverted,
    load_mask,
    meaning,
    obey,
    people_in,
)
from segtrain.data.sample import Catalog, LabelRules, Sample, identity, tolerated
from segtrain.data.threads import in_threads
from segtrain.errors import DataError
from segtrain.images import Pixels, decode_plain_jpeg, read_sized_image, resize_image, scaled_size

Mask = npt.NDArray[np.uint8]

_PROBLEMS = {
    OTHER_SIZE: "mask has another size than its picture",
    DAMAGED: "picture or mask damaged",
    PHOTO: "mask is a photo",
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
        digest = digest_of(pairs)
        scan = scan_pairs(pairs, digest)
        fine = self._usable(pairs, scan)
        self._pairs: list[Pair] = [pairs[row] for row in fine]
        self._upright, self._plain = scan.upright[fine], scan.plain[fine]
        facts = [scan.facts(row) for row in fine]
        self._tables = self._tables_of(facts)
        # A prepared folder's gray levels tell nobody apart.
        self._codings = [Coding.SOFT if self._manifest else coding_of(fact) for fact in facts]
        self._look_for_mistakes(facts)
        self.catalog = self._catalog(scan.sizes[fine], digest)

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
            people = people_in(mask, self._codings[index], table)
            meant = obey(meant, people, self.rules)
        return meant

    def _usable(self, pairs: list[Pair], scan: Scan) -> npt.NDArray[np.intp]:
        """Rows of the pairs that can be used; many that cannot are an error."""
        for status, reason in _PROBLEMS.items():
            rows = np.flatnonzero(scan.status == status)
            if not len(rows):
                continue
            if len(rows) > tolerated(len(pairs)):
                names = ", ".join(pairs[row].mask.name for row in rows[:5])
                remedy = "mend or remove them"
                if status == PHOTO:
                    remedy = "are images/ and masks/ exchanged?"
                raise DataError(
                    f"{self.root}: {reason} in {len(rows)} of {len(pairs)} pairs, first "
                    f"{names}; {remedy}"
                )
            self.skipped[reason] = len(rows)
        fine = np.flatnonzero(scan.status == FINE)
        if not len(fine):
            raise DataError(f"{self.root} has no usable pair for {self.split}; mend the files")
        return fine

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
        # A hundred thousand files share a handful of tables.
        tables: dict[bytes, Mask] = {}
        found_tables = []
        for fact, coding in zip(facts, codings, strict=True):
            table = meaning(
                coding, fact.present, ignore_255=ignore_255, invert=self.rules.invert_masks
            )
            found_tables.append(tables.setdefault(table.tobytes(), table))
        return found_tables

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

            deque(in_threads(look_at, range(len(self)), desc="measuring people"), maxlen=0)
            return {"person_share": shares, "num_people": counts}

        table = self._manifest.table().tobytes() if self._manifest else b""
        of = hashlib.sha256(f"{digest} {self.rules} {table!r}".encode()).hexdigest()
        return cached_arrays(f"folder-people-v{SCAN_VERSION}-{of}", measure)


def _nearest(mask: Mask, size: tuple[int, int]) -> Mask:
    return np.asarray(cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST), dtype=np.uint8)
