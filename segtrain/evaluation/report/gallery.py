"""The small files that the gallery of a report shows, written while the pictures are judged."""

from pathlib import Path

import cv2
import numpy as np

from segtrain.data.sample import Source
from segtrain.evaluation.picture import Probs
from segtrain.evaluation.report.folder import PAGE, Kind, picture_path
from segtrain.evaluation.report.layers import (
    ERROR_COLOURS,
    PREDICTION_COLOURS,
    TRUTH_COLOURS,
    encode_labels,
    error_labels,
    truth_labels,
)
from segtrain.files import atomic_write
from segtrain.images import Pixels, encode_image, resize_image

PHOTO_SIDE, THUMB_SIDE = 640, 288
"""Longest side of what is shown large and of what is shown in the gallery, pixels."""
_PHOTO_QUALITY, _THUMB_QUALITY = 82, 78


class Gallery:
    """Writes five files for each picture and keeps nothing, so memory does not grow with them.

    Several threads, and several processes with a gallery each, may add to the same folder.
    """

    def __init__(self, folder: Path, source: Source, threshold: float) -> None:
        """
        Args:
            folder: of the report.
            source: where the pictures come from.
            threshold: from which probability on a pixel is called person.
        """
        self._folder, self._source, self._threshold = folder, source, threshold
        # The page of an earlier report would show new pictures beside old numbers.
        (folder / PAGE).unlink(missing_ok=True)

    def add(self, index: int, probs: Probs, mask: Pixels) -> None:
        """Write the files of one picture.

        Args:
            index: its number in the source.
            probs: H W float32 in 0..1, probability of person.
            mask: H W uint8 in {0, 1, 255}.

        Raises:
            ResourceError: the folder cannot be written.
            DataError: the picture cannot be read any more.
        """
        size = shown_size(mask.shape[0], mask.shape[1], PHOTO_SIDE)
        # In float32, as it was judged.
        predicted = _shrunk((probs >= np.float32(self._threshold)).view(np.uint8), size)
        truth = _shrunk(mask, size)
        self._write(index, "truth", encode_labels(truth_labels(truth), TRUTH_COLOURS))
        self._write(index, "prediction", encode_labels(predicted, PREDICTION_COLOURS))
        self._write(index, "errors", encode_labels(error_labels(predicted, truth), ERROR_COLOURS))

        # A large JPEG is decoded small, which costs a fraction.
        smaller = min(size) if size != mask.shape else None
        photo = resize_image(self._source.sample(index, smaller).image, size)
        thumb = resize_image(photo, shown_size(*size, THUMB_SIDE))
        self._write_jpeg(index, "photo", photo, _PHOTO_QUALITY)
        self._write_jpeg(index, "thumb", thumb, _THUMB_QUALITY)

    def _write_jpeg(self, index: int, kind: Kind, pixels: Pixels, quality: int) -> None:
        path = picture_path(self._folder, index, kind)
        self._write(index, kind, encode_image(pixels, path, jpeg_quality=quality))

    def _write(self, index: int, kind: Kind, content: bytes) -> None:
        path = picture_path(self._folder, index, kind)
        with atomic_write(path, durable=False, needs=len(content)) as file:
            file.write(content)


def shown_size(height: int, width: int, longest: int) -> tuple[int, int]:
    """Height and width of a picture that is no longer than `longest`; a small one stays."""
    scale = min(1.0, longest / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _shrunk(labels: Pixels, size: tuple[int, int]) -> Pixels:
    """Each pixel takes the label of the one at its middle: a mean of classes is no class."""
    if labels.shape == size:
        return labels
    shrunk = cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(shrunk, dtype=np.uint8).reshape(size)
