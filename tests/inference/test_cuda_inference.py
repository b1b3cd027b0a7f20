"""Predictions on a GPU equal those on the CPU, and nothing synchronizes before they are read."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from helpers.command import no_device_sync
from helpers.export import TIRAMISU, random_images, write_checkpoint
from torch import nn

from segtrain.checkpoint import load_checkpoint, restore_model
from segtrain.config.schema import BnEval
from segtrain.evaluation.confusion import evaluate_batches
from segtrain.inference.onnx_backend import OnnxBackend
from segtrain.inference.options import InferenceOptions
from segtrain.inference.predict import predict_batches
from segtrain.inference.torch_backend import TorchBackend
from segtrain.models.batch_norm import recalibrate
from segtrain.runtime.devices import autocast_for, move_model, resolve_device

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
NETWORKS = {
    "unet": ("model.base_channels=4", "model.depth=2"),
    "unet valid": ("model.base_channels=4", "model.depth=2", "model.padding=valid"),
    "unet group": ("model.base_channels=16", "model.depth=2", "model.norm=group"),
    "unet on resnet18": ("model.encoder=resnet18", "model.base_channels=4"),
    "tiramisu": TIRAMISU,
}
all_networks = pytest.mark.parametrize("name", NETWORKS)
all_bn_evals = pytest.mark.parametrize("bn_eval", get_args(BnEval))


@pytest.fixture
def checkpoint(name: str, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "network.pt", *NETWORKS[name])


def load_model(checkpoint: Path, device: torch.device) -> nn.Module:
    model = restore_model(load_checkpoint(checkpoint), checkpoint)
    move_model(model, device)
    return model


def pinned_batches(num_batches: int) -> list[dict[str, Any]]:
    """Batches of two images, with masks larger than the images."""
    images = torch.from_numpy(random_images(2 * num_batches, 64, 80)).permute(0, 3, 1, 2)
    masks = torch.randint(2, (2 * num_batches, 96, 120), dtype=torch.uint8)
    pairs = zip(images.split(2), masks.split(2), strict=True)
    return [{"image": image.pin_memory(), "mask": mask.pin_memory()} for image, mask in pairs]


@all_bn_evals
@all_networks
def test_validation_equals_the_cpu(checkpoint: Path, bn_eval: BnEval) -> None:
    probs_by_device = []
    for device in (CPU, resolve_device("cuda")):
        model, autocast = load_model(checkpoint, device), autocast_for("fp32", device)
        if bn_eval == "recalibrate":
            recalibrate(model, pinned_batches(3), device=device, autocast=autocast)
        predictions = predict_batches(
            model,
            pinned_batches(2),
            options=InferenceOptions(tile=None, size=64, tta="flip"),
            device=device,
            autocast=autocast,
            bn_eval=bn_eval,
        )
        probs_by_device.append(torch.cat([probs.cpu() for _, probs in predictions]))

    on_cpu, on_cuda = probs_by_device
    torch.testing.assert_close(on_cuda, on_cpu, rtol=0, atol=1e-3)


@all_bn_evals
@pytest.mark.parametrize("name", ["unet", "tiramisu"])
def test_validation_does_not_synchronize(checkpoint: Path, bn_eval: BnEval) -> None:
    device = resolve_device("cuda")
    model, autocast = load_model(checkpoint, device), autocast_for("bf16", device)
    batches = pinned_batches(3)
    common: dict[str, Any] = {
        "options": InferenceOptions(tile=None, size=64, tta="scales"),
        "device": device,
        "autocast": autocast,
        "bn_eval": bn_eval,
    }
    # Warm up: select kernels and allocate memory.
    recalibrate(model, batches[:1], device=device, autocast=autocast)
    evaluate_batches(model, batches[:1], **common)

    with no_device_sync():
        if bn_eval == "recalibrate":
            recalibrate(model, batches, device=device, autocast=autocast)
        confusion = evaluate_batches(model, batches, **common)

    assert confusion.counts.sum() == 6 * 96 * 120


@pytest.mark.parametrize(
    "options", [{}, {"tta": "flip"}, {"tta": "scales"}, {"tile": 128, "size": 192}], ids=str
)
@all_networks
def test_predictions_in_fp32_equal_the_cpu(checkpoint: Path, options: dict[str, Any]) -> None:
    """TF32 would differ by thousandths."""
    images = list(random_images(3, 90, 121))
    on_cpu, on_cuda = (
        TorchBackend(checkpoint, InferenceOptions(device=device, **options))
        for device in ("cpu", "cuda")
    )

    for actual, expected in zip(on_cuda.probs(images), on_cpu.probs(images), strict=True):
        np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
@all_networks
def test_predictions_in_lower_precisions_are_close(checkpoint: Path, precision: Any) -> None:
    images = list(random_images(3, 90, 121))
    exact = TorchBackend(checkpoint, InferenceOptions(device="cuda")).probs(images)
    rounded = TorchBackend(checkpoint, InferenceOptions(device="cuda", precision=precision)).probs(
        images
    )

    for actual, expected in zip(rounded, exact, strict=True):
        difference = np.abs(np.asarray(actual) - np.asarray(expected))
        assert difference.mean() < (0.01 if precision == "bf16" else 0.002)


def test_an_onnx_file_on_a_gpu_equals_the_cpu(
    exported_unet: tuple[Path, Path],
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA")
    images = list(random_images(2, 90, 121))
    on_cpu, on_cuda = (
        OnnxBackend(exported_unet[1], InferenceOptions(device=device)) for device in ("cpu", "cuda")
    )

    assert "onnxruntime CUDA" in on_cuda.description
    for actual, expected in zip(on_cuda.probs(images), on_cpu.probs(images), strict=True):
        np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=1e-4)
