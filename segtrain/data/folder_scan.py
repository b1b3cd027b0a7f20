"""A look at every pair of a folder of masks, kept in the cache by names, sizes and times."""

import hashlib
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from segtrain.data.cache import Arrays, cached_arrays
from segtrain.data.folder_layout import Pair
from segtrain.data.mask_files import Facts, Kind, facts_of, load_mask
from segtrain.data.threads import in_threads
from segtrain.errors import DataError
from segtrain.images import FORMATS, decoding, is_plain_jpeg

SCAN_VERSION = 1

FINE, OTHER_SIZE, DAMAGED, PHOTO = range(4)
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width


@dataclass(frozen=True)
class Scan:
    """What a look at every pair has found; arrays of a row a pair.

    status: FINE or what is wrong. sizes: N 2, height and width of the sample. upright: whether the
    picture has to be turned as its EXIF orientation says. plain: whether it is a JPEG that needs no
    second look before it is decoded. The others are those of `Facts`.
    """

    status: npt.NDArray[np.uint8]
    sizes: npt.NDArray[np.int32]
    upright: npt.NDArray[np.bool_]
    plain: npt.NDArray[np.bool_]
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


def digest_of(pairs: list[Pair]) -> str:
    """Of names, sizes and times: an edited file is looked at anew."""
    sha = hashlib.sha256()
    for pair in pairs:
        sha.update(f"{pair.picture}\0{pair.mask}\0{pair.num_bytes}\0{pair.stamp}\n".encode(
            "utf-8", "surrogateescape"
        ))  # fmt: skip
    return sha.hexdigest()


def scan_pairs(pairs: list[Pair], digest: str) -> Scan:
    """Look at every pair, or take what the cache holds of the same files."""

    def scan() -> Arrays:
        n = len(pairs)
        found = Scan(
            status=np.zeros(n, dtype=np.uint8),
            sizes=np.zeros((n, 2), dtype=np.int32),
            upright=np.ones(n, dtype=bool),
            plain=np.zeros(n, dtype=bool),
            kind=np.zeros(n, dtype=np.uint8),
            present=np.zeros((n, 256), dtype=bool),
            extremes=np.zeros(n, dtype=np.float32),
            border=np.zeros(n, dtype=np.float32),
            middle=np.zeros(n, dtype=np.float32),
        )
        looks = in_threads(lambda row: _look_at(pairs[row], row, found), range(n), desc="scanning")
        deque(looks, maxlen=0)
        return vars(found)

    kept: dict[str, Any] = dict(cached_arrays(f"folder-v{SCAN_VERSION}-{digest}", scan))
    return Scan(**kept)


def _look_at(pair: Pair, row: int, found: Scan) -> None:
    """Fill in one row."""
    try:
        mask = load_mask(pair.mask)
        with decoding(pair.picture), Image.open(pair.picture, formats=FORMATS) as picture:
            stored = picture.height, picture.width
            orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
            plain = is_plain_jpeg(picture, upright=True)
    except DataError:
        found.status[row] = DAMAGED
        return
    upright = stored[::-1] if orientation in _TURNED else stored
    if mask.levels.shape not in {stored, upright}:
        found.status[row] = OTHER_SIZE
        return
    facts = facts_of(mask)
    if facts.kind == Kind.PHOTO:
        found.status[row] = PHOTO
    found.sizes[row] = mask.levels.shape
    # Of a square picture, or one turned by 180 degrees, the mask lies on the upright one.
    found.upright[row] = mask.levels.shape == upright
    found.plain[row] = plain
    found.kind[row], found.present[row] = facts.kind, facts.present
    found.extremes[row], found.border[row] = facts.extremes, facts.border
    found.middle[row] = facts.middle
