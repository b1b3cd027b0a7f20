"""A checkpoint, run by torch."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from segtrain.asking import Asking
from segtrain.checkpoint import load_checkpoint, restore_model
from segtrain.devices import (
    autocast_for,
    describe_device,
    move_model,
    resolve_device,
    resolve_precision,
)
from segtrain.images import Pixels, scaled_size
from segtrain.models.batch_norm import evaluation_statistics
from segtrain.models.inference import PIXELS_AT_ONCE, answers, scaled_batch
from segtrain.prediction.network import HowToRun
from segtrain.prediction.probability import Enlarged, Probability

# Of small pictures a megapixel is many, and reading that many ahead takes memory.
_PICTURES_AT_ONCE = 16


class TorchNetwork:
    """A trained network, rebuilt from its checkpoint alone.

    Raises:
        CheckpointError: the file is missing, damaged or no checkpoint.
        UsageError: the device is not there.
    """

    def __init__(self, path: Path, how: HowToRun) -> None:
        self._device = resolve_device(how.device)
        checkpoint = load_checkpoint(path)
        self._model = restore_model(checkpoint, path)
        move_model(self._model, self._device)
        self._bn_eval = checkpoint.config.train.bn_eval
        size = how.size or checkpoint.config.data.image_size
        self._asking = Asking(short_side=size, tta=how.tta, tile=how.tile)
        self._autocast = autocast_for(resolve_precision(how.precision, self._device), self._device)
        self.at_once = 1 if self._device.type == "cpu" else _PICTURES_AT_ONCE
        self.description = f"{checkpoint.config.model.name} on {describe_device(self._device)}"

    def probs(self, pictures: Sequence[Pixels]) -> list[Probability]:
        """As `segtrain.prediction.network.Network.probs`."""
        found: list[Probability] = []
        with evaluation_statistics(self._model, self._bn_eval):
            for (height, width, _), alike in groupby(pictures, key=lambda one: one.shape):
                together, number = list(alike), self._num_together(height, width)
                for start in range(0, len(together), number):
                    found += self._probs_of_batch(together[start : start + number])
        return found

    def _num_together(self, height: int, width: int) -> int:
        """How many pictures of this size are a batch."""
        seen = scaled_size(height, width, self._asking.loaded_short_side)
        return max(1, min(self.at_once, PIXELS_AT_ONCE // (seen[0] * seen[1])))

    def _probs_of_batch(self, pictures: Sequence[Pixels]) -> list[Probability]:
        height, width = pictures[0].shape[:2]
        image = scaled_batch(pictures, self._asking, self._device)
        scales = answers(self._model, image, self._autocast, asking=self._asking)
        arrays = [scale.cpu().numpy() for scale in scales]
        return [Enlarged(own, (height, width)) for own in zip(*arrays, strict=True)]
