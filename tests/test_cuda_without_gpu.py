"""What a training step would do on CUDA, checked on machines without a GPU.

Two passes, because neither sees everything. Fake tensors have a device and no values: with them a
tensor left on the CPU raises, and so does a value that Python reads. Autograd needs a driver for
them, so that pass makes up the gradients. The other pass takes a real step on the CPU. In both,
each operator that is dispatched must have a CUDA kernel, must not wait for the GPU, and must get
the arguments that the CUDA kernel insists on.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

import pytest
import torch
from test_models import SLIM
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segtrain.asking import Asking
from segtrain.config import BnEval, LossConfig, OptimConfig
from segtrain.devices import ResolvedPrecision, autocast_for, resolve_device
from segtrain.evaluation import evaluate as evaluation
from segtrain.models import MODELS, batch_norm, build_model
from segtrain.training import engine
from segtrain.training.averaging import AveragedModel, StatisticsGuard
from segtrain.training.engine import Tally, training_steps
from segtrain.training.losses import LOSSES, LossFn, build_loss, cross_entropy
from segtrain.training.optim import build_optimizer

pytestmark = [
    pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch has no CUDA kernels"),
    # What copies a number to the GPU is another operator before.
    pytest.mark.skipif(torch.__version__ < "2.15", reason="written for torch 2.15's operators"),
    pytest.mark.usefixtures("one_thread"),
    # copy.deepcopy asks a fake tensor for its address.
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning"),
]

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    # Slim, all FC-DenseNets are the same.
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
# torchvision's, which take longest, once.
TORCHVISION = {
    f"unet on {encoder}": ("unet", {"encoder": encoder, "base_channels": 4})
    for encoder in ("mobilenet_v3_large", "efficientnet_b0", "convnext_tiny")
}

_aten = torch.ops.aten
# What a dispatcher falls back to where a device has no kernel of its own.
_FOR_ALL_DEVICES = (
    *("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional"),
    "CompositeImplicitAutograd",
)
# They return a value to Python, or a tensor whose size depends on values.
_WAITING = {
    *(_aten._local_scalar_dense, _aten.is_nonzero, _aten.equal, _aten.nonzero, _aten.argwhere),
    *(_aten.masked_select, _aten._unique2, _aten.unique_dim, _aten.unique_consecutive),
    *(_aten.bincount, _aten.repeat_interleave),
}
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_}
_COPIES = {_aten.copy_, _aten._to_copy}


class Operators(TorchDispatchMode):
    """Collects in `problems` what CUDA would not take, or would make Python wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.problems: set[str] = set()
        self.num_seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten":
            self.num_seen += 1
            self.problems |= {f"{func}: {problem}" for problem in problems_of(func, args, kwargs)}
        return func(*args, **kwargs)


def problems_of(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[str]:
    op = func.overloadpacket
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if not any(has_kernel(func.name(), key) for key in ("CUDA", *_FOR_ALL_DEVICES)):
        yield "has no CUDA kernel"
    if op in _WAITING:
        yield "waits for the GPU"
    if op in _INDEXING and any(index.dtype == torch.bool for index in tensors_in(args[1])):
        yield "waits for the GPU to count a mask"
    if op is _aten.lift_fresh:
        yield "copies numbers of Python to the GPU, which waits"
    if op in _COPIES and "cuda" in (found := devices_of(op, args, kwargs)) and "cpu" in found:
        yield "copies between the CPU and the GPU, which waits"
    if op is _aten.fill_ and args[0].ndim == 0 and args[0]._base is not None:
        yield "is x[i] = number, which waits before torch 2.15; write x[i : i + 1] = number"
    if op is _aten.native_batch_norm_backward and None in args[5:7]:
        yield "needs save_mean and save_invstd as tensors; empty ones will do"


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def devices_of(op: Any, args: Any, kwargs: dict[str, Any]) -> set[str]:
    """Types of the devices that a copy is from and to."""
    found = {tensor.device.type for tensor in tensors_in(args)}
    if op is _aten._to_copy and kwargs.get("device") is not None:
        found.add(torch.device(kwargs["device"]).type)
    return found


class FakeCuda(FakeTensorMode):
    """Within, tensors on "cuda" need no GPU; they have no values."""

    def __deepcopy__(self, memo: Any) -> "FakeCuda":
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Of these two torch cannot say what comes out.
        if func is _aten.batch_norm_update_stats.default:
            return torch.empty_like(args[1]), torch.empty_like(args[2])
        if func.overloadpacket is _aten._fused_sgd_:
            return None
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FakeCuda, with autocast as on a GPU and batches that need no stream."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda *_: (2**36, 2**36))
    for module in (engine, evaluation, batch_norm):
        monkeypatch.setattr(module, "prefetched", lambda batches, device: batches)
    with FakeCuda():
        yield


@contextmanager
def made_up_gradients(model: nn.Module) -> Iterator[None]:
    """Within, `backward` gives every weight that learns a gradient."""

    def backward(loss: Tensor) -> None:
        assert loss.requires_grad
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.ones_like(p) if p.grad is None else p.grad + 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "backward", backward)
        yield


def make(name: str, device: torch.device) -> nn.Module:
    """A network laid out channels_last, as training has it."""
    factory, kwargs = {**NETWORKS, **TORCHVISION}[name]
    torch.manual_seed(0)
    with device:
        model = build_model(factory, **kwargs)
    # nn.Module.to cannot move fake weights.
    for module in model.modules():
        for key, weight in module.named_parameters(recurse=False):
            if weight.ndim == 4:
                laid_out = weight.detach().contiguous(memory_format=torch.channels_last)
                setattr(module, key, nn.Parameter(laid_out))
    return model


def a_batch(device: torch.device, side: int = 32) -> dict[str, Any]:
    image = torch.randint(256, (4, side, side, 3), dtype=torch.uint8, device=device)
    mask = torch.randint(2, (4, side, side), dtype=torch.uint8, device=device)
    sizes = [(side, side)] * 4
    border = torch.zeros_like(mask)
    return {"image": image.permute(0, 3, 1, 2), "mask": mask, "border": border, "size": sizes}


def operators_of_steps(
    model: nn.Module,
    device: torch.device,
    *,
    precision: ResolvedPrecision = "fp32",
    optimizer: OptimConfig = OptimConfig(),  # noqa: B008, it is frozen
    loss_fn: LossFn = cross_entropy,
) -> Operators:
    """What two steps dispatch, with everything that may belong to a step."""
    batch = a_batch(device)
    model.train()
    tally, average, guard = Tally(device), AveragedModel(model, 0.9), StatisticsGuard(model)
    steps = training_steps(
        model,
        [batch, batch],
        tally,
        loss_fn=loss_fn,
        optimizer=build_optimizer(model, optimizer),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        autocast=autocast_for(precision, device),
        device=device,
        before_step=lambda: 1e-3,
        images_at_once=2,
        clip_norm=1.0,
    )
    seen = Operators()
    with seen:
        for number, _ in enumerate(steps, 1):
            average.update(number)
            guard.look()
    return seen


# --- Steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [*NETWORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in TORCHVISION)]
)
def test_a_step_on_the_cpu_dispatches_nothing_that_cuda_would_not_take(name: str) -> None:
    seen = operators_of_steps(make(name, CPU), CPU)

    assert seen.problems == set()
    assert seen.num_seen > 100


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
def test_a_step_on_cuda_stays_there(name: str, precision: ResolvedPrecision) -> None:
    model = make(name, CUDA)
    with made_up_gradients(model):
        seen = operators_of_steps(model, CUDA, precision=precision)

    assert seen.problems == set()
    assert seen.num_seen > 100


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", get_args(OptimConfig.__annotations__["name"]))
@pytest.mark.usefixtures("fake_cuda")
def test_every_optimizer_steps_on_cuda(name: Any, momentum: float) -> None:
    model = make("unet", CUDA)
    config = OptimConfig(name=name, momentum=momentum)
    with made_up_gradients(model):
        if name == "rmsprop" and momentum:  # torch has no fused kernel for it, so it waits
            with pytest.raises(Exception, match="_local_scalar_dense"):
                operators_of_steps(model, CUDA, optimizer=config)
            return
        seen = operators_of_steps(model, CUDA, optimizer=config)

    assert seen.problems == set()


LOSS_CONFIGS = {
    **{name: LossConfig(name=name) for name in LOSSES},  # type: ignore[arg-type]
    **{
        f"{name} weighted": LossConfig(name=name, class_weights=(1, 3), label_smoothing=0.1)  # type: ignore[arg-type]
        for name in LOSSES
    },
}


@pytest.mark.parametrize("config", LOSS_CONFIGS.values(), ids=LOSS_CONFIGS)
def test_every_loss_suits_cuda_forward_and_backward(config: LossConfig) -> None:
    seen = operators_of_steps(make("unet", CPU), CPU, loss_fn=build_loss(config))

    assert seen.problems == set()


@pytest.mark.parametrize("config", LOSS_CONFIGS.values(), ids=LOSS_CONFIGS)
@pytest.mark.usefixtures("fake_cuda")
def test_every_loss_stays_on_cuda(config: LossConfig) -> None:
    batch, logits = a_batch(CUDA), torch.randn(4, 2, 32, 32, dtype=torch.float16, device=CUDA)
    seen = Operators()
    with seen:
        loss = build_loss(config)(logits, batch["mask"], batch["border"])

    assert (loss.device, loss.dtype, loss.ndim) == (CUDA, torch.float32, 0)
    assert seen.problems == set()


# --- Validation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bn_eval", get_args(BnEval))
@pytest.mark.parametrize("name", ["unet", "tiramisu"])
@pytest.mark.usefixtures("fake_cuda")
def test_validation_stays_on_cuda(name: str, bn_eval: BnEval) -> None:
    model, autocast = make(name, CUDA), autocast_for("bf16", CUDA)
    seen = Operators()
    with seen:
        if bn_eval == "recalibrate":
            batches = [a_batch(CUDA), a_batch(CUDA)]
            batch_norm.recalibrate(model, batches, device=CUDA, autocast=autocast)
        evaluation.evaluate(
            model,
            [a_batch(CUDA)],
            asking=Asking(short_side=32, tta="flip"),
            device=CUDA,
            autocast=autocast,
            bn_eval=bn_eval,
        )

    assert seen.problems == set()


# --- The checks themselves ----------------------------------------------------------------------


def batch_norm_backward(save: Tensor | None) -> None:
    x, one = torch.ones(2, 3, 4, 4), torch.ones(3)
    _aten.native_batch_norm_backward(
        *(x, x, one, one, one, save, save, False, 1e-5, [False, True, True])
    )


def set_some(index: Any, value: Any) -> None:
    torch.zeros(4)[index] = value


FAULTS: dict[str, tuple[Callable[[], object], str]] = {
    "read": (lambda: torch.ones(2).sum().item(), "waits for the GPU"),
    "condition": (lambda: bool(torch.ones(()) > 0), "waits for the GPU"),
    "mask": (lambda: torch.ones(3)[torch.ones(3) > 0], "count a mask"),
    "set by mask": (lambda: set_some(torch.ones(4) > 0, torch.ones(4)), "count a mask"),
    "new": (lambda: torch.tensor([1.0, 2.0]), "numbers of Python"),
    "set": (lambda: set_some(1, 3), "x[i] = number"),
    "batch norm": (lambda: batch_norm_backward(None), "save_mean"),
    "no kernel": (lambda: torch.ones(2, 2).to_mkldnn(), "no CUDA kernel"),
}


@pytest.mark.parametrize(("fault", "problem"), FAULTS.values(), ids=FAULTS)
def test_each_fault_is_seen(fault: Callable[[], object], problem: str) -> None:
    seen = Operators()
    with seen:
        fault()

    [found] = seen.problems
    assert problem in found


@pytest.mark.usefixtures("fake_cuda")
def test_a_copy_from_the_cpu_is_seen() -> None:
    seen = Operators()
    with seen:
        torch.ones(3).to(CUDA)
        torch.empty(3, device=CUDA).copy_(torch.ones(3))

    assert len(seen.problems) == 2
    assert all("copies between" in problem for problem in seen.problems)


@pytest.mark.usefixtures("fake_cuda")
def test_a_tensor_left_on_the_cpu_is_seen() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device=CUDA) + torch.ones(3)


def test_what_cuda_takes_is_no_fault() -> None:
    seen = Operators()
    with seen:
        batch_norm_backward(torch.empty(0))
        set_some(slice(1, 2), 3)
        set_some(torch.ones(4) > 0, 3)
        torch.zeros(()).fill_(1)

    assert seen.problems == set()


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_cuda_device_has_an_index(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """torch.cuda.set_device refuses one without."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    assert resolve_device(name) == torch.device("cuda", 0)
    assert resolve_device(name, local_rank=1).index == (0 if ":" in name else 1)
