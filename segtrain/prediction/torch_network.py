"""A checkpoint, run by torch."""

from collections.abc import Sequence
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
from segtrain.images import Pixels
from segtrain.models.batch_norm import evaluation_statistics
from segtrain.models.inference import person_probs_of_picture
from segtrain.prediction.network import HowToRun, Probability


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
        self.description = f"{checkpoint.config.model.name} on {describe_device(self._device)}"

    def probs(self, pictures: Sequence[Pixels]) -> list[Probability]:
        """As `segtrain.prediction.network.Network.probs`."""
        with evaluation_statistics(self._model, self._bn_eval):
            return [
                person_probs_of_picture(
                    self._model, picture, self._asking, self._device, self._autocast
                )
                .cpu()
                .numpy()
                for picture in pictures
            ]
