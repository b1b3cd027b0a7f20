"""Losses over N C H W logits and N H W masks.

Every loss is a function of

    logits: N C H W of any float type; computed in float32. C is 2, except for `cross_entropy`.
    mask: N H W uint8 in {0 background, 1 person, 255 ignore}.
    border: N H W uint8 from `segtrain.data.border_weights`, or None; only `border_ce` uses it.

and returns a float32 scalar. Ignored pixels have no weight and no gradient. If all pixels of a
batch are ignored, the loss and its gradients are 0. No loss waits for the device.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segtrain.config.schema import LossConfig
from segtrain.types import IGNORE, PERSON

LossFn = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(logits, mask, border) → scalar loss."""

# Added to numerator and denominator of Dice, in pixels: no person and none predicted gives 1.
_DICE_SMOOTH = 1.0


def build_loss(config: LossConfig) -> LossFn:
    """Build the configured loss.

    `class_weights` and `label_smoothing` apply to every loss with a cross-entropy term, which is
    every loss except lovasz.
    """
    return LOSSES[config.name](config)


def cross_entropy(
    logits: Tensor,
    mask: Tensor,
    border: Tensor | None = None,
    *,
    class_weights: tuple[float, ...] | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mean cross-entropy over the pixels that are not ignored, a scalar.

    If all pixels are ignored, the loss is 0, where torch's own mean would be NaN.

    Args:
        logits: N C H W of any float type; computed in float32.
        mask: N H W uint8 classes; 255 is ignored.
        border: unused.
        class_weights: one positive weight per class. The mean is weighted as in torch: the sum is
            divided by the sum of the weights of the pixels' true classes.
        label_smoothing: in 0..1, the fraction of the target that is spread evenly over all classes,
            as in torch (Szegedy et al. 2016, arXiv 1512.00567, section 7); each class keeps its
            weight.
    """
    target = mask.long()
    weight = None
    if class_weights is not None:
        # Filled on the device, because a copy from the host would wait for it.
        weight = torch.cat([logits.new_full((1,), w, dtype=torch.float32) for w in class_weights])
    total = F.cross_entropy(
        logits.float(),
        target,
        weight,
        ignore_index=IGNORE,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    if class_weights is None:
        return total / (target != IGNORE).sum().clamp(min=1)
    # A single pixel has at least this weight, so the clamp only replaces a sum of 0.
    return total / _class_weight(mask, class_weights).sum().clamp(min=min(class_weights))


def soft_dice(logits: Tensor, mask: Tensor) -> Tensor:
    """1 - (2 sum p g + 1) / (sum p + sum g + 1), a scalar in 0..1.

    p is the probability of person; g is 1 on person pixels and 0 elsewhere. The sums are over all
    pixels of the batch that are not ignored. From Milletari et al. 2016 (arXiv 1606.04797,
    section 3), with p and g instead of their squares in the denominator, as in Drozdzal et al. 2016
    (arXiv 1608.04117). The 1 defines the loss for batches without a person.

    Args:
        logits: N 2 H W of any float type; computed in float32.
        mask: N H W uint8 in {0, 1, 255}.
    """
    counted, person = mask != IGNORE, mask == PERSON
    probs = torch.where(counted, _log_odds(logits).sigmoid(), 0.0)
    overlap = torch.where(person, probs, 0.0).sum()
    total = probs.sum() + person.sum()
    return 1 - (2 * overlap + _DICE_SMOOTH) / (total + _DICE_SMOOTH)


def lovasz_hinge(logits: Tensor, mask: Tensor, border: Tensor | None = None) -> Tensor:
    """Lovasz hinge of the person IoU over the whole batch, a scalar of 0 or more.

    The convex surrogate of 1 - IoU by Berman et al. 2018 (arXiv 1705.08790, eq. 8 and 9 and
    algorithm 1). The hinge errors max(0, 1 - F y), where F is logit(person) - logit(background) and
    y is 1 on person pixels and -1 elsewhere, are sorted in descending order. Each is weighted by
    the increase of 1 - IoU when its pixel also becomes wrong. The loss is 0 if every pixel is right
    by a margin of 1 or more. Without person pixels, only the largest error has a weight.

    An ignored pixel gets error 0 and counts as background. It is sorted after all positive errors,
    whose weights depend only on the errors before them and on the number of person pixels. Its own
    weight multiplies an error of 0 without a gradient.

    Args:
        logits: N 2 H W of any float type; computed in float32.
        mask: N H W uint8 in {0, 1, 255}.
        border: unused.
    """
    error = torch.where(mask != IGNORE, F.relu(1 - _margin(logits, mask)), 0.0)
    # Stable, because pixels with equal errors get different weights: equal runs must agree.
    error, order = error.flatten().sort(descending=True, stable=True)
    with torch.no_grad():
        person = (mask == PERSON).flatten()[order]
        # Integer counts. The paper's algorithm subtracts nearly equal floats, which leaves one
        # digit of an increase of a millionth.
        false_negatives = person.cumsum(0)
        false_positives = torch.arange(1, len(person) + 1, device=person.device) - false_negatives
        intersection = person.sum() - false_negatives
        union = person.sum() + false_positives
        # A missed person pixel takes 1 from the intersection, which is 1 / union of the IoU. A
        # false positive makes the union larger by 1. Without person pixels, the first one takes
        # the IoU from 1 (0 / 0) to 0 / 1.
        weight = torch.where(person | (union == 1), 1 / union, intersection / (union * (union - 1)))
    return (error * weight).sum()


def focal(
    logits: Tensor,
    mask: Tensor,
    border: Tensor | None = None,
    *,
    gamma: float,
    class_weights: tuple[float, float] | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mean of -(1 - p)^gamma log p over the pixels that are not ignored, a scalar.

    p is the probability of the pixel's class (Lin et al. 2017, arXiv 1708.02002, section 3.2,
    eq. 4 and 5). The class weights are the paper's alpha. The paper divides by the number of
    objects; this is a weighted mean as in `cross_entropy`, and equal to it for gamma = 0.

    Args:
        logits: N 2 H W of any float type; computed in float32.
        mask: N H W uint8 in {0, 1, 255}.
        border: unused.
        gamma: 0 or more.
        class_weights, label_smoothing: as in `cross_entropy`; the smoothed target weights the
            -(1 - p)^gamma log p of each class.
    """

    def loss_from_margin(margin: Tensor) -> Tensor:
        # 1 - p is the probability of the other class. Computed from its logarithm, the power has a
        # gradient where 1 - p is 0 and stays precise where p is nearly 1.
        return F.softplus(-margin) * torch.exp(-gamma * F.softplus(margin))

    return _binary_mean(
        loss_from_margin, logits, mask, class_weights=class_weights, label_smoothing=label_smoothing
    )


def border_cross_entropy(
    logits: Tensor,
    mask: Tensor,
    border: Tensor | None,
    *,
    border_weight: float,
    class_weights: tuple[float, float] | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy with more weight between neighboring people, a scalar.

    The weight of a pixel is class weight + border_weight * border / 255 (Ronneberger et al. 2015,
    arXiv 1505.04597, section 3, eq. 1 and 2). The paper sums; this divides by the sum of the
    weights, like every weighted mean here, so that learning rates stay comparable. Without borders
    it equals `cross_entropy`.

    Args:
        logits: N 2 H W of any float type; computed in float32.
        mask: N H W uint8 in {0, 1, 255}.
        border: N H W uint8, from `segtrain.data.border_weights.border_map` for each mask.
        border_weight: w0 of the paper, 0 or more.
        class_weights, label_smoothing: as in `cross_entropy`.

    Raises:
        ValueError: border is None; the loader needs a border sigma.
    """
    if border is None:
        raise ValueError("border_ce needs batches with borders: pass border_sigma to train_batches")
    return _binary_mean(
        lambda margin: F.softplus(-margin),
        logits,
        mask,
        class_weights=class_weights,
        label_smoothing=label_smoothing,
        extra_weight=border * (border_weight / 255),
    )


def _ce(config: LossConfig) -> LossFn:
    if config.class_weights is None and not config.label_smoothing:
        return cross_entropy
    return partial(cross_entropy, **_cross_entropy_options(config))


def _ce_dice(config: LossConfig) -> LossFn:
    ce = _ce(config)

    def ce_dice(logits: Tensor, mask: Tensor, border: Tensor | None = None) -> Tensor:
        return ce(logits, mask, None) + soft_dice(logits, mask)

    return ce_dice


def _focal(config: LossConfig) -> LossFn:
    return partial(focal, gamma=config.focal_gamma, **_cross_entropy_options(config))


def _lovasz(config: LossConfig) -> LossFn:
    return lovasz_hinge


def _border_ce(config: LossConfig) -> LossFn:
    return partial(
        border_cross_entropy, border_weight=config.border_weight, **_cross_entropy_options(config)
    )


LOSSES: Mapping[str, Callable[[LossConfig], LossFn]] = {
    "ce": _ce,
    "ce_dice": _ce_dice,
    "focal": _focal,
    "lovasz": _lovasz,
    "border_ce": _border_ce,
}
"""Loss name in `LossConfig` → builder of the loss."""


def _cross_entropy_options(config: LossConfig) -> dict[str, Any]:
    return {
        "class_weights": config.class_weights,
        "label_smoothing": config.label_smoothing,
    }


def _log_odds(logits: Tensor) -> Tensor:
    """N H W float32: logit(person) - logit(background)."""
    background, person = logits.float().unbind(1)
    return person - background


def _margin(logits: Tensor, mask: Tensor) -> Tensor:
    """N H W float32: logit of the pixel's class minus logit of the other class."""
    odds = _log_odds(logits)
    return torch.where(mask == PERSON, odds, -odds)


def _class_weight(mask: Tensor, class_weights: tuple[float, ...]) -> Tensor:
    """N H W float32: the weight of each pixel's class; 0 for ignored pixels."""
    weight = torch.zeros_like(mask, dtype=torch.float32)
    for label, class_weight in enumerate(class_weights):
        weight = torch.where(mask == label, class_weight, weight)
    return weight


def _binary_mean(
    loss_from_margin: Callable[[Tensor], Tensor],
    logits: Tensor,
    mask: Tensor,
    *,
    class_weights: tuple[float, float] | None,
    label_smoothing: float,
    extra_weight: Tensor | None = None,
) -> Tensor:
    """Weighted mean of a loss over the pixels that are not ignored.

    Args:
        loss_from_margin: loss of a class from its margin, its logit minus the other class's logit.
        extra_weight: N H W, added to the weights of both classes.
    """
    class_weights = class_weights or (1.0, 1.0)
    counted = mask != IGNORE
    own = _class_weight(mask, class_weights)
    other = sum(class_weights) - own
    if extra_weight is not None:
        extra_weight = torch.where(counted, extra_weight, 0.0)
        own, other = own + extra_weight, other + extra_weight
    margin = _margin(logits, mask)
    loss = (1 - label_smoothing / 2) * own * loss_from_margin(margin)
    if label_smoothing:
        loss = loss + label_smoothing / 2 * other * loss_from_margin(-margin)
    # A single pixel has at least this weight, so the clamp only replaces a sum of 0.
    return torch.where(counted, loss, 0.0).sum() / own.sum().clamp(min=min(class_weights))
