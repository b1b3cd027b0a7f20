"""Networks to export, with random weights and nontrivial batch-norm statistics."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from segtrain.checkpoint import Checkpoint, load_checkpoint, restore_model, save_checkpoint
from segtrain.config.resolve import load_config
from segtrain.config.schema import BnEval
from segtrain.models import build_model
from segtrain.models.batch_norm import eval_mode
from segtrain.types import Image

# An FC-DenseNet with two levels, evaluated as in the paper.
TIRAMISU = (
    *("model.name=fc_densenet56", "model.growth_rate=3", "model.stem_channels=5"),
    *("model.down_blocks=[2]", "model.bottleneck=2", "model.up_blocks=[2]"),
    "train.bn_eval=batch",
)


def write_checkpoint(path: Path, *sets: str) -> Path:
    """Write a checkpoint of an untrained network with these settings."""
    config = load_config(sets=["data.image_size=64", *sets])
    torch.manual_seed(0)
    model = build_model(config.model.name, 2, **config.model.kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    _scale_logits(model, config.train.bn_eval)
    weights = model.state_dict()
    save_checkpoint(
        path, Checkpoint(config=config, weights=weights, epoch=1, global_step=1, metrics={})
    )
    return path


@torch.no_grad()
def _scale_logits(model: nn.Module, bn_eval: BnEval) -> None:
    """Scale the head so that logits have a magnitude of about 4, as after training.

    Random weights give logits in the hundreds, at which float32 is off by thousandths.
    """
    images = torch.from_numpy(random_images(1, 64, 64)).permute(0, 3, 1, 2)
    with eval_mode(model, bn_eval):
        scale = 4 / model(images).abs().max()
    for weight in model.head.parameters():
        weight *= scale


def random_images(number: int, height: int, width: int) -> Image:
    """Random images, uint8 N H W 3."""
    generator = np.random.default_rng(number * height * width)
    return generator.integers(0, 256, (number, height, width, 3)).astype(np.uint8)


def torch_probs(checkpoint: Path, images: Image) -> np.ndarray:
    """Probabilities by torch, one image at a time: float32 N H W."""
    loaded = load_checkpoint(checkpoint)
    model = restore_model(loaded, checkpoint)
    probs = []
    with torch.no_grad(), eval_mode(model, loaded.config.train.bn_eval):
        for image in images:
            logits = model(torch.from_numpy(image.copy()).permute(2, 0, 1)[None])
            probs.append(torch.sigmoid(logits[0, 1] - logits[0, 0]).numpy())
    return np.stack(probs)
