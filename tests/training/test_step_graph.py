"""The training step as a CUDA graph: when it is captured and, on a GPU, what it computes."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.command import TOY_TRAINING, Command
from helpers.training import training_steps
from torch import Tensor, nn

from segtrain.config.schema import OptimConfig
from segtrain.errors import UsageError
from segtrain.models import build_model
from segtrain.runtime.devices import autocast_for, move_model, resolve_device
from segtrain.training.losses import cross_entropy
from segtrain.training.optim import build_optimizer
from segtrain.training.step import StepStats
from segtrain.training.step_graph import StepGraph


class FakeGraph:
    """Stores the computations made during its capture, and repeats them."""

    capturing: "FakeGraph | None" = None

    def __init__(self) -> None:
        self.computations: list[Callable[[], None]] = []

    def replay(self) -> None:
        for compute in self.computations:
            compute()


@pytest.fixture
def weight(monkeypatch: pytest.MonkeyPatch) -> nn.Parameter:
    """A weight whose gradient is the sum of the batch; torch.cuda is replaced by fakes."""

    @contextmanager
    def capture(graph: FakeGraph, stream: Any = None) -> Any:
        FakeGraph.capturing = graph
        yield
        FakeGraph.capturing = None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(StepGraph, "_run_on_side_stream", lambda self, run: run())
    return nn.Parameter(torch.zeros(()))


class Backward:
    """Counts its calls, and adds its computation to a graph that is being captured."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight, self.num_calls = weight, 0

    def __call__(self, batch: Any) -> Tensor:
        self.num_calls += 1
        result, grad = torch.zeros(()), torch.zeros(())

        def compute() -> None:
            result.copy_(batch["image"].sum())
            grad.copy_(batch["image"].sum())

        compute()
        if FakeGraph.capturing is not None:
            FakeGraph.capturing.computations.append(compute)
        self.weight.grad = grad
        return result


def run_step(graph: StepGraph, backward: Backward, images: Tensor) -> float:
    weight = backward.weight
    weight.grad = None
    result = graph.run(backward, {"image": images, "size": [(1, 1)]}, [weight])
    assert weight.grad is not None
    assert weight.grad.item() == result.item() == images.sum().item()
    return result.item()


def test_after_three_batches_the_graph_is_captured_once_and_replayed(weight: nn.Parameter) -> None:
    graph, backward = StepGraph(), Backward(weight)
    for number in range(10):
        run_step(graph, backward, torch.full((2, 3), float(number)))
    assert backward.num_calls == 4


def test_a_smaller_last_batch_runs_without_the_graph_which_is_kept(weight: nn.Parameter) -> None:
    graph, backward = StepGraph(), Backward(weight)
    for _ in range(3):
        for size in (2, 2, 2, 2, 1):
            run_step(graph, backward, torch.ones(size, 3))
    assert backward.num_calls == 4 + 3


def test_a_larger_batch_another_size_or_changed_freezing_starts_a_new_capture(
    weight: nn.Parameter,
) -> None:
    graph, backward = StepGraph(), Backward(weight)
    for shape in ((1, 3), (2, 3), (2, 5)):
        before = backward.num_calls
        for _ in range(6):
            run_step(graph, backward, torch.ones(shape))
        assert backward.num_calls == before + 4
    weight.requires_grad_(False)
    before = backward.num_calls
    run_step(graph, backward, torch.ones(2, 5))
    assert backward.num_calls == before + 1


def test_another_model_does_not_use_the_graph_of_the_first(weight: nn.Parameter) -> None:
    graph = StepGraph()
    for _ in range(5):
        run_step(graph, Backward(weight), torch.ones(2, 3))
    other = Backward(nn.Parameter(torch.zeros(())))
    for _ in range(5):
        run_step(graph, other, torch.ones(2, 3))
    assert other.num_calls == 4


def test_an_operation_that_cannot_be_captured_is_a_usage_error(weight: nn.Parameter) -> None:
    def waiting(batch: Any) -> Tensor:
        if FakeGraph.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return torch.zeros(())

    graph, batch = StepGraph(), {"image": torch.ones(1, 1)}
    for _ in range(3):
        graph.run(waiting, batch, [weight])
    with pytest.raises(UsageError, match=r"not permitted.*drop train\.cuda_graph"):
        graph.run(waiting, batch, [weight])


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("train.epochs=1", "one GPU"), ("data.whole=true", "crops of one size")],
)
def test_a_cuda_graph_that_is_not_supported_is_rejected(
    segtrain: Command, toy_coco: Any, setting: str, expected: str
) -> None:
    finished = segtrain(
        *("train", "--data", toy_coco, *TOY_TRAINING, "--batch-size", "1"),
        *("--set", "train.cuda_graph=true", "--set", setting),
    )
    assert finished.code == 2
    assert expected in finished.err


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["unet", "fc_densenet56"])
def test_a_replayed_step_on_a_gpu_equals_the_step(name: str, precision: Any) -> None:
    device = resolve_device("cuda")
    torch.manual_seed(0)
    options = {"unet": {"base_channels": 8, "depth": 2}, "fc_densenet56": {"drop_rate": 0.0}}
    model = build_model(name, **options[name]).train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    batches = [
        {
            "image": torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8).pin_memory(),
            "mask": torch.randint(2, (4, 64, 64), dtype=torch.uint8).pin_memory(),
            "size": [(64, 64)] * 4,
        }
        for _ in range(8)
    ]
    weights, losses = [], []
    for graph in (None, StepGraph()):
        model.load_state_dict(state)
        move_model(model, device)
        stats = StepStats(device)
        optimizer = build_optimizer(model, OptimConfig(name="sgd", momentum=0.9))
        steps = training_steps(
            model,
            batches,
            stats,
            loss_fn=cross_entropy,
            optimizer=optimizer,
            scaler=torch.amp.GradScaler("cuda", enabled=precision == "fp16"),
            autocast=autocast_for(precision, device),
            device=device,
            lr=1e-3,
            micro_batch_size=4,
            graph=graph,
        )
        assert len(list(steps)) == 8
        weights.append([p.detach().clone() for p in model.parameters()])
        losses.append(stats.read().loss)
    assert graph is not None
    assert graph._graph is not None
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-3)
