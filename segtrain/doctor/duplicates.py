"""The same picture in both splits, although scaled or encoded again: validation would be a lie."""

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from segtrain.images import Pixels

Hashes = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float32]

THUMBNAIL = 16

# Of 64 bits. Photos at 60 % of their size and JPEG quality 50 differ in 0 to 8.
_NEAR = 8
_ROWS_AT_ONCE = 256
# The second look. Photos of one scene from a burst differ by far more than two encodings of one.
_LEAST_CORRELATION = 0.98
_LARGEST_DIFFERENCE = 8.0
# Flat pictures all look alike, and their hashes are those of their noise.
_LEAST_CONTRAST = 4.0


@dataclass(frozen=True)
class Fingerprint:
    """hash: 64 bits. thumbnail: 16 16 3 uint8, to compare in colour where the hashes agree."""

    hash: int
    thumbnail: Pixels


def fingerprint(image: Pixels) -> Fingerprint:
    """Of H W 3 uint8 RGB: the 64-bit difference hash, bit = brighter than its left neighbour."""
    thumbnail = cv2.resize(image, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    # In float, for in bytes a slight slope would be rounded away.
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    tiny = cv2.resize(gray, (9, 8), interpolation=cv2.INTER_AREA)
    bits = np.packbits(np.diff(tiny, axis=1).ravel() > 0)
    return Fingerprint(int(bits.view(">u8")[0]), np.asarray(thumbnail, dtype=np.uint8))


def near_duplicates(
    ours: list[Fingerprint], theirs: list[Fingerprint]
) -> Iterator[tuple[int, int]]:
    """(i, j) for each picture i of `ours` that is, to the eye, picture j of `theirs`."""
    if not ours or not theirs:
        return
    our_hashes, their_hashes = _hashes(ours), _hashes(theirs)
    their_thumbnails = _thumbnails(theirs)
    for start in range(0, len(ours), _ROWS_AT_ONCE):
        rows = our_hashes[start : start + _ROWS_AT_ONCE, None]
        near = np.bitwise_count(rows ^ their_hashes[None]) <= _NEAR
        for row in np.flatnonzero(near.any(axis=1)):
            i, candidates = start + int(row), np.flatnonzero(near[row])
            alike = _look_alike(_thumbnails([ours[i]]), their_thumbnails[candidates])
            if alike.any():
                yield i, int(candidates[alike.argmax()])


def _hashes(fingerprints: list[Fingerprint]) -> Hashes:
    return np.array([f.hash for f in fingerprints], dtype=np.uint64)


def _thumbnails(fingerprints: list[Fingerprint]) -> Floats:
    """N P float32."""
    stacked = np.stack([f.thumbnail for f in fingerprints])
    return stacked.reshape(len(fingerprints), -1).astype(np.float32)


def _look_alike(picture: Floats, others: Floats) -> npt.NDArray[np.bool_]:
    """Whether 1 P resembles each of N P. Flat pictures resemble nothing: N bool."""
    difference = np.abs(picture - others).mean(axis=1)
    contrast, contrasts = picture.std(axis=1), others.std(axis=1)
    centred, all_centred = (x - x.mean(axis=1, keepdims=True) for x in (picture, others))
    covariance = (centred * all_centred).mean(axis=1)
    flat = np.minimum(contrast, contrasts) < _LEAST_CONTRAST
    correlated = covariance >= _LEAST_CORRELATION * contrast * contrasts
    return np.asarray(correlated & (difference <= _LARGEST_DIFFERENCE) & ~flat)
