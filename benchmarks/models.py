"""Speed and memory of the models compared with common implementations.

    python benchmarks/models.py                    # this CPU, bf16, batch 4, 224 x 224
    python benchmarks/models.py --device cuda      # batch 4, 16 and 32: eager and CUDA graphs
    python benchmarks/models.py --traffic          # memory traffic of a step on a GPU; needs no GPU

The reference is FC-DenseNet103 as most ports write it: torch.cat before every layer, and BN, ReLU,
convolution and dropout as modules. It has our weights and the same precision, memory format, batch
and process; its logits are compared with ours before anything is timed. Variants alternate, and
medians are reported, so that a noisy machine affects all of them equally.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from traffic import step_traffic

from segtrain.errors import is_memory_error
from segtrain.models import build_model
from segtrain.models.dense_block import DenseBlock
from segtrain.models.summary import compute_cost, count_kept_bytes
from segtrain.runtime.devices import describe_device, move_model, resolve_device

SIZE = 224
OTHERS = {
    "fc_densenet67": {},
    "fc_densenet56": {},
    "unet": {},
    "unet encoder=resnet34": {"encoder": "resnet34"},
}


class NaiveBlock(nn.Module):
    """A dense block with explicit concatenation."""

    def __init__(self, block: DenseBlock) -> None:
        super().__init__()
        self.in_channels = block.in_channels
        self.layers = nn.ModuleList(
            nn.Sequential(
                copy.deepcopy(layer.norm),
                nn.ReLU(inplace=True),
                copy.deepcopy(layer.conv),
                nn.Dropout(layer.dropout.p),
            )
            for layer in block.layers
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=1)
        return x


class NaiveTiramisu(nn.Module):
    """FC-DenseNet103 with our weights, common dense blocks and torch's dropout."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.normalize, self.stem, self.downs, self.ups, self.head = copy.deepcopy(
            (ours.normalize, ours.stem, ours.downs, ours.ups, ours.head)
        )
        for down in self.downs:
            down.dropout = nn.Dropout(down.dropout.p)
        self.down_blocks = nn.ModuleList(map(NaiveBlock, ours.down_blocks))
        self.bottleneck = NaiveBlock(ours.bottleneck)
        self.up_blocks = nn.ModuleList(map(NaiveBlock, ours.up_blocks))

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(self.normalize(image))
        skips = []
        for block, down in zip(self.down_blocks, self.downs, strict=True):
            skips.append(block(x))
            x = down(skips[-1])
        new = self.bottleneck(x)[:, self.bottleneck.in_channels :]
        for up, block in zip(self.ups, self.up_blocks, strict=True):
            x = block(torch.cat([up(new), skips.pop()], dim=1))
            new = x[:, block.in_channels :]
        return self.head(x)


class Job:
    """A model and a batch to time."""

    def __init__(
        self, model: nn.Module, batch_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        generator = torch.Generator().manual_seed(0)
        shape = (batch_size, SIZE, SIZE)
        image = torch.randint(0, 256, (*shape, 3), generator=generator, dtype=torch.uint8)
        self.image = image.permute(0, 3, 1, 2).to(device)
        self.mask = torch.randint(0, 2, shape, generator=generator).to(device)

    def logits(self) -> Tensor:
        with torch.autocast(self.device.type, dtype=self.dtype):
            return self.model(self.image)

    def train_step(self) -> None:
        """Forward and backward; the optimizer takes the same time for all models."""
        self.model.train()
        F.cross_entropy(self.logits().float(), self.mask).backward()
        for parameter in self.model.parameters():
            parameter.grad = None

    @torch.inference_mode()
    def inference(self) -> None:
        self.model.eval()
        self.logits()


def medians(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each run, alternating, after three warm-up rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(3 + repeats):
        for name, run in runs.items():
            seconds[name].append(measure_seconds(run))
    return {name: statistics.median(times[3:]) for name, times in seconds.items()}


def measure_seconds(run: Callable[[], object]) -> float:
    """Seconds; on a GPU from CUDA events, starting when the GPU is idle."""
    if not torch.cuda.is_available():
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of a large matrix product: the peak of the machine."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / medians({"matmul": lambda: a @ a}, 9)["matmul"] / 1e9


def benchmark_cpu(batch_size: int, repeats: int) -> None:
    device, dtype = torch.device("cpu"), torch.bfloat16
    ours = build_model("tiramisu")
    reference = NaiveTiramisu(ours)
    models = {"reference": reference, "plain": ours, "memory-efficient": copy.deepcopy(ours)}
    models["plain"].memory_efficient = False
    models["memory-efficient"].memory_efficient = True
    for model in models.values():
        move_model(model, device)
    check_same_logits(reference, ours)
    jobs = {name: Job(model, batch_size, device, dtype) for name, model in models.items()}
    # Inference first: eval and predict run in a process that has not trained, and memory that
    # training leaves in the allocator makes the reference faster.
    runs = {name: jobs[name].inference for name in ("reference", "plain")}
    inference = medians(runs, 2 * repeats)
    train = medians({name: job.train_step for name, job in jobs.items()}, repeats)
    peak = matmul_peak(device, dtype)
    macs = compute_cost("tiramisu").multiply_adds * batch_size

    table = Table(title=f"FC-DenseNet103, batch {batch_size}, bf16, {describe_device(device)}")
    for heading in ("", "s", "x reference's speed", "kept MB/image", "GFLOP/s", "of peak"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, seconds in train.items():
        kept = count_kept_bytes(models[name], jobs[name].image) / 1e6
        rate = 6 * macs / seconds / 1e9
        add_row(table, f"train, {name}", seconds, train["reference"], f"{kept:.0f}", rate, peak)
    for name, seconds in inference.items():
        rate = 2 * macs / seconds / 1e9
        label = "reference" if name == "reference" else "ours"
        add_row(table, f"inference, {label}", seconds, inference["reference"], "", rate, peak)
    Console().print(table)
    benchmark_other_models(batch_size, repeats, device, dtype, peak)


def add_row(
    table: Table, name: str, seconds: float, reference: float, kept: str, rate: float, peak: float
) -> None:
    ratio = f"{reference / seconds:.2f}"
    table.add_row(name, f"{seconds:.3f}", ratio, kept, f"{rate:.0f}", f"{rate / peak:.0%}")


def benchmark_other_models(
    batch_size: int, repeats: int, device: torch.device, dtype: torch.dtype, peak: float
) -> None:
    table = Table(title=f"matrix-product peak {peak:.0f} GFLOP/s")
    for heading in ("", "train s", "GFLOP/s", "of peak", "inference s", "GFLOP/s", "of peak"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, kwargs in OTHERS.items():
        model = build_model(name.split()[0], **kwargs)
        move_model(model, device)
        job = Job(model, batch_size, device, dtype)
        macs = compute_cost(name.split()[0], **kwargs).multiply_adds * batch_size
        seconds = medians({"train": job.train_step, "inference": job.inference}, repeats)
        cells = []
        for mode, flops in (("train", 6 * macs), ("inference", 2 * macs)):
            rate = flops / seconds[mode] / 1e9
            cells += [f"{seconds[mode]:.3f}", f"{rate:.0f}", f"{rate / peak:.0%}"]
        table.add_row(name, *cells)
    Console().print(table)


@torch.no_grad()
def check_same_logits(reference: nn.Module, ours: nn.Module) -> None:
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(ours.eval()(image), reference.eval()(image), rtol=1e-3, atol=1e-3)


def benchmark_cuda(
    device: torch.device, batch_sizes: list[int], repeats: int, compiled: bool
) -> None:
    """All variants of a step at each batch size, and the largest batch of each variant."""
    # Crops have one size, so cuDNN may benchmark its kernels, for all variants.
    torch.backends.cudnn.benchmark = True
    ours = build_model("tiramisu")
    check_same_logits(NaiveTiramisu(ours), ours)
    dtype = torch.bfloat16
    peak, bandwidth = matmul_peak(device, dtype), copy_bandwidth(device)
    console = Console(width=120)
    title = f"FC-DenseNet103, {SIZE} x {SIZE}, bf16, {describe_device(device)}"
    console.print(f"matrix product {peak / 1e3:.0f} TFLOP/s, copies {bandwidth / 1e12:.2f} TB/s")
    for batch_size in batch_sizes:
        table = Table(title=f"{title}, batch {batch_size}")
        for heading in ("step", "ms", "x textbook's speed", "launches", "peak GB", "of matrix peak",
                        "GB moved", "of copies"):  # fmt: skip
            table.add_column(heading, justify="right" if heading != "step" else "left")
        runs = cuda_runs(ours, batch_size, device, dtype, compiled)
        seconds = medians({name: run.step for name, run in runs.items()}, repeats)
        flops = 6 * compute_cost("tiramisu").multiply_adds * batch_size
        for name, run in runs.items():
            moved = step_traffic(run.make_model, batch_size, SIZE, dtype)[0]
            row = [
                f"{1e3 * seconds[name]:.1f}",
                f"{seconds['textbook'] / seconds[name]:.2f}",
                str(count_launches(run.step)),
                f"{peak_memory(run.step) / 1e9:.1f}",
                f"{flops / seconds[name] / 1e9 / peak:.0%}",
                *([f"{moved / 1e9:.0f}", f"{moved / seconds[name] / bandwidth:.0%}"]
                  if run.is_counted else ["", ""]),
            ]  # fmt: skip
            table.add_row(name, *row)
        console.print(table)
        del runs
        torch.cuda.empty_cache()
    console.print(largest_batches(ours, device, dtype))


class CudaRun(NamedTuple):
    """A variant of a step.

    make_model: builds its model again, for counting.
    is_counted: whether `traffic` can count its traffic, which it cannot for compiled kernels.
    """

    step: Callable[[], None]
    make_model: Callable[[], nn.Module]
    is_counted: bool = True


def cuda_runs(
    ours: nn.Module, batch_size: int, device: torch.device, dtype: torch.dtype, compiled: bool
) -> dict[str, CudaRun]:
    """The textbook model and ours: eager, in channels_last, compiled and as a CUDA graph."""

    def textbook() -> nn.Module:
        return NaiveTiramisu(ours)

    def job(make: Callable[[], nn.Module], memory_format: torch.memory_format) -> Job:
        model = make().to(device=device, memory_format=memory_format)
        return Job(model, batch_size, device, dtype)

    last = torch.channels_last
    variants = {
        "textbook": textbook,
        "ours, auto": partial(copy_model, ours, "auto"),
        "ours, memory_efficient=false": partial(copy_model, ours, False),
        "ours, memory_efficient=true": partial(copy_model, ours, True),
    }
    runs = {"textbook, not channels_last": CudaRun(
        job(textbook, torch.contiguous_format).train_step, textbook
    )}  # fmt: skip
    for name, make in variants.items():
        runs[name] = CudaRun(job(make, last).train_step, make)
        runs[f"{name}, CUDA graph"] = CudaRun(as_graph(job(make, last)), make)
    if compiled:
        for name in ("textbook", "ours, memory_efficient=false"):
            run = job(variants[name], last)
            run.model.compile()
            runs[f"{name}, compiled"] = CudaRun(run.train_step, variants[name], is_counted=False)
    return runs


def as_graph(job: Job) -> Callable[[], None]:
    """The step as a CUDA graph; replaying it takes a single launch on the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            job.train_step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        job.train_step()
    return graph.replay


def count_launches(step: Callable[[], None]) -> int:
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())


def peak_memory(step: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that copies of large tensors read and write."""
    a = torch.empty(2**30, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() / medians({"copy": lambda: b.copy_(a)}, 9)["copy"]


def largest_batches(ours: nn.Module, device: torch.device, dtype: torch.dtype) -> Table:
    """Double the batch until the GPU is out of memory."""
    table = Table(title="largest batch that fits, of 8, 16, 32 ...")
    table.add_column("network")
    table.add_column("batch", justify="right")
    variants: dict[str, Callable[[], nn.Module]] = {"textbook": lambda: NaiveTiramisu(ours)}
    for efficient in (False, True):
        variants[f"ours, memory_efficient={str(efficient).lower()}"] = partial(
            copy_model, ours, efficient
        )
    for name, make in variants.items():
        model = make()
        move_model(model, device)
        fits, batch_size = 0, 8
        while batch_size <= 4096:
            try:
                Job(model, batch_size, device, dtype).train_step()
            except RuntimeError as error:
                if not is_memory_error(error):
                    raise
                break
            fits, batch_size = batch_size, 2 * batch_size
        table.add_row(name, str(fits))
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    return table


def copy_model(ours: nn.Module, memory_efficient: bool | str) -> nn.Module:
    model = copy.deepcopy(ours)
    model.memory_efficient = memory_efficient
    return model


def print_traffic(batch_sizes: list[int]) -> None:
    """Print the memory traffic of a step on a GPU; it is counted without one."""
    table = Table(title=f"FC-DenseNet103, {SIZE} x {SIZE}, bf16: GB read and written in a step")
    table.add_column("")
    for batch_size in batch_sizes:
        table.add_column(f"batch {batch_size}", justify="right")
    variants: dict[str, Callable[[], nn.Module]] = {
        "textbook": lambda: NaiveTiramisu(build_model("tiramisu")),
        "ours, memory_efficient=false": lambda: build_model("tiramisu", memory_efficient=False),
        "ours, memory_efficient=true": lambda: build_model("tiramisu", memory_efficient=True),
    }
    for name, make in variants.items():
        counts = [step_traffic(make, size, SIZE, torch.bfloat16)[0] for size in batch_sizes]
        table.add_row(name, *(f"{count / 1e9:.1f}" for count in counts))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch-size", type=int, default=4, help="on a CPU")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 16, 32], help="on CUDA")
    parser.add_argument(
        "--compiled", action="store_true", help="include torch.compile, which takes minutes"
    )
    parser.add_argument(
        "--traffic", action="store_true", help="only count the memory traffic of a step"
    )
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.traffic:
        print_traffic(arguments.batch_sizes)
    elif arguments.device == "cuda":
        device = resolve_device("cuda")
        benchmark_cuda(device, arguments.batch_sizes, arguments.repeats, arguments.compiled)
    else:
        benchmark_cpu(arguments.batch_size, arguments.repeats)


if __name__ == "__main__":
    main()
