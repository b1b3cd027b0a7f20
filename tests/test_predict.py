"""Which pictures are meant, where results go, and that nothing is overwritten."""

from pathlib import Path

import numpy as np
import pytest

from segtrain.errors import UsageError
from segtrain.images import write_image
from segtrain.prediction.jobs import plan_jobs

KINDS = ["mask", "cutout"]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three pictures in a folder with a sub-folder, and a text file that is none."""
    monkeypatch.chdir(tmp_path)
    picture = np.zeros((4, 4, 3), dtype=np.uint8)
    for name in ("photos/a.jpg", "photos/b.b.png", "photos/sub/a.jpg"):
        write_image(tmp_path / name, picture)
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    (tmp_path / "photos" / ".hidden.jpg").write_text("nor this")
    return tmp_path / "photos"


def outputs(inputs: list[str], *, overwrite: bool = False) -> dict[str, list[str]]:
    jobs = plan_jobs(inputs, Path("out"), KINDS, overwrite=overwrite)
    return {str(job.source): [str(path) for path in job.outputs.values()] for job in jobs}


def test_a_file_gives_a_mask_and_a_cutout(photos: Path) -> None:
    assert outputs(["photos/a.jpg"]) == {
        "photos/a.jpg": ["out/a_mask.png", "out/a_cutout.png"],
    }


def test_a_folder_is_searched_to_the_bottom_and_keeps_its_structure(photos: Path) -> None:
    assert outputs(["photos"]) == {
        "photos/a.jpg": ["out/a_mask.png", "out/a_cutout.png"],
        "photos/b.b.png": ["out/b.b_mask.png", "out/b.b_cutout.png"],
        "photos/sub/a.jpg": ["out/sub/a_mask.png", "out/sub/a_cutout.png"],
    }


@pytest.mark.parametrize("absolute", [False, True])
def test_a_glob_pattern_finds_files(photos: Path, absolute: bool) -> None:
    pattern = f"{photos}/*.jpg" if absolute else "photos/*.jpg"

    assert [Path(source).name for source in outputs([pattern])] == ["a.jpg"]


def test_the_same_picture_given_twice_is_done_once(photos: Path) -> None:
    assert len(outputs(["photos/a.jpg", "photos/*.jpg"])) == 1


def test_neighbours_with_one_stem_keep_their_extensions(photos: Path) -> None:
    write_image(photos / "a.png", np.zeros((4, 4, 3), dtype=np.uint8))

    assert outputs(["photos/a.jpg", "photos/a.png"]) == {
        "photos/a.jpg": ["out/a_jpg_mask.png", "out/a_jpg_cutout.png"],
        "photos/a.png": ["out/a_png_mask.png", "out/a_png_cutout.png"],
    }


def test_a_collision_from_two_folders_is_told_before_any_work(photos: Path) -> None:
    with pytest.raises(UsageError, match=r"would both become a_mask\.png"):
        outputs(["photos/a.jpg", "photos/sub/a.jpg"])


def test_an_existing_result_is_kept_unless_overwrite_is_given(photos: Path) -> None:
    Path("out").mkdir()
    Path("out/a_cutout.png").write_text("precious")

    with pytest.raises(UsageError, match="--overwrite"):
        outputs(["photos/a.jpg"])
    assert len(outputs(["photos/a.jpg"], overwrite=True)) == 1
    assert Path("out/a_cutout.png").read_text() == "precious"


def test_an_input_is_never_an_output_even_through_a_link(photos: Path) -> None:
    Path("out").mkdir()
    write_image(photos / "x_mask.png", np.zeros((4, 4, 3), dtype=np.uint8))
    write_image(photos / "x.jpg", np.zeros((4, 4, 3), dtype=np.uint8))
    Path("out/x_mask.png").symlink_to(photos / "x_mask.png")

    with pytest.raises(UsageError, match="is an input too"):
        outputs(["photos/x.jpg", "photos/x_mask.png"], overwrite=True)


@pytest.mark.parametrize("text", ["nope.jpg", "photos/*.gif", "empty"])
def test_an_input_that_matches_nothing_is_named(photos: Path, text: str) -> None:
    Path("empty").mkdir()

    with pytest.raises(UsageError, match=text.replace("*", r"\*")):
        outputs([text])
