"""Cost of training besides the model: the loop, the data and the checkpoints.

    python benchmarks/train.py loop                  # our loop vs. forward, backward and step
    python benchmarks/train.py data --data FOLDER    # a prepared folder vs. memory
    python benchmarks/train.py checkpoint            # last.pt of FC-DenseNet103
    python benchmarks/train.py allocator             # freed memory kept vs. returned
    python benchmarks/train.py cuda --data FOLDER    # models and precisions on a GPU; --compile

Compared variants alternate in one process, and medians are reported, so that a noisy machine
affects all of them equally.
"""

import argparse
import contextlib
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

from segtrain.config.resolve import load_config
from segtrain.data.loader import Batch, Batches, collate
from segtrain.data.sample import Sample
from segtrain.demo.dataset import demo_people_root
from segtrain.models import build_model
from segtrain.models.summary import compute_cost
from segtrain.runtime.devices import describe_device, prefetch, resolve_device
from segtrain.runtime.distributed import DistributedContext
from segtrain.runtime.logs import run_log
from segtrain.runtime.progress import no_progress_bars
from segtrain.training.epoch import train_one_epoch
from segtrain.training.losses import cross_entropy
from segtrain.training.parallel import prepare_model
from segtrain.training.setup import StageData, TrainContext, open_run, open_stage
from segtrain.training.state import TrainingState, build_state, save_last

SIZE = 224


class InMemory:
    """A loader that returns the same batch repeatedly."""

    def __init__(self, batch: Batch, num_batches: int) -> None:
        self.batch, self.num_batches = batch, num_batches
        self.num_images = num_batches * len(batch["image"])

    def __iter__(self) -> Iterator[Batch]:
        return repeat(self.batch, self.num_batches)

    def set_epoch(self, epoch: int, *, num_done: int = 0) -> None:
        """All batches are equal."""


def random_batch(num_images: int) -> Batch:
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
def open_training(
    root: Path, sets: Sequence[str]
) -> Iterator[tuple[TrainContext, StageData, TrainingState]]:
    """The context of `segtrain train`, in a temporary run folder."""
    with tempfile.TemporaryDirectory() as folder, no_progress_bars():
        flags = {"data.root": str(root), "train.output": folder, "train.name": "benchmark"}
        config = load_config(flags=flags, sets=sets)
        with (
            run_log() as log,
            open_run(
                config,
                resume=None,
                resolve=load_config,
                world=DistributedContext(),
                run_log=log,
            ) as ctx,
        ):
            state = build_state(ctx.config, ctx.device, use_scaler=ctx.use_scaler)
            yield ctx, open_stage(ctx, 0, ctx.config, state.micro_batch_size), state


def with_batches(stage: StageData, batches: Any) -> StageData:
    return StageData(**{**vars(stage), "train_loader": batches})


def measure_seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def time_alternating(
    runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(measure_seconds(run, device))
    return seconds


def bare_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Mapping[str, Any]],
    ctx: TrainContext,
) -> None:
    """Only what every training loop must do."""
    model.train()
    for batch in prefetch(batches, ctx.device):
        with ctx.autocast():
            logits = model(batch["image"])
        cross_entropy(logits, batch["mask"]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def epoch(ctx: TrainContext, stage: StageData, state: TrainingState) -> None:
    state.begin_epoch()
    train_one_epoch(ctx, stage, state, save=lambda: None)


def benchmark_loop(root: Path, repeats: int, device: str) -> None:
    """Our epoch vs. the bare steps, on a batch in memory."""
    batch_size, num_batches = (4, 2) if device == "cpu" else (16, 60)
    sets = [f"train.device={device}", f"train.batch_size={batch_size}", "data.workers=0"]
    table = Table(title=f"loop, U-Net, {SIZE} x {SIZE}, batch {batch_size}")
    for heading in ("", "s a step, bare", "ours", "overhead", "from", "to"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, options in {"": [], "with EMA": ["train.ema_decay=0.999"]}.items():
        seconds = time_bare_and_ours(root, [*sets, *options], batch_size, num_batches, repeats)
        overheads = [b / a - 1 for a, b in zip(seconds["bare"], seconds["ours"], strict=True)]
        medians = [statistics.median(seconds[key]) / num_batches for key in ("bare", "ours")]
        table.add_row(
            name or "default precision of the device",
            *(f"{value:.4f}" for value in medians),
            f"{statistics.median(overheads):+.1%}",
            f"{min(overheads):+.1%}",
            f"{max(overheads):+.1%}",
        )
    Console().print(table)


def time_bare_and_ours(
    root: Path, sets: Sequence[str], batch_size: int, num_batches: int, repeats: int
) -> dict[str, list[float]]:
    with open_training(root, sets) as (ctx, stage, state):
        batches = InMemory(random_batch(batch_size), num_batches)
        ours = with_batches(stage, batches)
        return time_alternating(
            {
                "bare": lambda: bare_steps(state.model, state.optimizer, batches, ctx),
                "ours": lambda: epoch(ctx, ours, state),
            },
            repeats,
            ctx.device,
        )


def benchmark_data(root: Path, repeats: int, device: str, num_batches: int, model: str) -> None:
    """Images/s from a prepared folder with loader processes vs. from memory."""
    batch_size = 4 if device == "cpu" else 32
    sets = [f"train.device={device}", f"train.batch_size={batch_size}", f"model.name={model}"]
    with open_training(root, sets) as (ctx, stage, state):
        # The same number of batches each time; the loader processes persist as in training.
        first_batches = FirstBatches(stage.train_loader, num_batches)
        memory = InMemory(next(iter(stage.train_loader)), num_batches)
        seconds = time_alternating(
            {
                "memory": lambda: epoch(ctx, with_batches(stage, memory), state),
                "folder": lambda: epoch(ctx, with_batches(stage, first_batches), state),
            },
            repeats,
            ctx.device,
        )
    images = num_batches * batch_size
    ratios = [a / b for a, b in zip(seconds["memory"], seconds["folder"], strict=True)]
    table = Table(title=f"{describe_device(ctx.device)}, {model}, batch {batch_size}")
    for heading in ("", "images/s", "of memory", "from", "to"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("from memory", f"{images / statistics.median(seconds['memory']):.2f}", "", "", "")
    table.add_row(
        "from the prepared folder",
        f"{images / statistics.median(seconds['folder']):.2f}",
        *(f"{f(ratios):.1%}" for f in (statistics.median, min, max)),
    )
    Console().print(table)


class FirstBatches:
    """The first batches of a loader's epoch."""

    def __init__(self, batches: Batches, num_batches: int) -> None:
        self.batches, self.num_batches = batches, num_batches
        self.num_images = min(num_batches * len(next(iter(batches))["image"]), batches.num_images)

    def __iter__(self) -> Iterator[Batch]:
        return islice(iter(self.batches), self.num_batches)

    def set_epoch(self, epoch: int, *, samples_seen: int = 0) -> None:
        self.batches.set_epoch(epoch)


def benchmark_checkpoint(root: Path, repeats: int, device: str) -> None:
    """Seconds that saving last.pt takes."""
    sets = [f"train.device={device}", "model.name=tiramisu", "train.ema_decay=0.999"]
    with open_training(root, sets) as (ctx, _, state):
        runs = {"save": lambda: save_last(ctx.run, state, ctx.config, ctx.data)}
        seconds = time_alternating(runs, repeats, ctx.device)["save"]
        size = ctx.run.last.stat().st_size / 1e6
    Console().print(
        f"last.pt of FC-DenseNet103 with RMSProp and EMA, {size:.0f} MB: "
        f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"
    )


# The setting cannot be undone, so each variant runs in its own process.
ALLOCATOR_STEPS = """
import resource, sys, torch
from segtrain.runtime.devices import autocast_for, keep_freed_memory, move_model
from segtrain.models import build_model
from segtrain.training.losses import cross_entropy
from segtrain.training.parallel import prepare_model
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


def benchmark_allocator(repeats: int) -> None:
    """CPU seconds of a training step; wall time would depend on other processes."""
    table = Table(title="FC-DenseNet103, bf16, batch 2, one CPU thread")
    for heading in ("freed memory is", "user s", "system s", "peak MB"):
        table.add_column(heading, justify="right" if heading != "freed memory is" else "left")
    for variant in ("returned", "kept"):
        rows = []
        for _ in range(repeats):
            command = [sys.executable, "-c", ALLOCATOR_STEPS, variant]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append([float(word) for word in result.stdout.split()])
        user, system, peak = (statistics.median(column) for column in zip(*rows, strict=True))
        table.add_row(variant, f"{user:.2f}", f"{system:.2f}", f"{peak:.0f}")
    Console().print(table)


def benchmark_cuda(
    root: Path, repeats: int, compiled: Sequence[str], *, cudnn_benchmark: bool
) -> None:
    """Models and precisions: images/s, memory, and fractions of the GPU's peak."""
    torch.backends.cudnn.benchmark = cudnn_benchmark
    device = resolve_device("cuda")
    peak = measure_gpu_peak(device)
    suffix = ", cudnn.benchmark" if cudnn_benchmark else ""
    table = Table(title=f"{describe_device(device)}, batch 16, {SIZE} x {SIZE}{suffix}")
    for heading in ("", "images/s", "peak GB", "waiting", "TFLOP/s", "of peak", "GB/s", "of copy"):
        table.add_column(heading, justify="right" if heading else "left")
    for model in ("unet", "tiramisu"):
        for precision in ("fp32", "tf32", "bf16", "fp16"):
            for compile_ in ("off", "blocks") if model in compiled else ("off",):
                row = cuda_row(root, repeats, model, precision, compile_, peak)
                suffix = ", blocks" if compile_ == "blocks" else ""
                table.add_row(f"{model} {precision}{suffix}", *row)
                torch.cuda.empty_cache()
                torch.compiler.reset()
    Console().print(table)
    Console().print(
        f"measured on this GPU: {peak.flops / 1e12:.0f} TFLOP/s in a bf16 matrix product, "
        f"{peak.bytes / 1e9:.0f} GB/s in a copy, read and written"
    )


@dataclass(frozen=True)
class GpuPeak:
    """Measured peak of a GPU, per second."""

    flops: float
    bytes: float


def cuda_row(
    root: Path, repeats: int, model: str, precision: str, compile_: str, peak: GpuPeak
) -> list[str]:
    num_batches, batch_size = 20, 16
    sets = [f"model.name={model}", f"train.precision={precision}", f"train.compile={compile_}"]
    sets += ["train.device=cuda", f"train.batch_size={batch_size}"]
    waits: list[float] = []
    peaks: list[int] = []
    with open_training(root, sets) as (ctx, stage, state):
        first_batches = with_batches(stage, FirstBatches(stage.train_loader, num_batches))
        prepare_model(state.model, ctx.config.train, ctx.world, ctx.device)

        def run() -> None:
            epoch(ctx, first_batches, state)
            waits.append(state.stats.seconds_waited)
            # Each epoch resets the peak.
            peaks.append(torch.cuda.max_memory_allocated(ctx.device))

        # The warm-up run chooses kernels, compiles, and starts the loader processes.
        seconds = time_alternating({"": run}, repeats, ctx.device)[""]
        images = state.stats.num_images
    median = statistics.median(seconds)
    # Two operations per multiply-add; backward takes twice as many as forward.
    flops = 6 * compute_cost(model).multiply_adds * images / median
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    moved, _ = step_traffic(lambda: build_model(model), batch_size, SIZE, dtype)
    bytes_per_second = moved * images / batch_size / median
    fused = compile_ != "off"  # the traffic of compiled kernels is not counted
    return [
        f"{images / median:.0f}",
        f"{max(peaks) / 1e9:.1f}",
        f"{statistics.median(waits[1:]) / median:.1%}",
        f"{flops / 1e12:.1f}",
        f"{flops / peak.flops:.0%}",
        "" if fused else f"{bytes_per_second / 1e9:.0f}",
        "" if fused else f"{bytes_per_second / peak.bytes:.0%}",
    ]


def measure_gpu_peak(device: torch.device) -> GpuPeak:
    side = 8192
    a, b, out = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(3))
    product = gpu_seconds(lambda: torch.mm(a, b, out=out))
    source = torch.zeros(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = gpu_seconds(lambda: target.copy_(source))
    return GpuPeak(flops=2 * side**3 / product, bytes=2 * source.numel() / copied)


def gpu_seconds(run: Callable[[], object]) -> float:
    """Median seconds from CUDA events, after a warm-up."""
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
    parser.add_argument("benchmark", choices=["loop", "data", "checkpoint", "allocator", "cuda"])
    parser.add_argument("--data", type=Path, help="a prepared folder (default: drawn people)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=5, help="for the data benchmark")
    parser.add_argument("--model", default="unet", help="for the data benchmark")
    parser.add_argument(
        "--compile",
        nargs="+",
        choices=["unet", "tiramisu"],
        default=[],
        help="cuda: add rows with train.compile=blocks; many minutes each for tiramisu",
    )
    parser.add_argument(
        "--cudnn-benchmark", action="store_true", help="cuda: enable torch.backends.cudnn.benchmark"
    )
    arguments = parser.parse_args()
    if arguments.benchmark == "allocator":
        benchmark_allocator(arguments.repeats)
        return
    root = (arguments.data or demo_people_root()).resolve()
    if arguments.benchmark == "loop":
        benchmark_loop(root, arguments.repeats, arguments.device)
    elif arguments.benchmark == "data":
        benchmark_data(
            root, arguments.repeats, arguments.device, arguments.batches, arguments.model
        )
    elif arguments.benchmark == "checkpoint":
        benchmark_checkpoint(root, arguments.repeats, arguments.device)
    else:
        benchmark_cuda(
            root, arguments.repeats, arguments.compile, cudnn_benchmark=arguments.cudnn_benchmark
        )


if __name__ == "__main__":
    main()
