"""Compare an exported file with torch before it is written."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from segtrain.config.schema import BnEval
from segtrain.models.batch_norm import eval_mode
from segtrain.runtime.progress import progress_bar
from segtrain.runtime.signals import raise_if_stopped
from segtrain.types import PERSON, Image, Probs

Predict = Callable[[Image], Probs]
"""From N H W 3 uint8 RGB to N H W float32 in 0..1, the probability of person."""

TOLERANCE = 1e-3


def torch_predict(model: nn.Module, bn_eval: BnEval) -> Predict:
    """The model as it is evaluated: image by image, in float32 on the CPU."""

    def predict(images: Image) -> Probs:
        batch = torch.from_numpy(images).permute(0, 3, 1, 2)
        with torch.inference_mode(), eval_mode(model, bn_eval):
            logits = torch.cat([model(image[None]) for image in batch])
        return np.asarray(logits.softmax(dim=1)[:, PERSON].numpy(), dtype=np.float32)

    return predict


def example_batches(short_side: int) -> Iterator[Image]:
    """Yield N H W 3 uint8 of five sizes, some odd, with one to three images each.

    Smooth shapes with noise: on noise alone, many models predict the same value everywhere.

    Args:
        short_side: as in training. Smaller images may be too small for a model that normalizes
            with the statistics of each image.
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
        inputs = shapes[:, rows[:, None], columns] + generator.normal(0, 20, shape)
        yield np.clip(inputs, 0, 255).astype(np.uint8)


def max_difference(predict: Predict, reference: Predict, short_side: int) -> float:
    """The largest difference of two probabilities over `example_batches`; NaN if any is NaN."""
    differences = []
    inputs = list(example_batches(short_side))
    with progress_bar(total=len(inputs), desc="comparing with torch", unit="size") as bar:
        for images in inputs:
            differences.append(np.abs(predict(images) - reference(images)).max())
            raise_if_stopped()
            bar.update()
    return float(np.max(differences))
