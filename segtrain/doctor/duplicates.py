"""Find the same image in both splits, also rescaled or re-encoded: it inflates validation."""

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from segtrain.types import Image

Hashes = npt.NDArray[np.uint64]
Thumbnails = npt.NDArray[np.float32]
"""N P: N flattened thumbnails."""

THUMBNAIL = 16

# Of 64 bits. Photos at 60 % of their size and JPEG quality 50 differ in 0 to 8.
_MAX_HAMMING_DISTANCE = 8
_ROWS_PER_BLOCK = 256
# Second test, on thumbnails. Two photos of one burst differ far more than two encodings of one.
_MIN_CORRELATION = 0.98
_MAX_MEAN_DIFFERENCE = 8.0
# Flat images all resemble each other, and their hashes are hashes of noise.
_MIN_CONTRAST = 4.0


@dataclass(frozen=True)
class Fingerprint:
    """hash: 64 bits. thumbnail: 16 16 3 uint8, compared in color where the hashes agree."""

    hash: int
    thumbnail: Image


def fingerprint(image: Image) -> Fingerprint:
    """64-bit difference hash of H W 3 uint8 RGB: a bit is 1 if brighter than its left neighbor."""
    thumbnail = cv2.resize(image, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    # In float, because uint8 would round a slight slope away.
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    tiny = cv2.resize(gray, (9, 8), interpolation=cv2.INTER_AREA)
    bits = np.packbits(np.diff(tiny, axis=1).ravel() > 0)
    return Fingerprint(int(bits.view(">u8")[0]), np.asarray(thumbnail, dtype=np.uint8))


def near_duplicates(a: list[Fingerprint], b: list[Fingerprint]) -> Iterator[tuple[int, int]]:
    """Yield (i, j) for each image i of `a` that is visually the same as image j of `b`."""
    if not a or not b:
        return
    hashes_a, hashes_b = _stack_hashes(a), _stack_hashes(b)
    thumbnails_b = _stack_thumbnails(b)
    for start in range(0, len(a), _ROWS_PER_BLOCK):
        rows = hashes_a[start : start + _ROWS_PER_BLOCK, None]
        near = np.bitwise_count(rows ^ hashes_b[None]) <= _MAX_HAMMING_DISTANCE
        for row in np.flatnonzero(near.any(axis=1)):
            i, candidates = start + int(row), np.flatnonzero(near[row])
            same = _look_alike(_stack_thumbnails([a[i]]), thumbnails_b[candidates])
            if same.any():
                yield i, int(candidates[same.argmax()])


def _stack_hashes(fingerprints: list[Fingerprint]) -> Hashes:
    return np.array([f.hash for f in fingerprints], dtype=np.uint64)


def _stack_thumbnails(fingerprints: list[Fingerprint]) -> Thumbnails:
    stacked = np.stack([f.thumbnail for f in fingerprints])
    return stacked.reshape(len(fingerprints), -1).astype(np.float32)


def _look_alike(image: Thumbnails, others: Thumbnails) -> npt.NDArray[np.bool_]:
    """Compare 1 P with N P; returns N bool. Flat images never match."""
    difference = np.abs(image - others).mean(axis=1)
    contrast, contrasts = image.std(axis=1), others.std(axis=1)
    centered, all_centered = (x - x.mean(axis=1, keepdims=True) for x in (image, others))
    covariance = (centered * all_centered).mean(axis=1)
    flat = np.minimum(contrast, contrasts) < _MIN_CONTRAST
    correlated = covariance >= _MIN_CORRELATION * contrast * contrasts
    return np.asarray(correlated & (difference <= _MAX_MEAN_DIFFERENCE) & ~flat)
