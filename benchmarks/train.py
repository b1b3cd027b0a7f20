"""What training costs besides the network: the loop, the data and the checkpoints.

    python benchmarks/train.py loop                  # our loop against forward, backward and step
    python benchmarks/train.py data --data FOLDER    # from a prepared folder against from memory
    python benchmarks/train.py checkpoint            # last.pt of FC-DenseNet103
    python benchmarks/train.py allocator             # freed memory kept, or given back
    python benchmarks/train.py cuda --data FOLDER    # networks and precisions on a GPU; --compile

Everything that is compared runs in turn in one process, and medians are reported, so that a noisy
machine hits all alike.
"""

import argparse
import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from traffic import step_traffic

from segtrain.data.demo import demo_people_root
from segtrain.data.loading import Batch, Batches, collate
from segtrain.data.sample import Sample
from segtrain.devices import describe_device, prefetched, resolve_device
from segtrain.distributed import World
from segtrain.models import build_model
from segtrain.models.overview import cost_of
from segtrain.progress import silenced
from segtrain.training.epoch import train_one_epoch
from segtrain.training.logs import RunLog
from segtrain.training.losses import cross_entropy
from segtrain.training.network import make_ready
from segtrain.training.setting import Setting, Stage, open_setting, open_stage
from segtrain.training.start import starting
from segtrain.training.state import TrainingState, begin, save_last

SIZE = 224


class InMemory:
    """The same batch again and again, where the trainer expects a loader."""

    def __init__(self, batch: Batch, num_batches: int) -> None:
        self.batch, self.num_batches = batch, num_batches
        self.num_images = num_batches * len(batch["image"])

    def __iter__(self) -> Iterator[Batch]:
        return repeat(self.batch, self.num_batches)

    def set_epoch(self, epoch: int, *, num_done: int = 0) -> None:
        """It has no order."""


def a_batch(num_images: int) -> Batch:
    torch.manual_seed(0)
    return collate(
        [
            Sample(
                image=torch.randint(256, (SIZE, SIZE, 3), dtype=torch.uint8).numpy(),
                mask=torch.randint(2, (SIZE, SIZE), dtype=torch.uint8).numpy(),
                image_id=str(number),
            )
            for number in range(num_images)
        ]
    )


@contextlib.contextmanager
def a_training(root: Path, sets: Sequence[str]) -> Iterator[tuple[Setting, Stage, TrainingState]]:
    """All that `segtrain train` works with, in a run folder that goes away."""
    with tempfile.TemporaryDirectory() as folder, silenced():
        flags = {"data.root": str(root), "train.output": folder, "train.name": "benchmark"}
        with starting(None, flags=flags, sets=sets, resume=None, world=World()) as start:
            with contextlib.redirect_stdout(io.StringIO()):
                setting = open_setting(start, RunLog(start.run.log))
            state = begin(setting.config, setting.device, use_scaler=setting.use_scaler)
            yield setting, open_stage(setting, 0, setting.config, state.images_at_once), state


def with_batches(stage: Stage, batches: Any) -> Stage:
    return Stage(**{**vars(stage), "train_set": batches})


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def in_turn(
    runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(seconds_of(run, device))
    return seconds


def bare_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Mapping[str, Any]],
    setting: Setting,
) -> None:
    """What every training has to do, and nothing else."""
    model.train()
    for batch in prefetched(batches, setting.device):
        with setting.autocast():
            logits = model(batch["image"])
        cross_entropy(logits, batch["mask"]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def epoch(setting: Setting, stage: Stage, state: TrainingState) -> None:
    state.begin_epoch()
    train_one_epoch(setting, stage, state, save=lambda: None)


def loop(root: Path, repeats: int, device: str) -> None:
    """Our epoch against the bare steps, on a batch in memory."""
    batch_size, num_batches = (4, 2) if device == "cpu" else (16, 60)
    sets = [f"train.device={device}", f"train.batch_size={batch_size}", "data.workers=0"]
    table = Table(title=f"loop, U-Net, {SIZE} x {SIZE}, batch {batch_size}")
    for heading in ("", "s a step, bare", "ours", "overhead", "from", "to"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, more in {"": [], "with EMA": ["train.ema_decay=0.999"]}.items():
        found = bare_and_ours(root, [*sets, *more], batch_size, num_batches, repeats)
        shares = [b / a - 1 for a, b in zip(found["bare"], found["ours"], strict=True)]
        medians = [statistics.median(found[key]) / num_batches for key in ("bare", "ours")]
        table.add_row(
            name or "fp32 or bf16 as the device likes",
            *(f"{value:.4f}" for value in medians),
            f"{statistics.median(shares):+.1%}",
            f"{min(shares):+.1%}",
            f"{max(shares):+.1%}",
        )
    Console().print(table)


def bare_and_ours(
    root: Path, sets: Sequence[str], batch_size: int, num_batches: int, repeats: int
) -> dict[str, list[float]]:
    with a_training(root, sets) as (setting, stage, state):
        batches = InMemory(a_batch(batch_size), num_batches)
        ours = with_batches(stage, batches)
        return in_turn(
            {
                "bare": lambda: bare_steps(state.model, state.optimizer, batches, setting),
                "ours": lambda: epoch(setting, ours, state),
            },
            repeats,
            setting.device,
        )


def data(root: Path, repeats: int, device: str, num_batches: int, model: str) -> None:
    """Images a second from a prepared folder, with loader processes, against from memory."""
    batch_size = 4 if device == "cpu" else 32
    sets = [f"train.device={device}", f"train.batch_size={batch_size}", f"model.name={model}"]
    with a_training(root, sets) as (setting, stage, state):
        # As many batches each time, from loader processes that live on as in a training.
        some = _Some(stage.train_set, num_batches)
        memory = InMemory(next(iter(stage.train_set)), num_batches)
        found = in_turn(
            {
                "memory": lambda: epoch(setting, with_batches(stage, memory), state),
                "folder": lambda: epoch(setting, with_batches(stage, some), state),
            },
            repeats,
            setting.device,
        )
    images = num_batches * batch_size
    shares = [a / b for a, b in zip(found["memory"], found["folder"], strict=True)]
    table = Table(title=f"{describe_device(setting.device)}, {model}, batch {batch_size}")
    for heading in ("", "images/s", "of memory's", "from", "to"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("from memory", f"{images / statistics.median(found['memory']):.2f}", "", "", "")
    table.add_row(
        "from the prepared folder",
        f"{images / statistics.median(found['folder']):.2f}",
        *(f"{f(shares):.1%}" for f in (statistics.median, min, max)),
    )
    Console().print(table)


class _Some:
    """The first batches of a loader's epoch."""

    def __init__(self, batches: Batches, num_batches: int) -> None:
        self.batches, self.num_batches = batches, num_batches
        self.num_images = min(num_batches * len(next(iter(batches))["image"]), batches.num_images)

    def __iter__(self) -> Iterator[Batch]:
        return islice(iter(self.batches), self.num_batches)

    def set_epoch(self, epoch: int, *, num_done: int = 0) -> None:
        self.batches.set_epoch(epoch)


def checkpoint(root: Path, repeats: int, device: str) -> None:
    """What saving takes away from training."""
    sets = [f"train.device={device}", "model.name=tiramisu", "train.ema_decay=0.999"]
    with a_training(root, sets) as (setting, _, state):
        save = _saving(setting, state)
        found = in_turn({"save": save}, repeats, setting.device)["save"]
        size = setting.run.last.stat().st_size / 1e6
    Console().print(
        f"last.pt of FC-DenseNet103 with RMSProp and EMA, {size:.0f} MB: "
        f"{statistics.median(found):.2f} s ({min(found):.2f} to {max(found):.2f})"
    )


# Memory once kept is not given back, so each way has a process of its own.
ALLOCATOR_STEPS = """
import resource, sys, torch
from segtrain.devices import autocast_for, keep_freed_memory, move_model
from segtrain.models import build_model
from segtrain.training.losses import cross_entropy
from segtrain.training.network import make_ready
if sys.argv[1] == "kept":
    keep_freed_memory()
torch.set_num_threads(1)
device = torch.device("cpu")
model = build_model("tiramisu")
move_model(model, device)
image = torch.randint(256, (2, 224, 224, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
mask = torch.randint(2, (2, 224, 224), dtype=torch.uint8)
for step in range(5):
    if step == 2:
        before = resource.getrusage(resource.RUSAGE_SELF)
    with autocast_for("bf16", device)():
        logits = model(image)
    cross_entropy(logits, mask).backward()
    model.zero_grad()
after = resource.getrusage(resource.RUSAGE_SELF)
print((after.ru_utime - before.ru_utime) / 3, (after.ru_stime - before.ru_stime) / 3,
      after.ru_maxrss / 1024)
"""


def allocator(repeats: int) -> None:
    """Processor seconds of a training step; wall time would measure who else is at work."""
    table = Table(title="FC-DenseNet103, bf16, batch 2, one CPU thread")
    for heading in ("freed memory is", "user s", "system s", "peak MB"):
        table.add_column(heading, justify="right" if heading != "freed memory is" else "left")
    for way in ("given back", "kept"):
        rows = []
        for _ in range(repeats):
            command = [sys.executable, "-c", ALLOCATOR_STEPS, way]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append([float(word) for word in done.stdout.split()])
        user, system, peak = (statistics.median(column) for column in zip(*rows, strict=True))
        table.add_row(way, f"{user:.2f}", f"{system:.2f}", f"{peak:.0f}")
    Console().print(table)


def _saving(setting: Setting, state: TrainingState) -> Callable[[], None]:
    return lambda: save_last(setting.run, state, setting.config, setting.data)


def cuda(root: Path, repeats: int, compiled: Sequence[str], *, try_algorithms: bool) -> None:
    """Networks and precisions: images a second, memory, shares of what the card can do."""
    torch.backends.cudnn.benchmark = try_algorithms
    device = resolve_device("cuda")
    card = measure_card(device)
    trying = ", cudnn.benchmark" if try_algorithms else ""
    table = Table(title=f"{describe_device(device)}, batch 16, {SIZE} x {SIZE}{trying}")
    for heading in ("", "images/s", "peak GB", "waiting", "TFLOP/s", "of peak", "GB/s", "of copy"):
        table.add_column(heading, justify="right" if heading else "left")
    for model in ("unet", "tiramisu"):
        for precision in ("fp32", "tf32", "bf16", "fp16"):
            for way in ("off", "blocks") if model in compiled else ("off",):
                row = cuda_row(root, repeats, model, precision, way, card)
                table.add_row(f"{model} {precision}{', blocks' if way == 'blocks' else ''}", *row)
                torch.cuda.empty_cache()
                torch.compiler.reset()
    Console().print(table)
    Console().print(
        f"measured on this card: {card.operations / 1e12:.0f} TFLOP/s in a bf16 matrix product, "
        f"{card.bytes / 1e9:.0f} GB/s in a copy, read and written"
    )


@dataclass(frozen=True)
class Card:
    """What a GPU does a second where nothing else is in the way."""

    operations: float
    bytes: float


def cuda_row(
    root: Path, repeats: int, model: str, precision: str, way: str, card: Card
) -> list[str]:
    num_batches, batch_size = 20, 16
    sets = [f"model.name={model}", f"train.precision={precision}", f"train.compile={way}"]
    sets += ["train.device=cuda", f"train.batch_size={batch_size}"]
    waits: list[float] = []
    peaks: list[int] = []
    with a_training(root, sets) as (setting, stage, state):
        some = with_batches(stage, _Some(stage.train_set, num_batches))
        make_ready(state.model, setting.config.train, setting.world, setting.device)

        def run() -> None:
            epoch(setting, some, state)
            waits.append(state.tally.seconds_waited)
            # An epoch begins to count anew.
            peaks.append(torch.cuda.max_memory_allocated(setting.device))

        # The first turn chooses kernels, compiles, and starts the loader processes.
        seconds = in_turn({"": run}, repeats, setting.device)[""]
        images = state.tally.num_images
    median = statistics.median(seconds)
    # Two operations a multiply-add; backward takes two of forward.
    operations = 6 * cost_of(model).multiply_adds * images / median
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    moved, _ = step_traffic(lambda: build_model(model), batch_size, SIZE, dtype)
    bytes_a_second = moved * images / batch_size / median
    fused = way != "off"  # then nobody has counted what is left of the traffic
    return [
        f"{images / median:.0f}",
        f"{max(peaks) / 1e9:.1f}",
        f"{statistics.median(waits[1:]) / median:.1%}",
        f"{operations / 1e12:.1f}",
        f"{operations / card.operations:.0%}",
        "" if fused else f"{bytes_a_second / 1e9:.0f}",
        "" if fused else f"{bytes_a_second / card.bytes:.0%}",
    ]


def measure_card(device: torch.device) -> Card:
    side = 8192
    a, b, out = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(3))
    product = gpu_seconds(lambda: torch.mm(a, b, out=out))
    source = torch.zeros(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = gpu_seconds(lambda: target.copy_(source))
    return Card(operations=2 * side**3 / product, bytes=2 * source.numel() / copied)


def gpu_seconds(run: Callable[[], object]) -> float:
    """Median by the GPU's own clock, once it has come up to speed."""
    for _ in range(10):
        run()
    pairs = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["loop", "data", "checkpoint", "allocator", "cuda"])
    parser.add_argument("--data", type=Path, help="a prepared folder; default: drawn people")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=5, help="of the data benchmark")
    parser.add_argument("--model", default="unet", help="of the data benchmark")
    parser.add_argument(
        "--compile",
        nargs="+",
        choices=["unet", "tiramisu"],
        default=[],
        help="cuda: rows with train.compile=blocks, too; for tiramisu many minutes each",
    )
    parser.add_argument(
        "--cudnn-benchmark", action="store_true", help="cuda: let cuDNN try its algorithms"
    )
    arguments = parser.parse_args()
    if arguments.what == "allocator":
        allocator(arguments.repeats)
        return
    root = (arguments.data or demo_people_root()).resolve()
    if arguments.what == "loop":
        loop(root, arguments.repeats, arguments.device)
    elif arguments.what == "data":
        data(root, arguments.repeats, arguments.device, arguments.batches, arguments.model)
    elif arguments.what == "checkpoint":
        checkpoint(root, arguments.repeats, arguments.device)
    else:
        cuda(root, arguments.repeats, arguments.compile, try_algorithms=arguments.cudnn_benchmark)


if __name__ == "__main__":
    main()
