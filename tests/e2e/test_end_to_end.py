"""train → eval → predict from the command line, on a toy data set."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers.coco import make_toy_coco
from helpers.command import TOY_TRAINING, Command
from PIL import Image

from segtrain.checkpoint import load_checkpoint
from segtrain.config.resolve import load_config

PROJECT = Path(__file__).parents[2]

# A network with dropout, which depends on the state of torch's generator.
TOY_TIRAMISU = (
    *("--model", "fc_densenet56", "--set", "model.down_blocks=[1]", "--set", "model.up_blocks=[1]"),
    *("--set", "model.bottleneck=1", "--image-size", "48", "--batch-size", "4"),
    *("--precision", "fp32", "--device", "cpu"),
)


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path).weights


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_pixels(path: str) -> npt.NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.array(image)


def assert_equal_weights(a: Path, b: Path) -> None:
    weights_a, weights_b = load_weights(a), load_weights(b)
    assert weights_a.keys() == weights_b.keys()
    for name in weights_a:
        assert torch.equal(weights_a[name], weights_b[name]), name


def test_a_run_writes_all_its_files(trained_run: Path) -> None:
    files = {str(p.relative_to(trained_run)) for p in trained_run.rglob("*") if p.is_file()}

    assert files == {
        *("config.yaml", "metrics.jsonl", "curves.png", "log.txt", ".lock"),
        *("samples/epoch_0001.jpg", "samples/epoch_0002.jpg"),
        *("checkpoints/last.pt", "checkpoints/previous.pt", "checkpoints/best.pt"),
    }
    assert (trained_run.parent / "latest").resolve() == trained_run.resolve()
    for image in ("curves.png", "samples/epoch_0002.jpg"):
        with Image.open(trained_run / image) as opened:
            assert min(opened.size) > 100


def test_metrics_jsonl_has_one_object_per_epoch(trained_run: Path) -> None:
    rows = read_metrics(trained_run)

    assert [row["epoch"] for row in rows] == [1, 2]
    assert [row["global_step"] for row in rows] == [2, 4]
    for row in rows:
        for key in ("person_iou", "mean_iou", "dice", "pixel_accuracy"):
            assert 0 <= row[f"val/{key}"] <= 1
        assert row["train/loss"] > 0


def test_the_saved_configuration_is_the_resolved_one(trained_run: Path, toy_coco: Path) -> None:
    config = load_config(trained_run / "config.yaml")

    assert config == load_checkpoint(trained_run / "checkpoints" / "best.pt").config
    assert config.data.root == str(toy_coco)
    assert config.train.name == "toy"


def test_best_is_the_epoch_with_the_highest_person_iou(trained_run: Path) -> None:
    rows = read_metrics(trained_run)
    best = load_checkpoint(trained_run / "checkpoints" / "best.pt")

    assert best.metrics["val/person_iou"] == max(row["val/person_iou"] for row in rows)
    assert best.training == {}


def test_eval_reproduces_the_metrics_of_the_training(
    segtrain: Command, trained_run: Path, toy_coco: Path
) -> None:
    best = load_checkpoint(trained_run / "checkpoints" / "best.pt")

    finished = segtrain("eval", "--checkpoint", trained_run, "--json", "--batch-size", "1")

    result = json.loads(finished.out)
    assert finished.code == 0
    assert result["data"] == [str(toy_coco)]
    assert result["num_images"] == 4
    for key in ("person_iou", "mean_iou", "dice", "pixel_accuracy"):
        assert result["metrics"][key] == pytest.approx(best.metrics[f"val/{key}"], abs=1e-6)


def test_eval_prints_a_table_with_the_baselines(segtrain: Command, trained_run: Path) -> None:
    finished = segtrain("eval", "--checkpoint", trained_run, "--split", "train")

    assert finished.code == 0
    for words in ("person IoU", "mean IoU", "Dice", "pixel accuracy", "background"):
        assert words in finished.out


def test_predict_writes_at_the_original_size(
    segtrain: Command, trained_run: Path, tmp_path: Path
) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (61, 47, 3), dtype=np.uint8)
    # EXIF orientation 6: stored as 61 x 47 (H x W), displayed as 47 x 61.
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(photo).save(tmp_path / "photo.jpg", exif=exif)

    finished = segtrain(
        *("predict", "photo.jpg", "--checkpoint", trained_run, "--background", "#0000ff"), "--panel"
    )

    assert finished.code == 0, finished.err
    mask, cutout = (
        read_pixels("predictions/photo_mask.png"),
        read_pixels("predictions/photo_cutout.png"),
    )
    assert mask.shape == (47, 61)
    assert set(np.unique(mask)) <= {0, 255}
    assert cutout.shape == (47, 61, 4)
    assert read_pixels("predictions/photo_background.jpg").shape == (47, 61, 3)
    assert read_pixels("predictions/photo_panel.jpg").shape[1] >= 3 * 61


def test_predict_continues_after_a_broken_image_and_exits_with_3(
    segtrain: Command, trained_run: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "good.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")

    finished = segtrain("predict", "broken.jpg", "good.png", "--checkpoint", trained_run)

    assert finished.code == 3
    [line] = finished.error_lines
    assert "1 of 2" in line
    assert "broken.jpg" in line
    assert Path("predictions/good_mask.png").exists()
    assert not Path("predictions/broken_mask.png").exists()


def test_outputs_of_an_image_are_written_all_or_none(
    segtrain: Command, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If one output is too wide for JPEG, the others are not written either."""
    Image.new("RGB", (50, 40)).save(tmp_path / "p.png")
    monkeypatch.setattr("segtrain.imaging.images._JPEG_LONGEST_SIDE", 100)

    finished = segtrain("predict", "p.png", "--checkpoint", trained_run, "--panel")

    assert finished.code == 3
    assert "JPEG allows at most 100" in finished.error_lines[0]
    assert not Path("predictions").exists()


def test_predict_needs_only_the_checkpoint(trained_run: Path, tmp_path: Path) -> None:
    shutil.copy(trained_run / "checkpoints" / "best.pt", tmp_path / "moved.pt")
    Image.new("RGB", (50, 40), "gray").save(tmp_path / "p.png")

    done = subprocess.run(
        [sys.executable, "-m", "segtrain", "predict", "p.png"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PROJECT), "SEGTRAIN_CHECKPOINT": "moved.pt"},
    )

    assert done.returncode == 0, done.stderr
    assert "$SEGTRAIN_CHECKPOINT" in done.stderr
    assert (tmp_path / "predictions" / "p_mask.png").exists()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(
    segtrain: Command, toy_coco: Path, workers: str
) -> None:
    toy = ["--data", str(toy_coco), *TOY_TIRAMISU, "--workers", workers]

    assert segtrain("train", *toy, "--name", "uninterrupted", "--epochs", "3").code == 0
    assert segtrain("train", *toy, "--name", "stopped", "--epochs", "1").code == 0
    resumed = segtrain("train", *toy, "--name", "stopped", "--epochs", "3", "--resume", "auto")

    assert resumed.code == 0
    assert "after epoch 1" in resumed.out
    checkpoints = [Path("runs") / name / "checkpoints" for name in ("uninterrupted", "stopped")]
    for file in ("last.pt", "best.pt"):
        assert_equal_weights(checkpoints[0] / file, checkpoints[1] / file)
    assert [row["epoch"] for row in read_metrics(Path("runs/stopped"))] == [1, 2, 3]


def test_resume_auto_without_a_run_starts_a_new_one(segtrain: Command, toy_coco: Path) -> None:
    finished = segtrain(
        *("train", "--data", toy_coco, "--epochs", "1", "--resume", "auto", *TOY_TRAINING)
    )

    assert finished.code == 0
    assert "starting a new run" in finished.out


def test_a_run_stopped_in_its_first_epoch_restarts_with_resume_auto(
    segtrain: Command, toy_coco: Path, tmp_path: Path
) -> None:
    command = ["train", "--data", str(toy_coco), "--epochs", "1", *TOY_TRAINING, "--name", "early"]
    (tmp_path / "runs" / "early").mkdir(parents=True)

    assert segtrain(*command).code == 2
    assert segtrain(*command, "--resume", "auto").code == 0


def test_a_lower_learning_rate_on_resume_is_used_and_logged(
    segtrain: Command, toy_coco: Path
) -> None:
    """This is how a diverged run continues."""
    command = ["train", "--data", str(toy_coco), *TOY_TRAINING, "--name", "slower"]
    segtrain(*command, "--epochs", "1")

    resumed = segtrain(*command, "--epochs", "2", "--lr", "1e-4", "--resume", "auto")

    assert resumed.code == 0
    assert "changed from here on: optim.lr, train.epochs" in resumed.out
    assert read_metrics(Path("runs/slower"))[-1]["lr"] < 1e-4


def test_nan_weights_are_not_saved(
    segtrain: Command, toy_coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step of an epoch can make weights NaN although its loss is finite."""
    command = ["train", "--data", str(toy_coco), *TOY_TRAINING, "--name", "nan"]
    segtrain(*command, "--epochs", "1")
    before = Path("runs/nan/checkpoints/last.pt").read_bytes()

    def set_nan(ctx: Any, stage: Any, model: torch.nn.Module) -> dict[str, float]:
        next(model.parameters()).data[0] = torch.nan
        return {"val/person_iou": 1.0}

    monkeypatch.setattr("segtrain.training.fit.validate", set_nan)
    finished = segtrain(*command, "--epochs", "2", "--resume", "auto")

    assert finished.code == 6
    assert Path("runs/nan/checkpoints/last.pt").read_bytes() == before


def test_a_damaged_validation_image_is_skipped_with_a_warning(
    segtrain: Command, tmp_path: Path
) -> None:
    root = make_toy_coco(tmp_path / "coco")
    first = min((root / "val2017").iterdir())
    first.write_bytes(first.read_bytes()[:50])

    finished = segtrain("train", "--data", root, *TOY_TRAINING, "--epochs", "1")

    assert finished.code == 0, finished.err
    assert "warning: validation: 1 damaged images skipped" in finished.err
    assert first.name in finished.err


def test_resume_refuses_other_settings_and_names_their_keys(
    segtrain: Command, trained_run: Path
) -> None:
    before = (trained_run / "checkpoints" / "last.pt").read_bytes()

    finished = segtrain("train", "--resume", trained_run, "--seed", "5", "--model", "tiramisu")

    assert finished.code == 4
    assert "train.seed" in finished.error_lines[0]
    assert "model.name" in finished.error_lines[0]
    assert (trained_run / "checkpoints" / "last.pt").read_bytes() == before


def test_resuming_a_finished_run_does_not_change_it(segtrain: Command, trained_run: Path) -> None:
    before = (trained_run / "checkpoints" / "last.pt").read_bytes()

    finished = segtrain("train", "--resume", trained_run)

    assert finished.code == 0
    assert (trained_run / "checkpoints" / "last.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("precision", "logged"), [("bf16", "bf16"), ("fp16", "fp16"), ("auto", "(bf16|fp32)")]
)
def test_precisions_train_on_the_cpu(
    segtrain: Command, toy_coco: Path, precision: str, logged: str
) -> None:
    toy = [argument for argument in TOY_TRAINING if argument not in {"--precision", "fp32"}]

    finished = segtrain(
        "train", "--data", toy_coco, "--epochs", "1", *toy, "--precision", precision
    )

    assert finished.code == 0, finished.err
    assert re.search(f"precision {logged}", finished.out)


def test_a_toy_network_learns_the_toy_people(segtrain: Command, toy_coco: Path) -> None:
    toy = ["--data", str(toy_coco), *TOY_TRAINING, "--epochs", "25", "--name", "toy"]

    assert segtrain("train", *toy).code == 0

    best = load_checkpoint(Path("runs/toy/checkpoints/best.pt")).metrics
    assert best["val/person_iou"] > 2 * best["val/all_person_iou"]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_on_cuda(segtrain: Command, toy_coco: Path, precision: str) -> None:
    toy = [a for a in TOY_TRAINING if a not in {"--precision", "fp32", "--device", "cpu"}]

    finished = segtrain(
        *("train", "--data", toy_coco, "--epochs", "2", *toy, "--device", "cuda"),
        *("--precision", precision, "--name", "cuda"),
    )

    assert finished.code == 0, finished.err
    assert segtrain("eval", "--checkpoint", "runs/cuda", "--device", "cuda").code == 0
