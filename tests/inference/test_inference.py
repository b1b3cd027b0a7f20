"""Test-time augmentation and tiles, compared with sums by hand, Pillow and hard seams."""

import contextlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from helpers.command import no_device_sync
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from segtrain.config.schema import DataConfig
from segtrain.data.datasets import open_selection
from segtrain.data.loader import eval_batches
from segtrain.errors import UsageError
from segtrain.inference import tiles
from segtrain.inference.options import InferenceOptions
from segtrain.inference.predict import person_probs, person_probs_of_image
from segtrain.inference.tiled import WeightedSpan, predict_tiled, weighted_spans
from segtrain.inference.tiles import auto_tile_size, tile_spans
from segtrain.models import build_model
from segtrain.models.batch_norm import eval_mode
from segtrain.models.layers import pad_to_multiple
from segtrain.runtime.devices import autocast_for, prefetch
from segtrain.types import Image

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
FP32 = contextlib.nullcontext
TILE_SIZES = st.integers(4, 40).map(lambda factor: 32 * factor)


class Asymmetric(nn.Module):
    """Two 3x3 convolutions with asymmetric weights; the receptive field reaches 2 pixels."""

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
    """Predicts from the means of 32 x 32 cells, like the coarsest features of a network."""

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        cells = nn.functional.avg_pool2d(pad_to_multiple(image.float(), 32), 32)
        person = cells.repeat_interleave(32, 2).repeat_interleave(32, 3)[:, :1, :height, :width]
        return torch.cat([torch.zeros_like(person), (person - 127) * 4], dim=1)


def noise(height: int, width: int, seed: int = 0) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def predict(model: nn.Module, image: Image, **options: Any) -> Tensor:
    """Predict with these options, by default without tiles and at the image's own size."""
    options = {"size": min(image.shape[:2]), "tile": None, **options}
    return person_probs_of_image(model.eval(), image, InferenceOptions(**options), CPU, FP32)


def predict_directly(model: nn.Module, image: Image) -> Tensor:
    """Person probability at the size of `image` (bytes or floats), without segtrain.inference."""
    with torch.no_grad():
        logits = model(torch.from_numpy(image.transpose(2, 0, 1).copy())[None])[0]
    return torch.sigmoid(logits[1] - logits[0])


# --- Test-time augmentation ---------------------------------------------------------------------


def test_flip_is_the_mean_of_the_image_and_the_flipped_image() -> None:
    model, image = Asymmetric(), noise(21, 34)
    plain = predict(model, image)
    flipped = predict(model, image[:, ::-1].copy()).flip(1)
    assert not torch.allclose(plain, flipped, atol=0.1)
    assert torch.equal(predict(model, image, tta="flip"), (plain + flipped) / 2)
    torch.testing.assert_close(plain, predict_directly(model, image))


def resize_with_pillow(image: Image, height: int, width: int) -> np.ndarray[Any, Any]:
    """Resize with antialiasing, without rounding to bytes."""
    channels = [
        np.asarray(
            PIL.Image.fromarray(image[..., i].astype(np.float32)).resize(
                (width, height), PIL.Image.Resampling.BILINEAR
            )
        )
        for i in range(3)
    ]
    return np.stack(channels, axis=2)


def test_scales_are_the_mean_of_three_sizes_and_their_flips() -> None:
    """The image has the largest of the three sizes, so OpenCV resizes nothing."""
    model, image = Asymmetric(), noise(50, 80)
    views = [resize_with_pillow(image, 30, 48), resize_with_pillow(image, 40, 64), image]
    outputs = []
    for view in views:
        for output in (
            predict_directly(model, view),
            predict_directly(model, view[:, ::-1].copy()).flip(1),
        ):
            upsampled = PIL.Image.fromarray(output.numpy()).resize(
                (80, 50), PIL.Image.Resampling.BILINEAR
            )
            outputs.append(np.asarray(upsampled))
    actual = predict(model, image, size=40, tta="scales")
    np.testing.assert_allclose(actual.numpy(), np.mean(outputs, axis=0), atol=1e-4)
    assert np.abs(actual.numpy() - outputs[4]).max() > 0.1
    assert model.shapes[-6:] == [
        *[(1, 3, 30, 48)] * 2,
        *[(1, 3, 40, 64)] * 2,
        *[(1, 3, 50, 80)] * 2,
    ]


def test_the_largest_scale_is_made_from_the_original_image() -> None:
    """It shows details that are lost at the requested short side."""
    inputs: list[Tensor] = []

    class Recording(Asymmetric):
        def forward(self, image: Tensor) -> Tensor:
            inputs.append(image)
            return super().forward(image)

    photo = noise(100, 100)
    predict(Recording(), photo, size=80, tta="scales")
    assert torch.equal(inputs[4], torch.from_numpy(photo.transpose(2, 0, 1))[None])


# --- Tiles --------------------------------------------------------------------------------------


@given(st.integers(1, 4000), TILE_SIZES)
def test_tiles_cover_a_side_of_any_length(length: int, tile_size: int) -> None:
    spans = tile_spans(length, tile_size)
    assert spans[0].start == 0
    assert spans[-1].stop == length
    assert (len(spans) == 1) == (length <= tile_size)
    for span, next_span in pairwise(spans):
        assert span.start < next_span.start <= span.stop - tile_size / 2
        assert span.stop - span.start == tile_size
    if len(spans) > 1:
        assert tile_size - 32 < length - spans[-1].start <= tile_size
        assert all(span.start % 32 == 0 for span in spans)


@given(st.integers(1, 4000), TILE_SIZES)
def test_weights_sum_to_one_and_vanish_at_inner_edges(length: int, tile_size: int) -> None:
    total = np.zeros(length, dtype=np.float32)
    tiles = weighted_spans(length, tile_size, CPU)
    for tile in tiles:
        weights = tile.weights.numpy()
        assert weights.dtype == np.float32
        assert weights.shape == (tile.span.stop - tile.span.start,)
        assert weights.min() >= 0
        total[tile.span] += weights
        margin = tile_size // 8
        if tile is not tiles[0]:
            assert not weights[:margin].any()
        if tile is not tiles[-1]:
            assert not weights[-margin:].any()
    assert (total == 1).all()


@pytest.mark.parametrize("max_batch_pixels", [1, 2**15, 2**20])
@pytest.mark.parametrize(("height", "width"), [(128, 129), (333, 517), (64, 300), (40, 50)])
def test_a_constant_prediction_stays_constant(
    height: int, width: int, max_batch_pixels: int
) -> None:
    image = torch.zeros(1, 3, height, width, dtype=torch.uint8)

    def constant(value: float) -> Callable[[Tensor], Tensor]:
        return lambda tiles: torch.full((len(tiles), *tiles.shape[2:]), value)

    actual = predict_tiled(constant(0.5), image, 128, max_batch_pixels)
    assert torch.equal(actual, torch.full((height, width), 0.5))
    actual = predict_tiled(constant(0.3), image, 128, max_batch_pixels)
    torch.testing.assert_close(actual, torch.full((height, width), 0.3), rtol=3e-7, atol=0)


@pytest.mark.parametrize("tta", ["none", "flip", "scales"])
@pytest.mark.parametrize(("height", "width"), [(128, 129), (333, 517), (101, 300), (60, 50)])
def test_tiles_equal_the_whole_image(height: int, width: int, tta: str) -> None:
    model, image = Asymmetric(), noise(height, width)
    whole = predict(model, image, tta=tta)
    assert whole.std() > 0.05
    tiled = predict(model, image, tta=tta, tile=128)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tta", ["none", "flip"])
def test_tiles_are_pooled_at_the_same_pixels_as_the_whole_image(tta: str) -> None:
    model, image = CellMeans(), noise(333, 517)
    whole = predict(model, image, tta=tta)
    assert whole.std() > 0.1
    tiled = predict(model, image, tta=tta, tile=160)
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


def receptive_radius(model: nn.Module) -> int:
    """How far a NaN pixel spreads in the output, in pixels."""
    image = torch.zeros(1, 3, 192, 192)
    image[..., 96, 96] = torch.nan
    affected = model(image)[0, 1].isnan().nonzero()
    return int((affected - 96).abs().max())


@pytest.mark.parametrize(
    ("name", "tile_size"),
    [("unet", 256), ("unet valid", 256), ("tiramisu", 256), ("deep unet", 192)],
)
def test_tiles_of_real_networks_equal_the_whole_image_away_from_edges(
    name: str, tile_size: int
) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    image = noise(300, 417)
    with torch.inference_mode():
        radius = receptive_radius(model)
        whole = predict(model, image)
        difference = (predict(model, image, tile=tile_size) - whole).abs()
    assert whole.std() > 0.01
    near = torch.zeros(300, 417, dtype=torch.bool)
    for rows in weighted_spans(300, tile_size, CPU):
        near[_indices_near_edge(rows, 300, radius), :] = True
    for columns in weighted_spans(417, tile_size, CPU):
        near[:, _indices_near_edge(columns, 417, radius)] = True
    assert near.float().mean() < 0.5
    assert difference[~near].max() < 1e-5
    if radius <= tile_size // 8:
        assert not near.any()
    else:
        assert difference.max() > 1e-5  # otherwise the assertion above would be trivial


def _indices_near_edge(tile: WeightedSpan, length: int, radius: int) -> Tensor:
    """Indices with nonzero weight that are less than `radius` pixels from an inner edge."""
    start, stop = tile.span.start, tile.span.stop
    indices = torch.arange(start, stop)
    near = torch.zeros(stop - start, dtype=torch.bool)
    if start > 0:
        near |= indices < start + radius
    if stop < length:
        near |= indices >= stop - radius
    return indices[near & (tile.weights > 0)]


def _first_pixel(tiles: Tensor) -> Tensor:
    """Predict person for a tile if its first pixel is white: neighbors disagree completely."""
    return (tiles[:, 0, :1, :1] / 255.0).expand(-1, *tiles.shape[2:]).contiguous()


def max_step(image: Tensor, tile_size: int) -> float:
    """The largest difference between neighboring pixels."""
    probs = predict_tiled(_first_pixel, image, tile_size, 1)
    return max(probs.diff(dim=dim).abs().max().item() for dim in (0, 1))


def test_tiles_that_disagree_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights rise over a quarter of a tile, 64 pixels; the maximum slope is 1.5 / 64."""
    image = torch.zeros(1, 3, 500, 700)
    image[..., 200:] = 255
    assert 0.02 < max_step(image, 256) < 1.5 / 64 + 1e-3

    monkeypatch.setattr(tiles, "_ramp", lambda tile_size: 1e-6)  # a hard seam
    assert max_step(image, 256) == 1


def test_automatic_tiles_limit_the_input_of_the_network() -> None:
    model, image = Asymmetric(), noise(1100, 1300)
    predict(model, image, tile="auto", tta="flip")
    assert set(model.shapes) == {
        (1, 3, height, width) for height in (512, 492) for width in (512, 500)
    }


def test_batches_of_tiles_respect_the_pixel_limit() -> None:
    shapes: list[Sequence[int]] = []

    def forward_fn(tiles: Tensor) -> Tensor:
        shapes.append(tiles.shape)
        return tiles[:, 0] / 255.0

    image = torch.from_numpy(noise(500, 600)).permute(2, 0, 1)[None]
    actual = predict_tiled(forward_fn, image, 128, 5 * 128 * 128)
    torch.testing.assert_close(actual, image[0, 0] / 255.0)
    assert max(len(shape) for shape in shapes) == 4
    assert max(shape[0] for shape in shapes) == 5
    assert max(np.prod((shape[0], *shape[2:])) for shape in shapes) <= 5 * 128 * 128


@pytest.mark.parametrize(
    ("size", "tile_size"), [((1024, 1024), None), ((100, 10_000), None), ((1025, 1024), 512)]
)
def test_automatic_tiles_start_above_a_megapixel(
    size: tuple[int, int], tile_size: int | None
) -> None:
    assert auto_tile_size(*size) == tile_size


@pytest.mark.parametrize("tile", [0, -256, 96, 100, 200, 513])
def test_an_invalid_tile_size_is_rejected(tile: int) -> None:
    with pytest.raises(UsageError, match=f"{tile} pixels; use a multiple of 32, at least 128"):
        InferenceOptions(size=600, tile=tile)


# --- Evaluation equals prediction ---------------------------------------------------------------

OPTIONS = [
    InferenceOptions(tile=None, size=64),
    InferenceOptions(tile=None, size=64, tta="flip"),
    InferenceOptions(tile=None, size=64, tta="scales"),
    InferenceOptions(size=110, tta="scales", tile=128),
]
every_options = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: f"{o.tta} {o.tile}")


@every_options
def test_evaluation_and_prediction_get_the_same_probabilities(
    options: InferenceOptions, toy_coco: Path
) -> None:
    torch.manual_seed(0)
    model = build_model("unet", base_channels=4, depth=2).eval()
    source = open_selection(DataConfig(root=str(toy_coco)), "val")
    batches = eval_batches(
        source,
        image_size=options.loaded_short_side,
        batch_size=3,
        workers=0,
        pin_memory=False,
    )
    images = {sample.image_id: sample.image for sample in map(source.sample, range(len(source)))}
    autocast = autocast_for("fp32", CPU)
    num_seen = 0
    for batch in prefetch(batches, CPU):
        size = batch["mask"].shape[1], batch["mask"].shape[2]
        probs = person_probs(model, batch["image"], size, autocast, options=options)
        for image_id, evaluated in zip(batch["image_id"], probs, strict=True):
            image = images[image_id]
            predicted = person_probs_of_image(model, image, options, CPU, autocast)
            assert torch.equal(evaluated, predicted)
            num_seen += 1
    assert num_seen == len(source) > 3


@every_options
@pytest.mark.parametrize("bn_eval", ["running", "batch"])
def test_a_prediction_does_not_depend_on_the_rest_of_the_batch(
    options: InferenceOptions, bn_eval: Any
) -> None:
    torch.manual_seed(0)
    model = build_model("unet", base_channels=4, depth=2)
    images = torch.from_numpy(np.stack([noise(70, 90, seed) for seed in range(4)]))
    images = images.permute(0, 3, 1, 2)
    with eval_mode(model, bn_eval):
        together = person_probs(model, images, (140, 180), FP32, options=options)
        alone = [
            person_probs(model, image, (140, 180), FP32, options=options)
            for image in images.split(1)
        ]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.gpu
@every_options
def test_cuda_does_not_synchronize_and_equals_the_cpu(options: InferenceOptions) -> None:
    torch.manual_seed(0)
    model = build_model("unet", base_channels=4, depth=2).eval()
    images = torch.from_numpy(np.stack([noise(250, 290, seed) for seed in range(3)]))
    images = images.permute(0, 3, 1, 2)
    expected = person_probs(model, images, (300, 350), FP32, options=options)
    device = torch.device("cuda")
    model, on_device = model.to(device), images.to(device)
    autocast = autocast_for("fp32", device)  # without TF32, which differs by up to 3e-3
    person_probs(model, on_device, (300, 350), autocast, options=options)  # warm up cuDNN
    with no_device_sync():
        actual = person_probs(model, on_device, (300, 350), autocast, options=options)
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=1e-4)
