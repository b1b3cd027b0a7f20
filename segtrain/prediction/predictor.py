"""From a checkpoint and a picture to the probability of person at every pixel."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from segtrain.checkpoint import load_checkpoint, restore_model
from segtrain.devices import autocast_for, move_model
from segtrain.images import resize_short_side
from segtrain.models.inference import person_probs
from segtrain.prediction.outputs import Result

Pixels = npt.NDArray[np.uint8]


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
        scaled = resize_short_side(image, self.config.data.image_size)
        batch = torch.from_numpy(scaled).permute(2, 0, 1)[None].to(self.device)
        height, width = image.shape[:2]
        probs = person_probs(self.model, batch, (height, width), autocast_for("fp32", self.device))
        return Result(image=image, probability=probs[0].cpu().numpy())
