"""Check every pair of a folder of masks; results are cached by names, sizes and times."""

import hashlib
from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from segtrain.data.mask_folder.encoding import MaskKind, MaskStats, load_mask, mask_stats
from segtrain.data.mask_folder.layout import ImageMaskPair
from segtrain.errors import DataError
from segtrain.imaging.images import FORMATS, is_plain_jpeg, map_decode_errors
from segtrain.runtime.cache import Arrays, cached_arrays
from segtrain.runtime.thread_map import thread_map

SCAN_VERSION = 1

_ROTATED = (5, 6, 7, 8)  # EXIF orientations that swap height and width


class PairStatus(IntEnum):
    """Whether a pair is usable; UNNAMED_VALUES is set by the dataset and not by the scan."""

    OK = 0
    OTHER_SIZE = 1
    DAMAGED = 2
    PHOTO = 3
    UNNAMED_VALUES = 100


@dataclass(frozen=True)
class FolderScan:
    """Results for every pair; arrays with one row per pair.

    status: `PairStatus`. sizes: N 2, height and width of the sample. upright: whether to apply the
    EXIF orientation to the image. plain: whether the image is a JPEG that can be decoded without
    another check. The others are the fields of `MaskStats`.
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

    def stats(self, row: int) -> MaskStats:
        return MaskStats(
            kind=MaskKind(int(self.kind[row])),
            present=self.present[row],
            extremes=float(self.extremes[row]),
            border=float(self.border[row]),
            middle=float(self.middle[row]),
        )


def pairs_digest(pairs: list[ImageMaskPair]) -> str:
    """Hash names, sizes and times, so that an edited file is scanned again."""
    sha = hashlib.sha256()
    for pair in pairs:
        sha.update(f"{pair.image}\0{pair.mask}\0{pair.num_bytes}\0{pair.stamp}\n".encode(
            "utf-8", "surrogateescape"
        ))  # fmt: skip
    return sha.hexdigest()


def scan_pairs(pairs: list[ImageMaskPair], digest: str) -> FolderScan:
    """Check every pair, or load the cached result for the same files."""

    def scan() -> Arrays:
        n = len(pairs)
        result = FolderScan(
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
        scans = thread_map(
            lambda row: _scan_pair(pairs[row], row, result), range(n), desc="scanning"
        )
        deque(scans, maxlen=0)
        return vars(result)

    arrays: dict[str, Any] = dict(cached_arrays(f"folder-v{SCAN_VERSION}-{digest}", scan))
    return FolderScan(**arrays)


def _scan_pair(pair: ImageMaskPair, row: int, result: FolderScan) -> None:
    """Fill in one row."""
    try:
        mask = load_mask(pair.mask)
        with map_decode_errors(pair.image), Image.open(pair.image, formats=FORMATS) as image:
            stored = image.height, image.width
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            plain = is_plain_jpeg(image, upright=True)
    except DataError:
        result.status[row] = PairStatus.DAMAGED
        return
    upright = stored[::-1] if orientation in _ROTATED else stored
    if mask.levels.shape not in {stored, upright}:
        result.status[row] = PairStatus.OTHER_SIZE
        return
    stats = mask_stats(mask)
    if stats.kind == MaskKind.PHOTO:
        result.status[row] = PairStatus.PHOTO
    result.sizes[row] = mask.levels.shape
    # If the image is square or rotated by 180 degrees, the mask belongs to the upright image.
    result.upright[row] = mask.levels.shape == upright
    result.plain[row] = plain
    result.kind[row], result.present[row] = stats.kind, stats.present
    result.extremes[row], result.border[row] = stats.extremes, stats.border
    result.middle[row] = stats.middle
