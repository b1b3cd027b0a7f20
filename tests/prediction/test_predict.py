"""Inputs, outputs, overwrite protection and the predict command."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.command import Command
from PIL import Image

import segtrain as segtrain_package
from segtrain.errors import UsageError
from segtrain.imaging.images import read_image, write_image
from segtrain.prediction.jobs import find_inputs, parse_tile, plan_jobs, select_kinds
from segtrain.runtime import files
from segtrain.types import Image as ImageArray
from segtrain.types import Probs

PACKAGE_PARENT = Path(segtrain_package.__file__).parents[1]
KINDS = ["mask", "cutout"]
USAGE, DATA, RESOURCE = 2, 3, 5


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three images, one in a subfolder, a text file and a hidden file."""
    monkeypatch.chdir(tmp_path)
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    for name in ("photos/a.jpg", "photos/b.b.png", "photos/sub/a.jpg"):
        write_image(tmp_path / name, image)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    (tmp_path / "photos" / ".hidden.jpg").write_text("nor this")
    return tmp_path / "photos"


def planned_outputs(inputs: list[str], *, overwrite: bool = False) -> dict[str, list[str]]:
    jobs = plan_jobs(inputs, Path("out"), KINDS, overwrite=overwrite)
    return {str(job.source): [str(path) for path in job.outputs.values()] for job in jobs}


def test_a_file_gives_a_mask_and_a_cutout(photos: Path) -> None:
    assert planned_outputs(["photos/a.jpg"]) == {
        "photos/a.jpg": ["out/a_mask.png", "out/a_cutout.png"],
    }


def test_a_folder_is_searched_recursively_and_keeps_its_structure(photos: Path) -> None:
    assert planned_outputs(["photos"]) == {
        "photos/a.jpg": ["out/a_mask.png", "out/a_cutout.png"],
        "photos/b.b.png": ["out/b.b_mask.png", "out/b.b_cutout.png"],
        "photos/sub/a.jpg": ["out/sub/a_mask.png", "out/sub/a_cutout.png"],
    }


@pytest.mark.parametrize("absolute", [False, True])
def test_a_glob_pattern_finds_files(photos: Path, absolute: bool) -> None:
    pattern = f"{photos}/*.jpg" if absolute else "photos/*.jpg"

    assert [Path(source).name for source in planned_outputs([pattern])] == ["a.jpg"]


def test_an_image_given_twice_is_processed_once(photos: Path) -> None:
    assert len(planned_outputs(["photos/a.jpg", "photos/*.jpg"])) == 1


def test_images_with_the_same_stem_get_their_suffix_in_the_name(photos: Path) -> None:
    write_image(photos / "a.png", np.zeros((4, 4, 3), dtype=np.uint8))

    assert planned_outputs(["photos/a.jpg", "photos/a.png"]) == {
        "photos/a.jpg": ["out/a_jpg_mask.png", "out/a_jpg_cutout.png"],
        "photos/a.png": ["out/a_png_mask.png", "out/a_png_cutout.png"],
    }


def test_a_collision_between_two_folders_is_a_usage_error(photos: Path) -> None:
    with pytest.raises(UsageError, match=r"would both be written to a_mask\.png"):
        planned_outputs(["photos/a.jpg", "photos/sub/a.jpg"])


def test_an_existing_output_needs_overwrite(photos: Path) -> None:
    Path("out").mkdir()
    Path("out/a_cutout.png").write_text("precious")

    with pytest.raises(UsageError, match="--overwrite"):
        planned_outputs(["photos/a.jpg"])
    assert len(planned_outputs(["photos/a.jpg"], overwrite=True)) == 1
    assert Path("out/a_cutout.png").read_text() == "precious"


def test_an_input_is_never_overwritten_even_through_a_link(photos: Path) -> None:
    Path("out").mkdir()
    write_image(photos / "x_mask.png", np.zeros((4, 4, 3), dtype=np.uint8))
    write_image(photos / "x.jpg", np.zeros((4, 4, 3), dtype=np.uint8))
    Path("out/x_mask.png").symlink_to(photos / "x_mask.png")

    with pytest.raises(UsageError, match="is also an input"):
        planned_outputs(["photos/x.jpg", "photos/x_mask.png"], overwrite=True)


@pytest.mark.parametrize("argument", ["nope.jpg", "photos/*.gif", "empty"])
def test_an_argument_without_a_match_is_a_usage_error(photos: Path, argument: str) -> None:
    Path("empty").mkdir()

    with pytest.raises(UsageError, match=argument.replace("*", r"\*")):
        planned_outputs([argument])


@pytest.mark.parametrize("link_to", ["nowhere.png", "precious.png"])
def test_a_link_in_place_of_an_output_needs_overwrite(photos: Path, link_to: str) -> None:
    Path("out").mkdir()
    Path("out/precious.png").write_text("precious")
    Path("out/a_mask.png").symlink_to(link_to)

    with pytest.raises(UsageError, match="--overwrite"):
        planned_outputs(["photos/a.jpg"])


def test_two_paths_of_one_folder_collide(photos: Path) -> None:
    """out/two links to out/one, so a_mask.png in both is one file."""
    for name in ("one", "two"):
        write_image(Path("in") / name / "a.jpg", np.zeros((4, 4, 3), dtype=np.uint8))
    Path("out/one").mkdir(parents=True)
    Path("out/two").symlink_to("one")

    with pytest.raises(UsageError, match=r"would both be written to a_mask\.png"):
        planned_outputs(["in"])


def test_outputs_inside_the_input_folder_are_not_inputs_of_the_next_run(photos: Path) -> None:
    write_image(photos / "out" / "a_mask.png", np.zeros((4, 4), dtype=np.uint8))

    def found(exclude: str) -> list[str]:
        return [str(each.path) for each in find_inputs(["photos"], Path(exclude))]

    assert found("photos/out") == ["photos/a.jpg", "photos/b.b.png", "photos/sub/a.jpg"]
    assert "photos/out/a_mask.png" in found("photos")
    assert "photos/out/a_mask.png" in found("elsewhere")


def test_videos_must_be_named_and_stay_videos(photos: Path) -> None:
    (photos / "clip.MP4").write_text("video")

    assert str(photos / "clip.MP4") not in planned_outputs([str(photos)])
    [job] = plan_jobs(["photos/clip.MP4"], Path("out"), KINDS)
    assert job.is_video
    assert job.files == [Path("out/clip_background.mp4")]
    [job] = plan_jobs(["photos/clip.MP4"], Path("out"), KINDS, background="transparent")
    assert job.files == [Path("out/clip_cutout.webm")]
    [job] = plan_jobs(["photos/clip.MP4"], Path("new.mp4"), KINDS[:1])
    assert job.files == [Path("new.mp4")]
    for name, background in [("x.mov", "blur"), ("x.MP4", "blur"), ("x.mp4", "transparent")]:
        with pytest.raises(UsageError, match="cannot hold this video"):
            plan_jobs(["photos/clip.MP4"], Path(name), KINDS[:1], background=background)


# ---------------------------------------------------------------- single file and standard output


@pytest.mark.parametrize(
    ("save", "background", "panel", "output", "kinds"),
    [
        (None, None, False, "out", ["mask", "cutout"]),
        (None, "blur", False, "out", ["mask", "cutout", "background"]),
        (None, None, True, "out", ["mask", "cutout", "panel"]),
        ("panel, mask,mask", None, True, "out", ["panel", "mask"]),
        (None, None, False, "x.png", ["cutout"]),
        (None, None, False, "-", ["cutout"]),
        (None, "blur", False, "x.jpg", ["background"]),
        (None, "blur", True, "x.jpg", ["panel"]),
        ("mask", None, False, "-", ["mask"]),
    ],
)
def test_selected_kinds(
    save: str | None, background: str | None, panel: bool, output: str, kinds: list[str]
) -> None:
    assert select_kinds(save, background, Path(output), panel=panel) == kinds


@pytest.mark.parametrize(
    ("save", "background", "output", "message"),
    [
        ("masks", None, "out", "'masks'"),
        (",", None, "out", "','"),
        ("mask", "blur", "out", "background or panel"),
        ("mask,cutout", None, "x.png", "mask and cutout"),
        ("mask,cutout", None, "-", "mask and cutout"),
    ],
)
def test_inconsistent_outputs_are_rejected(
    save: str, background: str | None, output: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        select_kinds(save, background, Path(output))


def test_one_image_is_written_to_the_given_file(photos: Path) -> None:
    for name in ("x.png", "x.PNG", "new/x.png"):
        [job] = plan_jobs(["photos/a.jpg"], Path(name), ["cutout"])
        assert job.outputs == {"cutout": Path(name)}
    [job] = plan_jobs(["photos/a.jpg"], Path("x.jpeg"), ["background"])
    assert job.outputs == {"background": Path("x.jpeg")}
    with pytest.raises(UsageError, match="JPEG cannot store a background"):
        plan_jobs(["photos/a.jpg"], Path("x.jpg"), ["background"], background="transparent")


def test_a_folder_may_be_named_like_an_image(photos: Path) -> None:
    Path("x.png").mkdir()
    [job] = plan_jobs(["photos/a.jpg"], Path("x.png"), ["mask"])
    assert job.files == [Path("x.png/a_mask.png")]


@pytest.mark.parametrize(
    ("inputs", "output", "kind", "message"),
    [
        (["photos"], "x.png", "mask", "3 inputs"),
        (["photos"], "-", "mask", "3 inputs"),
        (["photos/a.jpg"], "x.jpg", "mask", "JPEG cannot store a mask"),
        (["photos/a.jpg"], "x.jpg", "cutout", "JPEG cannot store a cutout"),
        (["photos/a.jpg"], "x.webp", "mask", r"\.png or \.jpg"),
        (["photos/a.jpg"], "photos/b.b.png", "mask", "exists"),
        (["photos/a.jpg"], "photos/notes.txt", "mask", "is a file"),
        (["photos/clip.mp4"], "x.png", "mask", "x.mp4"),
    ],
)
def test_a_file_that_cannot_hold_the_outputs_is_rejected(
    photos: Path, inputs: list[str], output: str, kind: str, message: str
) -> None:
    (photos / "clip.mp4").write_text("video")
    with pytest.raises(UsageError, match=message):
        plan_jobs(inputs, Path(output), [kind])


def test_the_jsonl_file_is_checked_like_the_other_outputs(photos: Path) -> None:
    def plan(jsonl: str, output: str = "out") -> object:
        return plan_jobs(["photos/a.jpg"], Path(output), ["mask"], jsonl=Path(jsonl))

    assert plan("new.jsonl")
    for jsonl in ("photos/a.jpg", "photos/notes.txt", "out/a_mask.png", "photos"):
        with pytest.raises(UsageError):
            plan(jsonl)
    assert plan("-")
    with pytest.raises(UsageError, match="--jsonl"):
        plan("-", output="-")


def test_tile_values() -> None:
    assert [parse_tile(text) for text in ("auto", "off", "512")] == ["auto", None, 512]
    for text in ("on", "-5", "1.5", ""):
        with pytest.raises(UsageError, match="--tile"):
            parse_tile(text)


# ------------------------------------------------------------------------------------ the command


def write_photo(path: Path, seed: int = 0, size: tuple[int, int] = (30, 40)) -> Path:
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    write_image(path, noise)
    return path


class FakeStdin:
    """Standard input as a pipe from another program."""

    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)

    def isatty(self) -> bool:
        return False


def decode(content: bytes) -> ImageArray:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image)


def run_in_process(
    *arguments: str | Path, **options: object
) -> "subprocess.CompletedProcess[bytes]":
    """Run the command in its own process, where standard output is bytes."""
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [sys.executable, "-m", "segtrain", *arguments],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(PACKAGE_PARENT)},
        **options,
    )


def test_an_image_from_a_pipe_gives_the_same_output_as_from_a_file(
    segtrain: Command, trained_run: Path, tmp_path: Path
) -> None:
    path = write_photo(tmp_path / "a.png")
    assert segtrain("predict", path, "-o", "x.png", "--checkpoint", trained_run).code == 0

    piped = run_in_process(
        *("predict", "-", "-o", "-", "--save", "cutout", "--checkpoint", trained_run),
        input=path.read_bytes(),
    )

    assert piped.returncode == 0, piped.stderr
    assert piped.stdout == (tmp_path / "x.png").read_bytes()
    assert decode(piped.stdout).shape == (30, 40, 4)
    assert b"checkpoint" in piped.stderr


def test_a_closed_pipe_ends_the_command_quietly(trained_run: Path, tmp_path: Path) -> None:
    """The image is larger than the pipe buffer, and the reader has closed the pipe."""
    path = write_photo(tmp_path / "a.png", size=(400, 400))
    reading, writing = os.pipe()
    os.close(reading)
    command = ["predict", str(path), "-o", "-", "--checkpoint", str(trained_run)]
    process = subprocess.run(
        [sys.executable, "-m", "segtrain", *command],
        stdout=writing,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(PACKAGE_PARENT)},
    )
    os.close(writing)

    assert process.returncode == 128 + signal.SIGPIPE
    assert [
        line for line in process.stderr.splitlines() if not line.startswith(b"checkpoint")
    ] == []


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "stdin"), (b"no image", "stdin"), (b"x" * 101, "more than")]
)
def test_invalid_standard_input_is_a_data_error(
    segtrain: Command,
    trained_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    message: str,
) -> None:
    monkeypatch.setattr("segtrain.prediction.run._MAX_STDIN_BYTES", 100)
    monkeypatch.setattr(sys, "stdin", FakeStdin(content))

    result = segtrain("predict", "-", "--checkpoint", trained_run)

    assert result.code == DATA
    assert message in result.error_lines[0]


def test_reading_an_image_from_a_terminal_is_a_usage_error(
    segtrain: Command, trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    assert segtrain("predict", "-", "--checkpoint", trained_run).code == USAGE


@pytest.fixture
def fake_describe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace `describe` by one that is fast and constant."""
    fake = SimpleNamespace(describe=lambda result: {"person_fraction": 0.25, "num_components": 3})
    monkeypatch.setitem(sys.modules, "segtrain.prediction.describe", fake)


@pytest.mark.usefixtures("fake_describe")
def test_json_lines_are_in_input_order(
    segtrain: Command, trained_run: Path, tmp_path: Path
) -> None:
    for number in range(6):
        write_photo(tmp_path / "in" / f"{number}.png", number)
    (tmp_path / "in" / "3.png").write_text("damaged")

    result = segtrain(
        "predict", "in", "--checkpoint", trained_run, "--jsonl", "-", "--save", "mask"
    )

    assert result.code == DATA
    records = [json.loads(line) for line in result.out.splitlines()]
    assert [record["image"] for record in records] == [f"in/{number}.png" for number in range(6)]
    assert "3.png" in records[3].pop("error")
    assert records[3] == {"image": "in/3.png"}
    assert records[0].pop("seconds") > 0
    assert records[0] == {
        "image": "in/0.png",
        "width": 40,
        "height": 30,
        "outputs": {"mask": "predictions/0_mask.png"},
        "person_fraction": 0.25,
        "num_components": 3,
    }


@pytest.mark.usefixtures("fake_describe")
def test_json_lines_are_written_to_a_file_that_is_not_overwritten(
    segtrain: Command, trained_run: Path, tmp_path: Path
) -> None:
    command = ("predict", write_photo(tmp_path / "a.png"), "--checkpoint", trained_run)

    assert segtrain(*command, "--jsonl", "new/all.jsonl").code == 0
    assert len(Path("new/all.jsonl").read_text().splitlines()) == 1
    assert segtrain(*command, "-o", "other", "--jsonl", "new/all.jsonl").code == USAGE
    assert not Path("other").exists()


def test_the_first_frame_of_an_animation_is_used_and_reported(
    segtrain: Command, trained_run: Path, tmp_path: Path
) -> None:
    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    command = ("predict", "a.gif", "--checkpoint", trained_run, "--save", "panel")

    result = segtrain(*command)

    assert result.code == 0
    assert "a.gif is animated; its first frame is taken" in result.err
    panel = read_image(tmp_path / "predictions" / "a_panel.jpg")
    assert np.abs(panel[:, :40].astype(int) - (255, 0, 0)).mean() < 5


# Unusual files and how to create them: usable ones, and unusable ones.
GOOD = {
    "photo.jpg": lambda path: scene((4000, 6000)).save(path),
    "deep.png": lambda path: Image.fromarray(np.full((40, 50), 30_000, np.uint16)).save(path),
    "ink.jpg": lambda path: scene().convert("CMYK").save(path),
    "palette.png": lambda path: scene().quantize(8).save(path),
    "moving.gif": lambda path: scene().save(path, save_all=True, append_images=[scene((40, 51))]),
    "really_png.jpg": lambda path: scene().save(path, format="PNG"),
}
BAD = {
    "truncated.jpg": lambda path: path.write_bytes(jpeg_bytes(scene())[:-300]),
    "bomb.png": lambda path: Image.new("1", (10_001, 10_000)).save(path),
    "empty.jpg": lambda path: path.touch(),
    "words.webp": lambda path: path.write_text("no image"),
}


def scene(size: tuple[int, int] = (40, 50)) -> Image.Image:
    rows, columns = np.indices(size)
    return Image.fromarray(np.stack([rows, columns, rows + columns], axis=-1).astype(np.uint8))


def jpeg_bytes(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=95)
    return file.getvalue()


PREDICT_AND_MEASURE = """
import sys
from pathlib import Path
from segtrain.cli.main import run
code = run(sys.argv[1:])
# Not ru_maxrss, which starts at the peak of the parent process.
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
sys.exit(code)
"""


@pytest.mark.slow
def test_a_folder_of_unusual_files_needs_less_than_a_gigabyte(
    trained_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "in" / "folder.jpg").mkdir(parents=True)
    for name, create in (GOOD | BAD).items():
        create(tmp_path / "in" / name)
    command = ["predict", "in", "--save", "mask,cutout", "--checkpoint", str(trained_run)]

    process = subprocess.run(
        [sys.executable, "-c", PREDICT_AND_MEASURE, *command],
        capture_output=True,
        text=True,
        check=False,
    )

    assert process.returncode == 3, process.stderr
    skipped = [line for line in process.stderr.splitlines() if line.startswith("skipped: ")]
    assert len(skipped) == len(BAD)
    assert all(any(name in line for line in skipped) for name in BAD)
    written = sorted(path.name for path in Path("predictions").iterdir())
    kinds = ("cutout", "mask")
    assert written == sorted(f"{Path(name).stem}_{kind}.png" for name in GOOD for kind in kinds)
    assert int(process.stdout.split()[-1]) * 1024 < 10**9


def test_refining_precedes_cleaning(
    segtrain: Command, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here refining makes everything person, and cleaning removes the left half."""

    def clean(probs: Probs) -> Probs:
        columns = np.arange(probs.shape[1]) >= probs.shape[1] // 2
        return probs * columns.astype(np.float32)

    def refine(image: object, probs: Probs) -> Probs:
        return np.ones_like(probs)

    monkeypatch.setattr("segtrain.prediction.postprocess.refine_probs", refine)
    monkeypatch.setattr("segtrain.prediction.postprocess.remove_small_components", clean)
    command = (
        "predict",
        write_photo(tmp_path / "a.png"),
        "--checkpoint",
        trained_run,
        "--save",
        "mask",
    )

    assert segtrain(*command, "--refine", "--clean", "-o", "x.png").code == 0
    mask = decode(Path("x.png").read_bytes())
    assert (mask[:, :20] == 0).all()
    assert (mask[:, 20:] == 255).all()


def test_videos_are_processed_after_images(
    segtrain: Command, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clip.mov").write_text("video")
    calls = []

    def predict_video(source: Path, target: Path, backend: object, **options: object) -> object:
        assert Path("out/a_mask.png").exists()
        calls.append((source, target, options["overwrite"]))
        return SimpleNamespace(person_fraction=0.0)

    video = SimpleNamespace(predict_video=predict_video)
    monkeypatch.setitem(sys.modules, "segtrain.prediction.video", video)
    command = ("predict", "clip.mov", write_photo(tmp_path / "a.png"), "--checkpoint", trained_run)

    result = segtrain(*command, "-o", "out", "--background", "#00ff00")
    assert result.code == 0
    assert "no person found in clip.mov" in result.err
    assert result.out == "2 of 2 files done, results in out\n"
    assert calls == [(Path("clip.mov"), Path("out/clip_background.mp4"), False)]


@pytest.mark.parametrize(
    "option",
    [("--save", "mask"), ("--refine",), ("--clean",), ("--jsonl", "x.jsonl")],
    ids=" ".join,
)
def test_image_options_are_rejected_for_videos(
    segtrain: Command, tmp_path: Path, option: tuple[str, ...]
) -> None:
    (tmp_path / "clip.mov").write_text("video")
    result = segtrain("predict", "clip.mov", *option)
    assert result.code == 2
    assert "are for images" in result.error_lines[0]


@pytest.mark.parametrize("tile", ["100", "33", "96"])
def test_an_invalid_tile_side_is_rejected_before_any_work(segtrain: Command, tile: str) -> None:
    result = segtrain("predict", "nowhere.jpg", "--tile", tile)
    assert result.code == 2
    assert "multiple of 32" in result.error_lines[0]


def test_a_full_disk_leaves_only_complete_files(
    segtrain: Command, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(8):
        write_photo(tmp_path / "in" / f"{number}.png", number)
    real_fsync, num_synced = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal num_synced
        num_synced += 1
        if num_synced > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    result = segtrain("predict", "in", "--save", "mask", "--checkpoint", trained_run)

    assert result.code == RESOURCE
    assert "No space left" in result.error_lines[0]
    written = sorted((tmp_path / "predictions").iterdir())
    assert len(written) == 3
    assert all(read_image(path).shape == (30, 40, 3) for path in written)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_complete_images_and_reports_their_number(
    segtrain: Command,
    trained_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
) -> None:
    for index in range(30):
        write_photo(tmp_path / "in" / f"{index:02}.png", index)
    write, num_written = files.write_bytes, 0

    def write_and_signal(path: Path, content: bytes) -> None:
        nonlocal num_written
        num_written += 1
        if num_written == 5:
            os.kill(os.getpid(), number)
        write(path, content)

    monkeypatch.setattr("segtrain.prediction.postprocess.write_bytes", write_and_signal)
    result = segtrain("predict", "in", "--checkpoint", trained_run)

    assert result.code == code
    names = [path.name for path in (tmp_path / "predictions").iterdir()]
    masks = {name.split("_")[0] for name in names if name.endswith("_mask.png")}
    cutouts = {name.split("_")[0] for name in names if name.endswith("_cutout.png")}
    assert masks == cutouts
    assert 2 <= len(masks) < 30
    assert len(names) == 2 * len(masks)
    assert f"{len(masks)} of 30 images are done" in result.err
