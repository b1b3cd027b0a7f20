"""Dense blocks on a GPU: compiled kernels, number of launches, and memory."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segtrain.models import build_model, dense_block_cuda
from segtrain.models.dense_block import DenseBlock
from segtrain.models.layers import Dropout
from segtrain.runtime.devices import autocast_for, move_model, resolve_device

pytestmark = pytest.mark.gpu

TOLERANCES = {"fp16": 2e-2, "bf16": 1e-1}


@pytest.fixture
def device() -> torch.device:
    return resolve_device("cuda")


def kernels() -> Any:
    from segtrain.models import dense_layer_triton

    return dense_layer_triton


def make_block(
    device: torch.device, growth_rate: int = 16, p: float = 0.2, num_layers: int = 3
) -> DenseBlock:
    torch.manual_seed(0)
    block = DenseBlock(48, num_layers, growth_rate, p).train()
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.3, 1.5)
            nn.init.uniform_(norm.bias, -1.0, 1.0)
    move_model(block, device)
    return block


def reference(block: DenseBlock, parts: list[Tensor], features: Tensor) -> Tensor:
    """The plain form in float64; dropout drops the values that are zero in `features`."""
    x = torch.cat(parts, dim=1)
    for layer in block.layers:
        norm, conv = layer.norm, layer.conv
        weight, bias = norm.weight.double(), norm.bias.double()
        a = F.batch_norm(x, None, None, weight, bias, training=True, eps=norm.eps).relu()
        y = F.conv2d(a, conv.weight.double(), conv.bias.double(), padding=1)
        if layer.dropout.p:
            kept = features[:, x.shape[1] : x.shape[1] + y.shape[1]] != 0
            y = torch.where(kept, y / (1 - layer.dropout.p), 0)
        x = torch.cat([x, y], dim=1)
    return x


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("size", [(2, 33, 50), (1, 7, 7), (3, 3, 224)])
@pytest.mark.parametrize("growth_rate", [5, 12, 16])
def test_kernel_features_and_gradients_match_the_reference(
    growth_rate: int, size: tuple[int, int, int], precision: Any, device: torch.device
) -> None:
    block = make_block(device, growth_rate)
    n, h, w = size
    parts = [torch.randn(n, c, h, w, device=device).requires_grad_() for c in (16, 32)]
    with autocast_for(precision, device)():
        features = dense_block_cuda._forward_fused(block, kernels(), parts)
        exact = [part.detach().to(features.dtype).double().requires_grad_() for part in parts]
        expected = reference(block, exact, features.detach())
        grad = torch.randn_like(features)
        weights = list(block.parameters())
        actual_grads = torch.autograd.grad(features, [*parts, *weights], grad)
        expected_grads = torch.autograd.grad(expected, [*exact, *weights], grad.double())

    assert relative_error(features.detach(), expected.detach()) < TOLERANCES[precision]
    for actual, expected_grad in zip(actual_grads, expected_grads, strict=True):
        assert relative_error(actual, expected_grad) < 3 * TOLERANCES[precision]


def test_the_kernels_pass_the_check_of_the_first_step(device: torch.device) -> None:
    """Otherwise FC-DenseNet would silently train without them."""
    for dtype in (torch.float16, torch.bfloat16):
        block, parts = make_block(device), [torch.randn(2, 48, 64, 64, device=device)]
        block.memory_efficient = True
        with torch.autocast("cuda", dtype=dtype):
            assert dense_block_cuda.training_ops(block, parts) is kernels()


@pytest.mark.parametrize("memory_efficient", [True, False, "auto"])
def test_a_network_trains_in_each_form(memory_efficient: Any, device: torch.device) -> None:
    torch.manual_seed(0)
    model = build_model("fc_densenet56", memory_efficient=memory_efficient).train()
    move_model(model, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    image = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8, device=device)
    mask = (image.float().mean(1) > 127).long()
    losses = []
    for _ in range(30):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(image).float(), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    # The timed steps do not change the running statistics.
    assert {int(norm.num_batches_tracked) for norm in norms} == {30}


def count_launches(model: nn.Module, image: Tensor) -> int:
    """Count the kernel launches of one forward and backward pass."""
    mask = torch.zeros(len(image), *image.shape[2:], dtype=torch.long, device=image.device)

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = model(image)
        F.cross_entropy(logits.float(), mask).backward()
        model.zero_grad()

    step()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len(events)


def test_number_of_launches_of_a_tiramisu_step(device: torch.device) -> None:
    model = build_model("tiramisu", memory_efficient=True).train()
    move_model(model, device)
    image = torch.zeros(2, 3, 224, 224, dtype=torch.uint8, device=device)
    image = image.contiguous(memory_format=torch.channels_last)
    assert count_launches(model, image) <= 1200
    model.memory_efficient = False
    assert count_launches(model, image) <= 2450


def test_memory_efficient_saves_at_most_a_third_of_the_plain_forms_bytes(
    device: torch.device,
) -> None:
    image = torch.zeros(2, 3, 224, 224, dtype=torch.uint8, device=device)
    saved = {}
    for efficient in (True, False):
        model = build_model("tiramisu", memory_efficient=efficient).train()
        move_model(model, device)
        model(image).sum().backward()
        model.zero_grad()
        before = torch.cuda.memory_allocated(device)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = model(image)
        saved[efficient] = (torch.cuda.memory_allocated(device) - before) / len(image)
        del logits, model
    assert saved[True] < 200e6
    assert saved[True] < saved[False] / 3


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_dropout_rate_and_seed(p: float, device: torch.device) -> None:
    dropout, x = Dropout(p), torch.ones(4, 16, 128, 128, device=device)
    torch.manual_seed(3)
    first = dropout(x)
    rate = (first == 0).double().mean().item()
    assert abs(rate - p) < 5 * (p * (1 - p) / x.numel()) ** 0.5
    assert not torch.equal(dropout(x), first)
    torch.manual_seed(3)
    assert torch.equal(dropout(x), first)

    block, parts = make_block(device, p=p), [torch.randn(2, 48, 64, 64, device=device).half()]
    torch.manual_seed(3)
    features, _ = block.train_fused(kernels(), parts)
    again, _ = block.train_fused(kernels(), parts)
    torch.manual_seed(3)
    same, _ = block.train_fused(kernels(), parts)
    assert torch.equal(features, same)
    assert not torch.equal(features, again)
    new = features[:, 48:]
    rate = (new == 0).double().mean().item()
    assert abs(rate - p) < 5 * (p * (1 - p) / new.numel()) ** 0.5
