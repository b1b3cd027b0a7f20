"""Speed and memory of the networks against the field's way of writing them.

    python benchmarks/models.py                    # this CPU, bf16, batch 4, 224 x 224
    python benchmarks/models.py --device cuda      # eager and compiled by block, bf16 and fp16

The reference is FC-DenseNet103 as most ports have it: torch.cat before every layer, and BN, ReLU,
convolution and dropout as modules. It gets our weights, the same precision, memory format, batch
and process, and its logits are compared with ours before anything is timed. All variants run in
turn, and medians are reported, so that a noisy machine hits all alike.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from segtrain.devices import describe_device, move_model
from segtrain.models import build_model
from segtrain.models.dense_block import DenseBlock
from segtrain.models.overview import cost_of, count_kept_bytes

SIZE = 224
OTHERS = {
    "fc_densenet67": {},
    "fc_densenet56": {},
    "unet": {},
    "unet encoder=resnet34": {"encoder": "resnet34"},
}


class NaiveBlock(nn.Module):
    """A dense block with the concatenation written down."""

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
    """FC-DenseNet103 with our weights, the field's blocks and torch's dropout."""

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
    """One network at one batch, to be timed."""

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
        """Forward and backward; what an optimizer costs is the same for all."""
        self.model.train()
        F.cross_entropy(self.logits().float(), self.mask).backward()
        for parameter in self.model.parameters():
            parameter.grad = None

    @torch.inference_mode()
    def inference(self) -> None:
        self.model.eval()
        self.logits()


def medians(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each, run in turn, after one turn to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of a large matrix product: what the machine can do at best."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / medians({"matmul": lambda: a @ a}, 9)["matmul"] / 1e9


def on_cpu(batch_size: int, repeats: int) -> None:
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
    # Inference first: eval and predict run in a process that has not trained, and what training
    # leaves in the allocator's hands makes the reference faster.
    runs = {name: jobs[name].inference for name in ("reference", "plain")}
    inference = medians(runs, 2 * repeats)
    train = medians({name: job.train_step for name, job in jobs.items()}, repeats)
    peak = matmul_peak(device, dtype)
    macs = cost_of("tiramisu").multiply_adds * batch_size

    table = Table(title=f"FC-DenseNet103, batch {batch_size}, bf16, {describe_device(device)}")
    for heading in ("", "s", "x reference's speed", "kept MB/image", "GFLOP/s", "of peak"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, seconds in train.items():
        kept = count_kept_bytes(models[name], jobs[name].image) / 1e6
        rate = 6 * macs / seconds / 1e9
        add_row(table, f"train, {name}", seconds, train["reference"], f"{kept:.0f}", rate, peak)
    for name, seconds in inference.items():
        rate = 2 * macs / seconds / 1e9
        what = "reference" if name == "reference" else "ours"
        add_row(table, f"inference, {what}", seconds, inference["reference"], "", rate, peak)
    Console().print(table)
    other_networks(batch_size, repeats, device, dtype, peak)


def add_row(
    table: Table, name: str, seconds: float, reference: float, kept: str, rate: float, peak: float
) -> None:
    ratio = f"{reference / seconds:.2f}"
    table.add_row(name, f"{seconds:.3f}", ratio, kept, f"{rate:.0f}", f"{rate / peak:.0%}")


def other_networks(
    batch_size: int, repeats: int, device: torch.device, dtype: torch.dtype, peak: float
) -> None:
    table = Table(title=f"matrix-product peak {peak:.0f} GFLOP/s")
    for heading in ("", "train s", "GFLOP/s", "of peak", "inference s", "GFLOP/s", "of peak"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, kwargs in OTHERS.items():
        model = build_model(name.split()[0], **kwargs)
        move_model(model, device)
        job = Job(model, batch_size, device, dtype)
        macs = cost_of(name.split()[0], **kwargs).multiply_adds * batch_size
        seconds = medians({"train": job.train_step, "inference": job.inference}, repeats)
        cells = []
        for what, flops in (("train", 6 * macs), ("inference", 2 * macs)):
            rate = flops / seconds[what] / 1e9
            cells += [f"{seconds[what]:.3f}", f"{rate:.0f}", f"{rate / peak:.0%}"]
        table.add_row(name, *cells)
    Console().print(table)


@torch.no_grad()
def check_same_logits(reference: nn.Module, ours: nn.Module) -> None:
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(ours.eval()(image), reference.eval()(image), rtol=1e-3, atol=1e-3)


def on_cuda(device: torch.device, repeats: int) -> None:
    """Batches that fill half of the card and more, eager and compiled by block."""
    table = Table(title=f"FC-DenseNet103, {SIZE} x {SIZE}, {describe_device(device)}")
    headings = (
        "network",
        "precision",
        "batch",
        "train images/s",
        "peak GB",
        "of peak",
        "compile s",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    ours = build_model("tiramisu")
    check_same_logits(NaiveTiramisu(ours), ours)
    for dtype in (torch.bfloat16, torch.float16):
        peak = matmul_peak(device, dtype)
        for name, make in cuda_variants(ours).items():
            model = make()
            move_model(model, device)
            cells = largest_batch(model, device, dtype, repeats, peak)
            table.add_row(name, str(dtype).removeprefix("torch."), *cells)
    Console().print(table)


def cuda_variants(ours: nn.Module) -> dict[str, Callable[[], nn.Module]]:
    def variant(memory_efficient: bool, compiled: bool) -> nn.Module:
        model = copy.deepcopy(ours)
        model.memory_efficient = memory_efficient
        for module in model.modules():
            if compiled and isinstance(module, DenseBlock):
                module.compile()
        return model

    return {
        "reference": lambda: NaiveTiramisu(ours),
        "plain": lambda: variant(False, False),
        "memory-efficient": lambda: variant(True, False),
        "compiled": lambda: variant(False, True),
    }


def largest_batch(
    model: nn.Module, device: torch.device, dtype: torch.dtype, repeats: int, peak: float
) -> list[str]:
    """Double the batch until the card is full; the figures of the largest that fits."""
    macs = cost_of("tiramisu").multiply_adds
    started = time.perf_counter()
    Job(model, 8, device, dtype).train_step()
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    cells = ["-"] * 5
    batch_size = 8
    while batch_size <= 1024:
        torch.cuda.reset_peak_memory_stats()
        try:
            job = Job(model, batch_size, device, dtype)
            seconds = medians({"step": job.train_step}, repeats)["step"]
        except torch.cuda.OutOfMemoryError:
            break
        rate = 6 * macs * batch_size / seconds / 1e9
        memory = torch.cuda.max_memory_allocated() / 1e9
        cells = [str(batch_size), f"{batch_size / seconds:.0f}", f"{memory:.1f}"]
        cells += [f"{rate / peak:.0%}", f"{first:.0f}"]
        batch_size *= 2
    torch.cuda.empty_cache()
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.device == "cuda":
        on_cuda(torch.device("cuda"), arguments.repeats)
    else:
        on_cpu(arguments.batch_size, arguments.repeats)


if __name__ == "__main__":
    main()
