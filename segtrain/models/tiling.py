"""Large pictures seen tile by tile, and the tiles' answers blended so that no seam shows.

A tile's answers are worst next to its inner edges, where the network sees padding in place of the
picture. So tiles overlap, and next to an inner edge a tile's weight is zero. Further in it rises
smoothly to one, while that of the neighbour falls. A network that looks no further around a pixel
than this margin is wide, an eighth of a tile, says what it says of the whole picture.

Probabilities are blended, not logits. Between two tiles that disagree the blend is then never
steeper than the weights are. Logits have no bound: a tile that is far surer would win within a few
pixels, which looks like a seam.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, product

import torch
from torch import Tensor

from segtrain import tiles


@dataclass(frozen=True)
class Strip:
    """The rows or the columns of a tile, and how much each counts: float32 in 0..1."""

    where: slice
    weights: Tensor

    def __len__(self) -> int:
        return len(self.weights)


Tile = tuple[Strip, Strip]
"""Rows and columns."""


def strips(length: int, side: int, device: torch.device) -> list[Strip]:
    """The tiles along one side of a picture, weighted as `segtrain.tiles.weights` says."""
    return [
        Strip(where, _on_device(torch.from_numpy(weights), device))
        for where, weights in zip(
            tiles.spans(length, side), tiles.weights(length, side), strict=True
        )
    ]


def _on_device(weights: Tensor, device: torch.device) -> Tensor:
    """Without waiting for a GPU, which takes pinned memory."""
    pinned = weights.pin_memory() if device.type == "cuda" else weights
    return pinned.to(device, non_blocking=True)


def probs_by_tiles(
    ask: Callable[[Tensor], Tensor], image: Tensor, side: int, pixels_at_once: int
) -> Tensor:
    """What `ask` says about a picture, seen in square tiles.

    Beside the result, 4 bytes a pixel, memory is taken for one batch of tiles.

    Args:
        ask: from N 3 h w to probabilities N h w float32.
        image: 1 3 H W.
        side: of the tiles, as `segtrain.tiles.check_side` allows.
        pixels_at_once: `ask` gets at most so many, but at least one tile.

    Returns:
        H W float32 on the picture's device.
    """
    height, width = image.shape[-2:]
    probs = torch.zeros((height, width), device=image.device)
    places = product(strips(height, side, image.device), strips(width, side, image.device))
    for batch in _batches(places, pixels_at_once):
        answers = ask(torch.cat([image[:, :, rows.where, cols.where] for rows, cols in batch]))
        for (rows, cols), answer in zip(batch, answers, strict=True):
            place = probs[rows.where, cols.where]
            place.addcmul_(answer, rows.weights[:, None] * cols.weights)
    return probs


def _batches(places: Iterable[Tile], pixels_at_once: int) -> Iterator[list[Tile]]:
    """Tiles of equal height and width, several at once."""

    def shape(tile: Tile) -> tuple[int, int]:
        return len(tile[0]), len(tile[1])

    for (height, width), alike in groupby(sorted(places, key=shape), key=shape):
        waiting = list(alike)
        at_once = max(1, pixels_at_once // (height * width))
        for start in range(0, len(waiting), at_once):
            yield waiting[start : start + at_once]
