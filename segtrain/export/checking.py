"""Whether a written file answers as torch does, found out on the spot."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from segtrain.classes import PERSON
from segtrain.config import BnEval
from segtrain.images import Pixels
from segtrain.models.batch_norm import evaluation_statistics
from segtrain.prediction.probability import Values
from segtrain.progress import progress_bar

Ask = Callable[[Pixels], Values]
"""From N H W 3 uint8 RGB to N H W float32 in 0..1, the probability of person."""

TOLERANCE = 1e-3


def ask_torch(model: nn.Module, bn_eval: BnEval) -> Ask:
    """The network as it is judged: picture by picture, in float32 on the CPU."""

    def ask(images: Pixels) -> Values:
        batch = torch.from_numpy(images).permute(0, 3, 1, 2)
        with torch.inference_mode(), evaluation_statistics(model, bn_eval):
            logits = torch.cat([model(image[None]) for image in batch])
        return np.asarray(logits.softmax(dim=1)[:, PERSON].numpy(), dtype=np.float32)

    return ask


def batches(short_side: int) -> Iterator[Pixels]:
    """N H W 3 uint8 of five sizes, odd ones among them, one to three pictures each.

    Smooth shapes with noise: on noise alone many networks say one thing everywhere.

    Args:
        short_side: as in training; smaller pictures may be too small for a network by the
            statistics of each.
    """
    s = short_side
    generator = np.random.default_rng(0)
    for number, height, width in [
        (1, s, s),
        (1, s, 3 * s // 2),
        (3, s + 1, s + 5),
        (1, 3 * s // 2 + 1, s + 1),
        (2, s + 31, s),
    ]:
        shape = (number, height, width, 3)
        shapes = generator.integers(0, 256, (number, 4, 5, 3)).astype(np.float32)
        rows = np.arange(height) * 4 // height
        columns = np.arange(width) * 5 // width
        pictures = shapes[:, rows[:, None], columns] + generator.normal(0, 20, shape)
        yield np.clip(pictures, 0, 255).astype(np.uint8)


def largest_difference(ask: Ask, reference: Ask, short_side: int) -> float:
    """The largest difference of two probabilities over all `batches`; NaN where there is one."""
    differences = []
    pictures = list(batches(short_side))
    with progress_bar(total=len(pictures), desc="comparing with torch", unit="size") as bar:
        for images in pictures:
            differences.append(np.abs(ask(images) - reference(images)).max())
            bar.update()
    return float(np.max(differences))
