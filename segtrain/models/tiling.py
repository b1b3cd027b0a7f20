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
from itertools import groupby, pairwise, product

import torch
from torch import Tensor

from segtrain.errors import UsageError

STRIDE = 32
"""Tiles begin at multiples of this: what all networks here halve to, unless they are deepened. So a
tile is pooled at the same pixels as the whole picture is."""

_SMALLEST = 4 * STRIDE
_AUTOMATIC = 512
_LARGEST_WHOLE = 2**20
# Weights are whole multiples of this: sums of products of two are exact in float32.
_GRAIN = 2.0**-12


@dataclass(frozen=True)
class Strip:
    """The rows or the columns of a tile, and how much each counts: float32 in 0..1."""

    where: slice
    weights: Tensor

    def __len__(self) -> int:
        return len(self.weights)


Tile = tuple[Strip, Strip]
"""Rows and columns."""


def check_side(side: int) -> None:
    """Refuse sides that tiles cannot have.

    Raises:
        UsageError: `side` is too small or no multiple of STRIDE.
    """
    if side < _SMALLEST or side % STRIDE:
        raise UsageError(
            f"tiles cannot have a side of {side} pixels; take a multiple of {STRIDE} from "
            f"{_SMALLEST} on"
        )


def automatic_side(height: int, width: int) -> int | None:
    """None, for whole, up to a megapixel; else 512 pixels.

    A megapixel takes the networks here a few GB in float32, a tile of 512 pixels a quarter of that.
    """
    return None if height * width <= _LARGEST_WHOLE else _AUTOMATIC


def spans(length: int, side: int) -> list[slice]:
    """Where the tiles lie along one side of a picture, evenly spread.

    Neighbours overlap by at least half a tile. All begin at multiples of STRIDE and none reaches
    beyond the picture; the last one is up to STRIDE - 1 pixels shorter, so that the network
    pads it just as it pads the whole picture. A picture that is no longer than a tile has one.
    """
    if length <= side:
        return [slice(0, length)]
    step = side - _overlap(side)
    last = -(-(length - side) // STRIDE)
    num_steps = -(-last * STRIDE // step)
    starts = [last * number // num_steps * STRIDE for number in range(num_steps + 1)]
    return [slice(start, min(start + side, length)) for start in starts]


def strips(length: int, side: int, device: torch.device) -> list[Strip]:
    """The tiles along one side of a picture, weighted.

    Halfway through each overlap a step rises from 0 to 1, and a tile counts as much as the step at
    its beginning exceeds the one at its end. So at every pixel the weights sum to exactly one.
    """
    tiles = spans(length, side)
    middles = torch.arange(length, device=device) + 0.5
    steps = [torch.ones(length, device=device)]
    for tile, following in pairwise(tiles):
        centre = (following.start + tile.stop) / 2
        t = ((middles - centre) / _ramp(side) + 0.5).clamp_(0, 1)
        steps.append((t * t * (3 - 2 * t) / _GRAIN).round_() * _GRAIN)
    steps.append(torch.zeros(length, device=device))
    return [
        Strip(tile, (begin - end)[tile])
        for tile, (begin, end) in zip(tiles, pairwise(steps), strict=True)
    ]


def probs_by_tiles(
    ask: Callable[[Tensor], Tensor], image: Tensor, side: int, pixels_at_once: int
) -> Tensor:
    """What `ask` says about a picture, seen in square tiles.

    Beside the result, 4 bytes a pixel, memory is taken for one batch of tiles.

    Args:
        ask: from N 3 h w to probabilities N h w float32.
        image: 1 3 H W.
        side: of the tiles, as `check_side` allows.
        pixels_at_once: `ask` gets at most so many, but at least one tile.

    Returns:
        H W float32 on the picture's device.
    """
    height, width = image.shape[-2:]
    probs = torch.zeros((height, width), device=image.device)
    tiles = product(strips(height, side, image.device), strips(width, side, image.device))
    for batch in _batches(tiles, pixels_at_once):
        answers = ask(torch.cat([image[:, :, rows.where, cols.where] for rows, cols in batch]))
        for (rows, cols), answer in zip(batch, answers, strict=True):
            place = probs[rows.where, cols.where]
            place.addcmul_(answer, rows.weights[:, None] * cols.weights)
    return probs


def _overlap(side: int) -> int:
    """Half a tile, as in nnU-Net (Isensee et al. 2018, arXiv 1809.10486), or a bit more.

    A quarter is half the work. But networks that look far say other things in other tiles, and then
    the blends can be seen: patches that end before the person does.
    """
    return -(-side // (2 * STRIDE)) * STRIDE


def _ramp(side: int) -> int:
    """The middle half of the overlap. Beside it, an eighth of a tile wide, an end is not heard."""
    return _overlap(side) // 2


def _batches(tiles: Iterable[Tile], pixels_at_once: int) -> Iterator[list[Tile]]:
    """Tiles of equal height and width, several at once."""

    def shape(tile: Tile) -> tuple[int, int]:
        return len(tile[0]), len(tile[1])

    for (height, width), alike in groupby(sorted(tiles, key=shape), key=shape):
        waiting = list(alike)
        at_once = max(1, pixels_at_once // (height * width))
        for start in range(0, len(waiting), at_once):
            yield waiting[start : start + at_once]
