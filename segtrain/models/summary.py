"""Parameters, multiply-adds, and training memory of the models, counted without computing."""

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
class ModelCost:
    """Cost of one model with 2 classes.

    name: value of `--model`, with the arguments that differ from the defaults.
    num_parameters: trainable parameters.
    multiply_adds: of all convolutions and matrix products, for one image of 224 x 224.
    kept_bytes: activations saved for the backward pass of one image of 224 x 224, in bf16 autocast
        on a CPU; without weights.
    plain_kept_bytes: the same with memory_efficient=false; None if the model has no such argument.
    has_pretrained: whether ImageNet weights exist for a part of the model.
    """

    name: str
    num_parameters: int
    multiply_adds: int
    kept_bytes: int
    plain_kept_bytes: int | None
    has_pretrained: bool


def model_variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of `MODELS` and, for a model that takes an encoder, each encoder."""
    for name in MODELS:
        yield name, {}
        if _has_argument(name, "encoder"):
            yield from ((name, {"encoder": encoder}) for encoder in ENCODERS)


def compute_cost(name: str, **kwargs: Any) -> ModelCost:
    """Compute the cost of one model; `kwargs` as for `build_model`."""
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = _build_fake_model(fake_mode, name, **kwargs)
    plain = None
    if _has_argument(name, "memory_efficient"):
        plain = _build_fake_model(fake_mode, name, **kwargs, memory_efficient=False)
    with fake_mode:
        image = torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE)
        return ModelCost(
            name=" ".join([name, *(f"{key}={value}" for key, value in kwargs.items())]),
            num_parameters=sum(p.numel() for p in model.parameters()),
            multiply_adds=count_multiply_adds(model, image),
            kept_bytes=count_kept_bytes(model, image),
            plain_kept_bytes=count_kept_bytes(plain, image) if plain else None,
            has_pretrained="encoder" in kwargs,
        )


def _has_argument(name: str, argument: str) -> bool:
    return argument in inspect.signature(MODELS[name]).parameters


def _build_fake_model(fake_mode: FakeTensorMode, name: str, **kwargs: Any) -> nn.Module:
    """A model whose device is the CPU but whose weights take no memory."""
    with torch.device("meta"):
        model = build_model(name, **kwargs)
    with fake_mode:
        return model.to_empty(device="cpu")


def count_multiply_adds(model: nn.Module, image: Tensor) -> int:
    """Count multiply-adds of convolutions and matrix products per image."""
    # In evaluation mode with gradients, models compute the form of their papers. Without gradients,
    # dense blocks compute overlapping strips, and the overlap is not part of the model.
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(image)
    # The counter counts a multiply-add as two operations.
    return int(counter.get_total_flops()) // 2 // len(image)


def count_kept_bytes(
    model: nn.Module, image: Tensor, dtype: torch.dtype | None = torch.bfloat16
) -> int:
    """Count the bytes saved for the backward pass per image, without weights.

    Args:
        dtype: of autocast; None disables it.
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
    # `logits` keeps the graph alive, and the graph its saved tensors, until they are counted.
    num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del logits
    return num_bytes // len(image)


def build_cost_table(costs: list[ModelCost]) -> Table:
    """One row per model, at most 80 characters wide."""
    table = Table(
        title=f"models with 2 classes, for one image of {IMAGE_SIZE} x {IMAGE_SIZE}",
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
