"""torch.compile makes one graph per block or network, without graph breaks."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from segtrain.config.schema import TrainConfig
from segtrain.models import build_model
from segtrain.runtime.distributed import DistributedContext
from segtrain.training.parallel import prepare_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # the compiler itself warns
]

NETWORKS: dict[str, dict[str, Any]] = {
    # More blocks than eight, the default limit for compilations of the same code.
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
    """Collect all compiled graphs; the backend does not optimize them."""
    compiled_graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        compiled_graphs.append(graph)
        return graph.forward  # type: ignore[no-any-return]

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):  # torch's default; restored after the test
        yield compiled_graphs
    torch._dynamo.reset()


def run_step(model: nn.Module, image: torch.Tensor) -> None:
    model(image).sum().backward()
    model.zero_grad()


@pytest.mark.parametrize("mode", ["full", "blocks"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_block_is_one_graph_without_breaks(name: str, mode: str, graphs: list[Any]) -> None:
    model = build_model(name, **NETWORKS[name]).train()
    prepare_model(model, TrainConfig(compile=mode), DistributedContext(), torch.device("cpu"))  # type: ignore[arg-type]
    compiled = [m for m in model.modules() if m._compiled_call_impl is not None]
    image = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)

    run_step(model, image)

    assert len(compiled) == (1 if mode == "full" else {"tiramisu": 11, "unet": 9}[name])
    assert len(graphs) == len(compiled)
    run_step(model, image)
    assert len(graphs) == len(compiled)
    assert not torch._dynamo.utils.counters["graph_break"]
