"""From a network's logits to what evaluation and prediction look at."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segtrain.classes import PERSON
from segtrain.config import Tta
from segtrain.devices import Autocast
from segtrain.images import Pixels, resize_short_side
from segtrain.models.tiling import through_tiles

_SCALES: dict[Tta, tuple[float, ...]] = {
    "none": (1.0,),
    "flip": (1.0,),
    "scales": (0.75, 1.0, 1.25),
}


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How a network is asked about a picture.

    short_side: what the network sees is scaled to this, pixels.
    tta: flip: mean over the picture and its mirror image; scales: mean over 0.75, 1 and 1.25 of the
        short side, each mirrored, too.
    tile: the network sees no more than this at once, pixels to a side of the scaled picture; None
        shows it the whole.
    """

    short_side: int
    tta: Tta = "none"
    tile: int | None = None


def person_probs_of_picture(
    model: nn.Module, picture: Pixels, asking: Asking, device: torch.device, autocast: Autocast
) -> Tensor:
    """Probability of person for each pixel of one picture.

    Args:
        model: in evaluation mode, on `device`.
        picture: H W 3 uint8 RGB at its original resolution.

    Returns:
        H W float32 in 0..1, on `device`.
    """
    scaled = resize_short_side(picture, asking.short_side)
    batch = torch.from_numpy(scaled).permute(2, 0, 1)[None].to(device)
    height, width = picture.shape[:2]
    return person_probs(model, batch, (height, width), autocast, asking=asking)[0]


@torch.inference_mode()
def person_probs(
    model: nn.Module,
    image: Tensor,
    out_size: tuple[int, int],
    autocast: Autocast,
    *,
    asking: Asking,
) -> Tensor:
    """Probability of person for each pixel of the original pictures.

    Probabilities are enlarged before anybody thresholds them: enlarging a mask would make stairs.
    On a CPU pictures go through the network one by one, which costs nothing there, so that the
    result does not depend on which others are in the batch, to the last bit.

    Args:
        model: in evaluation mode.
        image: N 3 h w uint8 on the model's device, scaled to `asking.short_side`.
        out_size: H, W of the original pictures.
        autocast: makes the precision context of the forward pass.

    Returns:
        N H W float32 in 0..1, on the model's device.
    """
    if image.device.type == "cpu" and len(image) > 1:
        ones = (
            person_probs(model, one, out_size, autocast, asking=asking)
            for one in torch.split(image, 1)
        )
        return torch.cat(list(ones))

    def see(part: Tensor) -> Tensor:
        with autocast():
            logits: Tensor = model(part)
        return logits.float().softmax(dim=1)[:, PERSON]

    scales = _SCALES[asking.tta]
    answers = (_resized(_at_scale(see, image, scale, asking), out_size) for scale in scales)
    total = next(answers)
    for answer in answers:
        total += answer
    return total.div_(len(scales))


def _at_scale(
    see: Callable[[Tensor], Tensor], image: Tensor, scale: float, asking: Asking
) -> Tensor:
    if scale != 1:
        size = [max(1, round(side * scale)) for side in image.shape[-2:]]
        image = F.interpolate(image.float(), size=size, mode="bilinear", antialias=True)
    look = see if asking.tile is None else partial(through_tiles, see, tile=asking.tile)
    probs = look(image)
    if asking.tta != "none":
        probs = (probs + look(image.flip(-1)).flip(-1)) / 2
    return probs


def _resized(probs: Tensor, size: tuple[int, int]) -> Tensor:
    if probs.shape[-2:] == size:
        return probs
    resized = F.interpolate(probs[:, None], size=size, mode="bilinear", align_corners=False)
    return resized[:, 0]
