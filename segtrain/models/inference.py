"""How a network is asked about pictures: the one way that evaluation and prediction share."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segtrain.asking import Asking
from segtrain.classes import PERSON
from segtrain.devices import Autocast
from segtrain.images import Pixels, resize_short_side, scaled_size
from segtrain.models.tiling import probs_by_tiles
from segtrain.tiles import automatic_side

# Tiles, and pictures to predict, come so many at once to a GPU; a megapixel keeps it busy.
PIXELS_AT_ONCE = 2**20


def person_probs_of_picture(
    model: nn.Module, picture: Pixels, asking: Asking, device: torch.device, autocast: Autocast
) -> Tensor:
    """Probability of person for each pixel of one picture.

    Args:
        model: in evaluation mode, on `device`.
        picture: H W 3 uint8 RGB at its original resolution.
        autocast: makes the precision context of the forward pass.

    Returns:
        H W float32 in 0..1, on `device`.
    """
    batch = scaled_batch([picture], asking, device)
    height, width = picture.shape[:2]
    return person_probs(model, batch, (height, width), autocast, asking=asking)[0]


def scaled_batch(pictures: Sequence[Pixels], asking: Asking, device: torch.device) -> Tensor:
    """What `answers` takes of pictures H W 3 uint8 of one size: N 3 h w uint8 on `device`."""
    scaled = [
        torch.from_numpy(resize_short_side(picture, asking.loaded_short_side))
        for picture in pictures
    ]
    # One alone may be as large as the photo, and need not be copied.
    batch = scaled[0][None] if len(scaled) == 1 else torch.stack(scaled)
    return batch.permute(0, 3, 1, 2).to(device)


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

    Args:
        model, image, autocast, asking: as in `answers`.
        out_size: H, W of the original pictures.

    Returns:
        N H W float32 in 0..1, on the model's device.
    """
    with torch.inference_mode():
        first, *others = answers(model, image, autocast, asking=asking)
        total = _enlarged(first, out_size)
        for other in others:
            total = total + _enlarged(other, out_size)
        return total / (1 + len(others)) if others else total


@torch.inference_mode()
def answers(model: nn.Module, image: Tensor, autocast: Autocast, *, asking: Asking) -> list[Tensor]:
    """Probabilities of person as the network sees the pictures, at each scale that is asked for.

    The network gets one picture or tile at a time on a CPU, where a batch would change the last
    bits and save nothing, and where batch norm goes by what is looked at. On a GPU it gets the
    whole batch, or as many tiles as make a megapixel.

    Memory for a picture seen by tiles at its own size, beside one batch of tiles: 4 bytes a pixel,
    for the tiles' blend; 11 with its mirror image; about 60 with other scales, which are made in
    floats.

    Args:
        model: in evaluation mode.
        image: N 3 h w uint8 on the model's device, scaled to `asking.loaded_short_side`.
        autocast: makes the precision context of the forward pass.

    Returns:
        N h w float32 in 0..1 for each scale, on the model's device. What is asked for is the mean
        of all, enlarged.
    """
    alone = image.device.type == "cpu" or any(module.training for module in model.modules())
    images_at_once = 1 if alone or asking.tile is not None else len(image)
    pixels_at_once = 1 if alone else PIXELS_AT_ONCE
    look = partial(_look, partial(_ask, model, autocast), asking.tile, pixels_at_once)
    parts = [
        [_with_mirror_image(look, view, asking) for view in _views(part, asking)]
        for part in torch.split(image, images_at_once)
    ]
    return [scale[0] if len(scale) == 1 else torch.cat(scale) for scale in zip(*parts, strict=True)]


def _with_mirror_image(look: Callable[[Tensor], Tensor], view: Tensor, asking: Asking) -> Tensor:
    if asking.tta == "none":
        return look(view)
    return look(view).add_(look(view.flip(-1)).flip(-1)).div_(2)


def _views(image: Tensor, asking: Asking) -> Iterator[Tensor]:
    """The picture at each scale, N 3 h w; the largest is the one that came."""
    *smaller, _ = asking.short_sides
    for short_side in smaller:
        size = scaled_size(image.shape[2], image.shape[3], short_side)
        yield F.interpolate(image.float(), size, mode="bilinear", antialias=True)
    yield image


def _look(
    ask: Callable[[Tensor], Tensor],
    tile: int | Literal["auto"] | None,
    pixels_at_once: int,
    image: Tensor,
) -> Tensor:
    """Probabilities N h w of pictures N 3 h w, whole or by tiles; with tiles N must be 1."""
    side = automatic_side(image.shape[2], image.shape[3]) if tile == "auto" else tile
    if side is None:
        return ask(image)
    return probs_by_tiles(ask, image, side, pixels_at_once)[None]


def _ask(model: nn.Module, autocast: Autocast, image: Tensor) -> Tensor:
    """The network's probabilities of person, N h w float32, for N 3 h w."""
    with autocast():
        logits: Tensor = model(image)
    return logits.float().softmax(dim=1)[:, PERSON]


def _enlarged(probs: Tensor, size: tuple[int, int]) -> Tensor:
    """N h w scaled to `size`."""
    if probs.shape[1:] == size:
        return probs
    return F.interpolate(probs[:, None], size, mode="bilinear", align_corners=False)[:, 0]
