"""`segtrain eval` as users call it, against a plain loop with torchmetrics and hand-made masks."""

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
from conftest import TOY_TRAINING, Command
from PIL import Image

from segtrain.checkpoint import load_checkpoint, restore_model
from segtrain.config import DataConfig
from segtrain.data import Pictures, open_pictures
from segtrain.evaluation.document import schema
from segtrain.evaluation.figures import FIGURES

pytestmark = pytest.mark.usefixtures("one_thread")


def judged(segtrain: Command, *options: str | Path) -> dict[str, Any]:
    done = segtrain("eval", "--json", "--workers", "0", *options)
    assert done.code == 0, done.err
    result: dict[str, Any] = json.loads(done.out)
    return result


def validation(root: Path) -> Pictures:
    return open_pictures(DataConfig(root=str(root)), "val")


def probabilities(run: Path, picture: np.ndarray) -> torch.Tensor:
    """A plain way from picture to H W probabilities, as anybody would write it down."""
    path = run / "checkpoints" / "best.pt"
    loaded = load_checkpoint(path)
    model = restore_model(loaded, path).eval()
    height, width = picture.shape[:2]
    scale = loaded.config.data.image_size / min(height, width)
    size = round(width * scale), round(height * scale)
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    with torch.inference_mode():
        logits = model(torch.from_numpy(small).permute(2, 0, 1)[None])
        probs = torch.softmax(logits, dim=1)[:, 1:]
        return torch.nn.functional.interpolate(probs, (height, width), mode="bilinear")[0, 0]


# --- The figures --------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_figures_are_those_of_a_plain_loop_and_torchmetrics(
    segtrain: Command, trained_run: Path, toy_coco: Path, threshold: float
) -> None:
    probs, truth = [], []
    pictures = validation(toy_coco)
    for index in range(len(pictures)):
        sample = pictures.sample(index)
        known = torch.from_numpy(sample.mask != 255)
        probs.append(probabilities(trained_run, sample.image)[known])
        truth.append(torch.from_numpy(sample.mask)[known])
    all_probs, all_truth = torch.cat(probs), torch.cat(truth).long()

    ours = judged(segtrain, "--checkpoint", trained_run, "--threshold", str(threshold))["figures"]

    def theirs(metric: type[torch.nn.Module]) -> float:
        # Above and not from the threshold on: a hair below is the same without ties.
        return float(metric(threshold=threshold - 1e-7)(all_probs, all_truth))

    assert ours["person_iou"] == pytest.approx(theirs(tm.BinaryJaccardIndex), abs=1e-6)
    assert ours["dice"] == pytest.approx(theirs(tm.BinaryF1Score), abs=1e-6)
    assert ours["precision"] == pytest.approx(theirs(tm.BinaryPrecision), abs=1e-6)
    assert ours["recall"] == pytest.approx(theirs(tm.BinaryRecall), abs=1e-6)
    assert ours["pixel_accuracy"] == pytest.approx(theirs(tm.BinaryAccuracy), abs=1e-6)
    assert 0.05 < ours["person_iou"] < 0.999


def test_what_is_judged_at_a_threshold_is_what_the_curves_say_of_it(
    segtrain: Command, trained_run: Path
) -> None:
    at = {
        k: judged(segtrain, "--checkpoint", trained_run, "--threshold", str(k / 256))
        for k in (64, 128)
    }
    for k, found in at.items():
        for name in ("person_iou", "precision", "recall"):
            assert found["figures"][name] == at[128]["curves"][name][k]
    assert at[64]["figures"]["person_iou"] != at[128]["figures"]["person_iou"]


def test_the_same_judgement_has_the_same_bytes(segtrain: Command, trained_run: Path) -> None:
    """Whatever is loaded at a time and by whom."""
    first = segtrain("eval", "--json", "--checkpoint", trained_run, "--workers", "0").out
    for batch_size, workers in [("8", "0"), ("1", "0"), ("3", "2")]:
        again = segtrain(
            *("eval", "--json", "--checkpoint", trained_run),
            *("--batch-size", batch_size, "--workers", workers),
        )
        assert again.out == first, (batch_size, workers)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["network", "masks", "one picture"])
def test_two_processes_find_what_one_finds(
    segtrain: Command, trained_run: Path, toy_coco: Path, tmp_path: Path, how: str
) -> None:
    arguments = ["eval", "--json", "--workers", "0"]
    if how == "masks":
        write_masks(tmp_path / "masks", toy_coco, trained_run, "classes")
        arguments += ["--predictions", str(tmp_path / "masks"), "--data", str(toy_coco)]
    else:
        arguments += ["--checkpoint", str(trained_run)]
        arguments += ["--limit", "1"] if how == "one picture" else []
    one = segtrain(*arguments).out
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
    assert done.stdout == one


def test_slices_part_the_pictures(segtrain: Command, trained_run: Path, toy_coco: Path) -> None:
    found = judged(segtrain, "--checkpoint", trained_run)
    groups: dict[str, int] = {}
    for part in found["slices"]:
        groups[part["group"]] = groups.get(part["group"], 0) + part["num_images"]
    assert set(groups) == {"share of frame", "people", "touches frame", "crowd", "source"}
    assert set(groups.values()) == {found["num_images"]}
    assert found["num_images"] == len(validation(toy_coco)) == len(found["images"]["image_id"])
    names = [validation(toy_coco).stem(index) for index in found["images"]["index"]]
    assert found["images"]["image_id"] == names


def test_trivial_answers_stand_beside_the_network(segtrain: Command, trained_run: Path) -> None:
    found = judged(segtrain, "--checkpoint", trained_run)
    assert set(found["trivial"]) == {"all person", "all background", "mean mask"}
    assert found["trivial"]["all background"]["person_iou"] == 0
    share = found["trivial"]["all person"]["person_iou"]
    assert share == pytest.approx(found["figures"]["all_person_iou"], abs=1e-12)
    low, high = found["intervals"]["person_iou"]
    assert low < found["figures"]["person_iou"] < high


def test_without_training_pictures_there_is_no_mean_mask(
    segtrain: Command, trained_run: Path, toy_coco: Path, tmp_path: Path
) -> None:
    for name in ("val2017", "annotations/instances_val2017.json"):
        (tmp_path / "coco" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "coco" / name).symlink_to(toy_coco / name)
    done = segtrain("eval", "--json", "--checkpoint", trained_run, "--data", tmp_path / "coco")
    assert done.code == 0, done.err
    assert set(json.loads(done.out)["trivial"]) == {"all person", "all background"}
    assert "no training pictures" in done.err


def test_limit_takes_some_evenly(segtrain: Command, trained_run: Path, toy_coco: Path) -> None:
    found = judged(segtrain, "--checkpoint", trained_run, "--limit", "2")
    pictures = validation(toy_coco)
    assert found["images"]["image_id"] == [pictures.stem(0), pictures.stem(len(pictures) - 1)]
    assert found["manifest"] != pictures.manifest
    assert judged(segtrain, "--checkpoint", trained_run, "--limit", "999")["num_images"] == len(
        pictures
    )


# --- Comparing ----------------------------------------------------------------------------------


def test_compare_is_paired(segtrain: Command, trained_run: Path) -> None:
    for name, threshold in [("mine", "0.5"), ("low", "0.2")]:
        done = segtrain("eval", "--json", "--checkpoint", trained_run, "--threshold", threshold)
        Path(f"{name}.json").write_text(done.out)
    same = judged(segtrain, "--checkpoint", trained_run, "--compare", "mine.json")["comparison"]
    assert set(same["differences"].values()) == {0.0}
    assert same["intervals"]["person_iou"] == [0, 0]

    other = judged(segtrain, "--checkpoint", trained_run, "--compare", "low.json")["comparison"]
    low, mine = (json.loads(Path(f"{n}.json").read_text())["figures"] for n in ("low", "mine"))
    for name in FIGURES:
        assert other["differences"][name] == pytest.approx(mine[name] - low[name], abs=1e-12)

    table = segtrain("eval", "--checkpoint", trained_run, "--compare", "low.json").out
    assert "than the other run" in table


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[1]", '{"version": 1}', "\xff", '{"version": 2, "images": {"index": [1]}}'],
)
def test_compare_refuses_what_eval_has_not_written(
    segtrain: Command, trained_run: Path, content: str
) -> None:
    Path("x.json").write_text(content, encoding="latin-1")
    done = segtrain("eval", "--checkpoint", trained_run, "--compare", "x.json")
    assert done.code == 3
    assert "x.json" in done.error_lines[0]


def test_compare_takes_names_that_are_no_text(segtrain: Command, trained_run: Path) -> None:
    document = judged(segtrain, "--checkpoint", trained_run)
    document["images"]["image_id"][0] = "\udc80"
    Path("x.json").write_text(json.dumps(document))
    assert judged(segtrain, "--checkpoint", trained_run, "--compare", "x.json")["comparison"]


@pytest.mark.parametrize("option", [("--label-check",), ("--bn", "all")], ids=" ".join)
def test_what_needs_all_pictures_at_once_goes_without_torchrun(
    segtrain: Command, monkeypatch: pytest.MonkeyPatch, option: tuple[str, ...]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = segtrain("eval", *option)
    assert done.code == 2
    assert "without torchrun" in done.error_lines[0]


def test_the_page_is_written_also_where_nobody_reads_the_figures(
    trained_run: Path, tmp_path: Path
) -> None:
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
    document = judged(segtrain, "--checkpoint", trained_run)
    document["images"]["size"].pop()
    Path("x.json").write_text(json.dumps(document))
    done = segtrain("eval", "--checkpoint", trained_run, "--compare", "x.json")
    assert done.code == 3
    assert "different lengths" in done.error_lines[0]


# --- Masks of other tools -----------------------------------------------------------------------


def write_masks(folder: Path, root: Path, run: Path, how: str) -> None:
    """The network's masks as other tools would have written them."""
    folder.mkdir()
    pictures = validation(root)
    for index in range(len(pictures)):
        sample = pictures.sample(index)
        person = (probabilities(run, sample.image) >= 0.5).numpy()
        white = person.astype(np.uint8) * 255
        written = {
            "black and white": white,
            "classes": person.astype(np.uint8),
            "sixteen bits": person.astype(np.uint16) * 65535,
            "cut-out": np.dstack([sample.image[..., ::-1], white]),
            "opaque gray with alpha": np.dstack([white] * 3 + [np.full_like(white, 255)]),
            "gray in colours": np.dstack([white] * 3),
        }[how]
        ending = "_mask" if how == "black and white" else ""
        cv2.imwrite(str(folder / f"{pictures.stem(index)}{ending}.png"), written)


@pytest.mark.parametrize(
    "how",
    [
        "black and white",
        "classes",
        "sixteen bits",
        "cut-out",
        "opaque gray with alpha",
        "gray in colours",
    ],
)
def test_masks_of_any_kind_are_judged_by_the_same_ruler(
    segtrain: Command, trained_run: Path, toy_coco: Path, tmp_path: Path, how: str
) -> None:
    write_masks(tmp_path / "masks", toy_coco, trained_run, how)
    network = judged(segtrain, "--checkpoint", trained_run)
    masks = judged(segtrain, "--predictions", tmp_path / "masks", "--data", toy_coco)
    assert (masks["kind"], masks["model"], masks["bn"]) == ("predictions", None, None)
    assert masks["manifest"] == network["manifest"]
    for name in set(FIGURES) - {"ece"}:
        assert masks["figures"][name] == network["figures"][name], name
    assert masks["trivial"] == network["trivial"]


def test_masks_of_predict_are_judged_as_the_network_is(
    segtrain: Command, trained_run: Path, toy_coco: Path
) -> None:
    done = segtrain("predict", toy_coco / "val2017", "--checkpoint", trained_run, "--output", "out")
    assert done.code == 0, done.err
    for path in Path("out").glob("*_cutout.png"):
        path.unlink()
    network = judged(segtrain, "--checkpoint", trained_run)
    masks = judged(segtrain, "--predictions", "out", "--data", toy_coco)
    assert masks["images"]["confusion"] == network["images"]["confusion"]


def test_soft_masks_are_probabilities(
    segtrain: Command, toy_coco: Path, trained_run: Path, tmp_path: Path
) -> None:
    """128 of 255 is person at one half, 127 is not."""
    (tmp_path / "masks").mkdir()
    pictures = validation(toy_coco)
    for index in range(len(pictures)):
        mask = pictures.sample(index).mask
        cv2.imwrite(
            str(tmp_path / "masks" / f"{pictures.stem(index)}.png"),
            np.where(mask == 1, 128, 127).astype(np.uint8),
        )
    assert judged(segtrain, "--predictions", tmp_path / "masks", "--data", toy_coco)["figures"][
        "person_iou"
    ] == pytest.approx(1)


def test_a_soft_mask_that_hardly_sees_anything_is_no_mask_of_classes(
    segtrain: Command, toy_coco: Path, tmp_path: Path
) -> None:
    """Others tell what 1 means: here a 255th."""
    (tmp_path / "masks").mkdir()
    pictures = validation(toy_coco)
    for index in range(len(pictures)):
        mask = pictures.sample(index).mask
        soft = np.full_like(mask, 1) if index == 0 else np.where(mask == 1, 255, 0)
        cv2.imwrite(str(tmp_path / "masks" / f"{pictures.stem(index)}.png"), soft.astype(np.uint8))
    found = judged(segtrain, "--predictions", tmp_path / "masks", "--data", toy_coco)["images"]
    (_, fp), (_, tp) = found["confusion"][0]
    assert (fp, tp) == (0, 0)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("missing", "has no mask for 1 of"),
        ("32 bits", "neither of 8 nor of 16 bits"),
        ("small", "has 10x10 pixels"),
        ("damaged", "cannot decode"),
        ("twice", "are both masks of"),
    ],
)
def test_masks_that_cannot_be_judged_are_named(
    segtrain: Command, toy_coco: Path, trained_run: Path, tmp_path: Path, fault: str, says: str
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
    assert says in line
    assert first.stem in line


# --- Options and the document -------------------------------------------------------------------


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
def test_contradictions_are_usage_errors(segtrain: Command, options: tuple[str, ...]) -> None:
    Path("out").mkdir()
    done = segtrain("eval", *options)
    assert done.code == 2
    assert len(done.error_lines) == 1


def test_predictions_without_data_ask_for_it(segtrain: Command, tmp_path: Path) -> None:
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
def test_what_the_network_is_asked_is_written_down_and_makes_a_difference(
    segtrain: Command, trained_run: Path, options: tuple[str, ...]
) -> None:
    plain = judged(segtrain, "--checkpoint", trained_run)
    other = judged(segtrain, "--checkpoint", trained_run, *options)
    for option, value in zip(options[::2], options[1::2], strict=True):
        assert str(other[option[2:]]) == value
    assert other["images"]["confusion"] != plain["images"]["confusion"]
    assert other["manifest"] == plain["manifest"]


def test_report_and_label_check_are_written_once_and_change_no_figure(
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
    assert len(list(Path("out/pictures").iterdir())) == 5 * num_images
    assert {path.name for path in Path("out").iterdir()} == {
        *("index.html", "pictures", "label_check.png", "label_check.csv")
    }
    assert "report: out/index.html" in done.err

    again = segtrain(*command, *outputs)
    assert again.code == 2
    assert "--overwrite" in again.error_lines[0]
    assert Path("out/index.html").read_text(encoding="utf-8") == page
    assert segtrain(*command, *outputs, "--overwrite").code == 0
    assert Path("out/index.html").read_text(encoding="utf-8") == page


def test_a_label_check_alone_has_a_folder_beside_the_runs(
    segtrain: Command, trained_run: Path
) -> None:
    assert segtrain("eval", "--checkpoint", trained_run, "--label-check").code == 0
    [sheet] = Path("runs").glob("label-check-*/label_check.png")
    assert sheet.stat().st_size > 0


def test_metrics_of_training_have_the_names_of_the_document(
    segtrain: Command, toy_coco: Path
) -> None:
    segtrain("train", "--data", toy_coco, "--name", "x", "--epochs", "1", *TOY_TRAINING)
    row = json.loads(Path("runs/x/metrics.jsonl").read_text().splitlines()[-1])
    named = {key.removeprefix("val/"): row[key] for key in row if key.startswith("val/")}
    found = judged(segtrain, "--checkpoint", "runs/x")["figures"]
    assert {"person_iou", "precision", "recall"} < set(named) < set(FIGURES)
    assert {key: found[key] for key in named} == pytest.approx(named, abs=1e-6)


def test_the_schema_in_the_docs_is_that_of_the_program() -> None:
    written = (Path(__file__).parents[1] / "docs" / "eval.schema.json").read_text(encoding="utf-8")
    assert json.loads(written) == schema()
