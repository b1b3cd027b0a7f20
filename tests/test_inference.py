"""How networks are asked: against sums by hand, another library's scaling, and seams on purpose."""

import contextlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import no_waiting
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from segtrain import tiles
from segtrain.asking import Asking
from segtrain.config import DataConfig
from segtrain.data import open_pictures
from segtrain.data.loading import eval_batches
from segtrain.devices import autocast_for, prefetched
from segtrain.errors import UsageError
from segtrain.images import Pixels
from segtrain.models import build_model, tiling
from segtrain.models.batch_norm import evaluation_statistics
from segtrain.models.inference import person_probs, person_probs_of_picture
from segtrain.models.layers import pad_to_multiple
from segtrain.models.tiling import probs_by_tiles, strips
from segtrain.tiles import automatic_side, spans

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
NOTHING = contextlib.nullcontext
SIDES = st.integers(4, 40).map(lambda number: 32 * number)


class Lopsided(nn.Module):
    """Two 3x3 convolutions whose weights are no mirror images of themselves: it sees 2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.convs = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, 1, 1)
        )
        for parameter in self.parameters():
            parameter.data.normal_(0, 0.3, generator=generator)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, image: Tensor) -> Tensor:
        self.shapes.append(tuple(image.shape))
        logits: Tensor = self.convs(image.float() / 64 - 2)
        return logits


class CellMeans(nn.Module):
    """Sees the mean of each cell of 32 x 32 pixels, as the coarsest features of a network do."""

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        cells = nn.functional.avg_pool2d(pad_to_multiple(image.float(), 32), 32)
        person = cells.repeat_interleave(32, 2).repeat_interleave(32, 3)[:, :1, :height, :width]
        return torch.cat([torch.zeros_like(person), (person - 127) * 4], dim=1)


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def probs(model: nn.Module, picture: Pixels, **asking: Any) -> Tensor:
    """As asked, by default at the picture's own size."""
    asking.setdefault("short_side", min(picture.shape[:2]))
    return person_probs_of_picture(model.eval(), picture, Asking(**asking), CPU, NOTHING)


def by_hand(model: nn.Module, picture: Pixels) -> Tensor:
    """Probability of person, whole, at the size of `picture` (bytes or floats)."""
    with torch.no_grad():
        logits = model(torch.from_numpy(picture.transpose(2, 0, 1).copy())[None])[0]
    return torch.sigmoid(logits[1] - logits[0])


# --- several views ------------------------------------------------------------------------------


def test_flip_is_the_mean_of_the_picture_and_its_mirror_image() -> None:
    model, picture = Lopsided(), noise(21, 34)
    plain = probs(model, picture)
    mirrored = probs(model, picture[:, ::-1].copy()).flip(1)
    assert not torch.allclose(plain, mirrored, atol=0.1)
    assert torch.equal(probs(model, picture, tta="flip"), (plain + mirrored) / 2)
    torch.testing.assert_close(plain, by_hand(model, picture))


def scaled_by_pillow(picture: Pixels, height: int, width: int) -> np.ndarray[Any, Any]:
    """Antialiased, by another library, without rounding to bytes."""
    channels = [
        np.asarray(
            Image.fromarray(picture[..., i].astype(np.float32)).resize(
                (width, height), Image.Resampling.BILINEAR
            )
        )
        for i in range(3)
    ]
    return np.stack(channels, axis=2)


def test_scales_are_the_mean_of_three_sizes_and_their_mirror_images() -> None:
    """The picture has the largest of the three sizes, so no scaling is left to OpenCV."""
    model, picture = Lopsided(), noise(50, 80)
    views = [scaled_by_pillow(picture, 30, 48), scaled_by_pillow(picture, 40, 64), picture]
    answers = []
    for view in views:
        for answer in (
            by_hand(model, view),
            by_hand(model, view[:, ::-1].copy()).flip(1),
        ):
            enlarged = Image.fromarray(answer.numpy()).resize((80, 50), Image.Resampling.BILINEAR)
            answers.append(np.asarray(enlarged))
    found = probs(model, picture, short_side=40, tta="scales")
    np.testing.assert_allclose(found.numpy(), np.mean(answers, axis=0), atol=1e-4)
    assert np.abs(found.numpy() - answers[4]).max() > 0.1
    assert model.shapes[-6:] == [
        *[(1, 3, 30, 48)] * 2,
        *[(1, 3, 40, 64)] * 2,
        *[(1, 3, 50, 80)] * 2,
    ]


def test_the_largest_scale_is_made_of_the_picture_itself() -> None:
    """It shows what the picture has lost at the short side that was asked for."""
    seen: list[Tensor] = []

    class Recording(Lopsided):
        def forward(self, image: Tensor) -> Tensor:
            seen.append(image)
            return super().forward(image)

    picture = noise(100, 100)
    probs(Recording(), picture, short_side=80, tta="scales")
    assert torch.equal(seen[4], torch.from_numpy(picture.transpose(2, 0, 1))[None])


# --- tiles --------------------------------------------------------------------------------------


@given(st.integers(1, 4000), SIDES)
def test_tiles_cover_a_side_of_any_length(length: int, side: int) -> None:
    tiles = spans(length, side)
    assert tiles[0].start == 0
    assert tiles[-1].stop == length
    assert (len(tiles) == 1) == (length <= side)
    for one, other in pairwise(tiles):
        assert one.start < other.start <= one.stop - side / 2
        assert one.stop - one.start == side
    if len(tiles) > 1:
        assert side - 32 < length - tiles[-1].start <= side
        assert all(tile.start % 32 == 0 for tile in tiles)


@given(st.integers(1, 4000), SIDES)
def test_weights_sum_to_one_and_vanish_at_inner_edges(length: int, side: int) -> None:
    total = np.zeros(length, dtype=np.float32)
    parts = strips(length, side, CPU)
    for part in parts:
        weights = part.weights.numpy()
        assert weights.dtype == np.float32
        assert weights.shape == (part.where.stop - part.where.start,)
        assert weights.min() >= 0
        total[part.where] += weights
        margin = side // 8
        if part is not parts[0]:
            assert not weights[:margin].any()
        if part is not parts[-1]:
            assert not weights[-margin:].any()
    assert (total == 1).all()


@pytest.mark.parametrize("pixels_at_once", [1, 2**15, 2**20])
@pytest.mark.parametrize(("height", "width"), [(128, 129), (333, 517), (64, 300), (40, 50)])
def test_an_even_answer_stays_even(height: int, width: int, pixels_at_once: int) -> None:
    image = torch.zeros(1, 3, height, width, dtype=torch.uint8)

    def constant(value: float) -> Callable[[Tensor], Tensor]:
        return lambda tiles: torch.full((len(tiles), *tiles.shape[2:]), value)

    found = probs_by_tiles(constant(0.5), image, 128, pixels_at_once)
    assert torch.equal(found, torch.full((height, width), 0.5))
    found = probs_by_tiles(constant(0.3), image, 128, pixels_at_once)
    torch.testing.assert_close(found, torch.full((height, width), 0.3), rtol=3e-7, atol=0)


@pytest.mark.parametrize("tta", ["none", "flip", "scales"])
@pytest.mark.parametrize(("height", "width"), [(128, 129), (333, 517), (101, 300), (60, 50)])
def test_tiles_say_what_the_whole_picture_says(height: int, width: int, tta: str) -> None:
    model, picture = Lopsided(), noise(height, width)
    whole = probs(model, picture, tta=tta)
    assert whole.std() > 0.05
    tiled = probs(model, picture, tta=tta, tile=128)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tta", ["none", "flip"])
def test_tiles_are_pooled_at_the_same_pixels_as_the_whole(tta: str) -> None:
    model, picture = CellMeans(), noise(333, 517)
    whole = probs(model, picture, tta=tta)
    assert whole.std() > 0.1
    tiled = probs(model, picture, tta=tta, tile=160)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "unet": lambda: build_model("unet", base_channels=4, depth=1),
    "unet valid": lambda: build_model(
        "unet", base_channels=4, depth=2, padding="valid", norm="none"
    ),
    "deep unet": lambda: build_model("unet", base_channels=2, depth=3),
    "tiramisu": lambda: build_model(
        "tiramisu",
        growth_rate=3,
        down_blocks=[2, 2],
        bottleneck=2,
        up_blocks=[2, 2],
        stem_channels=4,
    ),
}


def reach(model: nn.Module) -> int:
    """How many pixels away a network looks: how far one that is no number spoils the answer."""
    image = torch.zeros(1, 3, 192, 192)
    image[..., 96, 96] = torch.nan
    spoilt = model(image)[0, 1].isnan().nonzero()
    return int((spoilt - 96).abs().max())


@pytest.mark.parametrize(
    ("name", "side"), [("unet", 256), ("unet valid", 256), ("tiramisu", 256), ("deep unet", 192)]
)
def test_real_networks_say_the_same_by_tiles_away_from_their_edges(name: str, side: int) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    picture = noise(300, 417)
    with torch.inference_mode():
        far = reach(model)
        whole = probs(model, picture)
        difference = (probs(model, picture, tile=side) - whole).abs()
    assert whole.std() > 0.01
    near = torch.zeros(300, 417, dtype=torch.bool)
    rows, columns = strips(300, side, CPU), strips(417, side, CPU)
    for row in rows:
        near[_seen_near_an_edge(row, 300, far), :] = True
    for column in columns:
        near[:, _seen_near_an_edge(column, 417, far)] = True
    assert near.float().mean() < 0.5
    assert difference[~near].max() < 1e-5
    if far <= side // 8:
        assert not near.any()
    else:
        assert difference.max() > 1e-5  # else the rule above would prove nothing


def _seen_near_an_edge(strip: tiling.Strip, length: int, far: int) -> Tensor:
    """Indices at which a tile is heard though it ends less than `far` pixels on."""
    start, stop = strip.where.start, strip.where.stop
    indices = torch.arange(start, stop)
    near = torch.zeros(stop - start, dtype=torch.bool)
    if start > 0:
        near |= indices < start + far
    if stop < length:
        near |= indices >= stop - far
    return indices[near & (strip.weights > 0)]


def _first_pixel(tiles: Tensor) -> Tensor:
    """A tile is all person if its first pixel is white: neighbours disagree as much as can be."""
    return (tiles[:, 0, :1, :1] / 255.0).expand(-1, *tiles.shape[2:]).contiguous()


def steepest(picture: Tensor, side: int) -> float:
    """The largest difference between neighbouring pixels."""
    found = probs_by_tiles(_first_pixel, picture, side, 1)
    return max(found.diff(dim=dim).abs().max().item() for dim in (0, 1))


def test_tiles_that_disagree_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights rise over a quarter of a tile, 64 pixels, in the middle three halves as fast."""
    picture = torch.zeros(1, 3, 500, 700)
    picture[..., 200:] = 255
    assert 0.02 < steepest(picture, 256) < 1.5 / 64 + 1e-3

    monkeypatch.setattr(tiles, "_ramp", lambda side: 1e-6)  # cut hard instead
    assert steepest(picture, 256) == 1


def test_hardly_any_memory_beside_the_tiles_is_the_networks() -> None:
    model, picture = Lopsided(), noise(1100, 1300)
    probs(model, picture, tile="auto", tta="flip")
    assert set(model.shapes) == {
        (1, 3, height, width) for height in (512, 492) for width in (512, 500)
    }


def test_many_tiles_at_once_are_as_many_pixels_as_allowed() -> None:
    shapes: list[Sequence[int]] = []

    def ask(tiles: Tensor) -> Tensor:
        shapes.append(tiles.shape)
        return tiles[:, 0] / 255.0

    image = torch.from_numpy(noise(500, 600)).permute(2, 0, 1)[None]
    found = probs_by_tiles(ask, image, 128, 5 * 128 * 128)
    torch.testing.assert_close(found, image[0, 0] / 255.0)
    assert max(len(shape) for shape in shapes) == 4
    assert max(shape[0] for shape in shapes) == 5
    assert max(np.prod((shape[0], *shape[2:])) for shape in shapes) <= 5 * 128 * 128


@pytest.mark.parametrize(
    ("size", "side"), [((1024, 1024), None), ((100, 10_000), None), ((1025, 1024), 512)]
)
def test_automatic_tiles_begin_beyond_a_megapixel(size: tuple[int, int], side: int | None) -> None:
    assert automatic_side(*size) == side


@pytest.mark.parametrize("tile", [0, -256, 96, 100, 200, 513])
def test_tiles_of_an_odd_side_are_refused(tile: int) -> None:
    with pytest.raises(UsageError, match=f"{tile} pixels; take a multiple of 32 from 128 on"):
        Asking(short_side=600, tile=tile)


# --- the same answer whoever asks ---------------------------------------------------------------

ASKINGS = [
    Asking(short_side=64),
    Asking(short_side=64, tta="flip"),
    Asking(short_side=64, tta="scales"),
    Asking(short_side=110, tta="scales", tile=128),
]
every_asking = pytest.mark.parametrize("asking", ASKINGS, ids=lambda a: f"{a.tta} {a.tile}")


@every_asking
def test_evaluation_and_prediction_get_the_same_answer(asking: Asking, toy_coco: Path) -> None:
    torch.manual_seed(0)
    model = build_model("unet", base_channels=4, depth=2).eval()
    source = open_pictures(DataConfig(root=str(toy_coco)), "val")
    batches = eval_batches(
        source,
        image_size=asking.loaded_short_side,
        batch_size=3,
        workers=0,
        pin_memory=False,
    )
    pictures = {sample.image_id: sample.image for sample in map(source.sample, range(len(source)))}
    autocast = autocast_for("fp32", CPU)
    num_seen = 0
    for batch in prefetched(batches, CPU):
        size = batch["mask"].shape[1], batch["mask"].shape[2]
        found = person_probs(model, batch["image"], size, autocast, asking=asking)
        for image_id, judged in zip(batch["image_id"], found, strict=True):
            picture = pictures[image_id]
            predicted = person_probs_of_picture(model, picture, asking, CPU, autocast)
            assert torch.equal(judged, predicted)
            num_seen += 1
    assert num_seen == len(source) > 3


@every_asking
@pytest.mark.parametrize("bn_eval", ["running", "batch"])
def test_an_answer_does_not_depend_on_the_neighbours(asking: Asking, bn_eval: Any) -> None:
    torch.manual_seed(0)
    model = build_model("unet", base_channels=4, depth=2)
    images = torch.from_numpy(np.stack([noise(70, 90, seed) for seed in range(4)]))
    images = images.permute(0, 3, 1, 2)
    with evaluation_statistics(model, bn_eval):
        together = person_probs(model, images, (140, 180), NOTHING, asking=asking)
        alone = [
            person_probs(model, image, (140, 180), NOTHING, asking=asking)
            for image in images.split(1)
        ]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.gpu
@every_asking
def test_on_cuda_nobody_waits_and_the_answer_is_the_same(asking: Asking) -> None:
    torch.manual_seed(0)
    model = build_model("unet", base_channels=4, depth=2).eval()
    images = torch.from_numpy(np.stack([noise(250, 290, seed) for seed in range(3)]))
    images = images.permute(0, 3, 1, 2)
    expected = person_probs(model, images, (300, 350), NOTHING, asking=asking)
    device = torch.device("cuda")
    model, on_device = model.to(device), images.to(device)
    autocast = autocast_for("fp32", device)  # without TF32, which differs by up to 3e-3
    person_probs(model, on_device, (300, 350), autocast, asking=asking)  # cuDNN has chosen
    with no_waiting():
        found = person_probs(model, on_device, (300, 350), autocast, asking=asking)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-4)
