"""The training step as a CUDA graph: when it is recorded, and on a GPU what it computes."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import TOY_TRAINING, Command
from torch import Tensor, nn

from segtrain.config import OptimConfig
from segtrain.devices import autocast_for, move_model, resolve_device
from segtrain.errors import UsageError
from segtrain.models import build_model
from segtrain.training.engine import Tally, training_steps
from segtrain.training.losses import cross_entropy
from segtrain.training.optim import build_optimizer
from segtrain.training.step_graph import StepGraph


class FakeGraph:
    """Records the last thing that was computed while it was open, and does it again."""

    now: "FakeGraph | None" = None

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []

    def replay(self) -> None:
        for work in self.work:
            work()


@pytest.fixture
def weight(monkeypatch: pytest.MonkeyPatch) -> nn.Parameter:
    """A weight whose gradient is the sum of the batch; CUDA is replaced."""

    @contextmanager
    def recording(graph: FakeGraph, stream: Any = None) -> Any:
        FakeGraph.now = graph
        yield
        FakeGraph.now = None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(StepGraph, "_aside", lambda self, work: work())
    return nn.Parameter(torch.zeros(()))


class Backward:
    """Counts how often it is called, and tells a graph that is being recorded what to do again."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight, self.num_calls = weight, 0

    def __call__(self, batch: Any) -> Tensor:
        self.num_calls += 1
        result, grad = torch.zeros(()), torch.zeros(())

        def compute() -> None:
            result.copy_(batch["image"].sum())
            grad.copy_(batch["image"].sum())

        compute()
        if FakeGraph.now is not None:
            FakeGraph.now.work.append(compute)
        self.weight.grad = grad
        return result


def take(graph: StepGraph, backward: Backward, images: Tensor) -> float:
    weight = backward.weight
    weight.grad = None
    result = graph.run(backward, {"image": images, "size": [(1, 1)]}, [weight])
    assert weight.grad is not None
    assert weight.grad.item() == result.item() == images.sum().item()
    return result.item()


def test_after_three_batches_it_is_recorded_once_and_replayed(weight: nn.Parameter) -> None:
    graph, backward = StepGraph(), Backward(weight)
    for number in range(10):
        take(graph, backward, torch.full((2, 3), float(number)))
    assert backward.num_calls == 4


def test_the_last_smaller_batch_is_computed_and_the_graph_is_kept(weight: nn.Parameter) -> None:
    graph, backward = StepGraph(), Backward(weight)
    for _ in range(3):
        for size in (2, 2, 2, 2, 1):
            take(graph, backward, torch.ones(size, 3))
    assert backward.num_calls == 4 + 3


def test_a_larger_batch_another_size_or_freed_weights_are_recorded_anew(
    weight: nn.Parameter,
) -> None:
    graph, backward = StepGraph(), Backward(weight)
    for shape in ((1, 3), (2, 3), (2, 5)):
        before = backward.num_calls
        for _ in range(6):
            take(graph, backward, torch.ones(shape))
        assert backward.num_calls == before + 4
    weight.requires_grad_(False)
    before = backward.num_calls
    take(graph, backward, torch.ones(2, 5))
    assert backward.num_calls == before + 1


def test_another_network_is_not_taken_for_the_first(weight: nn.Parameter) -> None:
    graph = StepGraph()
    for _ in range(5):
        take(graph, Backward(weight), torch.ones(2, 3))
    other = Backward(nn.Parameter(torch.zeros(())))
    for _ in range(5):
        take(graph, other, torch.ones(2, 3))
    assert other.num_calls == 4


def test_what_no_graph_can_hold_is_a_usage_error(weight: nn.Parameter) -> None:
    def waiting(batch: Any) -> Tensor:
        if FakeGraph.now is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return torch.zeros(())

    graph, batch = StepGraph(), {"image": torch.ones(1, 1)}
    for _ in range(3):
        graph.run(waiting, batch, [weight])
    with pytest.raises(UsageError, match=r"not permitted.*drop train\.cuda_graph"):
        graph.run(waiting, batch, [weight])


@pytest.mark.parametrize(
    ("setting", "words"),
    [("train.epochs=1", "one GPU"), ("data.whole=true", "crops of one size")],
)
def test_it_is_refused_where_it_cannot_be(
    segtrain: Command, toy_coco: Any, setting: str, words: str
) -> None:
    finished = segtrain(
        *("train", "--data", toy_coco, *TOY_TRAINING, "--batch-size", "1"),
        *("--set", "train.cuda_graph=true", "--set", setting),
    )
    assert finished.code == 2
    assert words in finished.err


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["unet", "fc_densenet56"])
def test_on_a_gpu_a_replayed_step_is_the_step(name: str, precision: Any) -> None:
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
        tally = Tally(device)
        optimizer = build_optimizer(model, OptimConfig(name="sgd", momentum=0.9))
        steps = training_steps(
            model,
            batches,
            tally,
            loss_fn=cross_entropy,
            optimizer=optimizer,
            scaler=torch.amp.GradScaler("cuda", enabled=precision == "fp16"),
            autocast=autocast_for(precision, device),
            device=device,
            before_step=lambda: 1e-3,
            images_at_once=4,
            graph=graph,
        )
        assert len(list(steps)) == 8
        weights.append([p.detach().clone() for p in model.parameters()])
        losses.append(tally.read().loss)
    assert graph is not None
    assert graph._graph is not None
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-3)
