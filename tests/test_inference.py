"""How a network is asked: mirrored, at several scales, tile by tile; against plain loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from segtrain.config import Tta
from segtrain.devices import autocast_for
from segtrain.models import build_model
from segtrain.models.inference import Asking, person_probs, person_probs_of_picture
from segtrain.models.tiling import SMALLEST_TILE, through_tiles, tile_starts

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
FP32 = autocast_for("fp32", CPU)


class Nearby(nn.Module):
    """Two random convolutions: what is said of a pixel hangs on the two next to it each way."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = torch.randn(4, 3, 3, 3, generator=generator) / 255
        self.second = torch.randn(2, 4, 3, 3, generator=generator)

    def forward(self, image: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(image.float(), self.first, padding=1), self.second, padding=1)


def noise(height: int, width: int, num: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (num, 3, height, width), generator=generator, dtype=torch.uint8)


def ask(
    model: nn.Module, image: Tensor, size: tuple[int, int], tta: Tta, tile: int | None
) -> Tensor:
    asking = Asking(short_side=min(image.shape[-2:]), tta=tta, tile=tile)
    return person_probs(model.eval(), image, size, FP32, asking=asking)


# --- Mirrored and scaled ------------------------------------------------------------------------


def test_flip_is_the_mean_with_the_mirror_image() -> None:
    image, model = noise(20, 30), Nearby()
    plain = model(image).softmax(1)[0, 1]
    mirrored = model(image.flip(3)).softmax(1)[0, 1].flip(1)
    assert (plain - mirrored).abs().max() > 0.1
    ours = ask(model, image, (20, 30), "flip", None)[0]
    torch.testing.assert_close(ours, (plain + mirrored) / 2, rtol=0, atol=1e-6)


def test_scales_is_the_mean_over_six() -> None:
    image, model = noise(40, 60), Nearby()
    answers = []
    for size in [(30, 45), (40, 60), (50, 75)]:
        scaled = F.interpolate(image.float(), size, mode="bilinear", antialias=True)
        for mirrored in (False, True):
            seen = scaled.flip(3) if mirrored else scaled
            probs = model(seen).softmax(1)[:, 1:]
            probs = probs.flip(3) if mirrored else probs
            answers.append(F.interpolate(probs, (80, 120), mode="bilinear")[0, 0])
    ours = ask(model, image, (80, 120), "scales", None)[0]
    torch.testing.assert_close(ours, torch.stack(answers).mean(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tta", ["none", "flip", "scales"])
@pytest.mark.parametrize("tile", [None, 64])
def test_no_picture_feels_the_others_in_its_batch(tta: Tta, tile: int | None) -> None:
    torch.manual_seed(0)
    model = build_model("unet", 2, base_channels=4, depth=2)
    images = noise(70, 90, num=3)
    together = ask(model, images, (100, 110), tta, tile)
    for image, answer in zip(images.split(1), together, strict=True):
        assert torch.equal(ask(model, image, (100, 110), tta, tile)[0], answer)


def test_a_picture_and_a_batch_of_it_have_one_answer() -> None:
    """What predict asks and what eval asks."""
    picture = noise(48, 64)[0].permute(1, 2, 0).numpy()
    asking = Asking(short_side=48, tta="flip", tile=64)
    alone = person_probs_of_picture(Nearby(), picture, asking, CPU, FP32)
    batch = torch.from_numpy(np.stack([picture, picture])).permute(0, 3, 1, 2)
    together = person_probs(Nearby(), batch, (48, 64), FP32, asking=asking)
    assert torch.equal(alone, together[1])


# --- Tiles --------------------------------------------------------------------------------------


@given(st.integers(1, 700), st.integers(SMALLEST_TILE, 300))
@settings(max_examples=200, deadline=None)
def test_tiles_cover_a_side_and_share_enough(length: int, tile: int) -> None:
    starts = tile_starts(length, tile)
    ends = [min(start + tile, length) for start in starts]
    assert starts[0] == 0
    assert ends[-1] == length
    assert all(start % 32 == 0 for start in starts)
    for end, start in zip(ends[:-1], starts[1:], strict=True):
        assert end - start >= tile / 4
    assert (
        all(end - start > tile - 32 for start, end in zip(starts, ends, strict=True))
        or [length] == ends
    )


@given(st.integers(1, 300), st.integers(1, 300), st.integers(SMALLEST_TILE, 200))
@settings(max_examples=40, deadline=None)
def test_a_constant_stays_constant(height: int, width: int, tile: int) -> None:
    """Weights sum to one everywhere, and every pixel is seen."""
    answer = through_tiles(
        lambda x: torch.full((1, *x.shape[-2:]), 0.7), noise(height, width), tile
    )
    assert answer.shape == (1, height, width)
    torch.testing.assert_close(answer, torch.full_like(answer, 0.7), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(200, 333), (64, 500), (65, 65), (30, 1000)], ids=str)
def test_where_the_network_sees_no_farther_than_the_margin_tiles_are_the_whole(
    size: tuple[int, int],
) -> None:
    image, model = noise(*size), Nearby()
    whole = ask(model, image, size, "none", None)
    tiled = ask(model, image, size, "none", 64)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["unet", "tiramisu"])
def test_away_from_seams_a_real_network_is_nearly_the_same(name: str) -> None:
    """A U-Net of depth 2 sees 22 pixels far; a dense network's far sight is faint."""
    torch.manual_seed(0)
    small = {
        "unet": {"base_channels": 4, "depth": 2},
        "tiramisu": {"down_blocks": [2, 2], "up_blocks": [2, 2], "bottleneck": 2},
    }[name]
    model = build_model(name, 2, **small)
    image = noise(300, 420)
    whole = ask(model, image, (300, 420), "none", None)
    tiled = ask(model, image, (300, 420), "none", 192)
    assert (tiled - whole).abs().max() < 1e-3


def test_a_hard_cut_would_show() -> None:
    """The test above has power: tiles that are only laid side by side differ at their edges."""
    torch.manual_seed(0)
    model = build_model("unet", 2, base_channels=4, depth=2).eval()
    image = noise(300, 420)
    whole = ask(model, image, (300, 420), "none", None)
    cut = torch.cat([model(part).softmax(1)[:, 1] for part in image.split(192, dim=3)], dim=2)
    assert (cut - whole).abs().max() > 0.01


def test_tiles_bound_what_is_seen_at_once() -> None:
    seen: list[int] = []

    def see(part: Tensor) -> Tensor:
        seen.append(math.prod(part.shape[-2:]))
        return torch.zeros(1, *part.shape[-2:])

    through_tiles(see, noise(1000, 1500), 256)
    assert max(seen) <= 256 * 256
    assert sum(seen) < 2.5 * 1000 * 1500
