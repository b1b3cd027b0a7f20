"""From a checkpoint and a picture to the probability of person at every pixel."""

from pathlib import Path

import torch

from segtrain.checkpoint import load_checkpoint, restore_model
from segtrain.devices import autocast_for, move_model
from segtrain.images import Pixels
from segtrain.models.batch_norm import evaluation_statistics
from segtrain.models.inference import Asking, person_probs_of_picture
from segtrain.prediction.outputs import Result


class Predictor:
    """A trained network, rebuilt from its checkpoint alone.

    Args:
        checkpoint_path: a `best.pt` or `last.pt`.
        device: where the network runs.

    Raises:
        CheckpointError: the file is missing, damaged or no checkpoint.
    """

    def __init__(self, checkpoint_path: Path, device: torch.device) -> None:
        checkpoint = load_checkpoint(checkpoint_path)
        self.config = checkpoint.config
        self.device = device
        self.model = restore_model(checkpoint, checkpoint_path)
        move_model(self.model, device)

    def __call__(self, image: Pixels) -> Result:
        """H W 3 uint8 RGB of any size → Result at the same size."""
        asking = Asking(short_side=self.config.data.image_size)
        autocast = autocast_for("fp32", self.device)
        with evaluation_statistics(self.model, self.config.train.bn_eval):
            probs = person_probs_of_picture(self.model, image, asking, self.device, autocast)
        return Result(image=image, probability=probs.cpu().numpy())
