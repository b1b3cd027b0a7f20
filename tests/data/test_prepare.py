"""`segtrain prepare`: written files, continued runs, and errors."""

import hashlib
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from helpers.coco import annotation_row, image_row, make_toy_coco, write_coco
from helpers.command import Command
from PIL import Image

from segtrain.config.schema import DataConfig
from segtrain.data import prepare
from segtrain.data.datasets import open_dataset, open_selection


def file_hashes(folder: Path) -> dict[str, str]:
    """Map every file to the hash of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def box(left: int, top: int, right: int, bottom: int) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]


def smooth_image(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Write two sizes, a crowd, an image without people, and an image in a subfolder."""
    root = tmp_path / "coco"
    rng = np.random.default_rng(0)
    for split, first in (("train", 1), ("val", 101)):
        images = [
            image_row(first, 60, 90),
            image_row(first + 1, 24, 30),
            image_row(first + 2, 80, 64, f"sub/{first + 2}.png"),
        ]
        annotations = [
            annotation_row(1, first, [box(10, 10, 50, 50)]),
            annotation_row(2, first, [box(60, 5, 85, 55)], iscrowd=1),
            annotation_row(3, first + 1, [box(3, 3, 20, 20)]),
        ]
        photos = {row["id"]: smooth_image(rng, row["height"], row["width"]) for row in images}
        write_coco(root, split, images, annotations, pixels=photos)
    return root


def test_the_result_is_a_folder_of_masks_with_the_same_people(
    coco: Path, tmp_path: Path, segtrain: Command
) -> None:
    before = file_hashes(coco)
    result = segtrain("prepare", coco, tmp_path / "out", "--short-side", "40")

    assert result.code == 0, result.err
    assert "3 train and 3 val images" in result.out
    assert file_hashes(coco) == before
    original = open_dataset(coco, "train")
    prepared = open_dataset(tmp_path / "out", "train")
    by_name = {prepared.name(index): index for index in range(len(prepared))}
    assert by_name.keys() == {original.name(index) for index in range(len(original))}
    for index in range(len(original)):
        prepared_index = by_name[original.name(index)]
        height, width = original.index.sizes[index]
        small = prepared.sample(prepared_index)
        assert min(small.image.shape[:2]) == min(40, height, width)
        expected = original.sample(index, 40 if min(height, width) > 40 else None)
        assert np.array_equal(small.mask, expected.mask)
        assert np.abs(small.image.astype(int) - expected.image).mean() < 4
        for name in ("identities", "num_people", "has_crowd"):
            actual, expected_rows = getattr(prepared.index, name), getattr(original.index, name)
            assert actual[prepared_index] == expected_rows[index], name


def test_masks_are_visible_in_an_image_viewer(
    coco: Path, tmp_path: Path, segtrain: Command
) -> None:
    segtrain("prepare", coco, tmp_path / "out")
    values = set()
    for path in (tmp_path / "out").rglob("masks/**/*.png"):
        with Image.open(path) as mask:
            assert mask.mode == "L"
            values |= set(np.unique(np.asarray(mask)).tolist())
    assert values == {0, 128, 255}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["mask_values"] == {"background": 0, "person": 255, "ignore": 128}
    assert len(manifest["images"]) == 6


def test_only_the_selected_images_are_prepared(
    coco: Path, tmp_path: Path, segtrain: Command
) -> None:
    result = segtrain("prepare", coco, tmp_path / "out", "--set", "data.crowd=drop")

    assert "2 train and 2 val" in result.out
    assert len(open_selection(DataConfig(root=str(tmp_path / "out")), "val")) == 2


def test_a_second_run_continues_and_repairs(coco: Path, tmp_path: Path, segtrain: Command) -> None:
    out = tmp_path / "out"
    segtrain("prepare", coco, out, "--short-side", "40")
    whole = file_hashes(out)
    images = sorted(out.rglob("*.jpg"))
    images[0].unlink()
    images[1].write_bytes(b"")  # as after a power cut
    (out / "manifest.json").rename(out / "manifest.unfinished.json")  # as if killed before the end

    result = segtrain("prepare", coco, out, "--short-side", "40")

    assert "4 of them from before" in result.out
    assert file_hashes(out) == whole


def test_a_stopped_run_can_be_continued(
    tmp_path: Path, segtrain: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_toy_coco(tmp_path / "toy", num_train=12, num_val=4)
    segtrain("prepare", root, tmp_path / "whole")
    written: list[Path] = []
    encode = prepare.encode_image

    def encode_and_stop(pixels: np.ndarray, path: Path, **options: int) -> bytes:
        written.append(path)
        if len(written) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(pixels, path, **options)

    monkeypatch.setattr(prepare, "encode_image", encode_and_stop)
    stopped = segtrain("prepare", root, tmp_path / "out", "--workers", "1")
    assert stopped.code == 143
    assert "stopped by SIGTERM" in stopped.err
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not list((tmp_path / "out").rglob(".*.tmp"))

    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    result = segtrain("prepare", root, tmp_path / "out")
    assert result.code == 0
    assert "of them from before" in result.out
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "whole")


@pytest.mark.parametrize(
    "other", [["--short-side", "48"], ["--set", "data.largest_only=true"]], ids=["size", "rules"]
)
def test_another_size_or_selection_needs_another_folder(
    coco: Path, tmp_path: Path, segtrain: Command, other: list[str]
) -> None:
    segtrain("prepare", coco, tmp_path / "out")
    before = file_hashes(tmp_path / "out")

    result = segtrain("prepare", coco, tmp_path / "out", *other)

    assert result.code == 2
    assert "name another folder" in result.error_lines[0]
    assert file_hashes(tmp_path / "out") == before


def test_a_folder_with_other_files_is_not_modified(
    coco: Path, tmp_path: Path, segtrain: Command
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")

    for target in (tmp_path / "other", coco / "prepared", tmp_path / "other" / "letter.txt"):
        result = segtrain("prepare", coco, target)
        assert result.code == 2, target
        assert len(result.error_lines) == 1
    assert file_hashes(tmp_path / "other").keys() == {"letter.txt"}
    assert not (coco / "prepared").exists()


def test_damaged_images_are_reported_and_too_many_are_an_error(
    tmp_path: Path, segtrain: Command
) -> None:
    root = make_toy_coco(tmp_path / "toy", num_train=8, num_val=4)
    paths = sorted((root / "train2017").iterdir())
    paths[2].write_bytes(paths[2].read_bytes()[:900])

    result = segtrain("prepare", root, tmp_path / "out")
    assert result.code == 0
    assert "7 train and 4 val" in result.out
    assert paths[2].name in result.err

    paths[3].write_bytes(b"no image")
    result = segtrain("prepare", root, tmp_path / "other")
    assert result.code == 3
    assert paths[3].name in result.error_lines[0] or paths[2].name in result.error_lines[0]


def test_eval_on_the_original_recognizes_images_of_a_prepared_training_set(
    tmp_path: Path, segtrain: Command
) -> None:
    from helpers.command import TOY_TRAINING

    root = make_toy_coco(tmp_path / "toy")
    segtrain("prepare", root, tmp_path / "out")
    trained = segtrain(
        "train", "--data", tmp_path / "out", "--name", "x", "--epochs", "1", *TOY_TRAINING
    )
    assert trained.code == 0, trained.err

    result = segtrain(
        *("eval", "--checkpoint", "runs/x", "--data", root, "--split", "train"),
        *("--workers", "0", "--json"),
    )
    assert result.code == 0, result.err
    assert json.loads(result.out)["num_trained_on"] == 8
    assert "8 of 8 images were trained on" in result.err

    result = segtrain("eval", "--checkpoint", "runs/x", "--data", root, "--workers", "0", "--json")
    assert json.loads(result.out)["num_trained_on"] == 0
    assert "trained on;" not in result.err
