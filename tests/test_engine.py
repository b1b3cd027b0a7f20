"""Training steps, against gradient descent by hand and against whole batches."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from segtrain.config import OptimConfig
from segtrain.models import build_model
from segtrain.pieces import pieces
from segtrain.training.averaging import AveragedModel, StatisticsGuard
from segtrain.training.engine import Step, Tally, training_steps
from segtrain.training.losses import cross_entropy
from segtrain.training.optim import build_optimizer

CPU = torch.device("cpu")


class Line(nn.Module):
    """Person where a weighted sum of the colours is large: the smallest network that can learn."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image.float() / 255 - 0.5)


def separable_batches(sizes: list[int], *, ignored: float = 0.0) -> list[dict[str, Any]]:
    """Person is where red outshines green."""
    rng = np.random.default_rng(6)
    batches = []
    for size in sizes:
        image = rng.integers(0, 256, (size, 3, 8, 8), dtype=np.uint8)
        mask = (image[:, 0] > image[:, 1]).astype(np.uint8)
        # Some pictures have many ignored pixels and some have none.
        mask[rng.random(mask.shape) < rng.uniform(0, 2 * ignored, (size, 1, 1))] = 255
        batches.append(
            {
                "image": torch.from_numpy(image),
                "mask": torch.from_numpy(mask),
                "size": [(8, 8)] * size,
            }
        )
    return batches


def run_steps(
    model: nn.Module,
    batches: list[dict[str, Any]],
    *,
    tally: Tally | None = None,
    rate: float | Callable[[], float] = 0.05,
    **kwargs: Any,
) -> list[Step]:
    kwargs.setdefault("loss_fn", cross_entropy)
    kwargs.setdefault("optimizer", build_optimizer(model, OptimConfig()))
    kwargs.setdefault("scaler", torch.amp.GradScaler("cpu", enabled=False))
    kwargs.setdefault("autocast", contextlib.nullcontext)
    kwargs.setdefault("images_at_once", 100)
    return list(
        training_steps(
            model,
            batches,
            tally if tally is not None else Tally(CPU),
            device=CPU,
            before_step=rate if callable(rate) else lambda: rate,
            **kwargs,
        )
    )


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(model, OptimConfig(name="sgd", weight_decay=0.0))


def test_training_solves_a_separable_problem() -> None:
    model, batches = Line(), separable_batches([4] * 10)
    optimizer, losses = build_optimizer(model, OptimConfig()), []
    for _ in range(4):
        tally = Tally(CPU)
        run_steps(model, batches, optimizer=optimizer, tally=tally)
        losses.append(tally.read().loss)

    assert losses[0] < math.log(2)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.4
    right = [(model(b["image"]).argmax(1) == b["mask"]).float().mean() for b in batches]
    assert torch.stack(right).mean() > 0.95


def test_steps_are_plain_gradient_descent() -> None:
    """Two steps by hand; afterwards no gradient is left."""
    model, by_hand = Line(), Line()
    batches = separable_batches([3, 2])
    run_steps(model, batches, optimizer=sgd(model), rate=0.5)
    for batch in batches:
        loss = cross_entropy(by_hand(batch["image"]), batch["mask"])
        gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(by_hand.parameters(), gradients, strict=True):
                parameter -= 0.5 * gradient

    torch.testing.assert_close(model.state_dict(), by_hand.state_dict())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("images_at_once", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_pieces_take_the_step_of_the_whole_batch(images_at_once: int, ignored: float) -> None:
    """Also the last, smaller piece, and where pictures have different numbers of counted pixels."""
    whole, in_pieces = Line(), Line()
    batches = separable_batches([7, 7, 5], ignored=ignored)
    tallies = Tally(CPU), Tally(CPU)
    run_steps(whole, batches, optimizer=sgd(whole), rate=0.5, tally=tallies[0])
    run_steps(
        in_pieces,
        batches,
        optimizer=sgd(in_pieces),
        rate=0.5,
        tally=tallies[1],
        images_at_once=images_at_once,
    )

    assert whole.conv.weight.abs().max() > 0.1
    torch.testing.assert_close(in_pieces.state_dict(), whole.state_dict())
    assert tallies[1].read() == pytest.approx(tallies[0].read())


def test_the_loss_is_the_mean_over_images() -> None:
    """Losses 1, 2 and 6 of batches of 4, 4 and 1 images."""
    values, tally = iter([1.0, 2.0, 6.0]), Tally(CPU)
    run_steps(
        Line(),
        separable_batches([4, 4, 1]),
        loss_fn=lambda logits, mask, border: logits.sum() * 0 + next(values),
        tally=tally,
    )

    assert tally.read().loss == pytest.approx((4 * 1 + 4 * 2 + 1 * 6) / 9)


def test_the_tally_counts_person_iou_by_hand() -> None:
    """All logits are 0, so everything is called background until the first step was taken."""
    mask = torch.tensor([[[1, 1, 0, 255]], [[0, 1, 255, 255]]], dtype=torch.uint8)
    logits = torch.tensor([[[0, 2, 2, 2]], [[2, 2, 0, 2]]])[:, None] * torch.tensor(
        [-1.0, 1.0]
    ).view(1, 2, 1, 1)

    class Fixed(Line):
        def forward(self, image: Tensor) -> Tensor:
            return logits + self.conv(image.float()) * 0

    tally = Tally(CPU)
    batch = {"image": torch.zeros(2, 3, 1, 4), "mask": mask, "size": [(1, 4)] * 2}
    run_steps(Fixed(), [batch], tally=tally)

    # Person called: 1, 2 and (3, ignored) of the first; 0, 1 and (3, ignored) of the second.
    assert tally.read().person_iou == 2 / 5


def test_each_step_takes_the_rate_that_it_is_told() -> None:
    taken: list[float] = []

    class Recording(torch.optim.SGD):
        def step(self, closure: None = None) -> None:
            taken.extend(group["lr"] for group in self.param_groups)

    model = Line()
    groups = [{"params": [model.conv.weight]}, {"params": [model.conv.bias]}]
    rates = iter([70.0, 80.0, 90.0])
    run_steps(
        model,
        separable_batches([2, 2, 1]),
        optimizer=Recording(groups, lr=99.0),
        rate=lambda: next(rates),
    )

    assert taken == [70.0, 70.0, 80.0, 80.0, 90.0, 90.0]


def test_steps_say_how_far_the_epoch_is() -> None:
    batches = separable_batches([2, 1])
    for batch, drawn in zip(batches, (12, 14), strict=True):
        batch["num_drawn"] = drawn

    assert run_steps(Line(), batches) == [Step(2, 12), Step(1, 14)]


def test_the_forward_pass_runs_in_autocast_and_the_loss_outside() -> None:
    seen: list[tuple[torch.dtype, bool]] = []

    def loss_fn(logits: Tensor, mask: Tensor, border: Tensor | None) -> Tensor:
        seen.append((logits.dtype, torch.is_autocast_enabled("cpu")))
        return cross_entropy(logits, mask)

    model = Line()
    run_steps(
        model,
        separable_batches([2]),
        loss_fn=loss_fn,
        autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    )

    assert seen == [(torch.bfloat16, False)]
    assert all(p.dtype == torch.float32 and p.abs().sum() > 0 for p in model.parameters())


def test_the_border_comes_to_the_loss_in_the_same_pieces() -> None:
    [batch] = separable_batches([5])
    batch["border"] = torch.arange(5, dtype=torch.uint8).view(5, 1, 1).expand(5, 8, 8)
    seen = []

    def loss_fn(logits: Tensor, mask: Tensor, border: Tensor | None) -> Tensor:
        assert border is not None
        seen.append(border[:, 0, 0].tolist())
        return cross_entropy(logits, mask)

    run_steps(Line(), [batch], loss_fn=loss_fn, images_at_once=2)

    assert seen == [[0, 1], [2, 3], [4]]


def test_a_scaled_loss_is_unscaled_before_the_step() -> None:
    scaled, plain = Line(), Line()
    for model, enabled in ((scaled, True), (plain, False)):
        run_steps(
            model,
            separable_batches([2, 2]),
            optimizer=sgd(model),
            scaler=torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled),
        )

    assert scaled.conv.weight.abs().sum() > 0
    torch.testing.assert_close(scaled.state_dict(), plain.state_dict())


@pytest.mark.parametrize("enabled", [False, True])
def test_clipping_is_of_the_whole_gradient_after_unscaling(enabled: bool) -> None:
    clipped, plain = Line(), Line()
    for model, clip_norm in ((clipped, 0.01), (plain, None)):
        run_steps(
            model,
            separable_batches([4]),
            optimizer=sgd(model),
            rate=1.0,
            scaler=torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled),
            clip_norm=clip_norm,
        )

    moved = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (clipped, plain)]
    assert moved[1].norm() > 0.05
    torch.testing.assert_close(moved[0], moved[1] * 0.01 / moved[1].norm())


def test_a_gradient_that_is_short_is_not_clipped() -> None:
    clipped, plain = Line(), Line()
    run_steps(clipped, separable_batches([4]), optimizer=sgd(clipped), clip_norm=100.0)
    run_steps(plain, separable_batches([4]), optimizer=sgd(plain))

    torch.testing.assert_close(clipped.state_dict(), plain.state_dict())


# --- What is not finite -------------------------------------------------------------------------


def poisoned(bad: set[int], value: float) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """A loss that is `value` at the steps of these numbers, and so are all gradients."""
    steps = iter(range(1000))

    def loss_fn(logits: Tensor, mask: Tensor, border: Tensor | None) -> Tensor:
        loss = cross_entropy(logits, mask)
        return loss * value if next(steps) in bad else loss

    return loss_fn


@pytest.mark.parametrize("name", ["rmsprop", "sgd", "adam", "adamw"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_left_out_and_counted(name: str, value: float) -> None:
    momentum = 0.5 if name == "sgd" else 0.0
    config = OptimConfig(name=name, momentum=momentum)  # type: ignore[arg-type]
    batches = separable_batches([2, 2, 2, 2])
    model, without, tally = Line(), Line(), Tally(CPU)
    run_steps(
        model,
        batches,
        optimizer=build_optimizer(model, config),
        loss_fn=poisoned({0, 2}, value),
        tally=tally,
    )
    run_steps(without, [batches[1], batches[3]], optimizer=build_optimizer(without, config))

    torch.testing.assert_close(model.state_dict(), without.state_dict(), rtol=0, atol=0)
    found = tally.read()
    assert (found.skipped, found.skipped_in_a_row) == (2, 1)
    assert math.isfinite(found.loss)


def test_a_gradient_that_is_not_finite_counts_though_the_loss_is() -> None:
    def loss_fn(logits: Tensor, mask: Tensor, border: Tensor | None) -> Tensor:
        return cross_entropy(logits, mask) + (logits.sum() * 0).sqrt()  # 0, with slope infinite

    model, tally = Line(), Tally(CPU)
    run_steps(model, separable_batches([2]), loss_fn=loss_fn, tally=tally)

    assert tally.read().skipped == 1
    assert not any(p.any() for p in model.parameters())


def test_rmsprop_with_momentum_leaves_out_steps_too() -> None:
    model, tally = Line(), Tally(CPU)
    optimizer = build_optimizer(model, OptimConfig(momentum=0.9))
    run_steps(
        model,
        separable_batches([2, 2]),
        optimizer=optimizer,
        loss_fn=poisoned({0}, math.nan),
        tally=tally,
    )

    assert all(p.isfinite().all() and p.any() for p in model.parameters())


def test_the_most_in_a_row_are_counted_until_they_are_read() -> None:
    model, tally = Line(), Tally(CPU)
    loss_fn = poisoned({1, 2, 4, 5, 6, 8}, math.nan)
    run_steps(model, separable_batches([1] * 8), loss_fn=loss_fn, tally=tally)
    first = tally.read()
    run_steps(model, separable_batches([1] * 2), loss_fn=loss_fn, tally=tally)
    second = tally.read()

    assert (first.skipped, first.skipped_in_a_row) == (5, 3)
    assert (second.skipped, second.skipped_in_a_row) == (6, 1)


def test_a_tally_goes_on_from_its_sums() -> None:
    straight, model = Tally(CPU), Line()
    batches = separable_batches([2, 3, 1])
    run_steps(Line(), batches, tally=straight)
    first = Tally(CPU)
    optimizer = build_optimizer(model, OptimConfig())
    run_steps(model, batches[:1], tally=first, optimizer=optimizer)
    second = Tally(CPU, first.sums.tolist())
    run_steps(model, batches[1:], tally=second, optimizer=optimizer)

    assert second.read() == straight.read()


def test_an_overflow_in_fp16_is_left_out_by_the_scaler() -> None:
    model, tally = Line(), Tally(CPU)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    run_steps(
        model,
        separable_batches([2, 2]),
        scaler=scaler,
        loss_fn=poisoned({0}, math.inf),
        tally=tally,
    )

    assert tally.read().skipped == 1
    assert scaler.get_scale() == 32.0
    assert all(p.isfinite().all() and p.any() for p in model.parameters())


# --- Waiting for the device ---------------------------------------------------------------------

READS_FROM_THE_DEVICE = (
    "item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "nonzero"
)  # fmt: skip


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of what was called that on a GPU would wait until all queued work is done."""
    seen: list[str] = []
    for name in READS_FROM_THE_DEVICE:
        original = getattr(Tensor, name)

        def counting(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            seen.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(Tensor, name, counting)
    yield seen
    monkeypatch.undo()


@pytest.mark.parametrize("name", ["rmsprop", "sgd", "adam", "adamw"])
def test_steps_read_nothing_from_the_device(name: str, reads: list[str]) -> None:
    model, batches, tally = Line(), separable_batches([3, 3, 1]), Tally(CPU)
    reads.clear()
    run_steps(
        model,
        batches,
        optimizer=build_optimizer(model, OptimConfig(name=name)),  # type: ignore[arg-type]
        images_at_once=2,
        clip_norm=1.0,
        tally=tally,
    )
    assert reads == []

    tally.read()
    assert reads == ["tolist"]


def test_averaging_and_guarding_read_nothing_from_the_device(reads: list[str]) -> None:
    model = build_model("unet", base_channels=2, depth=1)
    average, guard = AveragedModel(model, 0.9), StatisticsGuard(model)
    reads.clear()

    average.update(1)
    guard.look()

    assert reads == []


@pytest.mark.parametrize("use_scaler", [False, True])
@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_loss_that_is_no_number_stops_a_step_whose_gradients_are(
    loss: float, use_scaler: bool
) -> None:
    """The scaler knows gradients only, and must agree with what is counted."""
    model, tally = Line(), Tally(CPU)
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", enabled=use_scaler)

    run_steps(
        model,
        separable_batches([4]),
        tally=tally,
        scaler=scaler,
        loss_fn=lambda *batch: cross_entropy(*batch) + loss,
    )

    assert tally.read().skipped == 1
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not use_scaler or scaler.get_scale() == 2.0**15  # halved, as after an overflow


# --- Averages -----------------------------------------------------------------------------------


def test_the_average_is_the_recurrence_by_hand() -> None:
    model = Line()
    average = AveragedModel(model, 0.5)
    expected = 0.0
    for step, value in enumerate([1.0, 5.0, -3.0, 2.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0], 1):
        nn.init.constant_(model.conv.bias, value)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value

    assert decay == 0.5  # both branches were taken
    assert average.model.conv.bias[0].item() == pytest.approx(expected)
    assert not average.model.training
    assert not any(p.requires_grad for p in average.model.parameters())


def test_the_average_follows_batch_norm_and_shares_no_memory() -> None:
    model = build_model("unet", base_channels=2, depth=1)
    average = AveragedModel(model, 0.999)
    model.train()(torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8))
    before = {key: value.clone() for key, value in average.model.state_dict().items()}

    average.update(10**6)

    after = average.model.state_dict()
    values = model.state_dict()
    for key, value in values.items():
        if "running" in key:
            torch.testing.assert_close(after[key], before[key] * 0.999 + value * 0.001)
            assert not torch.equal(after[key], value)
        elif "num_batches" in key:
            assert after[key] == value == 1
        assert after[key].data_ptr() != value.data_ptr()


def test_statistics_that_overflowed_are_put_back_and_good_ones_kept() -> None:
    model = build_model("unet", base_channels=2, depth=1)
    guard = StatisticsGuard(model)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    model.train()(torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8))
    guard.look()
    good = [norm.running_var.clone() for norm in norms]

    norms[1].running_var[0] = math.nan
    norms[1].running_var[1] = 5.0
    norms[2].running_var.fill_(7.0)
    guard.look()

    assert norms[1].running_var.tolist() == [good[1][0].item(), 5.0]
    assert torch.equal(norms[2].running_var, torch.full_like(good[2], 7.0))
    assert not torch.equal(good[1], torch.ones_like(good[1]))


# --- Pieces -------------------------------------------------------------------------------------


def test_a_piece_is_cut_to_its_own_largest_picture() -> None:
    batch = {
        "image": torch.zeros(3, 3, 9, 9),
        "mask": torch.zeros(3, 9, 9),
        "size": [(4, 9), (9, 5), (6, 6)],
        "image_id": ["a", "b", "c"],
    }

    shapes = [[tuple(p["image"].shape), tuple(p["mask"].shape)] for p in pieces(batch, 1)]
    pairs = [tuple(p["mask"].shape) for p in pieces(batch, 2)]

    assert shapes == [
        [(1, 3, 4, 9), (1, 4, 9)],
        [(1, 3, 9, 5), (1, 9, 5)],
        [(1, 3, 6, 6), (1, 6, 6)],
    ]
    assert pairs == [(2, 9, 9), (1, 6, 6)]
