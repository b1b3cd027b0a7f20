"""Probabilities that are made where somebody looks: as torch would scale them, in less memory."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from export_cases import write_checkpoint

from segtrain.asking import Asking
from segtrain.devices import autocast_for
from segtrain.images import Pixels
from segtrain.models.inference import person_probs_of_picture
from segtrain.prediction import torch_network
from segtrain.prediction.alpha import make_alpha, make_mask
from segtrain.prediction.network import HowToRun
from segtrain.prediction.probability import Enlarged, Values, bounds
from segtrain.prediction.torch_network import TorchNetwork

RNG = np.random.default_rng(0)
SIZES = [(40, 50), (13, 17), (97, 31), (20, 25), (10, 300), (300, 10), (1, 1), (601, 713)]


def by_torch(answer: Values, size: tuple[int, int]) -> Values:
    scaled = F.interpolate(torch.from_numpy(answer)[None, None], size, mode="bilinear")
    return scaled[0, 0].numpy()


def random_answers(*sizes: tuple[int, int]) -> list[Values]:
    return [RNG.random(size, dtype=np.float32) for size in sizes]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("answers", [[(20, 25)], [(1, 1)], [(15, 19), (20, 25), (25, 31)]], ids=str)
def test_it_is_scaled_as_by_torch(size: tuple[int, int], answers: list[tuple[int, int]]) -> None:
    given = random_answers(*answers)
    expected = np.mean([by_torch(answer, size) for answer in given], axis=0)

    found = np.asarray(Enlarged(given, size))

    assert (found.shape, found.dtype) == (size, np.float32)
    # torch counts places in float32.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_region_is_that_part_of_the_whole() -> None:
    probability = Enlarged(random_answers((20, 25), (15, 19)), (601, 713))
    whole = np.asarray(probability)

    for rows, columns in [((0, 1), (0, 713)), ((599, 601), (700, 713)), ((100, 377), (300, 301))]:
        region = slice(*rows), slice(*columns)
        np.testing.assert_array_equal(probability[region], whole[region])


def test_who_changes_what_they_looked_at_changes_nothing_else() -> None:
    probability = Enlarged(random_answers((20, 25)), (60, 70))
    region = slice(0, 60), slice(0, 70)
    before = probability[region].copy()
    probability[region][:] = 7

    np.testing.assert_array_equal(probability[region], before)


@pytest.mark.parametrize("size", [(200, 250), (20, 25), (13, 17)])
def test_no_pixel_is_beyond_the_bounds(size: tuple[int, int]) -> None:
    probability = Enlarged(random_answers((20, 25), (15, 19)), size)
    whole = np.asarray(probability)

    for _ in range(100):
        top, left = RNG.integers(0, size[0]), RNG.integers(0, size[1])
        region = slice(top, RNG.integers(top + 1, size[0] + 1)), slice(left, left + 1)
        lowest, highest = bounds(probability, region)
        assert lowest <= whole[region].min() + 1e-6
        assert highest >= whole[region].max() - 1e-6
        assert bounds(whole, region) == (whole[region].min(), whole[region].max())


@pytest.mark.parametrize("size", [(700, 900), (37, 41), (40, 50)])
def test_masks_and_opacities_are_those_of_the_whole(size: tuple[int, int]) -> None:
    """A blob with a sure inside, so that some tiles are decided without a look at their pixels."""
    down, across = np.mgrid[-1:1:40j, -1:1:50j]
    answer = (1.5 - 2 * np.hypot(down, across)).clip(0, 1).astype(np.float32)
    probability = Enlarged([answer], size)
    whole = np.asarray(probability)

    assert 0 < (whole >= 0.5).mean() < 0.5
    np.testing.assert_array_equal(make_mask(probability), make_mask(whole))
    np.testing.assert_array_equal(make_mask(probability) > 0, whole >= 0.5)
    np.testing.assert_array_equal(make_alpha(probability), make_alpha(whole))


def test_a_mask_of_a_large_picture_takes_its_own_memory() -> None:
    """And not the four bytes a pixel of the probabilities at full size."""
    height, width = 3000, 4000
    answer = np.zeros((224, 299), dtype=np.float32)
    answer[60:160, 100:200] = 1
    probability = Enlarged([answer], (height, width))
    tracemalloc.start()
    mask = make_mask(probability)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert mask.any()
    assert peak < 1.6 * height * width


# --- a network's answers ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a network that has learnt nothing and says something else everywhere."""
    folder = tmp_path_factory.mktemp("trained")
    return write_checkpoint(folder / "unet.pt", "model.base_channels=4", "model.depth=2")


def pictures(*sizes: tuple[int, int]) -> list[Pixels]:
    return [RNG.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


ASKINGS = [
    HowToRun(size=64),
    HowToRun(size=64, tta="flip"),
    HowToRun(size=64, tta="scales"),
    HowToRun(size=300, tile=128),
]


@pytest.mark.parametrize("how", ASKINGS, ids=lambda how: f"{how.size} {how.tta}")
def test_prediction_says_what_evaluation_judges(trained: Path, how: HowToRun) -> None:
    network = TorchNetwork(trained, how)
    asking = Asking(short_side=how.size or 0, tta=how.tta, tile=how.tile)
    cpu = torch.device("cpu")
    for picture in pictures((90, 121), (300, 301), (31, 64)):
        [found] = network.probs([picture])
        judged = person_probs_of_picture(
            network._model, picture, asking, cpu, autocast_for("fp32", cpu)
        )
        np.testing.assert_allclose(np.asarray(found), judged.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", ASKINGS, ids=lambda how: f"{how.size} {how.tta}")
def test_pictures_that_go_together_are_answered_as_alone(trained: Path, how: HowToRun) -> None:
    network = TorchNetwork(trained, how)
    together = pictures((90, 121), (90, 121), (90, 121), (31, 64), (90, 121))
    alone = [network.probs([picture])[0] for picture in together]
    network.at_once = 2

    found = network.probs(together)

    assert [one.shape for one in found] == [picture.shape[:2] for picture in together]
    for one, expected in zip(found, alone, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(expected))


@pytest.mark.parametrize(
    ("size", "most", "batches"),
    [((64, 64), 16, [5]), ((64, 64), 2, [2, 2, 1]), ((1000, 500), 16, [2, 2, 1])],
)
def test_a_batch_is_at_most_a_megapixel(
    trained: Path,
    size: tuple[int, int],
    most: int,
    batches: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, seen = TorchNetwork(trained, HowToRun(size=min(size), tile=None)), []
    network.at_once = most

    def note(model: object, image: torch.Tensor, *_: object, **__: object) -> list[torch.Tensor]:
        seen.append(len(image))
        return [torch.zeros((len(image), *image.shape[2:]))]

    monkeypatch.setattr(torch_network, "answers", note)

    assert len(network.probs(pictures(*[size] * 5))) == 5
    assert seen == batches


@pytest.mark.gpu
def test_on_cuda_pictures_of_one_size_go_together_and_say_the_same(trained: Path) -> None:
    on_cpu = TorchNetwork(trained, HowToRun(size=64, device="cpu"))
    on_cuda = TorchNetwork(trained, HowToRun(size=64, device="cuda"))
    asked = pictures((90, 121), (90, 121), (31, 64))

    assert (on_cpu.at_once, on_cuda.at_once > 1) == (1, True)
    for found, expected in zip(on_cuda.probs(asked), on_cpu.probs(asked), strict=True):
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=1e-3)
