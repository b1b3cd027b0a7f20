"""CUDA compatibility of a training step, checked on machines without a GPU.

Two passes, because neither finds every problem. Fake tensors have a device but no values: a tensor
left on the CPU raises, and so does reading a value in Python. Autograd needs a CUDA driver for
them, so that pass uses fake gradients. The other pass takes a real step on the CPU. In both passes,
each dispatched operator must have a CUDA kernel, must not wait for the GPU, and must get the
arguments that the CUDA kernel requires.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

import pytest
import torch
from helpers import training
from helpers.training import training_steps
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segtrain.config.schema import BnEval, LossConfig, OptimConfig
from segtrain.evaluation.confusion import evaluate_batches
from segtrain.inference import predict
from segtrain.inference.options import InferenceOptions
from segtrain.models import MODELS, batch_norm, build_model
from segtrain.runtime.devices import ResolvedPrecision, autocast_for, resolve_device
from segtrain.training.ema import AveragedModel
from segtrain.training.losses import LOSSES, LossFn, build_loss, cross_entropy
from segtrain.training.optim import build_optimizer
from segtrain.training.step import FiniteBatchNormGuard, StepStats

pytestmark = [
    pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch has no CUDA kernels"),
    # Earlier versions use another operator to copy a number to the GPU.
    pytest.mark.skipif(torch.__version__ < "2.15", reason="written for torch 2.15's operators"),
    pytest.mark.usefixtures("one_thread"),
    # copy.deepcopy reads the address of a fake tensor.
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning"),
]

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
# Small variants; a model without an entry is tested at its full size.
SLIM: dict[str, dict[str, Any]] = {
    "unet": {"base_channels": 4, "depth": 3},
    "tiramisu": {
        "growth_rate": 3,
        "down_blocks": [1, 2, 1],
        "bottleneck": 2,
        "up_blocks": [1, 2, 1],
        "stem_channels": 4,
    },
}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    # The slim variants of all FC-DenseNets would be the same.
    **{name: (name, SLIM.get(name, {})) for name in MODELS if not name.startswith("fc_densenet")},
    "unet valid bilinear": (
        "unet",
        {**SLIM["unet"], "padding": "valid", "norm": "none", "up": "bilinear", "drop_rate": 0.2},
    ),
    "unet group": ("unet", {"base_channels": 16, "depth": 2, "norm": "group"}),
    "unet on vgg16": ("unet", {"encoder": "vgg16", "base_channels": 4}),
    "unet on resnet18": ("unet", {"encoder": "resnet18", "base_channels": 4}),
    "tiramisu plain": ("tiramisu", {**SLIM["tiramisu"], "memory_efficient": False}),
    "tiramisu recomputing": ("tiramisu", {**SLIM["tiramisu"], "memory_efficient": True}),
}
# torchvision encoders take longest, so they run in one test only.
TORCHVISION = {
    f"unet on {encoder}": ("unet", {"encoder": encoder, "base_channels": 4})
    for encoder in ("mobilenet_v3_large", "efficientnet_b0", "convnext_tiny")
}

_aten = torch.ops.aten
# Dispatch keys used for devices without a kernel of their own.
_FOR_ALL_DEVICES = (
    *("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional"),
    "CompositeImplicitAutograd",
)
# Operators that return a value to Python, or a tensor whose size depends on values.
_SYNCHRONIZING = {
    *(_aten._local_scalar_dense, _aten.is_nonzero, _aten.equal, _aten.nonzero, _aten.argwhere),
    *(_aten.masked_select, _aten._unique2, _aten.unique_dim, _aten.unique_consecutive),
    *(_aten.bincount, _aten.repeat_interleave),
}
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_}
_COPIES = {_aten.copy_, _aten._to_copy}


class OperatorCheck(TorchDispatchMode):
    """Collects operators that CUDA does not support, or for which Python waits, in `problems`."""

    def __init__(self) -> None:
        super().__init__()
        self.problems: set[str] = set()
        self.num_operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten":
            self.num_operators += 1
            self.problems |= {f"{func}: {problem}" for problem in find_problems(func, args, kwargs)}
        return func(*args, **kwargs)


def find_problems(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[str]:
    op = func.overloadpacket
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if not any(has_kernel(func.name(), key) for key in ("CUDA", *_FOR_ALL_DEVICES)):
        yield "has no CUDA kernel"
    if op in _SYNCHRONIZING:
        yield "waits for the GPU"
    if op in _INDEXING and any(index.dtype == torch.bool for index in find_tensors(args[1])):
        yield "waits for the GPU to count a mask"
    if op is _aten.lift_fresh:
        yield "copies Python numbers to the GPU, which waits"
    if op in _COPIES and copy_devices(op, args, kwargs) >= {"cpu", "cuda"}:
        yield "copies between the CPU and the GPU, which waits"
    if op is _aten.fill_ and args[0].ndim == 0 and args[0]._base is not None:
        yield "is x[i] = number, which waits before torch 2.15; use x[i : i + 1] = number"
    if op is _aten.native_batch_norm_backward and None in args[5:7]:
        yield "needs save_mean and save_invstd as tensors, which may be empty"


def find_tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def copy_devices(op: Any, args: Any, kwargs: dict[str, Any]) -> set[str]:
    """Device types of the source and the target of a copy."""
    devices = {tensor.device.type for tensor in find_tensors(args)}
    if op is _aten._to_copy and kwargs.get("device") is not None:
        devices.add(torch.device(kwargs["device"]).type)
    return devices


class FakeCuda(FakeTensorMode):
    """Allows tensors on "cuda" without a GPU; they have no values."""

    def __deepcopy__(self, memo: Any) -> "FakeCuda":
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # torch has no fake implementation of these two.
        if func is _aten.batch_norm_update_stats.default:
            return torch.empty_like(args[1]), torch.empty_like(args[2])
        if func.overloadpacket is _aten._fused_sgd_:
            return None
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FakeCuda, with autocast as on a GPU and without the stream that copies batches."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda *_: (2**36, 2**36))
    for module in (training, predict, batch_norm):
        monkeypatch.setattr(module, "prefetch", lambda batches, device: batches)
    with FakeCuda():
        yield


@contextmanager
def fake_gradients(model: nn.Module) -> Iterator[None]:
    """Replace `backward`: it sets a gradient for every trainable weight."""

    def backward(loss: Tensor) -> None:
        assert loss.requires_grad
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.ones_like(p) if p.grad is None else p.grad + 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "backward", backward)
        yield


def make_model(name: str, device: torch.device) -> nn.Module:
    """A model in channels_last memory format, as in training."""
    factory, kwargs = {**NETWORKS, **TORCHVISION}[name]
    torch.manual_seed(0)
    with device:
        model = build_model(factory, **kwargs)
    # nn.Module.to cannot move fake weights.
    for module in model.modules():
        for key, weight in module.named_parameters(recurse=False):
            if weight.ndim == 4:
                converted = weight.detach().contiguous(memory_format=torch.channels_last)
                setattr(module, key, nn.Parameter(converted))
    return model


def make_batch(device: torch.device, side: int = 32) -> dict[str, Any]:
    image = torch.randint(256, (4, side, side, 3), dtype=torch.uint8, device=device)
    mask = torch.randint(2, (4, side, side), dtype=torch.uint8, device=device)
    sizes = [(side, side)] * 4
    border = torch.zeros_like(mask)
    return {"image": image.permute(0, 3, 1, 2), "mask": mask, "border": border, "size": sizes}


def check_steps(
    model: nn.Module,
    device: torch.device,
    *,
    precision: ResolvedPrecision = "fp32",
    optimizer: OptimConfig = OptimConfig(),  # noqa: B008, it is frozen
    loss_fn: LossFn = cross_entropy,
) -> OperatorCheck:
    """Check two steps with everything that a step may include."""
    batch = make_batch(device)
    model.train()
    stats, ema = StepStats(device), AveragedModel(model, 0.9)
    bn_guard = FiniteBatchNormGuard(model)
    steps = training_steps(
        model,
        [batch, batch],
        stats,
        loss_fn=loss_fn,
        optimizer=build_optimizer(model, optimizer),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        autocast=autocast_for(precision, device),
        device=device,
        lr=1e-3,
        micro_batch_size=2,
        clip_norm=1.0,
    )
    check = OperatorCheck()
    with check:
        for number, _ in enumerate(steps, 1):
            ema.update(number)
            bn_guard.check()
    return check


# --- Steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [*NETWORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in TORCHVISION)]
)
def test_a_step_on_the_cpu_uses_only_operators_that_cuda_supports(name: str) -> None:
    check = check_steps(make_model(name, CPU), CPU)

    assert check.problems == set()
    assert check.num_operators > 100


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((name, "fp16") for name in NETWORKS if "unet on" not in name),
        *(
            pytest.param(name, "fp16", marks=pytest.mark.slow)
            for name in NETWORKS
            if "unet on" in name
        ),
        *(pytest.param(name, "bf16", marks=pytest.mark.slow) for name in ("unet", "tiramisu")),
    ],
)
@pytest.mark.usefixtures("fake_cuda")
def test_a_step_on_cuda_stays_on_the_device(name: str, precision: ResolvedPrecision) -> None:
    model = make_model(name, CUDA)
    with fake_gradients(model):
        check = check_steps(model, CUDA, precision=precision)

    assert check.problems == set()
    assert check.num_operators > 100


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", get_args(OptimConfig.__annotations__["name"]))
@pytest.mark.usefixtures("fake_cuda")
def test_every_optimizer_steps_on_cuda(name: Any, momentum: float) -> None:
    model = make_model("unet", CUDA)
    config = OptimConfig(name=name, momentum=momentum)
    with fake_gradients(model):
        if name == "rmsprop" and momentum:  # torch has no fused kernel for it, so it waits
            with pytest.raises(Exception, match="_local_scalar_dense"):
                check_steps(model, CUDA, optimizer=config)
            return
        check = check_steps(model, CUDA, optimizer=config)

    assert check.problems == set()


LOSS_CONFIGS = {
    **{name: LossConfig(name=name) for name in LOSSES},  # type: ignore[arg-type]
    **{
        f"{name} weighted": LossConfig(name=name, class_weights=(1, 3), label_smoothing=0.1)  # type: ignore[arg-type]
        for name in LOSSES
    },
}


@pytest.mark.parametrize("config", LOSS_CONFIGS.values(), ids=LOSS_CONFIGS)
def test_every_loss_runs_on_cuda_forward_and_backward(config: LossConfig) -> None:
    check = check_steps(make_model("unet", CPU), CPU, loss_fn=build_loss(config))

    assert check.problems == set()


@pytest.mark.parametrize("config", LOSS_CONFIGS.values(), ids=LOSS_CONFIGS)
@pytest.mark.usefixtures("fake_cuda")
def test_every_loss_stays_on_cuda(config: LossConfig) -> None:
    batch, logits = make_batch(CUDA), torch.randn(4, 2, 32, 32, dtype=torch.float16, device=CUDA)
    check = OperatorCheck()
    with check:
        loss = build_loss(config)(logits, batch["mask"], batch["border"])

    assert (loss.device, loss.dtype, loss.ndim) == (CUDA, torch.float32, 0)
    assert check.problems == set()


# --- Validation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bn_eval", get_args(BnEval))
@pytest.mark.parametrize("name", ["unet", "tiramisu"])
@pytest.mark.usefixtures("fake_cuda")
def test_validation_stays_on_cuda(name: str, bn_eval: BnEval) -> None:
    model, autocast = make_model(name, CUDA), autocast_for("bf16", CUDA)
    check = OperatorCheck()
    with check:
        if bn_eval == "recalibrate":
            batches = [make_batch(CUDA), make_batch(CUDA)]
            batch_norm.recalibrate(model, batches, device=CUDA, autocast=autocast)
        evaluate_batches(
            model,
            [make_batch(CUDA)],
            options=InferenceOptions(tile=None, size=32, tta="flip"),
            device=CUDA,
            autocast=autocast,
            bn_eval=bn_eval,
        )

    assert check.problems == set()


# --- The checks themselves ----------------------------------------------------------------------


def batch_norm_backward(save: Tensor | None) -> None:
    x, one = torch.ones(2, 3, 4, 4), torch.ones(3)
    _aten.native_batch_norm_backward(
        *(x, x, one, one, one, save, save, False, 1e-5, [False, True, True])
    )


def set_item(index: Any, value: Any) -> None:
    torch.zeros(4)[index] = value


PROBLEMS: dict[str, tuple[Callable[[], object], str]] = {
    "read": (lambda: torch.ones(2).sum().item(), "waits for the GPU"),
    "condition": (lambda: bool(torch.ones(()) > 0), "waits for the GPU"),
    "mask": (lambda: torch.ones(3)[torch.ones(3) > 0], "count a mask"),
    "set by mask": (lambda: set_item(torch.ones(4) > 0, torch.ones(4)), "count a mask"),
    "new": (lambda: torch.tensor([1.0, 2.0]), "Python numbers"),
    "set": (lambda: set_item(1, 3), "x[i] = number"),
    "batch norm": (lambda: batch_norm_backward(None), "save_mean"),
    "no kernel": (lambda: torch.ones(2, 2).to_mkldnn(), "no CUDA kernel"),
}


@pytest.mark.parametrize(("cause", "problem"), PROBLEMS.values(), ids=PROBLEMS)
def test_each_problem_is_found(cause: Callable[[], object], problem: str) -> None:
    check = OperatorCheck()
    with check:
        cause()

    [found] = check.problems
    assert problem in found


@pytest.mark.usefixtures("fake_cuda")
def test_a_copy_from_the_cpu_is_found() -> None:
    check = OperatorCheck()
    with check:
        torch.ones(3).to(CUDA)
        torch.empty(3, device=CUDA).copy_(torch.ones(3))

    assert len(check.problems) == 2
    assert all("copies between" in problem for problem in check.problems)


@pytest.mark.usefixtures("fake_cuda")
def test_a_tensor_left_on_the_cpu_is_found() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device=CUDA) + torch.ones(3)


def test_supported_operators_are_not_problems() -> None:
    check = OperatorCheck()
    with check:
        batch_norm_backward(torch.empty(0))
        set_item(slice(1, 2), 3)
        set_item(torch.ones(4) > 0, 3)
        torch.zeros(()).fill_(1)

    assert check.problems == set()


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_cuda_device_has_an_index(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """torch.cuda.set_device rejects a device without an index."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    assert resolve_device(name) == torch.device("cuda", 0)
    assert resolve_device(name, local_rank=1).index == (0 if ":" in name else 1)
