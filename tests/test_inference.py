"""How a network is asked: mirrored, at several scales, tile by tile; against plain loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segtrain.config import Tta
from segtrain.devices import autocast_for
from segtrain.models import build_model
from segtrain.models.inference import Asking, person_probs, person_probs_of_picture

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
    short_side = min(image.shape[-2:]) * (4 if tta == "scales" else 5) // 5
    asking = Asking(short_side=short_side, tta=tta, tile=tile)
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
    for size in [(24, 36), (32, 48), (40, 60)]:
        scaled = image.float()
        if size != (40, 60):
            scaled = F.interpolate(scaled, size, mode="bilinear", antialias=True)
        for mirrored in (False, True):
            seen = scaled.flip(3) if mirrored else scaled
            probs = model(seen).softmax(1)[:, 1:]
            probs = probs.flip(3) if mirrored else probs
            answers.append(F.interpolate(probs, (80, 120), mode="bilinear")[0, 0])
    ours = ask(model, image, (80, 120), "scales", None)[0]
    torch.testing.assert_close(ours, torch.stack(answers).mean(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tta", ["none", "flip", "scales"])
@pytest.mark.parametrize("tile", [None, 128])
def test_no_picture_feels_the_others_in_its_batch(tta: Tta, tile: int | None) -> None:
    torch.manual_seed(0)
    model = build_model("unet", 2, base_channels=4, depth=2)
    images = noise(150, 190, num=3)
    together = ask(model, images, (100, 110), tta, tile)
    for image, answer in zip(images.split(1), together, strict=True):
        assert torch.equal(ask(model, image, (100, 110), tta, tile)[0], answer)


def test_a_picture_and_a_batch_of_it_have_one_answer() -> None:
    """What predict asks and what eval asks."""
    picture = noise(48, 64)[0].permute(1, 2, 0).numpy()
    asking = Asking(short_side=48, tta="flip", tile=128)
    alone = person_probs_of_picture(Nearby(), picture, asking, CPU, FP32)
    batch = torch.from_numpy(np.stack([picture, picture])).permute(0, 3, 1, 2)
    together = person_probs(Nearby(), batch, (48, 64), FP32, asking=asking)
    assert torch.equal(alone, together[1])
