"""What is wrong with data that opens: each check looks at one thing in both splits."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from segtrain.data.sample import tolerated
from segtrain.data.selection import is_negative
from segtrain.doctor.duplicates import fingerprint, near_duplicates
from segtrain.doctor.findings import Verdict
from segtrain.doctor.inspection import SHORT_SIDE, Split
from segtrain.errors import DataError

_FEWEST_PICTURES = 20
_SMALLEST_SIDE, _LARGEST_MEGAPIXELS = 64, 20.0
_SLOW_MEGAPIXELS = 2.0
_FULL = 0.99
_TINY_PEOPLE = 0.01
_MUCH_IGNORED = 0.3
_INVERTED_BORDER = 0.5
_INVERTED_NOTE = "look inverted"
# Left out when opening: so few in a hundred are life.
_FEW_LEFT_OUT = 0.001
_NAMED = 5
_MOST_COMPARED = 50

Splits = Sequence[Split]


def check_pictures(splits: Splits) -> Iterator[Verdict]:
    """How many there are."""
    for split in splits:
        number = len(split.pictures)
        parts = ", ".join(
            f"{part.num_selected} of {part.num_pictures} in {part.root} ({part.kind})"
            for part in split.parts
        )
        if number < _FEWEST_PICTURES:
            yield (
                "warning",
                f"{split.name}: only {number} pictures, {parts}",
                "a network needs hundreds to learn from, and dozens to be judged on",
            )
        else:
            yield "ok", f"{split.name}: {parts}", ""


def check_left_out(splits: Splits) -> Iterator[Verdict]:
    """What opening the data set skipped."""
    for split in splits:
        for reason, count in split.pictures.skipped.items():
            few = count <= _FEW_LEFT_OUT * len(split.pictures)
            yield (
                "note" if few else "warning",
                f"{split.name}: {count} left out: {reason}",
                "mend them, or live without them",
            )


def check_notes(splits: Splits) -> Iterator[Verdict]:
    """What opening the data set remarked."""
    for split in splits:
        for note in split.pictures.notes:
            if _INVERTED_NOTE not in note:  # which has a check of its own
                yield "note", f"{split.name}: {note}", ""


def check_damaged(splits: Splits) -> Iterator[Verdict]:
    """Pictures that training would leave out, or fail on if there are many."""
    for split in splits:
        seen = _seen(split)
        if not split.damaged:
            yield "ok", f"{split.name}: {seen} can be read", ""
            continue
        # Training counts over all pictures; from a sample the rest is guessed.
        share = len(split.damaged) / split.num_looked
        guessed = round(share * len(split.pictures))
        yield (
            "error" if guessed > tolerated(len(split.pictures)) else "warning",
            f"{split.name}: {len(split.damaged)} of {seen} cannot be used: "
            f"{_names(split, split.damaged)}; first: {next(iter(split.damaged.values()))}",
            "replace these files, or delete them with their masks",
        )


def check_sizes(splits: Splits) -> Iterator[Verdict]:
    for split in splits:
        sizes = split.pictures.catalog.sizes
        areas = sizes.astype(np.int64).prod(axis=1)
        order = np.argsort(areas)
        smallest, middle, largest = (
            f"{sizes[i][1]}x{sizes[i][0]}" for i in order[[0, len(order) // 2, -1]]
        )
        text = f"{split.name}: smallest {smallest}, median {middle}, largest {largest} pixels"
        odd = {
            f"under {_SMALLEST_SIDE} pixels a side": sizes.min(axis=1) < _SMALLEST_SIDE,
            f"over {_LARGEST_MEGAPIXELS:.0f} megapixels": areas > _LARGEST_MEGAPIXELS * 1e6,
        }
        for what, which in odd.items():
            if which.any():
                names = _names(split, np.flatnonzero(which).tolist())
                yield "note", f"{split.name}: {int(which.sum())} pictures {what}: {names}", ""
        if np.median(areas) > _SLOW_MEGAPIXELS * 1e6:
            yield (
                "note",
                f"{text}; decoding them would hold up a GPU",
                "run segtrain prepare once and train from its folder",
            )
        else:
            yield "ok", text, ""


def check_orientation(splits: Splits) -> Iterator[Verdict]:
    """Cameras turn pictures by a note in the file, which COCO's annotations don't mean."""
    for split in splits:
        turned = [look.index for look in split.looks if look.orientation != 1]
        coco = [index for index in turned if split.kind(index) == "COCO"]
        others = [index for index in turned if split.kind(index) != "COCO"]
        if coco:
            yield (
                "warning",
                f"{split.name}: {len(coco)} pictures are turned by EXIF, which COCO's annotations "
                f"ignore: {_names(split, coco)}",
                "if the masks lie wrong on contact_sheet.png, save the pictures without EXIF",
            )
        if others:
            yield (
                "note",
                f"{split.name}: {len(others)} pictures are turned upright by EXIF: "
                f"{_names(split, others)}; contact_sheet.png shows whether their masks are, too",
                "",
            )


def check_people(splits: Splits) -> Iterator[Verdict]:
    """Who is on the pictures, and whether anybody is."""
    for split in splits:
        shares = split.pictures.catalog.person_share
        shown = shares[shares > 0]
        if not len(shown):
            yield (
                "error",
                f"{split.name}: no mask shows a person",
                "are these the right masks? white or 1 is person, in COCO the category 'person'",
            )
            continue
        negatives = int(is_negative(split.pictures.catalog).sum())
        median = float(np.median(shown))
        yield (
            "ok",
            f"{split.name}: people cover {median:.0%} of the frame (median), from "
            f"{shown.min():.1%} to {shown.max():.0%}; {negatives} pictures without people",
            "",
        )
        if median < _TINY_PEOPLE:
            yield (
                "note",
                f"{split.name}: most people are tiny",
                "--set data.person_area=[0.05,1] leaves out pictures where they are",
            )
        if not negatives and split.name == "train":
            yield (
                "note",
                "train: every picture shows people, so nobody learns to say that there is none",
                "add pictures without people if you will use it on such",
            )


def check_masks(splits: Splits) -> Iterator[Verdict]:
    """What the masks consist of, and those that cover all."""
    for split in splits:
        if not split.looks:
            continue
        person = float(np.mean([look.person for look in split.looks]))
        ignored = float(np.mean([look.ignored for look in split.looks]))
        shares = (
            f"{split.name}: {1 - person - ignored:.1%} of all pixels are background, "
            f"{person:.1%} person, {ignored:.1%} ignored"
        )
        full = [look.index for look in split.looks if look.person > _FULL]
        if len(full) == len(split.looks):
            yield (
                "error",
                f"{split.name}: every mask covers all of its picture",
                "are these masks? background is 0 or black",
            )
        elif full:
            many = len(full) > tolerated(len(split.looks))
            yield (
                "warning" if many else "note",
                f"{split.name}: {len(full)} masks cover more than {_FULL:.0%} of their picture: "
                f"{_names(split, full)}",
                "look at them: a mask that covers all teaches little",
            )
        if ignored > _MUCH_IGNORED:
            yield "warning", f"{shares}: much is ignored", "look at contact_sheet.png: gray is"
        else:
            yield "ok", shares, ""


def check_inverted(splits: Splits) -> Iterator[Verdict]:
    """People stand inside a picture, backgrounds reach its edges."""
    for split in splits:
        noted = next((note for note in split.pictures.notes if _INVERTED_NOTE in note), None)
        partial = [look for look in split.looks if 0 < look.person <= _FULL]
        border = float(np.median([look.border for look in partial])) if partial else 0.0
        if noted is not None:
            message, _, remedy = noted.partition("; ")
            yield "warning", f"{split.name}: {message}", remedy
        elif border > _INVERTED_BORDER:
            yield (
                "warning",
                f"{split.name}: masks look inverted: of the pictures' edges {border:.0%} are "
                f"person (median), first {_names(split, [partial[0].index])}",
                "look at contact_sheet.png; for folders of masks --set data.invert_masks=true",
            )


def check_duplicates(splits: Splits) -> Iterator[Verdict]:
    """Pictures of the validation that were trained on."""
    by_name = {split.name: split for split in splits}
    if by_name.keys() != {"train", "val"}:
        return
    train, val = by_name["train"], by_name["val"]
    pairs = [
        (train.looks[j], val.looks[i])
        for i, j in near_duplicates(
            [look.print for look in val.looks], [look.print for look in train.looks]
        )
    ]
    if not pairs:
        yield "ok", "no picture of val resembles one of train", ""
        return
    named = ", ".join(f"{train.name_of(a.index)} = {val.name_of(b.index)}" for a, b in pairs[:5])
    yield (
        "warning",
        f"{len(pairs)} of {_seen(val)} of val are also in train: {named}{_more(len(pairs))}",
        "take them out of one: the validation would praise learning by heart",
    )


def check_same_names(splits: Splits) -> Iterator[Verdict]:
    """The very same entry in both splits, also among pictures that were not looked at."""
    by_name = {split.name: split for split in splits}
    if by_name.keys() != {"train", "val"}:
        return
    train, val = (by_name[name].pictures.catalog.identities for name in ("train", "val"))
    _, in_train, in_val = np.intersect1d(train, val, return_indices=True)
    if not len(in_val):
        return
    # Names may be given anew in each split: whether they mean the same pictures is looked at.
    compared = np.linspace(0, len(in_val) - 1, min(_MOST_COMPARED, len(in_val))).astype(int)
    same = [
        int(in_val[i])
        for i in compared
        if _same_picture(by_name["train"], int(in_train[i]), by_name["val"], int(in_val[i]))
    ]
    if same:
        yield (
            "warning",
            f"{len(in_val)} pictures have the same name and size in both splits, and "
            f"{len(same)} of {len(compared)} compared are the same: {_names(by_name['val'], same)}",
            "take them out of one: the validation would praise learning by heart",
        )
    else:
        yield "note", f"{len(in_val)} names are in both splits, for different pictures", ""


# A new check is one function and one row.
DATA_CHECKS: dict[str, Callable[[Splits], Iterable[Verdict]]] = {
    "pictures": check_pictures,
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


def _same_picture(a: Split, index_in_a: int, b: Split, index_in_b: int) -> bool:
    try:
        first, second = (
            fingerprint(split.pictures.sample(index, SHORT_SIDE).image)
            for split, index in ((a, index_in_a), (b, index_in_b))
        )
    except DataError:  # the check of damaged pictures tells
        return False
    return any(near_duplicates([first], [second]))


def _seen(split: Split) -> str:
    """How many pictures were looked at, and whether that is all of them."""
    if split.num_looked == len(split.pictures):
        return f"{split.num_looked} pictures"
    return f"{split.num_looked} pictures (of {len(split.pictures)}, evenly chosen)"


def _names(split: Split, indices: Iterable[int]) -> str:
    """The first few by name."""
    indices = list(indices)
    return ", ".join(map(split.name_of, indices[:_NAMED])) + _more(len(indices))


def _more(number: int) -> str:
    return ", ..." if number > _NAMED else ""
