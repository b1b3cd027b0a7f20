"""Masks that any other tool wrote, found by the names of the pictures and read as probabilities."""

from collections.abc import Iterable
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

    def holds_classes(self, stems: Iterable[str]) -> bool:
        """Whether the masks of these pictures hold the classes 0 and 1, for none has a level above.

        One mask alone cannot tell: a soft one in which hardly anything is seen may end at 1, too.

        Raises:
            DataError: a mask is damaged, or there are two of one name.
        """
        return all(read_levels(self._only(stem))[0].max() <= 1 for stem in stems)

    def probs(self, stem: str, size: tuple[int, int], *, classes: bool) -> Probs:
        """What the mask of one picture says.

        Args:
            stem: the picture's name in its split, with plain slashes and without suffix; the mask's
                may end in `_mask` besides.
            size: height and width that it must have.
            classes: as `holds_classes` found.

        Returns:
            H W float32 in 0..1.

        Raises:
            DataError: the mask is damaged, of another size, or there are two of that name.
        """
        path = self._only(stem)
        levels, white = read_levels(path)
        if levels.shape != size:
            raise DataError(
                f"{path} has {levels.shape[1]}x{levels.shape[0]} pixels, its picture "
                f"{size[1]}x{size[0]}; masks are judged at the pictures' own size"
            )
        return levels / np.float32(1 if classes else white)

    def _only(self, stem: str) -> Path:
        paths = self._paths[stem]
        if len(paths) > 1:
            raise DataError(
                f"{paths[0]} and {paths[1].name} are both masks of {stem}; remove one of them"
            )
        return paths[0]


def read_levels(path: Path) -> tuple[Probs, int]:
    """A cut-out's alpha channel, else gray: H W float32 of whole numbers, and which one is white.

    Gray with an alpha channel that hides nothing is gray. Of a palette, whatever is not the first
    colour is white.

    Raises:
        DataError: the file is missing, no picture, damaged or too large.
    """
    with decoding(path), Image.open(path, formats=FORMATS) as picture:
        picture.load()
        return _levels(picture)


def _levels(picture: Image.Image) -> tuple[Probs, int]:
    if picture.mode == "F":
        raise ValueError("its values are neither of 8 nor of 16 bits")
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        levels = np.asarray(picture, dtype=np.float32)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("its values are neither of 8 nor of 16 bits")
        return levels, 65535
    if picture.has_transparency_data:
        rgba = np.asarray(picture.convert("RGBA"))
        is_gray = (rgba[..., :3].max(axis=2) == rgba[..., :3].min(axis=2)).all()
        hides = rgba[..., 3].min() < 255
        return rgba[..., 0 if is_gray and not hides else 3].astype(np.float32), 255
    if picture.mode in {"P", "1"}:
        return (np.asarray(picture) != 0).astype(np.float32), 1
    return np.asarray(picture.convert("L"), dtype=np.float32), 255
