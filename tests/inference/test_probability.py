"""Lazily upsampled probabilities: equal to torch's upsampling, in less memory."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.export import write_checkpoint

from segtrain.inference import torch_backend
from segtrain.inference.options import InferenceOptions
from segtrain.inference.predict import person_probs_of_image
from segtrain.inference.probability import UpsampledProbs, bounds
from segtrain.inference.torch_backend import TorchBackend
from segtrain.prediction.matting import make_alpha, make_mask
from segtrain.runtime.devices import autocast_for
from segtrain.types import Image, Probs

RNG = np.random.default_rng(0)
SIZES = [(40, 50), (13, 17), (97, 31), (20, 25), (10, 300), (300, 10), (1, 1), (601, 713)]


def upsample_with_torch(output: Probs, size: tuple[int, int]) -> Probs:
    upsampled = F.interpolate(torch.from_numpy(output)[None, None], size, mode="bilinear")
    return upsampled[0, 0].numpy()


def random_outputs(*sizes: tuple[int, int]) -> list[Probs]:
    return [RNG.random(size, dtype=np.float32) for size in sizes]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "output_sizes", [[(20, 25)], [(1, 1)], [(15, 19), (20, 25), (25, 31)]], ids=str
)
def test_upsampling_equals_torch(
    size: tuple[int, int], output_sizes: list[tuple[int, int]]
) -> None:
    outputs = random_outputs(*output_sizes)
    expected = np.mean([upsample_with_torch(output, size) for output in outputs], axis=0)

    actual = np.asarray(UpsampledProbs(outputs, size))

    assert (actual.shape, actual.dtype) == (size, np.float32)
    # torch computes positions in float32.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_a_region_equals_that_part_of_the_whole() -> None:
    probability = UpsampledProbs(random_outputs((20, 25), (15, 19)), (601, 713))
    whole = np.asarray(probability)

    for rows, columns in [((0, 1), (0, 713)), ((599, 601), (700, 713)), ((100, 377), (300, 301))]:
        region = slice(*rows), slice(*columns)
        np.testing.assert_array_equal(probability[region], whole[region])


def test_changing_a_region_in_place_does_not_change_the_probabilities() -> None:
    probability = UpsampledProbs(random_outputs((20, 25)), (60, 70))
    region = slice(0, 60), slice(0, 70)
    before = probability[region].copy()
    probability[region][:] = 7

    np.testing.assert_array_equal(probability[region], before)


@pytest.mark.parametrize("size", [(200, 250), (20, 25), (13, 17)])
def test_all_pixels_are_within_the_bounds(size: tuple[int, int]) -> None:
    probability = UpsampledProbs(random_outputs((20, 25), (15, 19)), size)
    whole = np.asarray(probability)

    for _ in range(100):
        top, left = RNG.integers(0, size[0]), RNG.integers(0, size[1])
        region = slice(top, RNG.integers(top + 1, size[0] + 1)), slice(left, left + 1)
        lowest, highest = bounds(probability, region)
        assert lowest <= whole[region].min() + 1e-6
        assert highest >= whole[region].max() - 1e-6
        assert bounds(whole, region) == (whole[region].min(), whole[region].max())


@pytest.mark.parametrize("size", [(700, 900), (37, 41), (40, 50)])
def test_mask_and_alpha_equal_those_of_the_full_array(size: tuple[int, int]) -> None:
    """The inside of the blob is certain, so some blocks are decided from their bounds alone."""
    y, x = np.mgrid[-1:1:40j, -1:1:50j]
    output = (1.5 - 2 * np.hypot(y, x)).clip(0, 1).astype(np.float32)
    probability = UpsampledProbs([output], size)
    whole = np.asarray(probability)

    assert 0 < (whole >= 0.5).mean() < 0.5
    np.testing.assert_array_equal(make_mask(probability), make_mask(whole))
    np.testing.assert_array_equal(make_mask(probability) > 0, whole >= 0.5)
    np.testing.assert_array_equal(make_alpha(probability), make_alpha(whole))


def test_a_mask_of_a_large_image_needs_only_its_own_memory() -> None:
    """Probabilities at full size would need another four bytes a pixel."""
    height, width = 3000, 4000
    output = np.zeros((224, 299), dtype=np.float32)
    output[60:160, 100:200] = 1
    probability = UpsampledProbs([output], (height, width))
    tracemalloc.start()
    mask = make_mask(probability)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert mask.any()
    assert peak < 1.6 * height * width


# --- TorchBackend -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of an untrained network whose predictions vary between pixels."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return write_checkpoint(folder / "unet.pt", "model.base_channels=4", "model.depth=2")


def random_images(*sizes: tuple[int, int]) -> list[Image]:
    return [RNG.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


OPTIONS = [
    InferenceOptions(size=64),
    InferenceOptions(size=64, tta="flip"),
    InferenceOptions(size=64, tta="scales"),
    InferenceOptions(size=300, tile=128),
]
all_options = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: f"{o.size} {o.tta}")


@all_options
def test_prediction_equals_evaluation(checkpoint: Path, options: InferenceOptions) -> None:
    backend = TorchBackend(checkpoint, options)
    cpu = torch.device("cpu")
    for image in random_images((90, 121), (300, 301), (31, 64)):
        [predicted] = backend.probs([image])
        evaluated = person_probs_of_image(
            backend._model, image, options, cpu, autocast_for("fp32", cpu)
        )
        np.testing.assert_allclose(np.asarray(predicted), evaluated.numpy(), rtol=0, atol=1e-5)


@all_options
def test_a_batch_gives_the_same_probabilities_as_single_images(
    checkpoint: Path, options: InferenceOptions
) -> None:
    backend = TorchBackend(checkpoint, options)
    images = random_images((90, 121), (90, 121), (90, 121), (31, 64), (90, 121))
    single = [backend.probs([image])[0] for image in images]
    backend.batch_size = 2

    batched = backend.probs(images)

    assert [probs.shape for probs in batched] == [image.shape[:2] for image in images]
    for actual, expected in zip(batched, single, strict=True):
        np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


@pytest.mark.parametrize(
    ("size", "batch_size", "expected"),
    [((64, 64), 16, [5]), ((64, 64), 2, [2, 2, 1]), ((1000, 500), 16, [2, 2, 1])],
)
def test_a_batch_is_at_most_a_megapixel(
    checkpoint: Path,
    size: tuple[int, int],
    batch_size: int,
    expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = TorchBackend(checkpoint, InferenceOptions(size=min(size), tile=None))
    backend.batch_size = batch_size
    batch_sizes = []

    def record(model: object, image: torch.Tensor, *_: object, **__: object) -> list[torch.Tensor]:
        batch_sizes.append(len(image))
        return [torch.zeros((len(image), *image.shape[2:]))]

    monkeypatch.setattr(torch_backend, "predict_scales", record)

    assert len(backend.probs(random_images(*[size] * 5))) == 5
    assert batch_sizes == expected


@pytest.mark.gpu
def test_cuda_batches_images_of_one_size_and_equals_the_cpu(checkpoint: Path) -> None:
    on_cpu = TorchBackend(checkpoint, InferenceOptions(size=64, device="cpu"))
    on_cuda = TorchBackend(checkpoint, InferenceOptions(size=64, device="cuda"))
    images = random_images((90, 121), (90, 121), (31, 64))

    assert (on_cpu.batch_size, on_cuda.batch_size > 1) == (1, True)
    for actual, expected in zip(on_cuda.probs(images), on_cpu.probs(images), strict=True):
        np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=1e-3)
