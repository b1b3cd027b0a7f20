"""`segtrain eval` against a plain loop with torchmetrics, and its options and files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torchmetrics.classification as tm
from helpers.command import TOY_TRAINING, Command
from PIL import Image

from segtrain.checkpoint import load_checkpoint, restore_model
from segtrain.config.schema import DataConfig
from segtrain.data.datasets import ImageSelection, open_selection
from segtrain.evaluation.metrics import METRICS
from segtrain.evaluation.result_json import schema

pytestmark = pytest.mark.usefixtures("one_thread")


def eval_json(segtrain: Command, *options: str | Path) -> dict[str, Any]:
    done = segtrain("eval", "--json", "--workers", "0", *options)
    assert done.code == 0, done.err
    result: dict[str, Any] = json.loads(done.out)
    return result


def val_images(root: Path) -> ImageSelection:
    return open_selection(DataConfig(root=str(root)), "val")


def probabilities(run: Path, image: np.ndarray) -> torch.Tensor:
    """H W probabilities of an image, by an independent implementation."""
    path = run / "checkpoints" / "best.pt"
    loaded = load_checkpoint(path)
    model = restore_model(loaded, path).eval()
    height, width = image.shape[:2]
    scale = loaded.config.data.image_size / min(height, width)
    size = round(width * scale), round(height * scale)
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    with torch.inference_mode():
        logits = model(torch.from_numpy(small).permute(2, 0, 1)[None])
        probs = torch.softmax(logits, dim=1)[:, 1:]
        return torch.nn.functional.interpolate(probs, (height, width), mode="bilinear")[0, 0]


# --- Metrics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_metrics_agree_with_a_plain_loop_and_torchmetrics(
    segtrain: Command, trained_run: Path, toy_coco: Path, threshold: float
) -> None:
    probs, truth = [], []
    images = val_images(toy_coco)
    for index in range(len(images)):
        sample = images.sample(index)
        known = torch.from_numpy(sample.mask != 255)
        probs.append(probabilities(trained_run, sample.image)[known])
        truth.append(torch.from_numpy(sample.mask)[known])
    all_probs, all_truth = torch.cat(probs), torch.cat(truth).long()

    ours = eval_json(segtrain, "--checkpoint", trained_run, "--threshold", str(threshold))[
        "metrics"
    ]

    def theirs(metric: type[torch.nn.Module]) -> float:
        # torchmetrics compares with >, not >=: slightly below is the same without ties.
        return float(metric(threshold=threshold - 1e-7)(all_probs, all_truth))

    assert ours["person_iou"] == pytest.approx(theirs(tm.BinaryJaccardIndex), abs=1e-6)
    assert ours["dice"] == pytest.approx(theirs(tm.BinaryF1Score), abs=1e-6)
    assert ours["precision"] == pytest.approx(theirs(tm.BinaryPrecision), abs=1e-6)
    assert ours["recall"] == pytest.approx(theirs(tm.BinaryRecall), abs=1e-6)
    assert ours["pixel_accuracy"] == pytest.approx(theirs(tm.BinaryAccuracy), abs=1e-6)
    assert 0.05 < ours["person_iou"] < 0.999


def test_metrics_at_a_threshold_are_those_of_the_curves(
    segtrain: Command, trained_run: Path
) -> None:
    results = {
        k: eval_json(segtrain, "--checkpoint", trained_run, "--threshold", str(k / 256))
        for k in (64, 128)
    }
    for k, result in results.items():
        for name in ("person_iou", "precision", "recall"):
            assert result["metrics"][name] == results[128]["curves"][name][k]
    assert results[64]["metrics"]["person_iou"] != results[128]["metrics"]["person_iou"]


def test_batch_size_and_workers_do_not_change_the_output(
    segtrain: Command, trained_run: Path
) -> None:
    first = segtrain("eval", "--json", "--checkpoint", trained_run, "--workers", "0").out
    for batch_size, workers in [("8", "0"), ("1", "0"), ("3", "2")]:
        again = segtrain(
            *("eval", "--json", "--checkpoint", trained_run),
            *("--batch-size", batch_size, "--workers", workers),
        )
        assert again.out == first, (batch_size, workers)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["model", "masks", "one image"])
def test_two_processes_print_the_same_as_one(
    segtrain: Command, trained_run: Path, toy_coco: Path, tmp_path: Path, source: str
) -> None:
    arguments = ["eval", "--json", "--workers", "0"]
    if source == "masks":
        write_masks(tmp_path / "masks", toy_coco, trained_run, "classes")
        arguments += ["--predictions", str(tmp_path / "masks"), "--data", str(toy_coco)]
    else:
        arguments += ["--checkpoint", str(trained_run)]
        arguments += ["--limit", "1"] if source == "one image" else []
    expected = segtrain(*arguments).out
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "segtrain", *arguments),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected


def test_slices_of_a_group_add_up_to_all_images(
    segtrain: Command, trained_run: Path, toy_coco: Path
) -> None:
    found = eval_json(segtrain, "--checkpoint", trained_run)
    groups: dict[str, int] = {}
    for part in found["slices"]:
        groups[part["group"]] = groups.get(part["group"], 0) + part["num_images"]
    assert set(groups) == {"share of frame", "people", "touches frame", "crowd", "source"}
    assert set(groups.values()) == {found["num_images"]}
    assert found["num_images"] == len(val_images(toy_coco)) == len(found["images"]["image_id"])
    names = [val_images(toy_coco).name(index) for index in found["images"]["index"]]
    assert found["images"]["image_id"] == names


def test_the_result_contains_baselines_and_intervals(segtrain: Command, trained_run: Path) -> None:
    found = eval_json(segtrain, "--checkpoint", trained_run)
    assert set(found["baselines"]) == {"all person", "all background", "mean mask"}
    assert found["baselines"]["all background"]["person_iou"] == 0
    all_person = found["baselines"]["all person"]["person_iou"]
    assert all_person == pytest.approx(found["metrics"]["all_person_iou"], abs=1e-12)
    low, high = found["intervals"]["person_iou"]
    assert low < found["metrics"]["person_iou"] < high


def test_without_training_images_there_is_no_mean_mask(
    segtrain: Command, trained_run: Path, toy_coco: Path, tmp_path: Path
) -> None:
    for name in ("val2017", "annotations/instances_val2017.json"):
        (tmp_path / "coco" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "coco" / name).symlink_to(toy_coco / name)
    done = segtrain("eval", "--json", "--checkpoint", trained_run, "--data", tmp_path / "coco")
    assert done.code == 0, done.err
    assert set(json.loads(done.out)["baselines"]) == {"all person", "all background"}
    assert "no training images" in done.err


def test_limit_spaces_images_evenly(segtrain: Command, trained_run: Path, toy_coco: Path) -> None:
    found = eval_json(segtrain, "--checkpoint", trained_run, "--limit", "2")
    images = val_images(toy_coco)
    assert found["images"]["image_id"] == [images.name(0), images.name(len(images) - 1)]
    assert found["manifest"] != images.manifest
    assert eval_json(segtrain, "--checkpoint", trained_run, "--limit", "999")["num_images"] == len(
        images
    )


# --- Comparison -----------------------------------------------------------------------------------


def test_comparison_is_paired(segtrain: Command, trained_run: Path) -> None:
    for name, threshold in [("default", "0.5"), ("low", "0.2")]:
        done = segtrain("eval", "--json", "--checkpoint", trained_run, "--threshold", threshold)
        Path(f"{name}.json").write_text(done.out)
    same = eval_json(segtrain, "--checkpoint", trained_run, "--compare", "default.json")[
        "comparison"
    ]
    assert set(same["differences"].values()) == {0.0}
    assert same["intervals"]["person_iou"] == [0, 0]

    other = eval_json(segtrain, "--checkpoint", trained_run, "--compare", "low.json")["comparison"]
    low, default = (
        json.loads(Path(f"{name}.json").read_text())["metrics"] for name in ("low", "default")
    )
    for name in METRICS:
        assert other["differences"][name] == pytest.approx(default[name] - low[name], abs=1e-12)

    table = segtrain("eval", "--checkpoint", trained_run, "--compare", "low.json").out
    assert "the other run" in table


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[1]", '{"version": 1}', "\xff", '{"version": 3, "images": {"index": [1]}}'],
)
def test_compare_refuses_other_files(segtrain: Command, trained_run: Path, content: str) -> None:
    Path("x.json").write_text(content, encoding="latin-1")
    done = segtrain("eval", "--checkpoint", trained_run, "--compare", "x.json")
    assert done.code == 3
    assert "x.json" in done.error_lines[0]


def test_compare_accepts_names_that_are_not_valid_text(
    segtrain: Command, trained_run: Path
) -> None:
    document = eval_json(segtrain, "--checkpoint", trained_run)
    document["images"]["image_id"][0] = "\udc80"
    Path("x.json").write_text(json.dumps(document))
    assert eval_json(segtrain, "--checkpoint", trained_run, "--compare", "x.json")["comparison"]


@pytest.mark.parametrize("option", [("--label-check",), ("--bn", "all")], ids=" ".join)
def test_options_that_need_all_images_refuse_torchrun(
    segtrain: Command, monkeypatch: pytest.MonkeyPatch, option: tuple[str, ...]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = segtrain("eval", *option)
    assert done.code == 2
    assert "without torchrun" in done.error_lines[0]


def test_the_report_is_written_if_stdout_is_closed(trained_run: Path, tmp_path: Path) -> None:
    """As in `segtrain eval --json --report out | head -c 10`."""
    command = [sys.executable, "-m", "segtrain", "eval", "--json", "--report", "out"]
    with subprocess.Popen(
        [*command, "--checkpoint", str(trained_run), "--workers", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
    assert (tmp_path / "out" / "index.html").is_file()


def test_compare_refuses_columns_of_other_lengths(segtrain: Command, trained_run: Path) -> None:
    document = eval_json(segtrain, "--checkpoint", trained_run)
    document["images"]["size"].pop()
    Path("x.json").write_text(json.dumps(document))
    done = segtrain("eval", "--checkpoint", trained_run, "--compare", "x.json")
    assert done.code == 3
    assert "different lengths" in done.error_lines[0]


# --- Masks from other tools -----------------------------------------------------------------------


def write_masks(folder: Path, root: Path, run: Path, encoding: str) -> None:
    """Write the masks of the model in an encoding of another tool."""
    folder.mkdir()
    images = val_images(root)
    for index in range(len(images)):
        sample = images.sample(index)
        person = (probabilities(run, sample.image) >= 0.5).numpy()
        white = person.astype(np.uint8) * 255
        encoded = {
            "black and white": white,
            "classes": person.astype(np.uint8),
            "sixteen bits": person.astype(np.uint16) * 65535,
            "cut-out": np.dstack([sample.image[..., ::-1], white]),
            "opaque gray with alpha": np.dstack([white] * 3 + [np.full_like(white, 255)]),
            "gray in colors": np.dstack([white] * 3),
        }[encoding]
        suffix = "_mask" if encoding == "black and white" else ""
        cv2.imwrite(str(folder / f"{images.name(index)}{suffix}.png"), encoded)


@pytest.mark.parametrize(
    "encoding",
    [
        "black and white",
        "classes",
        "sixteen bits",
        "cut-out",
        "opaque gray with alpha",
        "gray in colors",
    ],
)
def test_masks_of_any_encoding_have_the_metrics_of_the_model(
    segtrain: Command, trained_run: Path, toy_coco: Path, tmp_path: Path, encoding: str
) -> None:
    write_masks(tmp_path / "masks", toy_coco, trained_run, encoding)
    model = eval_json(segtrain, "--checkpoint", trained_run)
    masks = eval_json(segtrain, "--predictions", tmp_path / "masks", "--data", toy_coco)
    assert (masks["kind"], masks["model"], masks["bn"]) == ("predictions", None, None)
    assert masks["manifest"] == model["manifest"]
    for name in set(METRICS) - {"ece"}:
        assert masks["metrics"][name] == model["metrics"][name], name
    assert masks["baselines"] == model["baselines"]


def test_masks_of_predict_have_the_metrics_of_the_model(
    segtrain: Command, trained_run: Path, toy_coco: Path
) -> None:
    done = segtrain("predict", toy_coco / "val2017", "--checkpoint", trained_run, "--output", "out")
    assert done.code == 0, done.err
    for path in Path("out").glob("*_cutout.png"):
        path.unlink()
    model = eval_json(segtrain, "--checkpoint", trained_run)
    masks = eval_json(segtrain, "--predictions", "out", "--data", toy_coco)
    assert masks["images"]["confusion"] == model["images"]["confusion"]


def test_soft_masks_are_probabilities(
    segtrain: Command, toy_coco: Path, trained_run: Path, tmp_path: Path
) -> None:
    """At a threshold of 0.5, a level of 128 is person and 127 is not."""
    (tmp_path / "masks").mkdir()
    images = val_images(toy_coco)
    for index in range(len(images)):
        mask = images.sample(index).mask
        cv2.imwrite(
            str(tmp_path / "masks" / f"{images.name(index)}.png"),
            np.where(mask == 1, 128, 127).astype(np.uint8),
        )
    assert eval_json(segtrain, "--predictions", tmp_path / "masks", "--data", toy_coco)["metrics"][
        "person_iou"
    ] == pytest.approx(1)


def test_a_dark_soft_mask_is_not_a_class_mask(
    segtrain: Command, toy_coco: Path, tmp_path: Path
) -> None:
    """The other masks show that a level of 1 is a probability of 1/255."""
    (tmp_path / "masks").mkdir()
    images = val_images(toy_coco)
    for index in range(len(images)):
        mask = images.sample(index).mask
        soft = np.full_like(mask, 1) if index == 0 else np.where(mask == 1, 255, 0)
        cv2.imwrite(str(tmp_path / "masks" / f"{images.name(index)}.png"), soft.astype(np.uint8))
    found = eval_json(segtrain, "--predictions", tmp_path / "masks", "--data", toy_coco)["images"]
    (_, fp), (_, tp) = found["confusion"][0]
    assert (fp, tp) == (0, 0)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "has no mask for 1 of"),
        ("32 bits", "neither 8-bit nor 16-bit"),
        ("small", "has 10x10 pixels"),
        ("damaged", "cannot decode"),
        ("twice", "are both masks of"),
    ],
)
def test_unusable_masks_are_named(
    segtrain: Command, toy_coco: Path, trained_run: Path, tmp_path: Path, fault: str, message: str
) -> None:
    folder = tmp_path / "masks"
    write_masks(folder, toy_coco, trained_run, "classes")
    first = min(folder.iterdir())
    if fault == "missing":
        first.unlink()
    elif fault == "small":
        cv2.imwrite(str(first), np.zeros((10, 10), np.uint8))
    elif fault == "32 bits":
        first.unlink()
        Image.fromarray(np.full((10, 10), 100_000, np.int32)).save(first.with_suffix(".tif"))
    elif fault == "damaged":
        first.write_bytes(first.read_bytes()[:60])
    else:
        first.with_name(f"{first.stem}_mask.png").write_bytes(first.read_bytes())
    done = segtrain("eval", "--predictions", folder, "--data", toy_coco)
    assert done.code == 3
    [line] = done.error_lines
    assert message in line
    assert first.stem in line


# --- Options and JSON -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ("--threshold", "0"),
        ("--threshold", "1.5"),
        ("--limit", "0"),
        ("--tta", "rotate"),
        ("--tile", "33"),
        ("--compare", "nowhere.json"),
        ("--predictions", ".", "--tta", "flip"),
        ("--predictions", ".", "--size", "64"),
        ("--predictions", ".", "--checkpoint", "x"),
        ("--bn", "all", "--label-check"),
        ("--bn", "all", "--report", "out"),
    ],
    ids=" ".join,
)
def test_invalid_options_are_usage_errors(segtrain: Command, options: tuple[str, ...]) -> None:
    Path("out").mkdir()
    done = segtrain("eval", *options)
    assert done.code == 2
    assert len(done.error_lines) == 1


def test_predictions_without_data_are_refused(segtrain: Command, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    cv2.imwrite(str(tmp_path / "masks" / "x.png"), np.zeros((4, 4), np.uint8))
    done = segtrain("eval", "--predictions", tmp_path / "masks")
    assert done.code == 2
    assert "--data" in done.error_lines[0]


@pytest.mark.parametrize(
    "options",
    [("--size", "32"), ("--tta", "flip"), ("--tta", "scales"), ("--size", "160", "--tile", "128")],
    ids=" ".join,
)
def test_inference_options_are_recorded_and_change_the_result(
    segtrain: Command, trained_run: Path, options: tuple[str, ...]
) -> None:
    default = eval_json(segtrain, "--checkpoint", trained_run)
    other = eval_json(segtrain, "--checkpoint", trained_run, *options)
    for option, value in zip(options[::2], options[1::2], strict=True):
        assert str(other[option[2:]]) == value
    assert other["images"]["confusion"] != default["images"]["confusion"]
    assert other["manifest"] == default["manifest"]


def test_report_and_label_check_are_written_and_do_not_change_metrics(
    segtrain: Command, trained_run: Path
) -> None:
    command = ("eval", "--json", "--checkpoint", trained_run, "--workers", "0")
    plain = segtrain(*command)
    outputs = ("--report", "out", "--label-check")
    done = segtrain(*command, *outputs)
    assert done.code == 0, done.err
    assert done.out == plain.out
    page = Path("out/index.html").read_text(encoding="utf-8")
    num_images = json.loads(done.out)["num_images"]
    assert len(list(Path("out/images").iterdir())) == 5 * num_images
    assert {path.name for path in Path("out").iterdir()} == {
        *("index.html", "images", "label_check.png", "label_check.csv")
    }
    assert "report: out/index.html" in done.err

    again = segtrain(*command, *outputs)
    assert again.code == 2
    assert "--overwrite" in again.error_lines[0]
    assert Path("out/index.html").read_text(encoding="utf-8") == page
    assert segtrain(*command, *outputs, "--overwrite").code == 0
    assert Path("out/index.html").read_text(encoding="utf-8") == page


def test_a_label_check_without_report_has_its_own_folder(
    segtrain: Command, trained_run: Path
) -> None:
    assert segtrain("eval", "--checkpoint", trained_run, "--label-check").code == 0
    [sheet] = Path("runs").glob("label-check-*/label_check.png")
    assert sheet.stat().st_size > 0


def test_metrics_of_training_have_the_names_and_values_of_eval(
    segtrain: Command, toy_coco: Path
) -> None:
    segtrain("train", "--data", toy_coco, "--name", "x", "--epochs", "1", *TOY_TRAINING)
    row = json.loads(Path("runs/x/metrics.jsonl").read_text().splitlines()[-1])
    training = {key.removeprefix("val/"): row[key] for key in row if key.startswith("val/")}
    found = eval_json(segtrain, "--checkpoint", "runs/x")["metrics"]
    assert {"person_iou", "precision", "recall"} < set(training) < set(METRICS)
    assert {key: found[key] for key in training} == pytest.approx(training, abs=1e-6)


def test_the_schema_in_the_docs_is_current() -> None:
    documented = (Path(__file__).parents[2] / "docs" / "eval.schema.json").read_text(
        encoding="utf-8"
    )
    assert json.loads(documented) == schema()
