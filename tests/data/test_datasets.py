"""Opening and selecting one or several datasets, and what runs store about them."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.coco import make_toy_coco
from helpers.command import TOY_TRAINING, Command

from segtrain.checkpoint import load_checkpoint
from segtrain.config.schema import DataConfig
from segtrain.data.datasets import dataset_kind, describe_roots, open_dataset, open_selection
from segtrain.errors import DataError


@pytest.fixture(scope="module")
def two_roots(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    base = tmp_path_factory.mktemp("two")
    first = make_toy_coco(base / "first", num_train=8, num_val=4, size=(48, 64))
    second = make_toy_coco(base / "second", num_train=5, num_val=3, size=(56, 52))
    return str(first), str(second)


def test_several_roots_are_concatenated(two_roots: tuple[str, str]) -> None:
    together = open_selection(DataConfig(root=two_roots), "train")
    parts = [open_dataset(Path(root), "train") for root in two_roots]

    assert together.lengths == [8, 5]
    assert len(together) == len(together.index) == 13
    for index in range(13):
        part, own = (parts[0], index) if index < 8 else (parts[1], index - 8)
        for short_side in (None, 20):
            expected, actual = part.sample(own, short_side), together.sample(index, short_side)
            assert np.array_equal(actual.image, expected.image)
            assert np.array_equal(actual.mask, expected.mask)
        assert together.image_path(index) == part.image_path(own)
        assert together.name(index) == part.name(own)
        assert together.index.sizes[index].tolist() == part.index.sizes[own].tolist()
    with pytest.raises(IndexError):
        together.sample(13)


def test_a_selection_renumbers_the_images(two_roots: tuple[str, str]) -> None:
    config = DataConfig(root=two_roots, negatives=0.0)
    all_images, people = (open_selection(c, "train") for c in (DataConfig(root=two_roots), config))

    # The second image of each toy dataset has no people.
    assert people.lengths == [7, 4]
    kept = [i for i in range(13) if i not in {1, 9}]
    assert [people.name(i) for i in range(11)] == [all_images.name(i) for i in kept]
    assert all(people.sample(i).mask.any() for i in range(11))
    assert people.manifest != all_images.manifest


def test_the_error_of_an_empty_selection_names_the_keys_to_widen(
    two_roots: tuple[str, str],
) -> None:
    with pytest.raises(DataError, match=r"none of the 8 train images.*data\.person_area"):
        open_selection(DataConfig(root=two_roots, person_area=(0.99, 1.0)), "train")


def test_roots_are_described_with_their_kind(two_roots: tuple[str, str], tmp_path: Path) -> None:
    assert describe_roots([Path(two_roots[0])]) == f"{two_roots[0]} (COCO)"
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="unknown dataset layout"):
        dataset_kind(tmp_path / "bare")


def test_training_on_two_roots_with_weights(
    two_roots: tuple[str, str], segtrain: Command, tmp_path: Path
) -> None:
    result = segtrain(
        *("train", "--data", two_roots[0], "--data", two_roots[1], "--name", "x"),
        *("--set", "data.weights=[1,3]", "--epochs", "1", *TOY_TRAINING),
    )

    assert result.code == 0, result.err
    assert f"{two_roots[0]} (COCO), {two_roots[1]} (COCO)" in result.out
    assert "13 for training, 7 for validation" in result.out
    checkpoint = load_checkpoint(tmp_path / "runs" / "x" / "checkpoints" / "best.pt")
    selections = {
        split: open_selection(DataConfig(root=two_roots), split) for split in ("train", "val")
    }
    assert checkpoint.config.data.root == two_roots
    assert checkpoint.data["train_manifest"] == selections["train"].manifest
    assert checkpoint.data["val_manifest"] == selections["val"].manifest
    identities = checkpoint.data["train_identities"].numpy().view(np.uint64)
    assert identities.tolist() == selections["train"].index.identities.tolist()


def test_weights_must_match_the_number_of_roots(
    segtrain: Command, two_roots: tuple[str, str]
) -> None:
    result = segtrain("train", "--data", two_roots[0], "--set", "data.weights=[1,2]")
    assert result.code == 2
    assert "data.weights" in result.error_lines[0]


def test_eval_uses_the_selection_of_the_run_by_default(
    two_roots: tuple[str, str], segtrain: Command
) -> None:
    segtrain(
        *("train", "--data", two_roots[0], "--name", "x", "--epochs", "1"),
        *("--set", "data.negatives=0", *TOY_TRAINING),
    )
    evaluate = ("eval", "--checkpoint", "runs/x", "--workers", "0", "--json")

    as_trained = json.loads(segtrain(*evaluate).out)
    all_images = json.loads(segtrain(*evaluate, "--set", "data.negatives=null").out)
    trained_on = segtrain(*evaluate, "--split", "train")

    assert (as_trained["num_images"], all_images["num_images"]) == (3, 4)
    assert as_trained["manifest"] != all_images["manifest"]
    assert as_trained["num_trained_on"] == 0
    assert json.loads(trained_on.out)["num_trained_on"] == 7
    assert "7 of 7 images were trained on" in trained_on.err


@pytest.mark.parametrize("key", ["optim.lr=1", "data.image_size=64", "data.root=x", "data.x=1"])
def test_eval_rejects_other_settings(key: str, trained_run: Path, segtrain: Command) -> None:
    result = segtrain("eval", "--checkpoint", trained_run, "--set", key)
    assert result.code == 2
    assert "does not belong to eval" in result.error_lines[0]


def test_resuming_on_other_images_is_a_warning(
    segtrain: Command, two_roots: tuple[str, str]
) -> None:
    segtrain("train", "--data", two_roots[0], "--name", "x", "--epochs", "1", *TOY_TRAINING)
    same = segtrain("train", "--resume", "runs/x", "--epochs", "2")
    other = segtrain("train", "--resume", "runs/x", "--epochs", "3", "--data", two_roots[1])

    assert same.code == other.code == 0
    assert "training images have changed since the run started" not in same.err
    assert "training images have changed since the run started" in other.err
