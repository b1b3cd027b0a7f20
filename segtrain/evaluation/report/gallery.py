"""The gallery of a report: image files, written during evaluation, and the data of the page."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import PIL.Image

from segtrain.data.sample import SegmentationDataset
from segtrain.evaluation.metrics import Floats, image_ious
from segtrain.evaluation.report.paths import PAGE, AssetKind, image_path
from segtrain.evaluation.result import EvalResult
from segtrain.evaluation.slices import person_fractions
from segtrain.imaging.images import encode_image, resize_image
from segtrain.runtime.files import atomic_write
from segtrain.types import BACKGROUND, IGNORE, PERSON, Image, Mask, Probs

PHOTO_SIDE, THUMB_SIDE = 640, 288
"""Longest side of an image in the viewer and in the gallery, in pixels."""
_PHOTO_QUALITY, _THUMB_QUALITY = 82, 78


class Rgba(NamedTuple):
    """Red, green, blue and opacity, 0..255 each."""

    red: int
    green: int
    blue: int
    alpha: int

    @property
    def css(self) -> str:
        """The CSS color without opacity, for the legend."""
        return f"rgb({self.red} {self.green} {self.blue})"


TRANSPARENT = Rgba(0, 0, 0, 0)
# Covers what is not person. A mid-tone, visible on dark and on bright photos.
VEIL = Rgba(96, 104, 120, 216)
# Red and blue, with clearly different lightness: distinguishable with any color vision.
FALSE_NEGATIVE_COLOR = Rgba(230, 44, 22, 205)
FALSE_POSITIVE_COLOR = Rgba(52, 156, 255, 205)
# Ignored pixels are striped, so they need no hue.
STRIPE_COLOR = Rgba(250, 250, 250, 190)
GAP_COLOR = Rgba(40, 44, 52, 190)

# The labels of an error map, which are palette indices. Truth maps use the first two for the
# classes. Ignored pixels are STRIPE or GAP.
CORRECT, FALSE_NEGATIVE, FALSE_POSITIVE, STRIPE, GAP = range(5)
_STRIPE_WIDTH = 5

TRUTH_COLORS = (VEIL, TRANSPARENT, VEIL, STRIPE_COLOR, GAP_COLOR)
PREDICTION_COLORS = (VEIL, TRANSPARENT)
ERROR_COLORS = (TRANSPARENT, FALSE_NEGATIVE_COLOR, FALSE_POSITIVE_COLOR, STRIPE_COLOR, GAP_COLOR)

LEGEND_COLORS = {
    "false-negative": FALSE_NEGATIVE_COLOR.css,
    "false-positive": FALSE_POSITIVE_COLOR.css,
    "stripe": STRIPE_COLOR.css,
    "stripe-gap": GAP_COLOR.css,
    "veil": VEIL.css,
}
"""Name of a CSS variable → its color."""


class Gallery:
    """Writes five files for each image; memory does not grow with the number of images.

    Several threads, and several processes with a gallery each, may write to the same folder.

    Args:
        folder: of the report.
        dataset: the evaluated images.
        threshold: the lowest probability that counts as person.
    """

    def __init__(self, folder: Path, dataset: SegmentationDataset, threshold: float) -> None:
        self._folder, self._dataset, self._threshold = folder, dataset, threshold
        # The page of an earlier report would show new images next to old metrics.
        (folder / PAGE).unlink(missing_ok=True)

    def add(self, index: int, probs: Probs, mask: Mask) -> None:
        """Write the files of one image.

        Args:
            index: of the image in the data set.
            probs: H W float32 in 0..1, probability of person.
            mask: H W uint8 in {0, 1, 255}.

        Raises:
            ResourceError: the folder cannot be written.
            DataError: the image can no longer be read.
        """
        size = fit_size(mask.shape[0], mask.shape[1], PHOTO_SIDE)
        # In float32, as in the evaluation.
        predicted = _downscale((probs >= np.float32(self._threshold)).view(np.uint8), size)
        truth = _downscale(mask, size)
        self._write(index, "truth", encode_labels(truth_labels(truth), TRUTH_COLORS))
        self._write(index, "prediction", encode_labels(predicted, PREDICTION_COLORS))
        self._write(index, "errors", encode_labels(error_labels(predicted, truth), ERROR_COLORS))

        # A large JPEG is decoded at a reduced size, which is much faster.
        short_side = min(size) if size != mask.shape else None
        photo = resize_image(self._dataset.sample(index, short_side).image, size)
        thumb = resize_image(photo, fit_size(*size, THUMB_SIDE))
        self._write_jpeg(index, "photo", photo, _PHOTO_QUALITY)
        self._write_jpeg(index, "thumb", thumb, _THUMB_QUALITY)

    def _write_jpeg(self, index: int, kind: AssetKind, image: Image, quality: int) -> None:
        path = image_path(self._folder, index, kind)
        self._write(index, kind, encode_image(image, path, jpeg_quality=quality))

    def _write(self, index: int, kind: AssetKind, content: bytes) -> None:
        path = image_path(self._folder, index, kind)
        with atomic_write(path, durable=False, needs=len(content)) as file:
            file.write(content)


def truth_labels(mask: Mask) -> Mask:
    """H W uint8: BACKGROUND, PERSON, or STRIPE and GAP for ignored pixels.

    Args:
        mask: H W uint8 in {0, 1, 255}.
    """
    return _stripe_ignored((mask == PERSON).astype(np.uint8), mask)


def error_labels(predicted: Mask, mask: Mask) -> Mask:
    """H W uint8: CORRECT, FALSE_NEGATIVE, FALSE_POSITIVE, or STRIPE and GAP for ignored pixels.

    Args:
        predicted: H W uint8 in {0, 1}.
        mask: H W uint8 in {0, 1, 255}.
    """
    labels = np.full(mask.shape, CORRECT, dtype=np.uint8)
    labels[(mask == PERSON) & (predicted != PERSON)] = FALSE_NEGATIVE
    labels[(mask != PERSON) & (predicted == PERSON)] = FALSE_POSITIVE
    return _stripe_ignored(labels, mask)


def encode_labels(labels: Mask, colors: Sequence[Rgba]) -> bytes:
    """Encode a PNG with the labels as palette indices.

    Args:
        labels: H W uint8, indices of `colors`.
    """
    image = PIL.Image.fromarray(labels)
    image.putpalette([channel for color in colors for channel in color[:3]])
    png = io.BytesIO()
    image.save(png, format="PNG", transparency=bytes(color.alpha for color in colors))
    return png.getvalue()


def _stripe_ignored(labels: Mask, mask: Mask) -> Mask:
    height, width = mask.shape
    diagonal = np.arange(height)[:, None] + np.arange(width)[None, :]
    striped = diagonal // _STRIPE_WIDTH % 2 == 0
    ignored = mask == IGNORE
    labels[ignored & striped] = STRIPE
    labels[ignored & ~striped] = GAP
    return labels


def fit_size(height: int, width: int, max_side: int) -> tuple[int, int]:
    """Height and width scaled down so that neither exceeds `max_side`."""
    scale = min(1.0, max_side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _downscale(labels: Mask, size: tuple[int, int]) -> Mask:
    """Nearest neighbor, because labels have no mean."""
    if labels.shape == size:
        return labels
    resized = cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(resized, dtype=np.uint8).reshape(size)


def image_columns(result: EvalResult) -> dict[str, Any]:
    """The data of the page's gallery: name → a value for each of N images, ordered as the records.

    Returns:
        index: number in the file names. name: string.
        iou, person, false_negatives, false_positives: in 0..1; the last three are fractions of the
            frame.
        width, height: of the photo, in pixels.
        slices: for each group of slices, N numbers of the slice that an image belongs to.
    """
    records = result.totals.records
    frame = np.maximum(records["size"].astype(np.int64).prod(axis=1), 1)
    sizes = [fit_size(height, width, PHOTO_SIDE) for height, width in records["size"].tolist()]
    return {
        "index": records["index"].tolist(),
        "name": list(result.image_ids),
        "iou": _round(image_ious(records)),
        "person": _round(person_fractions(records)),
        "false_negatives": _round(records["confusion"][:, PERSON, BACKGROUND] / frame),
        "false_positives": _round(records["confusion"][:, BACKGROUND, PERSON] / frame),
        "width": [width for _, width in sizes],
        "height": [height for height, _ in sizes],
        # Each image belongs to exactly one slice of a group.
        "slices": [
            np.argmax(np.stack([part.members for part in group]), axis=0).tolist()
            for group in result.slice_groups.values()
        ],
    }


def _round(values: Floats) -> list[float]:
    """Six digits: more would double the size of the page and not be visible."""
    return [round(value, 6) for value in values.tolist()]
