"""The Triton kernels of a dense block, run by Triton's interpreter on a CPU.

The interpreter is slow, so the sizes are small; they still cross the edges of tiles, blocks of
channels, and blocks of pixels. The interpreter cannot multiply bfloat16, but the kernels do not
depend on which half precision they use.
"""

import functools
import importlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segtrain.models import dense_block_cuda, dense_layer_aten
from segtrain.models.dense_block import DenseBlock
from segtrain.models.dense_block_fused import LayerOps

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Triton's use of NumPy.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def kernels() -> Any:
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled with a GPU; see test_dense_block_cuda")
    return importlib.import_module("segtrain.models.dense_layer_triton")


def make_block(
    in_channels: int = 5, num_layers: int = 2, growth_rate: int = 2, p: float = 0.0
) -> DenseBlock:
    """A block with random weights, channels_last as in training."""
    torch.manual_seed(0)
    block = DenseBlock(in_channels, num_layers, growth_rate, p).train()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.uniform_(module.bias, -1.0, 1.0)
        elif isinstance(module, nn.Conv2d):
            nn.init.uniform_(module.bias, -1.0, 1.0)
    return block.to(memory_format=torch.channels_last)


def make_parts(*channels: int, size: tuple[int, int], mean: float = 0.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(2, c, *size, generator=generator) + mean).requires_grad_() for c in channels
    ]


def reference(
    block: DenseBlock, parts: list[Tensor], features: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Plain form in float64: output, inputs, and weights; drops values that are 0 in `features`."""
    inputs = [part.detach().double().requires_grad_() for part in parts]
    weights, x = [], torch.cat(inputs, dim=1)
    for layer in block.layers:
        own = [
            w.detach().double().requires_grad_()
            for w in (layer.norm.weight, layer.norm.bias, layer.conv.weight, layer.conv.bias)
        ]
        a = F.batch_norm(x, None, None, own[0], own[1], training=True, eps=layer.norm.eps).relu()
        y = F.conv2d(a, own[2], own[3], padding=1)
        if layer.dropout.p:
            kept = features[:, x.shape[1] : x.shape[1] + y.shape[1]] != 0
            y = torch.where(kept, y / (1 - layer.dropout.p), 0)
        x = torch.cat([x, y], dim=1)
        weights += own
    return x, inputs, weights


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to the norm of `expected`."""
    actual, expected = actual.detach().double(), expected.detach()
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("p", [0.0, 0.25], ids=["all", "dropout"])
@pytest.mark.parametrize(
    ("growth_rate", "channels", "size"),
    [
        (2, (2, 3), (5, 7)),  # one tile, wider than the image
        # Partial tiles and blocks of channels.
        pytest.param(16, (20, 46), (9, 17), marks=pytest.mark.slow),
        (12, (16,), (3, 2)),  # few pixels
        (1, (3, 4, 5), (1, 1)),
    ],
)
def test_features_moments_and_gradients_match_the_reference(
    kernels: LayerOps, growth_rate: int, channels: tuple[int, ...], size: tuple[int, int], p: float
) -> None:
    block = make_block(sum(channels), 2, growth_rate, p)
    parts = make_parts(*channels, size=size)
    features, moments = block.train_fused(kernels, parts)
    expected, inputs, weights = reference(block, parts, features.detach())
    assert relative_error(features, expected) < 1e-6
    exact = expected.detach()
    torch.testing.assert_close(moments.mean.double(), exact.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    variance = exact.var((0, 2, 3), correction=0)
    torch.testing.assert_close(moments.var.double(), variance, rtol=1e-5, atol=1e-5)

    grad = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    own = [
        w
        for layer in block.layers
        for w in (layer.norm.weight, layer.norm.bias, layer.conv.weight, layer.conv.bias)
    ]
    actual_grads = torch.autograd.grad(features, [*parts, *own], grad)
    expected_grads = torch.autograd.grad(expected, [*inputs, *weights], grad.double())
    for actual, expected_grad in zip(actual_grads, expected_grads, strict=True):
        # With two pixels per channel, normalization cancels most digits of the gradients.
        torch.testing.assert_close(
            actual.double(), expected_grad, rtol=1e-4, atol=2e-5 * grad.numel()
        )
        if size[0] > 4:
            assert relative_error(actual, expected_grad) < 1e-5


@pytest.mark.slow
def test_float16_features_have_float32_moments_and_weights(kernels: LayerOps) -> None:
    block = make_block(18, 2, 16, 0.25)
    parts = [part.detach().half().requires_grad_() for part in make_parts(18, size=(9, 6))]
    features, moments = block.train_fused(kernels, parts)
    expected, inputs, weights = reference(block, parts, features.detach())
    assert features.dtype == torch.float16
    assert moments.mean.dtype == torch.float32
    assert relative_error(features, expected) < 1e-3
    grads = torch.autograd.grad(features, [*parts, *block.parameters()], torch.ones_like(features))
    named = dict(zip(["x", *(n for n, _ in block.named_parameters())], grads, strict=True))
    assert {g.dtype for name, g in named.items() if name != "x"} == {torch.float32}
    exact = torch.autograd.grad(expected, [*inputs, *weights], torch.ones_like(expected))
    for actual, expected_grad in zip(grads, exact, strict=True):
        assert relative_error(actual, expected_grad) < 5e-3


@pytest.mark.slow
def test_sums_split_between_programs(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    block, parts = make_block(), make_parts(5, size=(9, 18))
    grads = []
    for num_splits in (1, 4):
        monkeypatch.setattr(kernels, "_num_splits", lambda *args, n=num_splits: n)
        features, _ = block.train_fused(kernels, parts)
        loss = (features * torch.arange(18)).sum()
        grads.append(torch.autograd.grad(loss, [*parts, *block.parameters()]))
    for one, several in zip(*grads, strict=True):
        torch.testing.assert_close(several, one, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_float32_precision_with_a_large_mean(kernels: LayerOps) -> None:
    """A mean of 1000 standard deviations costs three of seven digits, not six."""
    block, parts = make_block(), make_parts(5, size=(9, 18), mean=1000.0)
    features, _ = block.train_fused(kernels, parts)
    expected, _, _ = reference(block, parts, features.detach())
    assert relative_error(features[:, 5:], expected[:, 5:]) < 1e-3


@pytest.mark.slow
def test_weights_in_any_memory_format_give_the_same_result(kernels: LayerOps) -> None:
    block, parts = make_block(), make_parts(5, size=(4, 6))
    features, _ = block.train_fused(kernels, parts)
    grads = torch.autograd.grad(features.sum(), list(block.parameters()))
    block.to(memory_format=torch.contiguous_format)
    other, _ = block.train_fused(kernels, parts)
    assert torch.equal(other, features)
    for a, b in zip(torch.autograd.grad(other.sum(), list(block.parameters())), grads, strict=True):
        assert torch.equal(a, b)


# --- Dropout -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dropped_values(kernels: LayerOps) -> Callable[..., Tensor]:
    """Function: mask of the zeros in the new features of two layers, 2 x (2 * 16) x 16 x 16."""

    @functools.cache
    def draw(p: float, seed: int = 3) -> Tensor:
        block, parts = make_block(2, 2, 16, p), make_parts(2, size=(16, 16))
        torch.manual_seed(seed)
        with torch.no_grad():
            features, _ = block.train_fused(kernels, parts)
        return features[:, 2:] == 0

    return draw


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_dropout_rate_per_channel_image_and_layer(
    dropped_values: Callable[..., Tensor], p: float
) -> None:
    zero = dropped_values(p).double()
    assert zero.shape == (2, 32, 16, 16)
    for dims in ((0, 2, 3), (1, 2, 3), (0, 1, 2), (0, 1, 3)):
        share = zero.mean(dims)
        sigma = (p * (1 - p) * share.numel() / zero.numel()) ** 0.5
        assert ((share - p).abs() < 5 * sigma).all()


def test_dropout_is_independent_between_neighbors_layers_and_seeds(
    dropped_values: Callable[..., Tensor],
) -> None:
    zero = dropped_values(0.5)
    pairs = [zero[:, :16] == zero[:, 16:], zero == dropped_values(0.5, seed=4), zero[0] == zero[1]]
    for dim in (1, 2, 3):
        length = zero.shape[dim] - 1
        pairs.append(zero.narrow(dim, 0, length) == zero.narrow(dim, 1, length))
    for equal in pairs:
        assert abs(equal.double().mean().item() - 0.5) < 5 * 0.5 / equal.numel() ** 0.5


def test_dropout_is_off_in_evaluation(kernels: LayerOps) -> None:
    block, parts = make_block(p=0.5), make_parts(5, size=(8, 8))
    for layer in block.layers:
        layer.dropout.eval()
    features, _ = block.train_fused(kernels, parts)
    assert (features != 0).all()


# --- Launches and memory ------------------------------------------------------------------------


def test_a_layer_takes_two_launches_forward_and_three_backward(
    kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch_counts: Counter[str] = Counter()

    class CountedKernel:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(kernels.kernels, name)

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            launch_counts[self.name] += 1
            return self.kernel[grid]  # type: ignore[no-any-return]

    names = "layer_forward merge_moments grad_of_new layer_backward sum_partials grad_of_part"
    for name in names.split():
        monkeypatch.setattr(kernels.kernels, name, CountedKernel(name))
    block, parts = make_block(5, 3, 2), make_parts(2, 3, size=(4, 4))
    features, _ = block.train_fused(kernels, parts)
    assert launch_counts == {"layer_forward": 3, "merge_moments": 3}
    features.sum().backward()
    assert launch_counts == dict.fromkeys(names.split(), 3) | {"grad_of_part": 2}


def test_only_features_moments_and_a_seed_are_saved(kernels: LayerOps) -> None:
    block, parts = make_block(5, 3, 2, 0.25), make_parts(5, size=(4, 4))
    excluded = {p.data_ptr() for p in block.parameters()}
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.data_ptr() not in excluded:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        features, moments = block.train_fused(kernels, parts)
    seed = 8
    assert sum(saved.values()) == features.nbytes + sum(m.nbytes for m in moments) + seed


# --- Choice of the form ------------------------------------------------------------------------


class WrongKernels:
    """Kernels that multiply one of their results by `factor`."""

    def __init__(self, kernels: Any, result: str, factor: float) -> None:
        self.kernels, self.result, self.factor = kernels, result, factor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernels, name)

    def forward_layer(self, layer: Any, features: Tensor, *args: Any, **kwargs: Any) -> Any:
        saved = self.kernels.forward_layer(layer, features, *args, **kwargs)
        if self.result == "features":
            features[:, layer.new] *= self.factor
        return saved

    def backward_layer(self, *args: Any) -> Any:
        grads = self.kernels.backward_layer(*args)
        if self.result == "grad":
            args[6].mul_(self.factor)
            return grads
        if self.result == "features":  # changed in `forward_layer`
            return grads
        return grads._replace(**{self.result: getattr(grads, self.result) * self.factor})


def test_correct_kernels_pass_the_check(kernels: LayerOps) -> None:
    block, parts = make_block(5, 2, 16, 0.2), make_parts(2, 3, size=(12, 17))
    assert dense_block_cuda._agrees_with_torch(block, parts, kernels)
    assert dense_block_cuda._agrees_with_torch(block, parts, dense_layer_aten)


@pytest.mark.parametrize(
    "result", ["features", "grad", "norm_weight", "norm_bias", "conv_weight", "conv_bias"]
)
@pytest.mark.parametrize("factor", [1.1, -1.0, float("nan")])
def test_wrong_kernels_fail_the_check(result: str, factor: float) -> None:
    block, parts = make_block(5, 2, 16, 0.2), make_parts(2, 3, size=(12, 17))
    assert not dense_block_cuda._agrees_with_torch(
        block, parts, WrongKernels(dense_layer_aten, result, factor)
    )


def test_the_check_does_not_change_any_state() -> None:
    block, parts = make_block(5, 2, 16, 0.2), make_parts(2, 3, size=(12, 17))
    block.layers[0].norm.requires_grad_(False)
    state, buffers = torch.get_rng_state(), [b.clone() for b in block.buffers()]
    assert dense_block_cuda._agrees_with_torch(block, parts, dense_layer_aten)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(block.buffers(), buffers, strict=True))
    assert all(p.grad is None for p in (*block.parameters(), *parts))
    assert [p.requires_grad for p in block.layers[0].norm.parameters()] == [False, False]
    assert all(layer.norm.track_running_stats for layer in block.layers)


@pytest.fixture
def choose_ops(kernels: LayerOps, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Function: the choice of `training_ops` for given results of the check and the timing."""
    dense_block_cuda._warn_once.cache_clear()

    def choose(
        block: DenseBlock | None = None,
        *,
        faster: bool = True,
        agree: bool = True,
        dtype: torch.dtype = torch.float16,
    ) -> Any:
        times = iter([1.0, 2.0] if faster else [2.0, 1.0])
        monkeypatch.setattr(dense_block_cuda, "_milliseconds", lambda *args: next(times))
        monkeypatch.setattr(dense_block_cuda, "_agrees_with_torch", lambda *args: agree)
        parts = [part.to(dtype) for part in make_parts(5, size=(4, 4))]
        return dense_block_cuda.training_ops(block or make_block(), parts)

    return choose


def test_a_gpu_uses_the_kernels_if_they_are_correct_and_faster(
    choose_ops: Callable[..., Any], kernels: LayerOps
) -> None:
    assert choose_ops() is kernels
    assert choose_ops(faster=False) is None
    assert choose_ops(dtype=torch.float32) is None
    assert choose_ops(make_block(growth_rate=17)) is None


def test_memory_efficient_true_and_false_determine_the_form(
    choose_ops: Callable[..., Any], kernels: LayerOps
) -> None:
    block = make_block()
    block.memory_efficient = True
    assert choose_ops(block, faster=False) is kernels
    assert choose_ops(block, dtype=torch.float32) is dense_layer_aten
    block.memory_efficient = False
    assert choose_ops(block) is None


def test_the_choice_is_cached(choose_ops: Callable[..., Any], kernels: LayerOps) -> None:
    block = make_block()
    assert choose_ops(block) is kernels
    assert choose_ops(block, faster=False, agree=False) is kernels


def test_wrong_kernels_are_not_used_with_a_warning(
    choose_ops: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert choose_ops(agree=False) is None
    assert "results differ from torch's" in caplog.text


def test_kernels_that_fail_to_compile_are_not_used(
    choose_ops: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    block = make_block()

    def no_compiler(*args: Any) -> bool:
        raise RuntimeError("Failed to find C compiler\nand more")

    parts = [part.half() for part in make_parts(5, size=(4, 4))]
    monkeypatch.setattr(dense_block_cuda, "_agrees_with_torch", no_compiler)
    assert dense_block_cuda.training_ops(block, parts) is None
    assert dense_block_cuda.training_ops(make_block(), parts) is None
    assert [r.getMessage() for r in caplog.records] == [
        "not using the Triton kernels for dense blocks: Failed to find C compiler"
    ]


def test_the_kernels_are_used_if_timing_runs_out_of_memory(
    choose_ops: Callable[..., Any], kernels: LayerOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(dense_block_cuda, "_agrees_with_torch", lambda *args: True)
    monkeypatch.setattr(dense_block_cuda, "_milliseconds", full)
    parts = [part.half() for part in make_parts(5, size=(4, 4))]
    assert dense_block_cuda.training_ops(make_block(), parts) is kernels
