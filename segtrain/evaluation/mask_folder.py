"""Masks that any other tool wrote, found by the names of the pictures and read as probabilities."""

from pathlib import Path

import numpy as np
from PIL import Image

from segtrain.errors import DataError
from segtrain.evaluation.picture import Probs
from segtrain.images import FORMATS, decoding, find_images

# What segtrain predict adds to the name of a picture.
_ENDING = "_mask"


class MaskFolder:
    """Finds the mask of a picture.

    Args:
        folder: of masks, searched to the bottom.

    Raises:
        DataError: there is no such folder, or no picture in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder; --predictions takes a folder of masks")
        self._paths: dict[str, list[Path]] = {}
        for path in find_images(folder):
            stem = path.relative_to(folder).with_suffix("").as_posix()
            for name in {stem, stem.removesuffix(_ENDING)}:
                self._paths.setdefault(name, []).append(path)
        if not self._paths:
            raise DataError(f"there are no masks in {folder}; give the folder that they are in")

    def missing(self, stems: list[str]) -> list[str]:
        """Those of the pictures' names that have no mask."""
        return [stem for stem in stems if stem not in self._paths]

    def probs(self, stem: str, size: tuple[int, int]) -> Probs:
        """What the mask of one picture says.

        Args:
            stem: the picture's name in its split, with plain slashes and without suffix; the mask's
                may end in `_mask` besides.
            size: height and width that it must have.

        Returns:
            H W float32 in 0..1.

        Raises:
            DataError: the mask is damaged, of another size, or there are two of that name.
        """
        path = self._only(stem)
        probs = read_probs(path)
        if probs.shape != size:
            raise DataError(
                f"{path} has {probs.shape[1]}x{probs.shape[0]} pixels, its picture "
                f"{size[1]}x{size[0]}; masks are judged at the pictures' own size"
            )
        return probs

    def _only(self, stem: str) -> Path:
        paths = self._paths[stem]
        if len(paths) > 1:
            raise DataError(
                f"{paths[0]} and {paths[1].name} are both masks of {stem}; remove one of them"
            )
        return paths[0]


def read_probs(path: Path) -> Probs:
    """The probability of person that a picture file stands for: H W float32 in 0..1.

    A cut-out's alpha channel; else gray, from black to white; or, where no value is above 1, the
    classes 0 and 1. Gray with an alpha channel that hides nothing is gray.

    Raises:
        DataError: the file is missing, no picture, damaged or too large.
    """
    with decoding(path), Image.open(path, formats=FORMATS) as picture:
        picture.load()
        levels, white = _levels(picture)
    return levels / np.float32(1 if levels.max() <= 1 else white)


def _levels(picture: Image.Image) -> tuple[Probs, int]:
    """H W float32 of whole numbers, and which of them is white."""
    if picture.mode == "F":
        raise ValueError("its values are neither of 8 nor of 16 bits")
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        return np.asarray(picture, dtype=np.float32), 65535
    if picture.has_transparency_data:
        rgba = np.asarray(picture.convert("RGBA"))
        is_gray = (rgba[..., :3].max(axis=2) == rgba[..., :3].min(axis=2)).all()
        hides = rgba[..., 3].min() < 255
        return rgba[..., 0 if is_gray and not hides else 3].astype(np.float32), 255
    if picture.mode in {"P", "1"}:
        return (np.asarray(picture) != 0).astype(np.float32), 1
    return np.asarray(picture.convert("L"), dtype=np.float32), 255
