"""A trained network for use from Python: `from segtrain import Predictor`."""

from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from segtrain.config import Precision, Tta
from segtrain.images import read_image
from segtrain.prediction.finishing import improved
from segtrain.prediction.network import HowToRun, open_network
from segtrain.prediction.outputs import Result
from segtrain.rgb import orientation_of, rgb_of, turned_upright
from segtrain.runs import find_checkpoint

Photo = str | Path | Image.Image | npt.NDArray[np.uint8]


class Predictor:
    """Finds people in pictures. The network is loaded once, here.

    Args:
        checkpoint: a file, or a run's folder, which stands for its best checkpoint.
        device: "auto", "cpu", "cuda" or "cuda:N".
        precision: what the network computes in: "fp32", "auto", "tf32", "bf16" or "fp16".
        size: short side at which it sees pictures, pixels; None: as trained.
        tta: mean over the mirrored picture, too ("flip"), or also over three scales ("scales").
        tile: side of the square tiles in which it sees the scaled picture, pixels; "auto": tiles
            above a megapixel; None: always whole.
        refine: let the edge follow the picture.
        clean: drop small pieces and fill small holes.

    Raises:
        CheckpointError: the file is missing, damaged or no checkpoint.
        UsageError: the device is not there.
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
        how = HowToRun(device=device, precision=precision, size=size, tta=tta, tile=tile)
        self._network = open_network(path, how)
        self._refine, self._clean = refine, clean

    def __call__(self, image: Photo) -> Result:
        """Find the people in one picture.

        Args:
            image: a path; a Pillow picture of any mode, turned as its EXIF says; or H W 3 uint8
                RGB, upright.

        Returns:
            Of the picture's own height and width: `.image` H W 3 uint8 RGB, upright;
            `.probability` H W float32 in 0..1; `.mask` H W uint8, 255 for person; `.cutout()`
            H W 4 uint8 RGBA.

        Raises:
            DataError: the file is missing, damaged or larger than 100 megapixels.
            ValueError: the array is no RGB picture of bytes.
        """
        pixels = _pixels(image)
        [probability] = self._network.probs([pixels])
        result = Result(image=pixels, answer=probability)
        return improved(result, refine=self._refine, clean=self._clean)


def _pixels(image: Photo) -> npt.NDArray[np.uint8]:
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        image.load()
        return turned_upright(rgb_of(image), orientation_of(image))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"a picture is H W 3 uint8 RGB, not {image.shape} {image.dtype}")
    return np.ascontiguousarray(image)
