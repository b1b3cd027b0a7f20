"""What the networks cost: counted on the networks themselves, without computing anything."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from segtrain.models import MODELS, build_model
from segtrain.models.encoders import ENCODERS

IMAGE_SIZE = 224


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Figures of one network with 2 classes.

    name: as `--model` takes it, with the arguments that differ from its defaults.
    num_parameters: weights that are learnt.
    multiply_adds: of all convolutions and matrix products for one image of 224 x 224.
    kept_bytes: activations that a training step keeps for the backward pass, an image of 224 x 224
        in bf16 autocast on a CPU; weights are not counted.
    plain_kept_bytes: the same with memory_efficient=false; None where there is no such argument.
    has_pretrained: whether there are ImageNet weights for a part of it.
    """

    name: str
    num_parameters: int
    multiply_adds: int
    kept_bytes: int
    plain_kept_bytes: int | None
    has_pretrained: bool


def variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of MODELS, and for one that can stand on an encoder every encoder, too."""
    for name in MODELS:
        yield name, {}
        if _takes(name, "encoder"):
            yield from ((name, {"encoder": encoder}) for encoder in ENCODERS)


def cost_of(name: str, **kwargs: Any) -> Cost:
    """Count one network; `kwargs` as for `build_model`."""
    hollow = FakeTensorMode(allow_non_fake_inputs=True)
    model = _hollow_model(hollow, name, **kwargs)
    plain = None
    if _takes(name, "memory_efficient"):
        plain = _hollow_model(hollow, name, **kwargs, memory_efficient=False)
    with hollow:
        image = torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE)
        return Cost(
            name=" ".join([name, *(f"{key}={value}" for key, value in kwargs.items())]),
            num_parameters=sum(p.numel() for p in model.parameters()),
            multiply_adds=count_multiply_adds(model, image),
            kept_bytes=count_kept_bytes(model, image),
            plain_kept_bytes=count_kept_bytes(plain, image) if plain else None,
            has_pretrained="encoder" in kwargs,
        )


def _takes(name: str, argument: str) -> bool:
    return argument in inspect.signature(MODELS[name]).parameters


def _hollow_model(hollow: FakeTensorMode, name: str, **kwargs: Any) -> nn.Module:
    """A network that says it is on the CPU and has no memory for its weights."""
    with torch.device("meta"):
        model = build_model(name, **kwargs)
    with hollow:
        return model.to_empty(device="cpu")


def count_multiply_adds(model: nn.Module, image: Tensor) -> int:
    """Multiply-adds of convolutions and matrix products, an image."""
    # With gradients, in evaluation, networks compute in their papers' form. Without, dense blocks
    # work in strips, whose overlap is not the network's.
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(image)
    # The counter counts a multiplication and an addition as two.
    return int(counter.get_total_flops()) // 2 // len(image)


def count_kept_bytes(
    model: nn.Module, image: Tensor, dtype: torch.dtype | None = torch.bfloat16
) -> int:
    """Bytes of the tensors that the backward pass will want, an image, without the weights.

    Args:
        dtype: of autocast; None goes without.
    """
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept[storage] = tensor
        return tensor

    with ExitStack() as stack:
        stack.enter_context(saved_tensors_hooks(keep, lambda tensor: tensor))
        if dtype is not None:
            stack.enter_context(torch.autocast(image.device.type, dtype=dtype))
        logits = model.train()(image)
    # The logits hold the graph, and the graph what it keeps, until everything is counted.
    num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del logits
    return num_bytes // len(image)


def cost_table(costs: list[Cost]) -> Table:
    """One row a network, at most 80 characters wide."""
    table = Table(
        title=f"networks at 2 classes, for an image of {IMAGE_SIZE} x {IMAGE_SIZE}",
        caption="MACs: multiply-adds; kept: activations for the backward pass, in bf16;\n"
        "plain: with memory_efficient=false",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("--model, --set model.")
    for heading in ("parameters", "MACs", "kept", "plain"):
        table.add_column(heading, justify="right")
    table.add_column("weights")
    for cost in costs:
        plain = cost.plain_kept_bytes
        table.add_row(
            cost.name,
            f"{cost.num_parameters:,}",
            f"{cost.multiply_adds / 1e9:.1f} G",
            f"{cost.kept_bytes / 1e6:.0f} MB",
            "" if plain is None else f"{plain / 1e6:.0f} MB",
            "ImageNet" if cost.has_pretrained else "-",
        )
    return table
