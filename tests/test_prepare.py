"""`segtrain prepare`: what is written, what is kept, and what is refused."""

import hashlib
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from coco_fixtures import annotation_row, image_row, make_toy_coco, write_coco
from conftest import Command
from PIL import Image

from segtrain.config import DataConfig
from segtrain.data import open_dataset, open_pictures, prepare


def tree(folder: Path) -> dict[str, str]:
    """Every file and the hash of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def box(left: int, top: int, right: int, bottom: int) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]


def smooth_picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Two sizes, a crowd, a picture without people, a picture in a sub-folder."""
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
        pictures = {row["id"]: smooth_picture(rng, row["height"], row["width"]) for row in images}
        write_coco(root, split, images, annotations, pictures=pictures)
    return root


def test_the_result_is_a_folder_data_set_of_the_same_people(
    coco: Path, tmp_path: Path, segtrain: Command
) -> None:
    before = tree(coco)
    done = segtrain("prepare", coco, tmp_path / "out", "--short-side", "40")

    assert done.code == 0, done.err
    assert "3 train and 3 val pictures" in done.out
    assert tree(coco) == before
    original = open_dataset(coco, "train")
    prepared = open_dataset(tmp_path / "out", "train")
    by_stem = {prepared.stem(index): index for index in range(len(prepared))}
    assert by_stem.keys() == {original.stem(index) for index in range(len(original))}
    for index in range(len(original)):
        twin = by_stem[original.stem(index)]
        height, width = original.catalog.sizes[index]
        small = prepared.sample(twin)
        assert min(small.image.shape[:2]) == min(40, height, width)
        expected = original.sample(index, 40 if min(height, width) > 40 else None)
        assert np.array_equal(small.mask, expected.mask)
        assert np.abs(small.image.astype(int) - expected.image).mean() < 4
        for name in ("identities", "num_people", "has_crowd"):
            ours, theirs = getattr(prepared.catalog, name), getattr(original.catalog, name)
            assert ours[twin] == theirs[index], name


def test_masks_can_be_looked_at(coco: Path, tmp_path: Path, segtrain: Command) -> None:
    segtrain("prepare", coco, tmp_path / "out")
    values = set()
    for path in (tmp_path / "out").rglob("masks/**/*.png"):
        with Image.open(path) as mask:
            assert mask.mode == "L"
            values |= set(np.unique(np.asarray(mask)).tolist())
    assert values == {0, 128, 255}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["mask_values"] == {"background": 0, "person": 255, "ignore": 128}
    assert len(manifest["pictures"]) == 6


def test_a_selection_is_prepared_alone(coco: Path, tmp_path: Path, segtrain: Command) -> None:
    done = segtrain("prepare", coco, tmp_path / "out", "--set", "data.crowd=drop")

    assert "2 train and 2 val" in done.out
    assert len(open_pictures(DataConfig(root=str(tmp_path / "out")), "val")) == 2


def test_run_again_it_goes_on_and_mends(coco: Path, tmp_path: Path, segtrain: Command) -> None:
    out = tmp_path / "out"
    segtrain("prepare", coco, out, "--short-side", "40")
    whole = tree(out)
    pictures = sorted(out.rglob("*.jpg"))
    pictures[0].unlink()
    pictures[1].write_bytes(b"")  # as after a power cut
    (out / "manifest.json").rename(out / "manifest.unfinished.json")  # as if killed before the end

    done = segtrain("prepare", coco, out, "--short-side", "40")

    assert "4 of them from before" in done.out
    assert tree(out) == whole


def test_stopped_in_the_middle_it_can_go_on(
    tmp_path: Path, segtrain: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_toy_coco(tmp_path / "toy", num_train=12, num_val=4)
    segtrain("prepare", root, tmp_path / "whole")
    written: list[Path] = []
    encode = prepare.encode_image

    def encode_and_be_stopped(pixels: np.ndarray, path: Path, **options: int) -> bytes:
        written.append(path)
        if len(written) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(pixels, path, **options)

    monkeypatch.setattr(prepare, "encode_image", encode_and_be_stopped)
    stopped = segtrain("prepare", root, tmp_path / "out", "--workers", "1")
    assert stopped.code == 143
    assert "stopped by SIGTERM" in stopped.err
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not list((tmp_path / "out").rglob(".*.tmp"))

    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    done = segtrain("prepare", root, tmp_path / "out")
    assert done.code == 0
    assert "of them from before" in done.out
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize(
    "other", [["--short-side", "48"], ["--set", "data.largest_only=true"]], ids=["size", "rules"]
)
def test_another_size_or_selection_needs_another_folder(
    coco: Path, tmp_path: Path, segtrain: Command, other: list[str]
) -> None:
    segtrain("prepare", coco, tmp_path / "out")
    before = tree(tmp_path / "out")

    done = segtrain("prepare", coco, tmp_path / "out", *other)

    assert done.code == 2
    assert "name another folder" in done.error_lines[0]
    assert tree(tmp_path / "out") == before


def test_a_folder_with_other_things_is_left_alone(
    coco: Path, tmp_path: Path, segtrain: Command
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")

    for target in (tmp_path / "mine", coco / "prepared", tmp_path / "mine" / "letter.txt"):
        done = segtrain("prepare", coco, target)
        assert done.code == 2, target
        assert len(done.error_lines) == 1
    assert tree(tmp_path / "mine").keys() == {"letter.txt"}
    assert not (coco / "prepared").exists()


def test_damaged_pictures_are_named_and_too_many_end_it(tmp_path: Path, segtrain: Command) -> None:
    root = make_toy_coco(tmp_path / "toy", num_train=8, num_val=4)
    victims = sorted((root / "train2017").iterdir())
    victims[2].write_bytes(victims[2].read_bytes()[:900])

    done = segtrain("prepare", root, tmp_path / "out")
    assert done.code == 0
    assert "7 train and 4 val" in done.out
    assert victims[2].name in done.err

    victims[3].write_bytes(b"no picture")
    done = segtrain("prepare", root, tmp_path / "other")
    assert done.code == 3
    assert victims[3].name in done.error_lines[0] or victims[2].name in done.error_lines[0]


def test_training_from_it_and_judging_on_the_original_knows_the_pictures(
    tmp_path: Path, segtrain: Command
) -> None:
    from conftest import TOY_TRAINING

    root = make_toy_coco(tmp_path / "toy")
    segtrain("prepare", root, tmp_path / "out")
    trained = segtrain(
        "train", "--data", tmp_path / "out", "--name", "x", "--epochs", "1", *TOY_TRAINING
    )
    assert trained.code == 0, trained.err

    done = segtrain(
        *("eval", "--checkpoint", "runs/x", "--data", root, "--split", "train"),
        *("--workers", "0", "--json"),
    )
    assert done.code == 0, done.err
    assert json.loads(done.out)["num_trained_on"] == 8
    assert "8 of 8 pictures were trained on" in done.err

    done = segtrain("eval", "--checkpoint", "runs/x", "--data", root, "--workers", "0", "--json")
    assert json.loads(done.out)["num_trained_on"] == 0
    assert "trained on;" not in done.err
