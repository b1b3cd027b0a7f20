"""Pair the files of a folder of masks, and assign them to splits.

    people/images/a.jpg   people/masks/a.png      and, optionally, people/train.txt, val.txt
    people/train/images, people/train/masks       people/val/images, people/val/masks
    people/images/train, people/masks/train       people/images/val, people/masks/val

Without lists and without folders for the splits, a tenth of the names is for validation. The choice
depends only on the name, so new images do not move existing ones to the other split.
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

from segtrain.data.sample import identity_hash, max_bad_samples
from segtrain.errors import DataError
from segtrain.imaging.images import IMAGE_SUFFIXES, find_images
from segtrain.types import IGNORE, PERSON

_VAL_DIVISOR = 10  # one name in ten


@dataclass(frozen=True)
class ImageMaskPair:
    """An image and its mask.

    name: path of the image in its split, with forward slashes and without suffix.
    num_bytes: size of the image file. stamp: changes when either file changes.
    """

    name: str
    image: Path
    mask: Path
    num_bytes: int
    stamp: str


def is_mask_folder(root: Path) -> bool:
    """Whether `root` holds images and masks in one of the layouts."""
    folders = (root, root / "train", root / "val")
    return any((f / "images").is_dir() and (f / "masks").is_dir() for f in folders)


def find_pairs(root: Path, split: str, skipped: Counter[str]) -> list[ImageMaskPair]:
    """Find the pairs of a split, sorted by name.

    Args:
        skipped: counts unpaired and unlisted files.

    Raises:
        DataError: the split is missing, a name is ambiguous, or more than 1 % of the files have no
            partner.
    """
    image_dir, mask_dir, is_split_dir = _find_folders(root, split)
    images, masks = _files_by_name(image_dir), _files_by_name(mask_dir)
    names = set(images) | set(masks)
    if not is_split_dir:
        names &= _split_names(root, split, names, skipped)
    _check_partners(image_dir, names, images, masks, skipped)
    paired = sorted(name for name in names if name in images and name in masks)
    if not paired:
        raise DataError(
            f"{root} has no images for {split}", f"add some or list them in {split}.txt"
        )
    return [_make_pair(name, images[name], masks[name]) for name in paired]


def _find_folders(root: Path, split: str) -> tuple[Path, Path, bool]:
    """Return the folders of images and masks, and whether they contain only this split."""
    is_split_dir = True
    if any((root / name / "images").is_dir() for name in ("train", "val")):
        image_dir, mask_dir = root / split / "images", root / split / "masks"
    elif any((root / "images" / name).is_dir() for name in ("train", "val")):
        image_dir, mask_dir = root / "images" / split, root / "masks" / split
    else:
        image_dir, mask_dir, is_split_dir = root / "images", root / "masks", False
    for folder in (image_dir, mask_dir):
        if not folder.is_dir():
            raise DataError(f"{folder} is missing", f"put the images or masks of {split} there")
    return image_dir, mask_dir, is_split_dir


def _files_by_name(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in find_images(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in files:
            raise DataError(f"{path} and {files[name].name} have the same name", "rename one")
        files[name] = path
    return files


def _split_names(root: Path, split: str, known: set[str], skipped: Counter[str]) -> set[str]:
    """Return the names of a split by train.txt and val.txt, or by their hash."""
    listed = {name: _read_list(root / f"{name}.txt") for name in ("train", "val")}
    own, other = listed[split], listed["val" if split == "train" else "train"]
    if own is not None and other is not None and own & other:
        both = sorted(own & other)
        raise DataError(
            f"{root}: {len(both)} names are in both train.txt and val.txt, first "
            f"{', '.join(both[:5])}",
            "remove them from one",
        )
    if own is not None:
        unknown = sorted(own - known)
        _count_or_raise(unknown, len(own), f"listed in {root / split}.txt but missing", skipped)
        return own
    if other is not None:
        return known - other
    return {name for name in known if _is_validation(name) == (split == "val")}


def _read_list(path: Path) -> set[str] | None:
    """Read names without suffix, one per line; None if the list does not exist."""
    if not path.is_file():
        return None
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise DataError(f"{path} is not a list of names in UTF-8", "fix it") from None
    names = set()
    for line in map(str.strip, lines):
        name, suffix = os.path.splitext(line)  # noqa: PTH122, a name and not a path on this machine
        names.add(name if suffix.lower() in IMAGE_SUFFIXES else line)
    return names - {""}


def _is_validation(name: str) -> bool:
    return identity_hash("split", name) % _VAL_DIVISOR == 0


def _check_partners(
    image_dir: Path,
    names: set[str],
    images: dict[str, Path],
    masks: dict[str, Path],
    skipped: Counter[str],
) -> None:
    without_mask = sorted(name for name in names if name in images and name not in masks)
    without_image = sorted(name for name in names if name in masks and name not in images)
    suffix = _common_suffix(without_image, images)
    hint = f" (masks end in {suffix!r}: rename them without it)" if suffix else ""
    total = len(names)
    _count_or_raise(without_mask, total, f"in {image_dir} without a mask{hint}", skipped)
    _count_or_raise(without_image, total, f"masks without an image in {image_dir}{hint}", skipped)


def _common_suffix(masks: list[str], images: Iterable[str]) -> str:
    """Return what all of these masks append to the name of an image; empty if nothing."""
    if not masks:
        return ""
    known = max((name for name in images if masks[0].startswith(name)), key=len, default=masks[0])
    suffix = masks[0].removeprefix(known)
    return suffix if all(mask.endswith(suffix) for mask in masks) else ""


def _count_or_raise(names: list[str], total: int, what: str, skipped: Counter[str]) -> None:
    """Count up to 1 % of the names as skipped; more is an error."""
    if len(names) > max_bad_samples(total):
        raise DataError(
            f"{len(names)} of {total} are {what}, first {', '.join(names[:5])}",
            "a mask must have the name of its image",
        )
    if names:
        skipped[f"{what}: {names[0]}"] = len(names)


def _make_pair(name: str, image: Path, mask: Path) -> ImageMaskPair:
    stats = image.stat(), mask.stat()
    stamp = " ".join(f"{s.st_size} {s.st_mtime_ns}" for s in stats)
    return ImageMaskPair(name, image, mask, stats[0].st_size, stamp)


def _from_hex(text: Any) -> int:
    if not isinstance(text, str):
        raise ValueError("not a string of hex digits")
    return int(text, 16)


class ManifestImage(BaseModel):
    """Metadata that `segtrain prepare` stores for an image."""

    identity: Annotated[int, BeforeValidator(_from_hex), Field(ge=0, lt=2**64)]
    num_people: Annotated[int, Field(ge=0, lt=2**31)]
    has_crowd: bool


class MaskValues(BaseModel):
    """Gray levels of the masks of a prepared folder."""

    background: Annotated[int, Field(ge=0, le=255)]
    person: Annotated[int, Field(ge=0, le=255)]
    ignore: Annotated[int, Field(ge=0, le=255)]


class Manifest(BaseModel):
    """manifest.json of a prepared folder."""

    mask_values: MaskValues
    images: dict[str, ManifestImage] = {}

    def lookup_table(self) -> npt.NDArray[np.uint8]:
        """Map gray levels to BACKGROUND, PERSON or IGNORE: 256 uint8."""
        table = np.zeros(256, dtype=np.uint8)
        table[self.mask_values.person] = PERSON
        table[self.mask_values.ignore] = IGNORE
        return table


def read_manifest(root: Path) -> Manifest | None:
    """Read the manifest of `segtrain prepare`; None if the folder was not made by it.

    Raises:
        DataError: the manifest is damaged.
    """
    path = root / "manifest.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        if not (isinstance(content, dict) and "mask_values" in content):
            return None  # the manifest of another program
        return Manifest.model_validate(content)
    except (OSError, ValueError, RecursionError) as error:
        reason = "invalid content" if isinstance(error, ValidationError) else "not JSON"
        raise DataError(
            f"{path} is damaged ({reason})", "prepare the folder again or remove the file"
        ) from None
