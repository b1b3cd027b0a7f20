"""Checks of data that opens. Each check covers one aspect of both splits."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from segtrain.data.sample import max_bad_samples
from segtrain.data.selection import is_negative
from segtrain.doctor.duplicates import fingerprint, near_duplicates
from segtrain.doctor.findings import CheckResult
from segtrain.doctor.image_scan import SHORT_SIDE, ScannedSplit
from segtrain.errors import DataError

_MIN_IMAGES = 20
_MIN_SIDE, _MAX_MEGAPIXELS = 64, 20.0
_SLOW_MEGAPIXELS = 2.0
_FULL = 0.99
_TINY_PEOPLE = 0.01
_MUCH_IGNORED = 0.3
_INVERTED_BORDER = 0.5
_INVERTED_NOTE = "look inverted"
# Up to one skipped annotation in a thousand is normal.
_FEW_SKIPPED = 0.001
_MAX_NAMES = 5
_MAX_COMPARED = 50
_DUPLICATES_REMEDY = "remove them from one split: validation would reward memorization"

Splits = Sequence[ScannedSplit]


def check_images(splits: Splits) -> Iterator[CheckResult]:
    """Number of images."""
    for split in splits:
        num_images = len(split.images)
        parts = ", ".join(
            f"{part.num_selected} of {part.num_images} in {part.root} ({part.kind})"
            for part in split.parts
        )
        if num_images < _MIN_IMAGES:
            yield (
                "warning",
                f"{split.name}: only {num_images} images, {parts}",
                "training needs hundreds of images, and validation dozens",
            )
        else:
            yield "ok", f"{split.name}: {parts}", ""


def check_left_out(splits: Splits) -> Iterator[CheckResult]:
    """Annotations and images skipped while opening the dataset."""
    for split in splits:
        for reason, count in split.images.skipped.items():
            few = count <= _FEW_SKIPPED * len(split.images)
            yield (
                "note" if few else "warning",
                f"{split.name}: {count} left out: {reason}",
                "repair them, or train without them",
            )


def check_notes(splits: Splits) -> Iterator[CheckResult]:
    """Notes that the dataset reported while opening."""
    for split in splits:
        for note in split.images.notes:
            if _INVERTED_NOTE not in note:  # `check_inverted` reports it
                yield "note", f"{split.name}: {note}", ""


def check_damaged(splits: Splits) -> Iterator[CheckResult]:
    """Images that training skips, or that stop it if there are many."""
    for split in splits:
        scanned = _scanned_images(split)
        if not split.damaged:
            yield "ok", f"{split.name}: {scanned} can be read", ""
            continue
        # Training counts over all images: extrapolate from the scanned ones.
        damaged_fraction = len(split.damaged) / split.num_scanned
        expected = round(damaged_fraction * len(split.images))
        yield (
            "error" if expected > max_bad_samples(len(split.images)) else "warning",
            f"{split.name}: {len(split.damaged)} of {scanned} cannot be used: "
            f"{_names(split, split.damaged)}; first: {next(iter(split.damaged.values()))}",
            "replace these files, or delete them with their masks",
        )


def check_sizes(splits: Splits) -> Iterator[CheckResult]:
    for split in splits:
        sizes = split.images.index.sizes
        areas = sizes.astype(np.int64).prod(axis=1)
        order = np.argsort(areas)
        smallest, median, largest = (
            f"{sizes[i][1]}x{sizes[i][0]}" for i in order[[0, len(order) // 2, -1]]
        )
        text = f"{split.name}: smallest {smallest}, median {median}, largest {largest} pixels"
        unusual = {
            f"under {_MIN_SIDE} pixels a side": sizes.min(axis=1) < _MIN_SIDE,
            f"over {_MAX_MEGAPIXELS:.0f} megapixels": areas > _MAX_MEGAPIXELS * 1e6,
        }
        for condition, matches in unusual.items():
            if matches.any():
                names = _names(split, np.flatnonzero(matches).tolist())
                yield "note", f"{split.name}: {int(matches.sum())} images {condition}: {names}", ""
        if np.median(areas) > _SLOW_MEGAPIXELS * 1e6:
            yield (
                "note",
                f"{text}; decoding them would slow down a GPU",
                "run segtrain prepare once and train on its folder",
            )
        else:
            yield "ok", text, ""


def check_orientation(splits: Splits) -> Iterator[CheckResult]:
    """EXIF orientation, which cameras write and COCO's annotations ignore."""
    for split in splits:
        rotated = [stats.index for stats in split.stats if stats.orientation != 1]
        coco = [index for index in rotated if split.kind_of(index) == "COCO"]
        others = [index for index in rotated if split.kind_of(index) != "COCO"]
        if coco:
            yield (
                "warning",
                f"{split.name}: {len(coco)} images are rotated by EXIF, which COCO's annotations "
                f"ignore: {_names(split, coco)}",
                "if the masks are misplaced on contact_sheet.png, save the images without EXIF",
            )
        if others:
            yield (
                "note",
                f"{split.name}: {len(others)} images are rotated by EXIF: "
                f"{_names(split, others)}; check on contact_sheet.png that their masks match",
                "",
            )


def check_people(splits: Splits) -> Iterator[CheckResult]:
    """Area covered by people, and images without any."""
    for split in splits:
        fractions = split.images.index.person_fraction
        positive = fractions[fractions > 0]
        if not len(positive):
            yield (
                "error",
                f"{split.name}: no mask shows a person",
                "are these the right masks? white or 1 is person, in COCO the category 'person'",
            )
            continue
        num_negatives = int(is_negative(split.images.index).sum())
        median = float(np.median(positive))
        yield (
            "ok",
            f"{split.name}: people cover {median:.0%} of the image (median), from "
            f"{positive.min():.1%} to {positive.max():.0%}; {num_negatives} images without people",
            "",
        )
        if median < _TINY_PEOPLE:
            yield (
                "note",
                f"{split.name}: most people are tiny",
                "--set data.person_area=[0.05,1] leaves out images with tiny people",
            )
        if not num_negatives and split.name == "train":
            yield (
                "note",
                "train: every image shows people, so the model does not learn to predict none",
                "add images without people if the model will see such images",
            )


def check_masks(splits: Splits) -> Iterator[CheckResult]:
    """Classes of the pixels, and masks that cover the whole image."""
    for split in splits:
        if not split.stats:
            continue
        person = float(np.mean([stats.person_fraction for stats in split.stats]))
        ignored = float(np.mean([stats.ignore_fraction for stats in split.stats]))
        text = (
            f"{split.name}: {1 - person - ignored:.1%} of all pixels are background, "
            f"{person:.1%} person, {ignored:.1%} ignored"
        )
        full = [stats.index for stats in split.stats if stats.person_fraction > _FULL]
        if len(full) == len(split.stats):
            yield (
                "error",
                f"{split.name}: every mask covers all of its image",
                "are these masks? background is 0 or black",
            )
        elif full:
            many = len(full) > max_bad_samples(len(split.stats))
            yield (
                "warning" if many else "note",
                f"{split.name}: {len(full)} masks cover more than {_FULL:.0%} of their image: "
                f"{_names(split, full)}",
                "check them: a mask that covers the whole image teaches little",
            )
        if ignored > _MUCH_IGNORED:
            yield (
                "warning",
                f"{text}: a large part is ignored",
                "see contact_sheet.png: ignored pixels are gray",
            )
        else:
            yield "ok", text, ""


def check_inverted(splits: Splits) -> Iterator[CheckResult]:
    """People are inside an image; the background reaches its border."""
    for split in splits:
        inverted_note = next((note for note in split.images.notes if _INVERTED_NOTE in note), None)
        partial = [stats for stats in split.stats if 0 < stats.person_fraction <= _FULL]
        borders = [stats.border_person_fraction for stats in partial]
        border = float(np.median(borders)) if borders else 0.0
        if inverted_note is not None:
            message, _, remedy = inverted_note.partition("; ")
            yield "warning", f"{split.name}: {message}", remedy
        elif border > _INVERTED_BORDER:
            yield (
                "warning",
                f"{split.name}: masks look inverted: {border:.0%} of the border pixels are "
                f"person (median), first {_names(split, [partial[0].index])}",
                "see contact_sheet.png; for folders of masks --set data.invert_masks=true",
            )


def check_duplicates(splits: Splits) -> Iterator[CheckResult]:
    """Validation images that are also in the training split."""
    by_name = {split.name: split for split in splits}
    if by_name.keys() != {"train", "val"}:
        return
    train, val = by_name["train"], by_name["val"]
    pairs = [
        (train.stats[j], val.stats[i])
        for i, j in near_duplicates(
            [stats.fingerprint for stats in val.stats],
            [stats.fingerprint for stats in train.stats],
        )
    ]
    if not pairs:
        yield "ok", "no val image resembles a train image", ""
        return
    names = ", ".join(
        f"{train.name_of(a.index)} = {val.name_of(b.index)}" for a, b in pairs[:_MAX_NAMES]
    )
    yield (
        "warning",
        f"{len(pairs)} of {_scanned_images(val)} in val are also in train: {names}"
        f"{_ellipsis(len(pairs))}",
        _DUPLICATES_REMEDY,
    )


def check_same_names(splits: Splits) -> Iterator[CheckResult]:
    """Equal names and sizes in both splits, also of images that were not scanned."""
    by_name = {split.name: split for split in splits}
    if by_name.keys() != {"train", "val"}:
        return
    train, val = (by_name[name].images.index.identities for name in ("train", "val"))
    _, in_train, in_val = np.intersect1d(train, val, return_indices=True)
    if not len(in_val):
        return
    # Each split may number its images independently: compare some of the images.
    compared = np.linspace(0, len(in_val) - 1, min(_MAX_COMPARED, len(in_val))).astype(int)
    same = [
        int(in_val[i])
        for i in compared
        if _same_image(by_name["train"], int(in_train[i]), by_name["val"], int(in_val[i]))
    ]
    if same:
        yield (
            "warning",
            f"{len(in_val)} images have the same name and size in both splits, and "
            f"{len(same)} of {len(compared)} compared are the same: {_names(by_name['val'], same)}",
            _DUPLICATES_REMEDY,
        )
    else:
        yield "note", f"{len(in_val)} names are in both splits, for different images", ""


# To add a check, write one function and add one row.
DATA_CHECKS: dict[str, Callable[[Splits], Iterable[CheckResult]]] = {
    "images": check_images,
    "left-out": check_left_out,
    "notes": check_notes,
    "damaged": check_damaged,
    "sizes": check_sizes,
    "orientation": check_orientation,
    "people": check_people,
    "masks": check_masks,
    "inverted": check_inverted,
    "duplicates": check_duplicates,
    "same-names": check_same_names,
}


def _same_image(a: ScannedSplit, index_in_a: int, b: ScannedSplit, index_in_b: int) -> bool:
    try:
        first, second = (
            fingerprint(split.images.sample(index, SHORT_SIDE).image)
            for split, index in ((a, index_in_a), (b, index_in_b))
        )
    except DataError:  # `check_damaged` reports it
        return False
    return any(near_duplicates([first], [second]))


def _scanned_images(split: ScannedSplit) -> str:
    """The number of scanned images, and the total if it is larger."""
    if split.num_scanned == len(split.images):
        return f"{split.num_scanned} images"
    return f"{split.num_scanned} images (of {len(split.images)}, evenly spaced)"


def _names(split: ScannedSplit, indices: Iterable[int]) -> str:
    """The names of the first few images."""
    indices = list(indices)
    return ", ".join(map(split.name_of, indices[:_MAX_NAMES])) + _ellipsis(len(indices))


def _ellipsis(count: int) -> str:
    return ", ..." if count > _MAX_NAMES else ""
