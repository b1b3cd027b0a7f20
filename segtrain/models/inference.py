"""From a network's logits to what evaluation and prediction look at."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segtrain.classes import PERSON
from segtrain.devices import Autocast
from segtrain.images import Pixels, resize_short_side


def person_probs_of_picture(
    model: nn.Module, picture: Pixels, short_side: int, device: torch.device, autocast: Autocast
) -> Tensor:
    """Probability of person for each pixel of one picture.

    Args:
        model: in evaluation mode, on `device`.
        picture: H W 3 uint8 RGB at its original resolution.
        short_side: what the network sees is scaled to this, pixels.

    Returns:
        H W float32 in 0..1, on `device`.
    """
    scaled = resize_short_side(picture, short_side)
    batch = torch.from_numpy(scaled).permute(2, 0, 1)[None].to(device)
    height, width = picture.shape[:2]
    return person_probs(model, batch, (height, width), autocast)[0]


@torch.inference_mode()
def person_probs(
    model: nn.Module,
    image: Tensor,
    out_size: tuple[int, int],
    autocast: Autocast,
) -> Tensor:
    """Probability of person for each pixel of the original picture.

    Probabilities are enlarged before anybody thresholds them: enlarging a mask would make stairs.

    Args:
        model: in evaluation mode.
        image: N 3 h w uint8 on the model's device, the picture scaled for the network.
        out_size: H, W of the original picture.
        autocast: makes the precision context of the forward pass.

    Returns:
        N H W float32 in 0..1, on the model's device.
    """
    with autocast():
        logits: Tensor = model(image)
    probs = logits.float().softmax(dim=1)[:, PERSON : PERSON + 1]
    if probs.shape[-2:] != out_size:
        probs = F.interpolate(probs, size=out_size, mode="bilinear", align_corners=False)
    return probs[:, 0]
