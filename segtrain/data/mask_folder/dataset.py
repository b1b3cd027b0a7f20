"""Folders of masks: `images/` and `masks/`, with a mask of the same name for each image."""

import hashlib
from collections import Counter, deque
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from segtrain.data.mask_folder.encoding import (
    ENCODING_NAMES,
    MASK_STATS_VERSION,
    EncodingKind,
    Labels,
    MaskEncoding,
    MaskFile,
    MaskStats,
    apply_label_rules,
    are_gray_photos,
    are_mixed,
    count_people,
    detect_encodings,
    invert_table,
    label_instances,
    load_mask,
    lookup_table,
)
from segtrain.data.mask_folder.layout import ImageMaskPair, Manifest, find_pairs, read_manifest
from segtrain.data.mask_folder.scan import (
    SCAN_VERSION,
    FolderScan,
    PairStatus,
    pairs_digest,
    scan_pairs,
)
from segtrain.data.sample import DatasetIndex, LabelRules, Sample, identity_hash, max_bad_samples
from segtrain.errors import DataError
from segtrain.imaging.images import decode_plain_jpeg, read_sized_image, resize_image, scaled_size
from segtrain.runtime.cache import Arrays, cached_arrays
from segtrain.runtime.thread_map import thread_map
from segtrain.types import PERSON, Image, Mask

_PROBLEMS = {
    PairStatus.OTHER_SIZE: "mask and image differ in size",
    PairStatus.DAMAGED: "image or mask damaged",
    PairStatus.PHOTO: "mask is a photo",
    PairStatus.UNNAMED_VALUES: "mask has values that manifest.json does not name",
}
_HINTS = {
    PairStatus.PHOTO: "are images/ and masks/ exchanged?",
    PairStatus.UNNAMED_VALUES: "prepare the folder again or remove manifest.json",
}


class MaskFolderDataset:
    """Person masks from a folder; the encoding is detected from all files.

    Args:
        root: contains images/ and masks/; see `segtrain.data.mask_folder.layout` for the splits.
        split: "train" or "val".
        rules: whether masks are inverted and which people are ignored. Only folders written by
            `segtrain prepare` have crowds.

    Raises:
        DataError: the folders do not match, or more than 1 % of the pairs are unusable. Fewer are
            skipped and counted in `skipped`.
    """

    def __init__(self, root: Path, split: str, rules: LabelRules = LabelRules()) -> None:  # noqa: B008
        self.root, self.split, self.rules = root, split, rules
        self.skipped: Counter[str] = Counter()
        self.notes: list[str] = []
        self._manifest = read_manifest(root)
        pairs = find_pairs(root, split, self.skipped)
        scan = _scan(pairs)
        rows = self._usable_rows(pairs, scan)
        self._pairs: list[ImageMaskPair] = [pairs[row] for row in rows]
        self._upright, self._plain = scan.upright[rows], scan.plain[rows]
        all_stats = [scan.stats(row) for row in rows]
        self._tables, self._has_instances = self._interpret(all_stats)
        self._note_inversion(all_stats)
        self.index = self._build_index(scan.sizes[rows])
        if not self.index.person_fraction.any():
            self.notes.append("no mask has a person; check the files or try other rules")

    def __len__(self) -> int:
        return len(self._pairs)

    def sample(self, index: int, short_side: int | None = None) -> Sample:
        """See `SegmentationDataset.sample`."""
        pair = self._pairs[index]
        mask = self._read_mask(index)
        image, size = self._read_image(index, short_side)
        if size != mask.shape:
            raise DataError(f"{pair.mask} and {pair.image} differ in size", "restore the originals")
        if short_side is not None:
            size = scaled_size(*size, short_side)
            image = resize_image(image, size)
            if size != mask.shape:
                # Plain INTER_NEAREST would shift the mask by half a pixel against the image.
                scaled = cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
                mask = np.asarray(scaled, dtype=np.uint8)
        return Sample(image=image, mask=mask, image_id=pair.name)

    def image_path(self, index: int) -> Path:
        return self._pairs[index].image

    def mask_path(self, index: int) -> Path:
        """Path of the mask file, for messages."""
        return self._pairs[index].mask

    def name(self, index: int) -> str:
        return self._pairs[index].name

    def _read_mask(self, index: int) -> Mask:
        """Read a mask under the label rules, H W uint8 in {0, 1, 255}."""
        file = load_mask(self._pairs[index].mask)
        mask = np.asarray(cv2.LUT(file.levels, self._tables[index]), dtype=np.uint8)
        if self.rules.largest_only or self.rules.min_person_area > 0:
            mask = apply_label_rules(mask, self._label_people(index, file), self.rules)
        return mask

    def _label_people(self, index: int, file: MaskFile) -> Labels:
        has_instances = bool(self._has_instances[index])
        return label_instances(file, self._tables[index], has_instances=has_instances)

    def _read_image(self, index: int, short_side: int | None) -> tuple[Image, tuple[int, int]]:
        """Like `read_sized_image`, without repeating the checks of the scan."""
        path, upright = self._pairs[index].image, bool(self._upright[index])
        if self._plain[index]:
            height, width = self.index.sizes[index].tolist()
            image = decode_plain_jpeg(path, (height, width), short_side)
            if image is not None:
                return image, (height, width)
        return read_sized_image(path, upright=upright, short_side=short_side)

    def _usable_rows(self, pairs: list[ImageMaskPair], scan: FolderScan) -> npt.NDArray[np.intp]:
        """Find the usable pairs; more than 1 % unusable ones is an error."""
        pair_status = scan.status.copy()
        if self._manifest is not None:
            is_unnamed = ~_named_levels(self._manifest, self.root)
            has_unnamed = scan.present[:, is_unnamed].any(axis=1)
            pair_status[has_unnamed & (pair_status == PairStatus.OK)] = PairStatus.UNNAMED_VALUES
        for status, reason in _PROBLEMS.items():
            rows = np.flatnonzero(pair_status == status)
            if not len(rows):
                continue
            if len(rows) > max_bad_samples(len(pairs)):
                names = ", ".join(pairs[row].mask.name for row in rows[:5])
                raise DataError(
                    f"{self.root}: {reason} in {len(rows)} of {len(pairs)} pairs, first {names}",
                    _HINTS.get(status, "fix or remove them"),
                )
            self.skipped[reason] = len(rows)
        usable = np.flatnonzero(pair_status == PairStatus.OK)
        if not len(usable):
            raise DataError(f"{self.root} has no usable pair for {self.split}", "fix the files")
        return usable

    def _interpret(self, all_stats: list[MaskStats]) -> tuple[list[Mask], npt.NDArray[np.bool_]]:
        """Return the lookup table of each mask, and whether its values distinguish people."""
        invert = self.rules.invert_masks
        if self._manifest is not None:
            self.notes.append("masks: encoding from manifest.json")
            table = self._manifest.lookup_table()
            table = invert_table(table) if invert else table
            return [table] * len(all_stats), np.zeros(len(all_stats), dtype=bool)
        if are_gray_photos(all_stats):
            raise DataError(f"{self.root}: the masks are gray photos", _HINTS[PairStatus.PHOTO])
        # The encoding belongs to the whole dataset and not to one split of it.
        encodings = detect_encodings([*all_stats, *self._other_split_stats()])[: len(all_stats)]
        counts = Counter(encodings)
        self._note_encodings(counts)
        # A hundred thousand files share a handful of tables.
        tables = {encoding: lookup_table(encoding, invert=invert) for encoding in counts}
        has_instances = np.array([encoding.has_instances for encoding in encodings])
        return [tables[encoding] for encoding in encodings], has_instances

    def _other_split_stats(self) -> list[MaskStats]:
        """Return the statistics of the masks of the other split; empty if it does not exist."""
        try:
            pairs = find_pairs(self.root, "val" if self.split == "train" else "train", Counter())
        except DataError:
            return []
        scan = _scan(pairs)
        return [scan.stats(row) for row in np.flatnonzero(scan.status == PairStatus.OK).tolist()]

    def _note_encodings(self, counts: Counter[MaskEncoding]) -> None:
        used = [(e, n) for e, n in counts.most_common() if e.kind != EncodingKind.EMPTY]
        names = ", ".join(f"{ENCODING_NAMES[encoding.kind]} ({n})" for encoding, n in used)
        self.notes.append(f"masks: {names or 'all empty'}")
        if are_mixed(counts):
            self.notes.append("mixed encodings: each mask is interpreted by its own values")
        if any(e.ignores_255 and e.kind == EncodingKind.BLACK_WHITE for e, _ in used):
            self.notes.append("255 is ignored, also in masks that contain only 0 and 255")

    def _note_inversion(self, all_stats: list[MaskStats]) -> None:
        border = float(np.mean([stats.border for stats in all_stats]))
        middle = float(np.mean([stats.middle for stats in all_stats]))
        if self.rules.invert_masks:
            border, middle = 1 - border, 1 - middle
        if border > 0.5 and border > middle:
            suggested = str(not self.rules.invert_masks).lower()
            self.notes.append(
                "masks look inverted: people fill the border and not the middle; "
                f"try --set data.invert_masks={suggested}"
            )

    def _build_index(self, sizes: npt.NDArray[np.int32]) -> DatasetIndex:
        measured = self._measure_people()
        manifest_images = self._manifest.images if self._manifest else {}
        num_people = measured["num_people"].astype(np.int32)
        has_crowd = np.zeros(len(self), dtype=bool)
        identities = np.zeros(len(self), dtype=np.uint64)
        for row, pair in enumerate(self._pairs):
            known = manifest_images.get(f"{self.split}/{pair.name}")
            if known:
                identities[row] = known.identity
                num_people[row], has_crowd[row] = known.num_people, known.has_crowd
            else:
                identities[row] = identity_hash("folder", pair.name, pair.num_bytes)
        return DatasetIndex(
            sizes=sizes,
            person_fraction=measured["person_fraction"].astype(np.float32),
            num_people=num_people,
            has_crowd=has_crowd,
            identities=identities,
        )

    def _measure_people(self) -> Arrays:
        """Measure the person fraction and the number of people of every mask under the rules."""

        def measure() -> Arrays:
            fractions = np.zeros(len(self), dtype=np.float32)
            counts = np.zeros(len(self), dtype=np.int32)

            def measure_one(index: int) -> None:
                file = load_mask(self._pairs[index].mask)
                people = self._label_people(index, file)
                counts[index] = count_people(people)
                mask = np.asarray(cv2.LUT(file.levels, self._tables[index]), dtype=np.uint8)
                mask = apply_label_rules(mask, people, self.rules)
                fractions[index] = (mask == PERSON).mean()

            deque(thread_map(measure_one, range(len(self)), desc="measuring people"), maxlen=0)
            return {"person_fraction": fractions, "num_people": counts}

        sha = hashlib.sha256(f"{pairs_digest(self._pairs)} {self.rules}".encode())
        sha.update(self._has_instances.tobytes())
        for table in self._tables:
            sha.update(table.tobytes())
        key = f"folder-people-v{SCAN_VERSION}-{MASK_STATS_VERSION}-{sha.hexdigest()}"
        return cached_arrays(key, measure)


def _scan(pairs: list[ImageMaskPair]) -> FolderScan:
    return scan_pairs(pairs, f"{MASK_STATS_VERSION}-{pairs_digest(pairs)}")


def _named_levels(manifest: Manifest, root: Path) -> npt.NDArray[np.bool_]:
    """Mark the levels that the masks of a prepared folder may contain, 256 bool."""
    values = manifest.mask_values
    named = [values.background, values.person, values.ignore]
    if len(set(named)) < len(named):
        raise DataError(
            f"{root / 'manifest.json'} is damaged (duplicate mask values)",
            "prepare the folder again or remove the file",
        )
    return np.isin(np.arange(256), named)
