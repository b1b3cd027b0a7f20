"""Dense blocks, their dropout, and their saved tensors, compared with a reference implementation.

The reference in this file uses torch.cat, batch_norm, and autograd with its own copy of the
weights. It shares only the dropout masks with the tested code.
"""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from segtrain.errors import UsageError
from segtrain.models import build_model
from segtrain.models.dense_block import DenseBlock
from segtrain.models.fc_densenet import FCDenseNet
from segtrain.models.layers import Dropout

pytestmark = pytest.mark.usefixtures("one_thread")

DOWN, BOTTLENECK, UP = (1, 2), 2, (2, 1)
SLIM: dict[str, Any] = {
    "growth_rate": 3,
    "down_blocks": DOWN,
    "bottleneck": BOTTLENECK,
    "up_blocks": UP,
    "stem_channels": 5,
}

keep_or_recompute = pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
# Dropout rounds to multiples of 1/65536, so these rates and their scales are exact.
dropout_rates = pytest.mark.parametrize("p", [0.0, 0.25], ids=["all", "dropout"])

Masks = list[Tensor | None]
Values = dict[str, Tensor]


# --- The reference -----------------------------------------------------------------------------


class Reference:
    """Plain implementation of a block or network with a copy of its weights.

    Args:
        module: a DenseBlock or FCDenseNet.
        masks: the values that each dropout keeps, in order; by default, all.
        p: the dropout rate of the masks.
        batch_stats: batch norm uses batch statistics and updates its running statistics.
    """

    def __init__(
        self,
        module: nn.Module,
        masks: Sequence[Tensor | None] = (),
        p: float = 0.0,
        *,
        batch_stats: bool = True,
    ) -> None:
        self.masks, self.p, self.batch_stats = iter(masks), p, batch_stats
        self.buffers = {key: value.clone() for key, value in module.named_buffers()}
        self.weights = {
            key: value.detach().clone().requires_grad_() for key, value in module.named_parameters()
        }

    def conv(self, x: Tensor, key: str) -> Tensor:
        weight, bias = self.weights[f"{key}.weight"], self.weights[f"{key}.bias"]
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    def layer(self, x: Tensor, key: str) -> Tensor:
        running = (self.buffers[f"{key}.norm.running_{moment}"] for moment in ("mean", "var"))
        affine = (self.weights[f"{key}.norm.{name}"] for name in ("weight", "bias"))
        x = F.batch_norm(x, *running, *affine, training=self.batch_stats, momentum=0.1, eps=1e-5)
        x = self.conv(x.relu(), f"{key}.conv")
        mask = next(self.masks, None)
        return x if mask is None else torch.where(mask, x / (1 - self.p), torch.zeros_like(x))

    def block(self, *parts: Tensor, prefix: str = "") -> Tensor:
        x = torch.cat(parts, dim=1)
        i = 0
        while f"{prefix}layers.{i}.conv.weight" in self.weights:
            x = torch.cat([x, self.layer(x, f"{prefix}layers.{i}")], dim=1)
            i += 1
        return x

    def network(self, image: Tensor) -> Tensor:
        """A network with the options `SLIM` on N 3 H W, where H and W are multiples of 4."""
        x = self.conv(
            (image - self.buffers["normalize.mean"]) / self.buffers["normalize.std"], "stem"
        )
        skips = []
        for level in range(len(DOWN)):
            skips.append(self.block(x, prefix=f"down_blocks.{level}."))
            x = F.max_pool2d(self.layer(skips[-1], f"downs.{level}"), 2)
        whole = self.block(x, prefix="bottleneck.")
        new = whole[:, x.shape[1] :]
        for level in range(len(UP)):
            key = f"ups.{level}.conv"
            weight, bias = self.weights[f"{key}.weight"], self.weights[f"{key}.bias"]
            up = F.conv_transpose2d(new, weight, bias, stride=2, padding=1, output_padding=1)
            parts = [up, skips[-1 - level]]
            whole = self.block(*parts, prefix=f"up_blocks.{level}.")
            new = whole[:, sum(part.shape[1] for part in parts) :]
        return self.conv(whole, "head")


# --- Tested modules and helpers -----------------------------------------------------------------


def random_normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomize_weights(module: nn.Module) -> None:
    """Set weights as after training, and harder ones: negative, zero, and disabled feature maps.

    A map with zero weight and bias is exactly at the kink of ReLU.
    """
    generator = torch.Generator().manual_seed(7)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for values in (norm.weight, norm.bias):
                nn.init.uniform_(values, -1.5, 1.5, generator=generator)
            disabled, constant = torch.randperm(norm.num_features, generator=generator)[:2]
            with torch.no_grad():
                norm.weight[disabled] = norm.bias[disabled] = 0
                norm.weight[constant], norm.bias[constant] = 0, 0.5
            norm.running_mean.uniform_(-1, 1, generator=generator)
            norm.running_var.uniform_(0.3, 3, generator=generator)
        elif isinstance(norm, nn.Conv2d):
            nn.init.uniform_(norm.bias, -1, 1, generator=generator)


def make_block(
    p: float = 0.0, *, recompute: bool = False, in_channels: int = 5, num_layers: int = 3
) -> DenseBlock:
    """Growth rate 2, float64, training mode, random weights."""
    torch.manual_seed(0)
    block = DenseBlock(in_channels, num_layers, 2, p).double().train()
    randomize_weights(block)
    block.memory_efficient = recompute
    return block


def make_network(p: float = 0.0, *, memory_efficient: bool | str = False) -> FCDenseNet:
    torch.manual_seed(0)
    network = build_model(
        "tiramisu", 2, drop_rate=p, memory_efficient=memory_efficient, **SLIM
    ).double()
    randomize_weights(network)
    return network.train()  # type: ignore[return-value]


def two_parts(mean: float = 0.0) -> list[Tensor]:
    """The input of `make_block`: 3 images, 2 and 3 channels."""
    parts = [random_normal(3, 2, 5, 7, seed=1), random_normal(3, 3, 5, 7, seed=2)]
    return [(part + mean).requires_grad_() for part in parts]


def random_image(height: int = 8, width: int = 12) -> Tensor:
    return (random_normal(2, 3, height, width, seed=3) * 60 + 120).requires_grad_()


def gradients(output: Tensor, inputs: Sequence[Tensor], weights: Values) -> Values:
    """Gradients of a weighted sum of the outputs, without accumulating them in `.grad`."""
    targets = {**{f"input {i}": x for i, x in enumerate(inputs)}, **weights}
    cotangent = random_normal(*output.shape, seed=4).to(output.dtype)
    grads = torch.autograd.grad(output, list(targets.values()), cotangent)
    return dict(zip(targets, grads, strict=True))


def run(module: nn.Module, inputs: Sequence[Tensor], seed: int = 5) -> tuple[Tensor, Values]:
    """Output and all gradients of a module; the seed determines the dropout."""
    torch.manual_seed(seed)
    output = module(*inputs)
    return output.detach(), gradients(output, inputs, dict(module.named_parameters()))


def assert_same(actual: Values, expected: Values, tolerance: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            actual[key], value, rtol=tolerance, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
        )


def assert_equal(actual: tuple[Tensor, Values], expected: tuple[Tensor, Values]) -> None:
    assert torch.equal(actual[0], expected[0])
    assert actual[1].keys() == expected[1].keys()
    for key, value in expected[1].items():
        assert torch.equal(actual[1][key], value), key


def running_stats(module: nn.Module) -> Values:
    return {key: value.clone() for key, value in module.named_buffers() if "norm." in key}


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> Masks:
    """Record all masks that dropout draws, in order."""
    masks: Masks = []
    draw_mask = Dropout.draw_mask

    def record(self: Dropout, x: Tensor) -> Tensor | None:
        masks.append(draw_mask(self, x))
        return masks[-1]

    monkeypatch.setattr(Dropout, "draw_mask", record)
    return masks


class Calls(TorchDispatchMode):
    """Counts the executed operators by name: `calls["convolution"]`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __getitem__(self, name: str) -> int:
        return self.counts[f"aten.{name}"]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


# --- Training: outputs and gradients -----------------------------------------------------------


@keep_or_recompute
@dropout_rates
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_block_outputs_and_gradients_match_the_reference(
    recompute: bool, p: float, mean: float, masks: Masks
) -> None:
    block, parts = make_block(p, recompute=recompute), two_parts(mean)
    output, grads = run(block, parts)
    assert len(masks) == 3  # once per layer, not again in the backward pass
    assert all((mask is None) == (p == 0) for mask in masks)
    reference = Reference(block, masks, p)
    expected = reference.block(*parts)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    assert_same(grads, gradients(expected, parts, reference.weights))


@keep_or_recompute
def test_block_with_one_part_and_one_layer(recompute: bool) -> None:
    torch.manual_seed(0)
    block = DenseBlock(2, 1, 3, 0.0).double()
    block.memory_efficient = recompute
    x = random_normal(2, 2, 1, 3).requires_grad_()
    output, grads = run(block, [x])
    reference = Reference(block)
    expected = reference.block(x)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    assert_same(grads, gradients(expected, [x], reference.weights))


@keep_or_recompute
def test_feature_maps_with_small_variance(recompute: bool) -> None:
    """The epsilon of batch norm dominates the variance."""
    block = make_block(recompute=recompute)
    parts = [(random_normal(3, c, 5, 7, seed=c) * 1e-3).requires_grad_() for c in (2, 3)]
    output, grads = run(block, parts)
    reference = Reference(block)
    expected = reference.block(*parts)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    # The input gradients are a few hundred here.
    assert_same(grads, gradients(expected, parts, reference.weights), tolerance=1e-9)


@keep_or_recompute
def test_float32_precision_with_a_large_mean(recompute: bool) -> None:
    """A mean of 1000 standard deviations costs three of seven digits, not six."""
    parts = [part.detach().float().requires_grad_() for part in two_parts(1000.0)]
    block = make_block(recompute=recompute).float()
    output, grads = run(block, parts)
    exact = [part.detach().double().requires_grad_() for part in parts]
    reference = Reference(block.double())
    expected = reference.block(*exact)
    torch.testing.assert_close(output[:, 5:].double(), expected[:, 5:], rtol=1e-3, atol=1e-3)
    for key, value in gradients(expected, exact, reference.weights).items():
        error = (grads[key].double() - value).norm()
        assert error <= 1e-3 * value.norm(), key


@keep_or_recompute
@dropout_rates
def test_network_outputs_gradients_and_statistics_match_the_reference(
    recompute: bool, p: float, masks: Masks
) -> None:
    network, image = make_network(p, memory_efficient=recompute), random_image()
    reference = Reference(network, masks, p)  # copies the running statistics
    output, grads = run(network, [image])
    assert len(masks) == sum(DOWN) + len(DOWN) + BOTTLENECK + sum(UP)
    expected = reference.network(image)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    assert_same(grads, gradients(expected, [image], reference.weights))
    for key, value in reference.buffers.items():
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(network.get_buffer(key), value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_recomputing_is_bit_identical(dtype: torch.dtype) -> None:
    block, parts = make_block(0.25).to(dtype), two_parts()
    parts = [part.detach().to(dtype).requires_grad_() for part in parts]
    kept = run(block, parts)
    block.memory_efficient = True
    assert_equal(run(block, parts), kept)
    other_seed, _ = run(block, parts, seed=6)
    assert not torch.equal(other_seed, kept[0])

    image = random_image(5, 7).detach().to(dtype).requires_grad_()
    kept, recomputed = (
        run(make_network(0.25, memory_efficient=efficient).to(dtype), [image])
        for efficient in (False, True)
    )
    assert_equal(recomputed, kept)


@keep_or_recompute
def test_backward_can_run_twice_and_does_not_change_the_given_gradient(
    recompute: bool,
) -> None:
    block, parts = make_block(0.25, recompute=recompute), two_parts()
    output = block(*parts)
    targets = [*parts, *block.parameters()]
    cotangent = random_normal(*output.shape)
    before = cotangent.clone()
    first = torch.autograd.grad(output, targets, cotangent, retain_graph=True)
    second = torch.autograd.grad(output, targets, cotangent)
    assert torch.equal(cotangent, before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@keep_or_recompute
def test_expanded_output_gradient(recompute: bool) -> None:
    """The gradient of `sum` is one number expanded to all values."""
    block, parts = make_block(recompute=recompute), two_parts()
    reference = Reference(block)
    actual = torch.autograd.grad(block(*parts).sum(), [*parts, *block.parameters()])
    expected = torch.autograd.grad(
        reference.block(*parts).sum(), [*parts, *reference.weights.values()]
    )
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_frozen_weights_and_inputs_without_gradients() -> None:
    block, parts = make_block(recompute=True), two_parts()
    _, expected = run(block, parts)
    parts[0].requires_grad_(False)
    block.layers[1].norm.requires_grad_(False)
    block.layers[2].conv.weight.requires_grad_(False)
    block(*parts).backward(random_normal(3, 11, 5, 7, seed=4))
    assert parts[0].grad is None
    actual = {key: value.grad for key, value in block.named_parameters() if value.requires_grad}
    assert len(actual) == 9
    assert parts[1].grad is not None
    torch.testing.assert_close(parts[1].grad, expected["input 1"])
    for key, grad in actual.items():
        assert torch.equal(grad, expected[key]), key


@keep_or_recompute
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_memory_layout_of_inputs_does_not_matter(
    recompute: bool, layout: torch.memory_format
) -> None:
    block, parts = make_block(recompute=recompute), two_parts()
    expected_output, expected = run(block, parts)
    # A slice of a larger tensor, like the features of the preceding block.
    wide = torch.cat([parts[0], random_normal(3, 4, 5, 7)], dim=1).detach()
    parts[0] = wide.contiguous(memory_format=layout)[:, :2].requires_grad_()
    output, grads = run(block, parts)
    torch.testing.assert_close(output, expected_output, rtol=1e-12, atol=1e-12)
    assert_same(grads, expected, tolerance=1e-12)


@keep_or_recompute
def test_gradcheck(recompute: bool) -> None:
    """Gradients match numerical differences."""
    torch.manual_seed(1)
    block = DenseBlock(2, 2, 2, 0.25).double()
    block.memory_efficient = recompute
    for norm in (layer.norm for layer in block.layers):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    weights = {key: value.detach().requires_grad_() for key, value in block.named_parameters()}

    def outputs(a: Tensor, b: Tensor, *values: Tensor) -> Tensor:
        torch.manual_seed(2)  # the same dropout in each call
        named = dict(zip(weights, values, strict=True))
        return torch.func.functional_call(block, named, (a, b))  # type: ignore[no-any-return]

    a, b = (
        random_normal(2, 1, 3, 4, seed=1).requires_grad_(),
        random_normal(2, 1, 3, 4, seed=2).requires_grad_(),
    )
    assert torch.autograd.gradcheck(outputs, (a, b, *weights.values()))


# --- Running statistics ------------------------------------------------------------------------


@keep_or_recompute
@pytest.mark.parametrize("momentum", [0.1, 0.4, None])
def test_running_statistics_match_torchs_batch_norm(
    recompute: bool, momentum: float | None
) -> None:
    block = make_block(recompute=recompute)
    for layer in block.layers:
        layer.norm.reset_running_stats()
        layer.norm.momentum = momentum
    reference = copy.deepcopy(block)
    means = []
    for step in range(3):
        x = random_normal(2, 5, 4, 3, seed=10 + step) * (step + 1) + step
        output = block(x)
        after_forward = running_stats(block)
        output.sum().backward()
        assert_same(running_stats(block), after_forward, tolerance=0)  # backward updates nothing
        for layer in reference.layers:
            x = torch.cat([x, layer.conv(layer.norm(x).relu())], dim=1)
        assert_same(running_stats(block), running_stats(reference))
        means.append(x[:, :9].mean(dim=(0, 2, 3)))
    for layer in block.layers:
        assert layer.norm.num_batches_tracked.item() == 3
    if momentum is None:
        expected = torch.stack(means).mean(dim=0).detach()
        torch.testing.assert_close(block.layers[2].norm.running_mean, expected)


def test_training_mode_without_gradients_updates_running_statistics() -> None:
    block, parts = make_block(), two_parts()
    other = copy.deepcopy(block)
    expected = block(*parts)
    with torch.no_grad():
        output = other(*parts)
    assert not output.requires_grad
    assert torch.equal(output, expected)
    assert_same(running_stats(other), running_stats(block), tolerance=0)
    assert other.layers[0].norm.num_batches_tracked.item() == 1


@dropout_rates
def test_evaluation_does_not_update_running_statistics(p: float) -> None:
    network, image = make_network(p).eval(), random_image()
    before = running_stats(network)
    network(image).sum().backward()
    with torch.no_grad():
        network(image)
    with torch.inference_mode():
        network(image)
    assert_same(running_stats(network), before, tolerance=0)


# --- Evaluation --------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_block_in_evaluation_matches_the_reference(context: Callable[[], Any]) -> None:
    """Without dropout."""
    block, parts = make_block(0.25).eval(), two_parts(1.0)
    expected = Reference(block, batch_stats=False).block(*parts)
    with context():
        output = block(*parts)
    torch.testing.assert_close(output, expected.detach(), rtol=1e-12, atol=1e-12)


def test_gradients_in_evaluation_use_running_statistics() -> None:
    block, parts = make_block(0.25).eval(), two_parts(1.0)
    output, grads = run(block, parts)
    reference = Reference(block, batch_stats=False)
    expected = reference.block(*parts)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    assert_same(grads, gradients(expected, parts, reference.weights))


@pytest.mark.parametrize("enabled", [False, True], ids=["no_grad", "grad"])
def test_network_in_evaluation_matches_the_reference(enabled: bool) -> None:
    network, image = make_network(0.25).eval(), random_image()
    with torch.set_grad_enabled(enabled):
        logits = network(image)
        expected = Reference(network, batch_stats=False).network(image)
    torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("track", [False, True], ids=["untracked", "tracked"])
@pytest.mark.parametrize("enabled", [False, True], ids=["no_grad", "grad"])
def test_norms_in_training_mode_use_batch_statistics_in_evaluation(
    enabled: bool, track: bool
) -> None:
    """Without dropout. Running statistics are updated as in torch: only if they are tracked."""
    block, parts = make_block(0.25).eval(), two_parts(2.0)
    for layer in block.layers:
        layer.norm.train()
        layer.norm.track_running_stats = track
    before = running_stats(block)
    reference = Reference(block)
    with torch.set_grad_enabled(enabled):
        output = block(*parts)
    expected = reference.block(*parts)
    torch.testing.assert_close(output, expected.detach(), rtol=1e-11, atol=1e-11)
    for i, layer in enumerate(block.layers):
        assert layer.norm.num_batches_tracked.item() == int(track)
        for name in ("running_mean", "running_var"):
            key = f"layers.{i}.norm.{name}"
            statistics = reference.buffers[key] if track else before[key]
            torch.testing.assert_close(layer.norm.get_buffer(name), statistics)


# --- Saved tensors and recomputation -----------------------------------------------------------


def saved_bytes(module: nn.Module, *inputs: Tensor) -> int:
    """Bytes saved by a forward pass for the backward pass, without weights and statistics."""
    excluded = {x.untyped_storage().data_ptr() for x in (*module.parameters(), *module.buffers())}
    saved: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.detach()
        return x.detach()

    with saved_tensors_hooks(pack, lambda x: x):
        output = module(*inputs)
    del output
    return sum(x.untyped_storage().nbytes() for ptr, x in saved.items() if ptr not in excluded)


@dropout_rates
def test_a_block_that_recomputes_saves_only_features_and_masks(p: float) -> None:
    parts = two_parts()
    num_pixels = 3 * 5 * 7
    features, moments = 11 * num_pixels * 8, 2 * 11 * 8
    masks = 3 * 2 * num_pixels if p else 0
    recomputing = saved_bytes(make_block(p, recompute=True), *parts)
    assert features <= recomputing <= features + masks + moments
    assert saved_bytes(make_block(p), *parts) > recomputing


@keep_or_recompute
def test_tensors_are_saved_only_through_autograd(recompute: bool) -> None:
    """Saved-tensor hooks, as for `saved_bytes` or offloading, see only what autograd saves."""
    output = make_block(0.25, recompute=recompute)(*two_parts())

    def tensors(x: object) -> int:
        if isinstance(x, list | tuple):
            return sum(tensors(item) for item in x)
        return isinstance(x, Tensor)

    assert sum(tensors(value) for value in vars(output.grad_fn).values()) == 0


def test_the_estimate_of_saved_bytes_matches_the_plain_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(DenseBlock, "_choose_ops", lambda block, parts: None)
    network, sides = make_network(), [(8, 12), (4, 6), (2, 3), (4, 6), (8, 12)]
    blocks = [*network.down_blocks, network.bottleneck, *network.up_blocks]
    saved = sum(
        saved_bytes(block, random_normal(2, block.in_channels, *side).requires_grad_())
        for block, side in zip(blocks, sides, strict=True)
    )
    moments = sum(2 * 8 * old.stop for block in blocks for old, _ in block.channels())
    estimate = network._saved_bytes(network.stem(random_image(8, 12)))
    assert estimate == saved - moments


@keep_or_recompute
def test_convolutions_are_not_recomputed(recompute: bool) -> None:
    block, parts = make_block(0.25, recompute=recompute), two_parts()
    with Calls() as forward:
        output = block(*parts)
    with Calls() as backward:
        output.sum().backward()
    assert forward["convolution"] == 3
    assert backward["convolution"] == 0
    assert backward["convolution_backward"] == 3
    assert backward["relu_"] + backward["relu"] == (3 if recompute else 0)


# --- Chunks, precisions, compilers -------------------------------------------------------------


@keep_or_recompute
@pytest.mark.parametrize("num_images", [1, 2])
def test_chunks_of_images_give_the_same_result(
    num_images: int, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, parts = make_block(0.25, recompute=recompute), two_parts()
    output, grads = run(block, parts)
    limit = 1 if num_images == 1 else 2 * 5 * 7 * 9 * 8  # the last layer's input for two images
    monkeypatch.setattr("segtrain.models.dense_layer_aten._CHUNK_BYTES", limit)
    with Calls() as calls:
        actual_output, actual = run(block, parts)
    # If two images fit for the last layer, layers with fewer channels may take all three.
    fewest, most = (9, 9) if num_images == 1 else (4, 6)
    assert fewest <= calls["convolution_backward"] <= most
    torch.testing.assert_close(actual_output, output, rtol=1e-12, atol=1e-12)
    assert_same(actual, grads, tolerance=1e-12)


@pytest.mark.parametrize("num_strips", [1, 2, 3, 7])
@pytest.mark.parametrize("evaluating", [True, False])
def test_strips_of_rows_give_the_same_result(
    num_strips: int, evaluating: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strips overlap by a row; with 7 rows in 2 or 3 strips, the last strip is shorter."""
    block, (old, new) = make_block(recompute=True).train(not evaluating), two_parts()
    with torch.no_grad():
        expected = block(old, new)
        largest = 5 * 7 * 9 * 8  # bytes per image of the last layer's input
        monkeypatch.setattr("segtrain.models.dense_layer_aten._STRIP_BYTES", largest / num_strips)
        with Calls() as calls:
            output = block(old, new)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    assert calls["convolution"] > 9 if num_strips > 1 else calls["convolution"] <= 9


@keep_or_recompute
def test_bf16_autocast_trains_float32_weights(recompute: bool) -> None:
    block = make_block(0.25, recompute=recompute).float()
    parts = [part.detach().float().requires_grad_() for part in two_parts(1.0)]
    reference = copy.deepcopy(block)
    output, expected = run(reference, parts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(5)
        half = block(*parts)
    assert half.dtype == torch.bfloat16
    grads = gradients(half, parts, dict(block.named_parameters()))
    assert (half.float() - output).abs().max() < 0.05 * (output.max() - output.min())
    for key, grad in grads.items():
        assert grad.dtype == torch.float32, key
        assert grad.isfinite().all(), key
        if expected[key].any():
            cosine = F.cosine_similarity(grad.flatten(), expected[key].flatten(), dim=0)
            assert cosine > 0.98, key
            # The cosine does not depend on the scale.
            assert grad.norm().item() == pytest.approx(expected[key].norm().item(), rel=0.1), key
    for key, value in running_stats(block).items():
        torch.testing.assert_close(value, running_stats(reference)[key], rtol=0.02, atol=0.02)


@keep_or_recompute
def test_network_gradients_in_bf16_match_float32(recompute: bool) -> None:
    network = make_network(memory_efficient=recompute).float()
    image = random_image().detach().float()
    _, expected = run(network, [image.requires_grad_()])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(image)
    assert logits.dtype == torch.bfloat16
    grads = gradients(logits, [image], dict(network.named_parameters()))
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    # Biases before a batch norm and weights of disabled maps have almost no gradient.
    actual, exact = (
        torch.cat([values[key].flatten() for key in expected]) for values in (grads, expected)
    )
    assert actual.isfinite().all()
    assert F.cosine_similarity(actual, exact, dim=0) > 0.98


def test_bf16_autocast_in_evaluation() -> None:
    block = make_block().float().eval()
    parts = [part.detach().float() for part in two_parts(1.0)]
    with torch.no_grad():
        exact = block(*parts)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = block(*parts)
    assert exact.dtype == torch.float32
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().max() < 0.05 * (exact.max() - exact.min())


@pytest.mark.parametrize("enabled", [False, True], ids=["no_grad", "grad"])
def test_an_exported_network_gives_the_same_logits(enabled: bool) -> None:
    network, image = make_network(0.25).eval(), random_image().detach()
    with torch.set_grad_enabled(enabled):
        exported = torch.export.export(network, (image,))
        logits = exported.module()(image)
        expected = network(image)
    torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-11)
    targets = [str(node.target) for node in exported.graph.nodes]
    # A compiler gets batch norm as an operator, not its arithmetic.
    num_norms = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert sum("batch_norm" in target for target in targets) == num_norms
    assert not any("addcmul" in target for target in targets)


def test_compiled_block_gradients_match_eager() -> None:
    """torch.compile gets the plain form. Its dropout draws different masks, so use none."""
    block, parts = make_block(), two_parts()
    expected_output, expected = run(block, parts)
    compiled = torch.compile(make_block(), backend="eager", fullgraph=True)
    output, actual = run(compiled, parts)
    torch.testing.assert_close(output, expected_output, rtol=1e-11, atol=1e-11)
    assert_same({key.removeprefix("_orig_mod."): grad for key, grad in actual.items()}, expected)


# --- memory_efficient --------------------------------------------------------------------------


def block_settings(network: nn.Module) -> set[bool | str]:
    return {
        module.memory_efficient for module in network.modules() if isinstance(module, DenseBlock)
    }


@pytest.mark.parametrize(
    ("value", "expected"),
    [(True, True), (False, False), ("true", True), ("false", False), ("auto", "auto")],
)
def test_memory_efficient_reaches_every_block(value: bool | str, expected: bool | str) -> None:
    network = build_model("tiramisu", memory_efficient=value, **SLIM)
    network(torch.zeros(1, 3, 8, 8))
    assert block_settings(network) == {expected}


def test_auto_recomputes_on_a_cpu() -> None:
    saved = {
        value: saved_bytes(make_network(memory_efficient=value), random_image())
        for value in (True, False, "auto")
    }
    assert saved["auto"] == saved[True] < saved[False]


def test_memory_efficient_is_auto_by_default() -> None:
    network = build_model("tiramisu", **SLIM)
    assert network.memory_efficient == "auto"


def test_memory_efficient_can_change_between_steps() -> None:
    network, image = make_network(memory_efficient=True), random_image()
    efficient = saved_bytes(network, image)
    network.memory_efficient = False
    assert saved_bytes(network, image) > efficient
    network.memory_efficient = True
    assert saved_bytes(network, image) == efficient


def test_an_invalid_memory_efficient_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"memory_efficient.*'maybe'"):
        build_model("tiramisu", memory_efficient="maybe", **SLIM)


@pytest.mark.parametrize(
    ("memory_efficient", "available", "expected"),
    [
        ("auto", 2.2, "auto"),
        ("auto", 1.8, True),
        (True, 2.2, True),
        (False, 1.8, False),
    ],
)
def test_auto_recomputes_on_a_gpu_if_half_of_the_free_memory_is_not_enough(
    memory_efficient: bool | str,
    available: float,
    expected: bool | str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = make_network(memory_efficient=memory_efficient)
    with monkeypatch.context() as patch:
        patch.setattr(DenseBlock, "_choose_ops", lambda block, parts: None)
        required = saved_bytes(make_network(), random_image())
    # Tensors outside of the blocks are saved in both forms.
    required -= saved_bytes(make_network(memory_efficient=True), random_image())
    free = int(required * available)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 100 * free))
    on_gpu = SimpleNamespace(
        device=torch.device("cuda"), shape=torch.Size((2, 5, 8, 12)), element_size=lambda: 8
    )
    network._set_memory_efficient(on_gpu)  # type: ignore[arg-type]
    assert block_settings(network) == {expected}


# --- Dropout -----------------------------------------------------------------------------------


def draw_keep_mask(p: float, *shape: int, seed: int = 8) -> Tensor:
    torch.manual_seed(seed)
    return Dropout(p)(torch.ones(shape)) != 0


@pytest.mark.parametrize("p", [0.01, 0.2, 0.5, 0.9])
def test_dropout_rate_in_every_position(p: float) -> None:
    """Also in each of the four 16-bit parts of the random 64-bit words."""
    keep = draw_keep_mask(p, 2, 4, 100, 100).permute(0, 2, 3, 1).reshape(-1, 4)
    sigma = (p * (1 - p) / keep.shape[0]) ** 0.5
    for lane in keep.unbind(dim=1):
        assert abs((~lane).double().mean().item() - p) < 6 * sigma


def test_the_smallest_rate_of_dropout_is_not_rounded_up() -> None:
    num = 2**23
    dropped = num - int(draw_keep_mask(2**-16, 1, 8, 1024, 1024).sum())
    assert abs(dropped - num / 2**16) < 6 * (num / 2**16) ** 0.5


def test_dropout_keeps_the_mean() -> None:
    torch.manual_seed(8)
    x = random_normal(2, 4, 100, 100, dtype=torch.float64) + 3
    y = Dropout(0.2)(x)
    assert y.mean().item() == pytest.approx(3, abs=0.05)  # sigma is below 0.01
    survivors = y != 0
    torch.testing.assert_close(y[survivors], x[survivors] / 0.8, rtol=1e-4, atol=0)


def test_dropout_scales_by_the_rounded_rate() -> None:
    """0.2 is rounded to 13107/65536; the scale keeps the mean exact."""
    torch.manual_seed(8)
    y = Dropout(0.2)(torch.ones(1, 1, 8, 8, dtype=torch.float64))
    assert y.max().item() == pytest.approx(65536 / (65536 - 13107), rel=1e-12)


@pytest.mark.parametrize("dim", range(4), ids=["image", "channel", "row", "column"])
def test_dropout_is_independent_between_neighbors(dim: int) -> None:
    """Dropout does not drop whole channels, pixels, rows, or images."""
    keep = draw_keep_mask(0.5, 4, 8, 40, 40)
    for distance in (1, 2, 3):
        length = keep.shape[dim] - distance
        pairs = keep.narrow(dim, 0, length) == keep.narrow(dim, distance, length)
        assert abs(pairs.double().mean().item() - 0.5) < 6 * 0.5 / pairs.numel() ** 0.5


def test_two_dropout_calls_are_independent() -> None:
    torch.manual_seed(8)
    dropout, x = Dropout(0.5), torch.ones(2, 4, 50, 50)
    equal = (dropout(x) != 0) == (dropout(x) != 0)
    assert abs(equal.double().mean().item() - 0.5) < 6 * 0.5 / equal.numel() ** 0.5


def test_dropout_uses_torchs_generator() -> None:
    dropout, x = Dropout(0.3), torch.ones(2, 3, 9, 7)
    torch.manual_seed(11)
    first = dropout(x)
    state = torch.get_rng_state()
    second = dropout(x)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(dropout(x), second)
    torch.manual_seed(11)
    assert torch.equal(dropout(x), first)
    torch.manual_seed(12)
    assert not torch.equal(dropout(x), first)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 1, 1), (1, 3, 5, 7), (2, 1, 3, 3)])
def test_dropout_of_a_number_of_values_not_divisible_by_four(
    shape: tuple[int, int, int, int],
) -> None:
    torch.manual_seed(8)
    dropout, x = Dropout(0.5), torch.ones(shape)
    drops = torch.stack([dropout(x) == 0 for _ in range(400)]).double().mean(dim=0)
    assert drops.shape == x.shape
    assert (drops - 0.5).abs().max() < 6 * 0.5 / 20  # 6 sigma at each position


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dropout_is_the_identity_for_a_zero_rate_and_in_evaluation(
    p: float, training: bool
) -> None:
    dropout, x = Dropout(p).train(training), random_normal(2, 3, 4, 5)
    state = torch.get_rng_state()
    assert torch.equal(dropout(x), x) == (p == 0 or not training)
    if p == 0 or not training:
        assert dropout.draw_mask(x) is None
        assert torch.equal(torch.get_rng_state(), state)


def test_dropout_gradient_has_the_same_mask_and_scale() -> None:
    torch.manual_seed(8)
    x = (random_normal(2, 3, 5, 7).abs() + 1).requires_grad_()
    y = Dropout(0.75)(x)
    cotangent = random_normal(2, 3, 5, 7, seed=2)
    y.backward(cotangent)
    assert x.grad is not None
    assert 0 < (y == 0).sum() < y.numel()
    assert torch.equal(y, torch.where(y == 0, 0, 4 * x))
    assert torch.equal(x.grad, torch.where(y == 0, 0, 4 * cotangent))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dropout_keeps_the_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(8)
    y = Dropout(0.5)(torch.ones(1, 2, 3, 3, dtype=dtype))
    assert y.dtype == dtype
    assert set(y.flatten().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_an_invalid_dropout_rate_is_rejected(p: float) -> None:
    with pytest.raises(ValueError, match="drop_rate"):
        Dropout(p)
