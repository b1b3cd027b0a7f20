"""Run a network on overlapping tiles of a large image and blend the results without seams.

The predictions of a tile are worst next to its inner edges, where the network sees padding instead
of the image. Therefore tiles overlap, and the weight of a tile is zero next to an inner edge.
Further inside it rises smoothly to one, while the weight of the neighbor falls. The margin of zero
weight is an eighth of a tile: a network whose receptive field reaches no further around a pixel
predicts the same as on the whole image.

Probabilities are blended, not logits. The blend between two tiles that disagree is then never
steeper than the weights. Logits have no bound: a tile with much larger logits would win within a
few pixels, which is visible as a seam.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, product

import torch
from torch import Tensor

from segtrain.inference.tiles import tile_spans, tile_weights


@dataclass(frozen=True)
class WeightedSpan:
    """The rows or the columns of a tile, with a float32 weight in 0..1 for each."""

    span: slice
    weights: Tensor

    def __len__(self) -> int:
        return len(self.weights)


Tile = tuple[WeightedSpan, WeightedSpan]
"""Rows and columns."""


def weighted_spans(length: int, tile_size: int, device: torch.device) -> list[WeightedSpan]:
    """Return the tiles along one side of an image, with the weights of `tile_weights`."""
    return [
        WeightedSpan(span, _copy_to_device(torch.from_numpy(weights), device))
        for span, weights in zip(
            tile_spans(length, tile_size), tile_weights(length, tile_size), strict=True
        )
    ]


def _copy_to_device(weights: Tensor, device: torch.device) -> Tensor:
    """Copy without synchronizing with a GPU, which requires pinned memory."""
    pinned = weights.pin_memory() if device.type == "cuda" else weights
    return pinned.to(device, non_blocking=True)


def predict_tiled(
    forward_fn: Callable[[Tensor], Tensor], image: Tensor, tile_size: int, max_batch_pixels: int
) -> Tensor:
    """Predict an image in square tiles and blend their probabilities.

    Memory: one batch of tiles, and 4 bytes a pixel for the result.

    Args:
        forward_fn: maps N 3 h w to probabilities N h w float32.
        image: 1 3 H W.
        tile_size: valid according to `segtrain.inference.tiles.check_tile_size`.
        max_batch_pixels: largest input of `forward_fn`, which still gets at least one tile.

    Returns:
        H W float32 on the image's device.
    """
    height, width = image.shape[-2:]
    probs = torch.zeros((height, width), device=image.device)
    tiles = product(
        weighted_spans(height, tile_size, image.device),
        weighted_spans(width, tile_size, image.device),
    )
    for batch in _batches(tiles, max_batch_pixels):
        tile_probs = forward_fn(
            torch.cat([image[:, :, rows.span, columns.span] for rows, columns in batch])
        )
        for (rows, columns), one in zip(batch, tile_probs, strict=True):
            target = probs[rows.span, columns.span]
            target.addcmul_(one, rows.weights[:, None] * columns.weights)
    return probs


def _batches(tiles: Iterable[Tile], max_batch_pixels: int) -> Iterator[list[Tile]]:
    """Group tiles of equal height and width into batches."""

    def shape(tile: Tile) -> tuple[int, int]:
        return len(tile[0]), len(tile[1])

    for (height, width), group in groupby(sorted(tiles, key=shape), key=shape):
        same_shape = list(group)
        batch_size = max(1, max_batch_pixels // (height * width))
        for start in range(0, len(same_shape), batch_size):
            yield same_shape[start : start + batch_size]
