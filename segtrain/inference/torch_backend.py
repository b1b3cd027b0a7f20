"""Run a checkpoint with torch."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from segtrain.checkpoint import load_checkpoint, restore_model
from segtrain.imaging.images import scaled_size
from segtrain.inference.options import InferenceOptions
from segtrain.inference.predict import MAX_BATCH_PIXELS, predict_scales, to_input
from segtrain.inference.probability import ProbsLike, UpsampledProbs
from segtrain.models.batch_norm import eval_mode
from segtrain.runtime.devices import (
    autocast_for,
    describe_device,
    move_model,
    resolve_device,
    resolve_precision,
)
from segtrain.types import Image

# A megapixel of small images is many images, and reading that many ahead takes memory.
_MAX_BATCH_SIZE = 16


class TorchBackend:
    """A trained network, rebuilt from its checkpoint alone.

    Raises:
        CheckpointError: the file is missing, damaged or not a checkpoint.
        UsageError: the device is not available.
    """

    def __init__(self, path: Path, options: InferenceOptions) -> None:
        self._device = resolve_device(options.device)
        checkpoint = load_checkpoint(path)
        self._model = restore_model(checkpoint, path)
        move_model(self._model, self._device)
        self._options = options.with_training_defaults(checkpoint.config)
        precision = resolve_precision(options.precision, self._device)
        self._autocast = autocast_for(precision, self._device)
        self.batch_size = 1 if self._device.type == "cpu" else _MAX_BATCH_SIZE
        self.description = f"{checkpoint.config.model.name} on {describe_device(self._device)}"

    def probs(self, images: Sequence[Image]) -> list[ProbsLike]:
        """Implement `segtrain.inference.backend.Backend.probs`."""
        assert self._options.bn is not None
        probs: list[ProbsLike] = []
        with eval_mode(self._model, self._options.bn):
            for (height, width, _), group in groupby(images, key=lambda image: image.shape):
                same_size, batch_size = list(group), self._batch_size_for(height, width)
                for start in range(0, len(same_size), batch_size):
                    probs += self._predict_batch(same_size[start : start + batch_size])
        return probs

    def _batch_size_for(self, height: int, width: int) -> int:
        """Number of images of this size in a batch: at most a megapixel after scaling."""
        scaled = scaled_size(height, width, self._options.loaded_short_side)
        return max(1, min(self.batch_size, MAX_BATCH_PIXELS // (scaled[0] * scaled[1])))

    def _predict_batch(self, images: Sequence[Image]) -> list[ProbsLike]:
        height, width = images[0].shape[:2]
        batch = to_input(images, self._options, self._device)
        scales = predict_scales(self._model, batch, self._autocast, options=self._options)
        arrays = [scale.cpu().numpy() for scale in scales]
        return [UpsampledProbs(probs, (height, width)) for probs in zip(*arrays, strict=True)]
