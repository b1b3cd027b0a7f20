"""Several processes over NCCL: on one GPU what one process alone can show, on two the rest."""

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
from coco_fixtures import make_toy_coco
from conftest import TOY_TRAINING, Command, no_waiting
from torch.nn.parallel import DistributedDataParallel

from segtrain import distributed
from segtrain.config import OptimConfig
from segtrain.devices import autocast_for, move_model, resolve_device
from segtrain.distributed import World
from segtrain.models import build_model
from segtrain.training.engine import Tally, training_steps
from segtrain.training.losses import cross_entropy
from segtrain.training.network import average_statistics, in_parallel
from segtrain.training.optim import build_optimizer

pytestmark = pytest.mark.gpu

PROJECT = Path(__file__).parents[1]
# As if another process were there: everything is sent, to nobody.
TWO = World(rank=0, local_rank=0, size=2)


@pytest.fixture
def one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.cuda.set_device(0)
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("nccl", init_method=store, rank=0, world_size=1)
    try:
        monkeypatch.setattr(distributed, "_control_group", dist.new_group(backend="gloo"))
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_sums_stay_on_the_gpu_and_words_on_the_cpu() -> None:
    device = resolve_device("cuda")
    values = torch.arange(4.0, dtype=torch.float64, device=device)
    TWO.sum_(values.clone())  # the connection is made

    with no_waiting():
        summed = TWO.sum_(values.clone())
        assert [TWO.any(True), TWO.any(False), TWO.smallest(3)] == [True, False, 3]
        assert TWO.told_by_first({"a": [1]}) == {"a": [1]}
        assert TWO.read_by_first(lambda: "read") == "read"

    assert summed.device == device
    assert torch.equal(summed, values)


@pytest.mark.usefixtures("one_rank")
def test_statistics_are_means_over_the_processes() -> None:
    model = build_model("unet", base_channels=4, depth=1)
    move_model(model, resolve_device("cuda"))
    before = {key: value.clone() for key, value in model.named_buffers()}

    average_statistics(model, TWO)

    for key, value in model.named_buffers():
        halved = before[key] / 2 if value.is_floating_point() else before[key]
        assert torch.equal(value, halved)


@pytest.mark.parametrize("sync_bn", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.usefixtures("one_rank")
def test_no_step_of_several_processes_waits(precision: Any, sync_bn: bool) -> None:
    device = resolve_device("cuda")
    model = build_model("unet", base_channels=8, depth=2)
    move_model(model, device)
    optimizer = build_optimizer(model, OptimConfig())
    if sync_bn:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    network, tally = in_parallel(model.train(), TWO), Tally(device)
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
        tally,
        loss_fn=cross_entropy,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler("cuda", enabled=precision == "fp16"),
        autocast=autocast_for(precision, device),
        device=device,
        before_step=lambda: 1e-3,
        images_at_once=2,
        clip_norm=1.0,
        sum_of_all=TWO.sum_,
    )
    for _ in range(3):  # buckets are made anew after the first
        next(steps)
    with no_waiting():
        taken = sum(1 for _ in steps)

    assert taken == 3
    assert tally.read().skipped == 0


# --- Two GPUs -----------------------------------------------------------------------------------


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU, or none")
NETWORK = TOY_TRAINING[: TOY_TRAINING.index("--batch-size")]


def on_two_gpus(*arguments: str | Path) -> str:
    launch = [sys.executable, "-m", "segtrain.launch", "--standalone", "--nproc-per-node", "2"]
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
def test_two_gpus_take_the_steps_of_one(
    segtrain: Command, tmp_path: Path, precision: str, bn_eval: str, sync_bn: str
) -> None:
    """With as many validation images as leave one process with more of them."""
    people = make_toy_coco(tmp_path / "people", num_train=12, num_val=5)
    common = ["--data", people, *NETWORK, "--workers", "0", "--precision", precision]
    common += ["--set", f"train.bn_eval={bn_eval}", "--set", "train.ema_decay=0.9"]
    synced = ["--set", f"train.sync_bn={sync_bn}"]
    on_two_gpus("train", *common, *synced, "--epochs", "2", "--batch-size", "2", "--name", "two")
    one = segtrain(
        *("train", *common, "--epochs", "2", "--batch-size", "4"),
        *("--device", "cuda:0", "--name", "one"),
    )
    assert one.code == 0, one.err

    two_rows, one_rows = (
        [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]
        for name in ("two", "one")
    )
    for ours, theirs in zip(two_rows, one_rows, strict=True):
        assert ours["global_step"] == theirs["global_step"]
        # Of the truth not a pixel more or less.
        assert ours["val/all_person_iou"] == theirs["val/all_person_iou"]
    # Batch norm over all images is that of one process.
    tolerance = 0.02 if sync_bn == "true" else 0.3
    assert two_rows[-1]["train/loss"] == pytest.approx(one_rows[-1]["train/loss"], abs=tolerance)


@two_gpus
def test_two_gpus_evaluate_as_one(segtrain: Command, trained_run: Path) -> None:
    common = ["eval", "--checkpoint", trained_run, "--workers", "0", "--json"]
    alone = segtrain(*common, "--device", "cuda:0")

    assert json.loads(on_two_gpus(*common))["figures"] == json.loads(alone.out)["figures"]
