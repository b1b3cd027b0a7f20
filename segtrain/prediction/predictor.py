"""The Python interface: `from segtrain import Predictor`."""

from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from segtrain.config.schema import Precision, Tta
from segtrain.imaging.images import read_image
from segtrain.imaging.rgb import exif_orientation, rotate_upright, to_rgb
from segtrain.inference.load import load_backend
from segtrain.inference.options import InferenceOptions
from segtrain.prediction.outputs import Result
from segtrain.prediction.postprocess import make_result
from segtrain.runs.folder import find_checkpoint

ImageInput = str | Path | Image.Image | npt.NDArray[np.uint8]


class Predictor:
    """Segments people in images. The constructor loads the network once.

    Args:
        checkpoint: a file, or a run folder for its best checkpoint.
        device: "auto", "cpu", "cuda" or "cuda:N".
        precision: of the forward pass: "fp32", "auto", "tf32", "bf16" or "fp16".
        size: short side of the network input, in pixels; None: as in training.
        tta: test-time augmentation: "none", "flip", or "scales" for flip and three scales.
        tile: side of the square tiles of the scaled image, in pixels; "auto": tiles above a
            megapixel; None: never.
        refine: align the edge with the image.
        clean: remove small components and fill small holes.

    Raises:
        CheckpointError: the file is missing, damaged or not a checkpoint.
        UsageError: the device is not available.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        device: str = "auto",
        precision: Precision = "fp32",
        size: int | None = None,
        tta: Tta = "none",
        tile: int | Literal["auto"] | None = "auto",
        refine: bool = False,
        clean: bool = False,
    ) -> None:
        path, _ = find_checkpoint(Path(checkpoint))
        options = InferenceOptions(
            device=device, precision=precision, size=size, tta=tta, tile=tile
        )
        self._backend = load_backend(path, options)
        self._refine, self._clean = refine, clean

    def __call__(self, image: ImageInput) -> Result:
        """Segment the people in one image.

        Args:
            image: a path; a Pillow image of any mode, rotated according to its EXIF; or H W 3
                uint8 RGB, upright.

        Returns:
            At the image's height and width: `.image` H W 3 uint8 RGB, upright; `.probability` H W
            float32 in 0..1; `.mask` H W uint8, 255 for person; `.cutout()` H W 4 uint8 RGBA.

        Raises:
            DataError: the file is missing, damaged or larger than 100 megapixels.
            ValueError: the array is not an RGB image of uint8.
        """
        pixels = _to_rgb(image)
        [probs] = self._backend.probs([pixels])
        return make_result(pixels, probs, refine=self._refine, clean=self._clean)


def _to_rgb(image: ImageInput) -> npt.NDArray[np.uint8]:
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        image.load()
        return rotate_upright(to_rgb(image), exif_orientation(image))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"expected H W 3 uint8 RGB, got shape {image.shape}, {image.dtype}")
    return np.ascontiguousarray(image)
