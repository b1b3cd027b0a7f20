"""Run a torch network on images; shared by evaluation and prediction."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segtrain.config.schema import BnEval
from segtrain.imaging.images import resize_short_side, scaled_size
from segtrain.inference.options import InferenceOptions
from segtrain.inference.tiled import predict_tiled
from segtrain.inference.tiles import auto_tile_size
from segtrain.models.batch_norm import eval_mode
from segtrain.runtime.devices import Autocast, prefetch
from segtrain.types import PERSON, Image

Batch = Mapping[str, Any]

# Largest batch of tiles, and of images to predict, on a GPU; a megapixel keeps it busy.
MAX_BATCH_PIXELS = 2**20


def predict_batches(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    options: InferenceOptions,
    device: torch.device,
    autocast: Autocast,
    bn_eval: BnEval,
) -> Iterator[tuple[Batch, Tensor]]:
    """Predict the person probabilities of batches from a loader.

    The network sees the images as they are in the batch, already scaled to its size. Its
    probabilities are upsampled to the size of the masks.

    Args:
        model: is set to evaluation mode and stays in it.
        batches: mappings with "image" N 3 h w uint8 and "mask" N H W uint8 in {0, 1, 255}.
        bn_eval: as in `segtrain.models.batch_norm.eval_mode`.

    Yields:
        Each batch on the device, with its probabilities N H W float32 in 0..1 on the device.
    """
    with eval_mode(model, bn_eval):
        for batch in prefetch(batches, device):
            size = (batch["mask"].shape[1], batch["mask"].shape[2])
            yield batch, person_probs(model, batch["image"], size, autocast, options=options)


def person_probs_of_image(
    model: nn.Module,
    image: Image,
    options: InferenceOptions,
    device: torch.device,
    autocast: Autocast,
) -> Tensor:
    """Predict the person probability of each pixel of one image.

    Args:
        model: in evaluation mode, on `device`.
        image: H W 3 uint8 RGB at its original resolution.
        autocast: creates the precision context of the forward pass.

    Returns:
        H W float32 in 0..1, on `device`.
    """
    batch = to_input([image], options, device)
    height, width = image.shape[:2]
    return person_probs(model, batch, (height, width), autocast, options=options)[0]


def to_input(images: Sequence[Image], options: InferenceOptions, device: torch.device) -> Tensor:
    """Scale and batch images H W 3 uint8 of one size: N 3 h w uint8 on `device`."""
    scaled = [
        torch.from_numpy(resize_short_side(image, options.loaded_short_side)) for image in images
    ]
    # A single image may be as large as the photo and is not copied.
    batch = scaled[0][None] if len(scaled) == 1 else torch.stack(scaled)
    return batch.permute(0, 3, 1, 2).to(device)


def person_probs(
    model: nn.Module,
    image: Tensor,
    out_size: tuple[int, int],
    autocast: Autocast,
    *,
    options: InferenceOptions,
) -> Tensor:
    """Predict the person probability of each pixel of the original images.

    Probabilities are upsampled before any threshold is applied: an upsampled mask would have
    staircase edges.

    Args:
        model, image, autocast, options: as in `predict_scales`.
        out_size: H, W of the original images.

    Returns:
        N H W float32 in 0..1, on the model's device.
    """
    with torch.inference_mode():
        first, *others = predict_scales(model, image, autocast, options=options)
        total = _upsample(first, out_size)
        for other in others:
            total = total + _upsample(other, out_size)
        return total / (1 + len(others)) if others else total


@torch.inference_mode()
def predict_scales(
    model: nn.Module, image: Tensor, autocast: Autocast, *, options: InferenceOptions
) -> list[Tensor]:
    """Predict person probabilities at each scale of the test-time augmentation.

    On a CPU, and if batch norm uses the statistics of its input, the network gets one image or tile
    at a time. On a CPU, a batch would change the last bits and save no time. On a GPU it gets the
    whole batch, or as many tiles as fit into a megapixel.

    Memory for an image in tiles at its own size, beside one batch of tiles: 4 bytes a pixel for the
    blended tiles, 11 with the flipped image, and about 60 with other scales, which are resized as
    floats.

    Args:
        model: in evaluation mode.
        image: N 3 h w uint8 on the model's device, scaled to `options.loaded_short_side`.
        autocast: creates the precision context of the forward pass.

    Returns:
        N h w float32 in 0..1 for each scale, on the model's device. The prediction is the mean of
        all scales after upsampling.
    """
    one_by_one = image.device.type == "cpu" or any(module.training for module in model.modules())
    micro_batch_size = 1 if one_by_one or options.tile is not None else len(image)
    max_batch_pixels = 1 if one_by_one else MAX_BATCH_PIXELS
    forward_fn = partial(
        _forward_tiled, partial(_forward_probs, model, autocast), options.tile, max_batch_pixels
    )
    chunks = [
        [_forward_with_flip(forward_fn, view, options) for view in _tta_scales(chunk, options)]
        for chunk in torch.split(image, micro_batch_size)
    ]
    return [
        scale[0] if len(scale) == 1 else torch.cat(scale) for scale in zip(*chunks, strict=True)
    ]


def _tta_scales(image: Tensor, options: InferenceOptions) -> Iterator[Tensor]:
    """The image at each scale, N 3 h w; the largest is `image` itself."""
    *smaller, _ = options.short_sides
    for short_side in smaller:
        size = scaled_size(image.shape[2], image.shape[3], short_side)
        yield F.interpolate(image.float(), size, mode="bilinear", antialias=True)
    yield image


def _forward_with_flip(
    forward_fn: Callable[[Tensor], Tensor], view: Tensor, options: InferenceOptions
) -> Tensor:
    if options.tta == "none":
        return forward_fn(view)
    return forward_fn(view).add_(forward_fn(view.flip(-1)).flip(-1)).div_(2)


def _forward_tiled(
    forward_fn: Callable[[Tensor], Tensor],
    tile: int | Literal["auto"] | None,
    max_batch_pixels: int,
    image: Tensor,
) -> Tensor:
    """Return probabilities N h w of N 3 h w, whole or in tiles; with tiles, N must be 1."""
    tile_size = auto_tile_size(image.shape[2], image.shape[3]) if tile == "auto" else tile
    if tile_size is None:
        return forward_fn(image)
    return predict_tiled(forward_fn, image, tile_size, max_batch_pixels)[None]


def _forward_probs(model: nn.Module, autocast: Autocast, image: Tensor) -> Tensor:
    """Return the network's person probabilities N h w float32 of N 3 h w."""
    with autocast():
        logits: Tensor = model(image)
    return logits.float().softmax(dim=1)[:, PERSON]


def _upsample(probs: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize N h w to `size`."""
    if probs.shape[1:] == size:
        return probs
    return F.interpolate(probs[:, None], size, mode="bilinear", align_corners=False)[:, 0]
