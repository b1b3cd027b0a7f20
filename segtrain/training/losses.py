"""Losses over N C H W logits and N H W masks.

Every loss is a function of

    logits: N C H W of any float type; computed in float32. C is 2, but for `cross_entropy`.
    mask: N H W uint8 in {0 background, 1 person, 255 ignore}.
    border: N H W uint8 as `segtrain.data.borders` makes it, or None; only `border_ce` looks at it.

and gives a scalar, float32. Ignored pixels have no weight and no gradient, and a batch of nothing
but ignored pixels gives 0 and gradients of 0. None reads from the device.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segtrain.classes import IGNORE, PERSON
from segtrain.config import LossConfig

LossFn = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(logits, mask, border) → loss."""

# Added above and below Dice's fraction, in pixels: nobody in the picture and nobody found is 1.
_DICE_SMOOTH = 1.0


def build_loss(config: LossConfig) -> LossFn:
    """The loss that a configuration names.

    `class_weights` and `label_smoothing` count in every loss with a cross-entropy, that is in all
    but lovasz, which has neither.
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
    """Mean cross-entropy over the pixels that are not ignored, a scalar; `border` does not count.

    Args:
        logits: N C H W of any float type; computed in float32.
        mask: N H W uint8 classes, 255 is ignored.
        class_weights: of the C classes, above 0. The mean is weighted, as torch's is: the sum is
            divided by the sum of the weights of the pixels' true classes.
        label_smoothing: in 0..1, the share of the target that goes evenly to all classes, as in
            torch (Szegedy et al. 2016, arXiv 1512.00567, section 7); each class has its weight.

    A batch of nothing but ignored pixels gives 0, where torch's own mean would give NaN.
    """
    target = mask.long()
    weight = None
    if class_weights is not None:
        # Filled where it is needed: a copy from the host would wait for the device.
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
    # A single pixel counts that much at least, so the clamp changes nothing but 0.
    return total / _class_weight(mask, class_weights).sum().clamp(min=min(class_weights))


def soft_dice(logits: Tensor, mask: Tensor) -> Tensor:
    """1 - (2 sum p g + 1) / (sum p + sum g + 1), a scalar in 0..1.

    p is the probability of person, g is 1 on persons and else 0; the sums go over all pixels of the
    batch that are not ignored. Milletari et al. 2016 (arXiv 1606.04797, section 3) with p and g in
    place of their squares below the fraction, as Drozdzal et al. 2016 (arXiv 1608.04117) have it;
    the 1 defines it where there is nobody.

    Args:
        logits: N 2 H W of any float type; computed in float32.
        mask: N H W uint8 in {0, 1, 255}.
    """
    counted, person = mask != IGNORE, mask == PERSON
    probability = torch.where(counted, _log_odds(logits).sigmoid(), 0.0)
    overlap = torch.where(person, probability, 0.0).sum()
    both = probability.sum() + person.sum()
    return 1 - (2 * overlap + _DICE_SMOOTH) / (both + _DICE_SMOOTH)


def lovasz_hinge(logits: Tensor, mask: Tensor, border: Tensor | None = None) -> Tensor:
    """Lovasz hinge of the person class's IoU over the whole batch, a scalar of 0 or more.

    The convex surrogate of 1 - IoU by Berman et al. 2018 (arXiv 1705.08790, eq. 8 and 9 and
    algorithm 1): the hinge errors max(0, 1 - F y), where F is logit(person) - logit(background) and
    y is 1 on persons and else -1, are sorted from the largest on, and each is weighed by how much
    1 - IoU grows when its pixel becomes wrong, too. 0 where every pixel is right by 1 or more.
    Where there are no persons only the largest error counts.

    Args:
        logits: N 2 H W of any float type; computed in float32.
        mask: N H W uint8 in {0, 1, 255}.
        border: does not count.

    An ignored pixel gets error 0 and is no person. So it comes after all errors above 0, whose
    weights depend on those before them and on the number of persons alone; and its own weight,
    whatever it is, meets an error of 0 that has no gradient.
    """
    error = torch.where(mask != IGNORE, F.relu(1 - _margin(logits, mask)), 0.0)
    # Stable, for pixels with one error share it unevenly: the same weights for the same run.
    error, order = error.flatten().sort(descending=True, stable=True)
    with torch.no_grad():
        person = (mask == PERSON).flatten()[order]
        # Integers, and no differences of nearly equal floats as in the paper's algorithm: a step of
        # a millionth would hold one digit.
        found = person.cumsum(0)
        others = torch.arange(1, len(person) + 1, device=person.device) - found
        missing = person.sum() - found
        union = person.sum() + others
        # A person's pixel that is lost takes 1 of the intersection, i.e. 1 / union of the IoU. One
        # of the background that is added makes the union larger by 1. Without persons the first
        # one takes the IoU from 1 (0 / 0) to 0 / 1.
        growth = torch.where(person | (union == 1), 1 / union, missing / (union * (union - 1)))
    return (error * growth).sum()


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
    eq. 4 and 5). The class weights are the paper's alpha. It divides by the number of objects; here
    the mean is weighted as in `cross_entropy`, of which this is the case gamma = 0.

    Args:
        logits: N 2 H W of any float type; computed in float32.
        mask: N H W uint8 in {0, 1, 255}.
        border: does not count.
        gamma: 0 or more.
        class_weights, label_smoothing: as in `cross_entropy`; a class's share of the smoothed
            target weighs its -(1 - p)^gamma log p.
    """

    def loss_of(margin: Tensor) -> Tensor:
        # 1 - p is the other class's probability. By its logarithm, the power has a gradient where
        # 1 - p is 0, and digits where p is nearly 1.
        return F.softplus(-margin) * torch.exp(-gamma * F.softplus(margin))

    return _binary_mean(
        loss_of, logits, mask, class_weights=class_weights, label_smoothing=label_smoothing
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
    """Cross-entropy with more weight between two persons, a scalar.

    A pixel weighs class weight + border_weight * border / 255 (Ronneberger et al. 2015,
    arXiv 1505.04597, section 3, eq. 1 and 2). The paper sums; this divides by the sum of the
    weights, as every weighted mean here, so that the learning rate means the same. Without borders
    it is `cross_entropy`.

    Args:
        logits: N 2 H W of any float type; computed in float32.
        mask: N H W uint8 in {0, 1, 255}.
        border: N H W uint8, as `segtrain.data.borders.border_map` makes it of each mask.
        border_weight: 0 or more: w0 of the paper.
        class_weights, label_smoothing: as in `cross_entropy`.

    Raises:
        ValueError: there is no border; the batches must be made with a sigma.
    """
    if border is None:
        raise ValueError("border_ce needs batches with borders: give train_batches border_sigma")
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
    return partial(cross_entropy, **_of_cross_entropy(config))


def _ce_dice(config: LossConfig) -> LossFn:
    ce = _ce(config)

    def ce_dice(logits: Tensor, mask: Tensor, border: Tensor | None = None) -> Tensor:
        return ce(logits, mask, None) + soft_dice(logits, mask)

    return ce_dice


def _focal(config: LossConfig) -> LossFn:
    return partial(focal, gamma=config.focal_gamma, **_of_cross_entropy(config))


def _lovasz(config: LossConfig) -> LossFn:
    return lovasz_hinge


def _border_ce(config: LossConfig) -> LossFn:
    return partial(
        border_cross_entropy, border_weight=config.border_weight, **_of_cross_entropy(config)
    )


LOSSES: Mapping[str, Callable[[LossConfig], LossFn]] = {
    "ce": _ce,
    "ce_dice": _ce_dice,
    "focal": _focal,
    "lovasz": _lovasz,
    "border_ce": _border_ce,
}
"""Name → what makes the loss of a configuration. The names are those that LossConfig allows."""


def _of_cross_entropy(config: LossConfig) -> dict[str, Any]:
    return {
        "class_weights": config.class_weights,
        "label_smoothing": config.label_smoothing,
    }


def _log_odds(logits: Tensor) -> Tensor:
    """N H W float32: logit(person) - logit(background)."""
    background, person = logits.float().unbind(1)
    return person - background


def _margin(logits: Tensor, mask: Tensor) -> Tensor:
    """N H W float32: how far the logit of a pixel's class is above that of the other."""
    odds = _log_odds(logits)
    return torch.where(mask == PERSON, odds, -odds)


def _class_weight(mask: Tensor, class_weights: tuple[float, ...]) -> Tensor:
    """N H W float32: the weight of each pixel's class; 0 where it is ignored."""
    weight = torch.zeros_like(mask, dtype=torch.float32)
    for label, of_class in enumerate(class_weights):
        weight = torch.where(mask == label, of_class, weight)
    return weight


def _binary_mean(
    loss_of: Callable[[Tensor], Tensor],
    logits: Tensor,
    mask: Tensor,
    *,
    class_weights: tuple[float, float] | None,
    label_smoothing: float,
    extra_weight: Tensor | None = None,
) -> Tensor:
    """Weighted mean of a loss over the pixels that are not ignored.

    Args:
        loss_of: from a class's margin, the logit above that of the other class, to its loss.
        extra_weight: N H W, added to both classes' weights.
    """
    class_weights = class_weights or (1.0, 1.0)
    counted = mask != IGNORE
    own = _class_weight(mask, class_weights)
    other = sum(class_weights) - own
    if extra_weight is not None:
        extra_weight = torch.where(counted, extra_weight, 0.0)
        own, other = own + extra_weight, other + extra_weight
    margin = _margin(logits, mask)
    loss = (1 - label_smoothing / 2) * own * loss_of(margin)
    if label_smoothing:
        loss = loss + label_smoothing / 2 * other * loss_of(-margin)
    # A single pixel counts that much at least, so the clamp changes nothing but 0.
    return torch.where(counted, loss, 0.0).sum() / own.sum().clamp(min=min(class_weights))
