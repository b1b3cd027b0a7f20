"""Inference options, shared by the torch and ONNX backends and by evaluation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from segtrain.inference.tiles import check_tile_size

if TYPE_CHECKING:  # importing the schema takes a tenth of a second
    from segtrain.config.schema import BnEval, Config, Precision, Tta

_SCALES = (0.75, 1.0, 1.25)


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """How to run a network on an image.

    Attributes:
        device: auto, cpu, cuda or cuda:N.
        precision: of the forward pass.
        size: short side to which the image is scaled for the network, in pixels; None: as in
            training.
        tta: test-time augmentation, the mean over several views of the image. "flip" adds the
            horizontally flipped image; "scales" uses 0.75, 1 and 1.25 times `size`, each also
            flipped.
        tile: side of the square tiles into which the scaled image is split, in pixels; None: no
            tiles; "auto": tiles of 512 above a megapixel.
        bn: batch-norm statistics; None: as in training.

    Raises:
        UsageError: the tile size is invalid.
    """

    device: str = "auto"
    precision: Precision = "fp32"
    size: int | None = None
    tta: Tta = "none"
    tile: int | Literal["auto"] | None = "auto"
    bn: BnEval | None = None

    def __post_init__(self) -> None:
        if isinstance(self.tile, int):
            check_tile_size(self.tile)

    def with_training_defaults(self, config: Config) -> InferenceOptions:
        """Replace `size` and `bn` by those of the training run where they are None."""
        return replace(
            self, size=self.size or config.data.image_size, bn=self.bn or config.train.bn_eval
        )

    @property
    def short_sides(self) -> list[int]:
        """The short side of each scale, ascending."""
        assert self.size is not None
        factors = _SCALES if self.tta == "scales" else (1.0,)
        return [round(factor * self.size) for factor in factors]

    @property
    def loaded_short_side(self) -> int:
        """The largest scale, to which an image is resized once before the other views are made."""
        return self.short_sides[-1]
