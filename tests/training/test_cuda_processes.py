"""Several processes over NCCL: with one GPU what a single rank can test, with two the rest."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.coco import make_toy_coco
from helpers.command import TOY_TRAINING, Command, no_device_sync
from helpers.training import training_steps
from torch.nn.parallel import DistributedDataParallel

from segtrain.config.schema import OptimConfig
from segtrain.models import build_model
from segtrain.runtime import distributed
from segtrain.runtime.devices import autocast_for, move_model, resolve_device
from segtrain.runtime.distributed import DistributedContext
from segtrain.training.losses import cross_entropy
from segtrain.training.optim import build_optimizer
from segtrain.training.parallel import average_running_stats, wrap_ddp
from segtrain.training.step import StepStats

pytestmark = pytest.mark.gpu

PROJECT = Path(__file__).parents[2]
# As if there were another process: rank 0 of 2, in a process group of size 1.
TWO = DistributedContext(rank=0, local_rank=0, size=2)


@pytest.fixture
def one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.cuda.set_device(0)
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("nccl", init_method=store, rank=0, world_size=1)
    try:
        monkeypatch.setattr(distributed, "_gloo_group", dist.new_group(backend="gloo"))
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_sums_stay_on_the_gpu_and_objects_on_the_cpu() -> None:
    device = resolve_device("cuda")
    values = torch.arange(4.0, dtype=torch.float64, device=device)
    TWO.all_reduce_sum(values.clone())  # opens the connection

    with no_device_sync():
        summed = TWO.all_reduce_sum(values.clone())
        assert [TWO.any_rank(True), TWO.any_rank(False), TWO.all_reduce_min(3)] == [True, False, 3]
        assert TWO.broadcast({"a": [1]}) == {"a": [1]}
        assert TWO.read_on_main(lambda: "read") == "read"

    assert summed.device == device
    assert torch.equal(summed, values)


@pytest.mark.usefixtures("one_rank")
def test_running_statistics_are_averaged_over_the_processes() -> None:
    model = build_model("unet", base_channels=4, depth=1)
    move_model(model, resolve_device("cuda"))
    before = {key: value.clone() for key, value in model.named_buffers()}

    average_running_stats(model, TWO)

    for key, value in model.named_buffers():
        expected = before[key] / 2 if value.is_floating_point() else before[key]
        assert torch.equal(value, expected)


@pytest.mark.parametrize("sync_bn", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.usefixtures("one_rank")
def test_distributed_steps_do_not_wait_for_the_gpu(precision: Any, sync_bn: bool) -> None:
    device = resolve_device("cuda")
    model = build_model("unet", base_channels=8, depth=2)
    move_model(model, device)
    optimizer = build_optimizer(model, OptimConfig())
    if sync_bn:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    network, stats = wrap_ddp(model.train(), TWO), StepStats(device)
    assert isinstance(network, DistributedDataParallel)
    torch.manual_seed(0)
    batch = {
        "image": torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8).pin_memory(),
        "mask": torch.randint(2, (4, 64, 64), dtype=torch.uint8).pin_memory(),
        "size": [(64, 64)] * 4,
    }
    steps = training_steps(
        network,
        [batch] * 6,
        stats,
        loss_fn=cross_entropy,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler("cuda", enabled=precision == "fp16"),
        autocast=autocast_for(precision, device),
        device=device,
        lr=1e-3,
        micro_batch_size=2,
        clip_norm=1.0,
        all_reduce=TWO.all_reduce_sum,
    )
    for _ in range(3):  # DDP rebuilds its buckets after the first step
        next(steps)
    with no_device_sync():
        num_steps = sum(1 for _ in steps)

    assert num_steps == 3
    assert stats.read().skipped == 0


# --- Two GPUs -----------------------------------------------------------------------------------


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
NETWORK = TOY_TRAINING[: TOY_TRAINING.index("--batch-size")]


def run_on_two_gpus(*arguments: str | Path) -> str:
    launch = [
        sys.executable,
        "-m",
        "segtrain.runtime.launch",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run(
        [*launch, "-m", "segtrain", *map(str, arguments), "--device", "cuda", "--debug"],
        env={**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@two_gpus
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("bn_eval", ["running", "batch", "recalibrate"])
@pytest.mark.parametrize("sync_bn", ["false", "true"])
def test_two_gpus_train_like_one(
    segtrain: Command, tmp_path: Path, precision: str, bn_eval: str, sync_bn: str
) -> None:
    """Five validation images: one process gets more of them than the other."""
    data = make_toy_coco(tmp_path / "data", num_train=12, num_val=5)
    common = ["--data", data, *NETWORK, "--workers", "0", "--precision", precision]
    common += ["--set", f"train.bn_eval={bn_eval}", "--set", "train.ema_decay=0.9"]
    sync = ["--set", f"train.sync_bn={sync_bn}"]
    run_on_two_gpus("train", *common, *sync, "--epochs", "2", "--batch-size", "2", "--name", "two")
    one = segtrain(
        *("train", *common, "--epochs", "2", "--batch-size", "4"),
        *("--device", "cuda:0", "--name", "one"),
    )
    assert one.code == 0, one.err

    two_rows, one_rows = (
        [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]
        for name in ("two", "one")
    )
    for two_row, one_row in zip(two_rows, one_rows, strict=True):
        assert two_row["global_step"] == one_row["global_step"]
        # The counts of true pixels are exactly equal.
        assert two_row["val/all_person_iou"] == one_row["val/all_person_iou"]
    # Synchronized batch norm equals that of one process.
    tolerance = 0.02 if sync_bn == "true" else 0.3
    assert two_rows[-1]["train/loss"] == pytest.approx(one_rows[-1]["train/loss"], abs=tolerance)


@two_gpus
def test_two_gpus_evaluate_like_one(segtrain: Command, trained_run: Path) -> None:
    common = ["eval", "--checkpoint", trained_run, "--workers", "0", "--json"]
    one = segtrain(*common, "--device", "cuda:0")

    assert json.loads(run_on_two_gpus(*common))["metrics"] == json.loads(one.out)["metrics"]
