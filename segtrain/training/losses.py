"""Losses over N C H W logits and N H W masks."""

import torch.nn.functional as F
from torch import Tensor

from segtrain.classes import IGNORE


def cross_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy over the pixels that are not ignored, a scalar.

    Args:
        logits: N C H W of any float type; computed in float32.
        mask: N H W uint8 classes, 255 is ignored.

    A batch of nothing but ignored pixels gives 0, where torch's own mean would give NaN.
    """
    target = mask.long()
    total = F.cross_entropy(logits.float(), target, ignore_index=IGNORE, reduction="sum")
    return total / (target != IGNORE).sum().clamp(min=1)
