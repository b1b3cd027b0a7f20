"""The choice of data sets, several at a time, and what runs remember of them."""

import json
from pathlib import Path

import numpy as np
import pytest
from coco_fixtures import make_toy_coco
from conftest import TOY_TRAINING, Command

from segtrain.checkpoint import load_checkpoint
from segtrain.config import DataConfig
from segtrain.data import describe_roots, kind_of, open_dataset, open_pictures
from segtrain.errors import DataError


@pytest.fixture(scope="module")
def two_roots(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    base = tmp_path_factory.mktemp("two")
    first = make_toy_coco(base / "first", num_train=8, num_val=4, size=(48, 64))
    second = make_toy_coco(base / "second", num_train=5, num_val=3, size=(56, 52))
    return str(first), str(second)


def test_several_roots_follow_one_another(two_roots: tuple[str, str]) -> None:
    together = open_pictures(DataConfig(root=two_roots), "train")
    parts = [open_dataset(Path(root), "train") for root in two_roots]

    assert together.lengths == [8, 5]
    assert len(together) == len(together.catalog) == 13
    for index in range(13):
        part, own = (parts[0], index) if index < 8 else (parts[1], index - 8)
        for short_side in (None, 20):
            expected, found = part.sample(own, short_side), together.sample(index, short_side)
            assert np.array_equal(found.image, expected.image)
            assert np.array_equal(found.mask, expected.mask)
        assert together.picture_path(index) == part.picture_path(own)
        assert together.stem(index) == part.stem(own)
        assert together.catalog.sizes[index].tolist() == part.catalog.sizes[own].tolist()
    with pytest.raises(IndexError):
        together.sample(13)


def test_a_selection_renumbers_the_pictures(two_roots: tuple[str, str]) -> None:
    config = DataConfig(root=two_roots, negatives=0.0)
    everything, people = (open_pictures(c, "train") for c in (DataConfig(root=two_roots), config))

    # The second picture of each toy set holds nobody.
    assert people.lengths == [7, 4]
    kept = [i for i in range(13) if i not in {1, 9}]
    assert [people.stem(i) for i in range(11)] == [everything.stem(i) for i in kept]
    assert all(people.sample(i).mask.any() for i in range(11))
    assert people.manifest != everything.manifest


def test_a_selection_of_nothing_says_what_to_widen(two_roots: tuple[str, str]) -> None:
    with pytest.raises(DataError, match=r"none of the 8 train pictures.*data\.person_area"):
        open_pictures(DataConfig(root=two_roots, person_area=(0.99, 1.0)), "train")


def test_kinds_are_named(two_roots: tuple[str, str], tmp_path: Path) -> None:
    assert describe_roots([Path(two_roots[0])]) == f"{two_roots[0]} (COCO)"
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="holds no data set"):
        kind_of(tmp_path / "bare")


def test_training_on_two_roots_with_weights(
    two_roots: tuple[str, str], segtrain: Command, tmp_path: Path
) -> None:
    done = segtrain(
        *("train", "--data", two_roots[0], "--data", two_roots[1], "--name", "x"),
        *("--set", "data.weights=[1,3]", "--epochs", "1", *TOY_TRAINING),
    )

    assert done.code == 0, done.err
    assert f"{two_roots[0]} (COCO), {two_roots[1]} (COCO)" in done.out
    assert "13 for training, 7 for validation" in done.out
    found = load_checkpoint(tmp_path / "runs" / "x" / "checkpoints" / "best.pt")
    sources = {
        split: open_pictures(DataConfig(root=two_roots), split) for split in ("train", "val")
    }
    assert found.config.data.root == two_roots
    assert found.data["train_manifest"] == sources["train"].manifest
    assert found.data["val_manifest"] == sources["val"].manifest
    identities = found.data["train_identities"].numpy().view(np.uint64)
    assert identities.tolist() == sources["train"].catalog.identities.tolist()


def test_weights_need_a_number_for_each_root(segtrain: Command, two_roots: tuple[str, str]) -> None:
    done = segtrain("train", "--data", two_roots[0], "--set", "data.weights=[1,2]")
    assert done.code == 2
    assert "data.weights" in done.error_lines[0]


def test_eval_goes_by_the_selection_of_the_run_unless_told(
    two_roots: tuple[str, str], segtrain: Command
) -> None:
    segtrain(
        *("train", "--data", two_roots[0], "--name", "x", "--epochs", "1"),
        *("--set", "data.negatives=0", *TOY_TRAINING),
    )
    evaluate = ("eval", "--checkpoint", "runs/x", "--workers", "0", "--json")

    as_trained = json.loads(segtrain(*evaluate).out)
    everything = json.loads(segtrain(*evaluate, "--set", "data.negatives=null").out)
    trained_on = segtrain(*evaluate, "--split", "train")

    assert (as_trained["num_images"], everything["num_images"]) == (3, 4)
    assert as_trained["manifest"] != everything["manifest"]
    assert as_trained["num_trained_on"] == 0
    assert json.loads(trained_on.out)["num_trained_on"] == 7
    assert "7 of 7 pictures were trained on" in trained_on.err


@pytest.mark.parametrize("key", ["optim.lr=1", "data.image_size=64", "data.root=x", "data.x=1"])
def test_eval_takes_no_other_settings(key: str, trained_run: Path, segtrain: Command) -> None:
    done = segtrain("eval", "--checkpoint", trained_run, "--set", key)
    assert done.code == 2
    assert "does not belong to eval" in done.error_lines[0]


def test_resuming_on_other_pictures_is_said(segtrain: Command, two_roots: tuple[str, str]) -> None:
    segtrain("train", "--data", two_roots[0], "--name", "x", "--epochs", "1", *TOY_TRAINING)
    same = segtrain("train", "--resume", "runs/x", "--epochs", "2")
    other = segtrain("train", "--resume", "runs/x", "--epochs", "3", "--data", two_roots[1])

    assert same.code == other.code == 0
    assert "are not those that the run began with" not in same.err
    assert "are not those that the run began with" in other.err
