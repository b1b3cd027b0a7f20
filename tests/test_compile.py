"""What torch.compile makes of the networks: one graph a block or network, and no breaks in it."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from segtrain.config import TrainConfig
from segtrain.distributed import World
from segtrain.models import build_model
from segtrain.training.network import make_ready

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # the compiler itself gives some
]

NETWORKS: dict[str, dict[str, Any]] = {
    # More blocks than the eight times that torch compiles the same code unless told.
    "tiramisu": {
        "growth_rate": 2,
        "down_blocks": [1, 1, 1, 1, 1],
        "bottleneck": 1,
        "up_blocks": [1, 1, 1, 1, 1],
        "stem_channels": 3,
    },
    "unet": {"base_channels": 2, "depth": 4},
}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every graph that is compiled from here on; none is made faster."""
    found: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        found.append(graph)
        return graph.forward  # type: ignore[no-any-return]

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):  # torch's default, and back to what was
        yield found
    torch._dynamo.reset()


def step(model: nn.Module, image: torch.Tensor) -> None:
    model(image).sum().backward()
    model.zero_grad()


@pytest.mark.parametrize("mode", ["full", "blocks"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_block_is_one_graph_without_breaks(name: str, mode: str, graphs: list[Any]) -> None:
    model = build_model(name, **NETWORKS[name]).train()
    make_ready(model, TrainConfig(compile=mode), World(), torch.device("cpu"))  # type: ignore[arg-type]
    compiled = [m for m in model.modules() if m._compiled_call_impl is not None]
    image = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)

    step(model, image)

    assert len(compiled) == (1 if mode == "full" else {"tiramisu": 11, "unet": 9}[name])
    assert len(graphs) == len(compiled)
    step(model, image)
    assert len(graphs) == len(compiled)
    assert not torch._dynamo.utils.counters["graph_break"]
