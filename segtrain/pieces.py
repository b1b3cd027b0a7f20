"""A batch cut into pieces that a device can hold."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def pieces(batch: Mapping[str, Any], num_images: int) -> Iterator[dict[str, Tensor]]:
    """The tensors of at most `num_images` pictures at a time.

    Args:
        batch: tensors N ... H W, and "size", N pairs (h, w) of what is picture in the upper left of
            each: a piece is cut to its own largest, so that one picture is never padded.
    """
    for start in range(0, len(batch["size"]), num_images):
        part = slice(start, start + num_images)
        height, width = (max(sides) for sides in zip(*batch["size"][part], strict=True))
        yield {
            key: value[part, ..., :height, :width]
            for key, value in batch.items()
            if isinstance(value, Tensor)
        }
