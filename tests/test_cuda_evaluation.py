"""What a network says on a GPU is what it says on the CPU, and nothing waits before it is read."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from conftest import no_waiting
from export_cases import TIRAMISU, random_images, write_checkpoint
from torch import nn

from segtrain.asking import Asking
from segtrain.checkpoint import load_checkpoint, restore_model
from segtrain.config import BnEval
from segtrain.devices import autocast_for, move_model, resolve_device
from segtrain.evaluation.evaluate import answered_batches, evaluate
from segtrain.models.batch_norm import recalibrate
from segtrain.prediction.network import HowToRun
from segtrain.prediction.onnx_network import OnnxNetwork
from segtrain.prediction.torch_network import TorchNetwork

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
NETWORKS = {
    "unet": ("model.base_channels=4", "model.depth=2"),
    "unet valid": ("model.base_channels=4", "model.depth=2", "model.padding=valid"),
    "unet group": ("model.base_channels=16", "model.depth=2", "model.norm=group"),
    "unet on resnet18": ("model.encoder=resnet18", "model.base_channels=4"),
    "tiramisu": TIRAMISU,
}
every_network = pytest.mark.parametrize("name", NETWORKS)
every_bn = pytest.mark.parametrize("bn_eval", get_args(BnEval))


@pytest.fixture
def checkpoint(name: str, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "network.pt", *NETWORKS[name])


def network_on(device: torch.device, checkpoint: Path) -> nn.Module:
    model = restore_model(load_checkpoint(checkpoint), checkpoint)
    move_model(model, device)
    return model


def pinned_batches(number: int) -> list[dict[str, Any]]:
    """Of two images, larger than what a network sees of them."""
    images = torch.from_numpy(random_images(2 * number, 64, 80)).permute(0, 3, 1, 2)
    masks = torch.randint(2, (2 * number, 96, 120), dtype=torch.uint8)
    pairs = zip(images.split(2), masks.split(2), strict=True)
    return [{"image": image.pin_memory(), "mask": mask.pin_memory()} for image, mask in pairs]


@every_bn
@every_network
def test_validation_says_what_it_says_on_the_cpu(checkpoint: Path, bn_eval: BnEval) -> None:
    found = []
    for device in (CPU, resolve_device("cuda")):
        model, autocast = network_on(device, checkpoint), autocast_for("fp32", device)
        if bn_eval == "recalibrate":
            recalibrate(model, pinned_batches(3), device=device, autocast=autocast)
        answers = answered_batches(
            model,
            pinned_batches(2),
            asking=Asking(short_side=64, tta="flip"),
            device=device,
            autocast=autocast,
            bn_eval=bn_eval,
        )
        found.append(torch.cat([probs.cpu() for _, probs in answers]))

    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-3)


@every_bn
@pytest.mark.parametrize("name", ["unet", "tiramisu"])
def test_nothing_waits_in_validation(checkpoint: Path, bn_eval: BnEval) -> None:
    device = resolve_device("cuda")
    model, autocast = network_on(device, checkpoint), autocast_for("bf16", device)
    batches = pinned_batches(3)
    common: dict[str, Any] = {
        "asking": Asking(short_side=64, tta="scales"),
        "device": device,
        "autocast": autocast,
        "bn_eval": bn_eval,
    }
    # Kernels are chosen and memory is taken.
    recalibrate(model, batches[:1], device=device, autocast=autocast)
    evaluate(model, batches[:1], **common)

    with no_waiting():
        if bn_eval == "recalibrate":
            recalibrate(model, batches, device=device, autocast=autocast)
        confusion = evaluate(model, batches, **common)

    assert confusion.counts.sum() == 6 * 96 * 120


@pytest.mark.parametrize(
    "how", [{}, {"tta": "flip"}, {"tta": "scales"}, {"tile": 128, "size": 192}], ids=str
)
@every_network
def test_predictions_in_fp32_are_those_of_the_cpu(checkpoint: Path, how: dict[str, Any]) -> None:
    """TF32 would be off by thousandths."""
    pictures = list(random_images(3, 90, 121))
    on_cpu, on_cuda = (
        TorchNetwork(checkpoint, HowToRun(device=device, **how)) for device in ("cpu", "cuda")
    )

    for found, expected in zip(on_cuda.probs(pictures), on_cpu.probs(pictures), strict=True):
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
@every_network
def test_predictions_in_lower_precisions_are_near(checkpoint: Path, precision: Any) -> None:
    pictures = list(random_images(3, 90, 121))
    exact = TorchNetwork(checkpoint, HowToRun(device="cuda")).probs(pictures)
    rounded = TorchNetwork(checkpoint, HowToRun(device="cuda", precision=precision)).probs(pictures)

    for found, expected in zip(rounded, exact, strict=True):
        difference = np.abs(np.asarray(found) - np.asarray(expected))
        assert difference.mean() < (0.01 if precision == "bf16" else 0.002)


def test_an_onnx_file_on_a_gpu_says_what_it_says_on_the_cpu(
    exported_unet: tuple[Path, Path],
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA")
    pictures = list(random_images(2, 90, 121))
    on_cpu, on_cuda = (
        OnnxNetwork(exported_unet[1], HowToRun(device=device)) for device in ("cpu", "cuda")
    )

    assert "onnxruntime CUDA" in on_cuda.description
    for found, expected in zip(on_cuda.probs(pictures), on_cpu.probs(pictures), strict=True):
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=1e-4)
