"""The interface of a trained network, implemented with torch and with onnxruntime."""

from collections.abc import Sequence
from typing import Protocol

from segtrain.inference.probability import ProbsLike
from segtrain.types import Image


class Backend(Protocol):
    """A trained network."""

    @property
    def description(self) -> str:
        """Network and device, for log messages."""
        ...

    @property
    def batch_size(self) -> int:
        """Recommended number of images of one size in a call of `probs`."""
        ...

    def probs(self, images: Sequence[Image]) -> list[ProbsLike]:
        """Predict the person probability of every pixel.

        Args:
            images: H W 3 uint8 RGB, upright, of any sizes. Neighbors of one size form batches.

        Returns:
            H W float32 in 0..1 for each image, at its own size.
        """
        ...
