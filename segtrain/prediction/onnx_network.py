"""An exported network, run by onnxruntime: the same answers as `TorchNetwork`, without torch."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from segtrain.asking import Asking
from segtrain.errors import CheckpointError, UsageError
from segtrain.images import Pixels, resize_short_side, scaled_size
from segtrain.prediction.network import HowToRun
from segtrain.prediction.onnx_session import OnnxSession
from segtrain.prediction.probability import Enlarged, Probability, Values
from segtrain.tiles import automatic_side, spans, weights


class OnnxNetwork:
    """A trained network in an .onnx file that `segtrain export` wrote.

    Raises:
        CheckpointError: the file is missing, damaged or not such a file.
        UsageError: onnxruntime is not installed or cannot use such a device, or another precision
            is asked for than the file's own.
    """

    def __init__(self, path: Path, how: HowToRun) -> None:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
        self._session = OnnxSession(content, path, how.device)
        about = self._session.metadata
        if how.precision not in {"auto", "fp32", about.precision}:
            raise UsageError(
                f"{path} computes in {about.precision}; export with --precision {how.precision}"
            )
        self._asking = Asking(short_side=how.size or about.short_side, tta=how.tta, tile=how.tile)
        self.at_once = 1
        self.description = (
            f"{about.model['name']} ({about.precision}) on onnxruntime {self._session.device}"
        )

    def probs(self, pictures: Sequence[Pixels]) -> list[Probability]:
        """As `segtrain.prediction.network.Network.probs`.

        Raises:
            CheckpointError: the network fails or answers nonsense.
        """
        return [self._probs_of(picture) for picture in pictures]

    def _probs_of(self, picture: Pixels) -> Probability:
        answers = [self._with_mirror_image(view) for view in _views(picture, self._asking)]
        return Enlarged(answers, (picture.shape[0], picture.shape[1]))

    def _with_mirror_image(self, view: Pixels) -> Values:
        if self._asking.tta == "none":
            return self._look(view)
        return (self._look(view) + self._look(view[:, ::-1])[:, ::-1]) / np.float32(2)

    def _look(self, view: Pixels) -> Values:
        """Probabilities h w of a scaled picture h w 3, whole or by tiles."""
        height, width = view.shape[:2]
        tile = self._asking.tile
        side = automatic_side(height, width) if tile == "auto" else tile
        if side is None:
            whole: Values = self._session.probs(view[None])[0]
            return whole
        probs = np.zeros((height, width), dtype=np.float32)
        columns = list(zip(spans(width, side), weights(width, side), strict=True))
        for rows, row_weights in zip(spans(height, side), weights(height, side), strict=True):
            for cols, col_weights in columns:
                answer = self._session.probs(view[None, rows, cols])[0]
                probs[rows, cols] += answer * (row_weights[:, None] * col_weights)
        return probs


def _views(picture: Pixels, asking: Asking) -> Iterator[Pixels]:
    """The picture at each scale.

    All are made of the largest, as for torch. But the file takes bytes, so the smaller ones are
    rounded here.
    """
    largest = resize_short_side(picture, asking.loaded_short_side)
    *smaller, _ = asking.short_sides
    for short_side in smaller:
        height, width = scaled_size(largest.shape[0], largest.shape[1], short_side)
        scaled = Image.fromarray(largest).resize((width, height), Image.Resampling.BILINEAR)
        yield np.asarray(scaled)
    yield largest
