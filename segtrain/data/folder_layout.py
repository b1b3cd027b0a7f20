"""Which files of a folder of masks belong together, and to which split.

    people/images/a.jpg   people/masks/a.png      and, if there are any, people/train.txt, val.txt
    people/train/images, people/train/masks       people/val/images, people/val/masks
    people/images/train, people/masks/train       people/images/val, people/masks/val

Without lists and without folders for the splits, a tenth of the names are for validation: which
ones depends on the name alone, so adding pictures moves none to the other side.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from segtrain.classes import IGNORE, PERSON
from segtrain.data.sample import identity, tolerated
from segtrain.errors import DataError
from segtrain.images import IMAGE_SUFFIXES, find_images

_VALIDATION_SHARE = 10  # one in so many


@dataclass(frozen=True)
class Pair:
    """A picture and its mask.

    stem: the picture's place in its split, with plain slashes and without suffix.
    num_bytes: of the picture. stamp: changes when one of the two files does.
    """

    stem: str
    picture: Path
    mask: Path
    num_bytes: int
    stamp: str


def is_folder(root: Path) -> bool:
    """Whether `root` holds images and masks in one of the layouts."""
    places = (root, root / "train", root / "val")
    return any((p / "images").is_dir() and (p / "masks").is_dir() for p in places)


def find_pairs(root: Path, split: str, skipped: Counter[str]) -> list[Pair]:
    """The pairs of a split, sorted by name.

    Args:
        skipped: counts pictures without mask and the like.

    Raises:
        DataError: the split is not there, a name is ambiguous, or more than 1 % have no partner.
    """
    images, masks, in_split_folder = _places(root, split)
    pictures, mask_files = _by_stem(images), _by_stem(masks)
    wanted = set(pictures) | set(mask_files)
    if not in_split_folder:
        wanted &= _names_of(root, split, wanted, skipped)
    _check_partners(images, wanted, pictures, mask_files, skipped)
    stems = sorted(stem for stem in wanted if stem in pictures and stem in mask_files)
    if not stems:
        raise DataError(f"{root} has no pictures for {split}; add some or name them in {split}.txt")
    return [_pair(stem, pictures[stem], mask_files[stem]) for stem in stems]


def _places(root: Path, split: str) -> tuple[Path, Path, bool]:
    """Folders of pictures and masks, and whether they hold this split alone."""
    for inner in (root / "train", root / "val"):
        if (inner / "images").is_dir():
            base = root / split
            places = base / "images", base / "masks", True
            break
    else:
        if any((root / "images" / name).is_dir() for name in ("train", "val")):
            places = root / "images" / split, root / "masks" / split, True
        else:
            places = root / "images", root / "masks", False
    for place in places[:2]:
        if not place.is_dir():
            raise DataError(f"{place} is missing; put the pictures or masks of {split} there")
    return places


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in find_images(folder):
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in found:
            raise DataError(f"{path} and {found[stem].name} have the same name; rename one")
        found[stem] = path
    return found


def _names_of(root: Path, split: str, known: set[str], skipped: Counter[str]) -> set[str]:
    """The names of a split by train.txt and val.txt, or by their hash."""
    listed = {name: _read_list(root / f"{name}.txt") for name in ("train", "val")}
    own, other = listed[split], listed["val" if split == "train" else "train"]
    if own is not None and other is not None and own & other:
        both = sorted(own & other)
        raise DataError(
            f"{root}: {len(both)} names are in train.txt and val.txt, first "
            f"{', '.join(both[:5])}; remove them from one"
        )
    if own is not None:
        unknown = sorted(own - known)
        _tolerate(unknown, len(own), f"listed in {root / split}.txt but not there", skipped)
        return own
    if other is not None:
        return known - other
    return {name for name in known if _is_validation(name) == (split == "val")}


def _read_list(path: Path) -> set[str] | None:
    """Names without suffix, one a line; None where there is no such list."""
    if not path.is_file():
        return None
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise DataError(f"{path} is no list of names in UTF-8; mend it") from None
    names = set()
    for line in map(str.strip, lines):
        stem, suffix = os.path.splitext(line)  # noqa: PTH122, a name and no path of this machine
        names.add(stem if suffix.lower() in IMAGE_SUFFIXES else line)
    return names - {""}


def _is_validation(stem: str) -> bool:
    return identity("split", stem) % _VALIDATION_SHARE == 0


def _check_partners(
    images: Path,
    wanted: set[str],
    pictures: dict[str, Path],
    masks: dict[str, Path],
    skipped: Counter[str],
) -> None:
    without_mask = sorted(stem for stem in wanted if stem in pictures and stem not in masks)
    without_picture = sorted(stem for stem in wanted if stem in masks and stem not in pictures)
    hint = ""
    if ending := _common_ending(without_picture, pictures):
        hint = f" (masks end in {ending!r}: rename them without it)"
    total = len(wanted)
    _tolerate(without_mask, total, f"in {images} without a mask{hint}", skipped)
    _tolerate(without_picture, total, f"masks without a picture in {images}{hint}", skipped)


def _common_ending(masks: list[str], pictures: Iterable[str]) -> str:
    """What all these masks have behind the name of a picture; empty if there is no such thing."""
    if not masks:
        return ""
    known = max((name for name in pictures if masks[0].startswith(name)), key=len, default=masks[0])
    ending = masks[0].removeprefix(known)
    return ending if all(mask.endswith(ending) for mask in masks) else ""


def _tolerate(names: list[str], total: int, what: str, skipped: Counter[str]) -> None:
    """Count a few; many are an error."""
    if len(names) > tolerated(total):
        raise DataError(
            f"{len(names)} of {total} are {what}, first {', '.join(names[:5])}; "
            "a mask has the name of its picture"
        )
    if names:
        skipped[f"{what}: {names[0]}"] = len(names)


def _pair(stem: str, picture: Path, mask: Path) -> Pair:
    stats = picture.stat(), mask.stat()
    stamp = " ".join(f"{s.st_size} {s.st_mtime_ns}" for s in stats)
    return Pair(stem, picture, mask, stats[0].st_size, stamp)


def _from_hex(text: Any) -> int:
    if not isinstance(text, str):
        raise ValueError("no hex digits")
    return int(text, 16)


class KnownPicture(BaseModel):
    """What `segtrain prepare` has written down of a picture."""

    identity: Annotated[int, BeforeValidator(_from_hex), Field(ge=0, lt=2**64)]
    num_people: Annotated[int, Field(ge=0, lt=2**31)]
    has_crowd: bool


class MaskValues(BaseModel):
    """The gray levels of a prepared folder's masks."""

    background: Annotated[int, Field(ge=0, le=255)]
    person: Annotated[int, Field(ge=0, le=255)]
    ignore: Annotated[int, Field(ge=0, le=255)]


class Manifest(BaseModel):
    """manifest.json of a prepared folder."""

    mask_values: MaskValues
    pictures: dict[str, KnownPicture] = {}

    def table(self) -> npt.NDArray[np.uint8]:
        """From a gray level to BACKGROUND, PERSON or IGNORE: 256 uint8."""
        table = np.zeros(256, dtype=np.uint8)
        table[self.mask_values.person] = PERSON
        table[self.mask_values.ignore] = IGNORE
        return table


def read_manifest(root: Path) -> Manifest | None:
    """What `segtrain prepare` has left; None where the folder was made otherwise.

    Raises:
        DataError: there is a manifest and it is damaged.
    """
    path = root / "manifest.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        if not (isinstance(content, dict) and "mask_values" in content):
            return None  # somebody else's
        return Manifest.model_validate(content)
    except (OSError, ValueError, RecursionError) as error:
        reason = "its content" if isinstance(error, ValidationError) else "it is no JSON"
        raise DataError(
            f"{path} is damaged ({reason}); prepare the folder anew or remove it"
        ) from None
