"""Which pictures are meant, where results go, that nothing is overwritten; and predict as typed."""

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
import numpy.typing as npt
import pytest
from conftest import Command
from PIL import Image

from segtrain import files as segtrain_files
from segtrain.errors import UsageError
from segtrain.images import read_image, write_image
from segtrain.prediction.inputs import find_inputs
from segtrain.prediction.jobs import plan_jobs, tile_of, wanted_kinds

KINDS = ["mask", "cutout"]
USAGE, DATA, RESOURCE = 2, 3, 5


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


@pytest.mark.parametrize("link_to", ["nowhere.png", "precious.png"])
def test_a_link_in_the_place_of_a_result_counts_as_one(photos: Path, link_to: str) -> None:
    Path("out").mkdir()
    Path("out/precious.png").write_text("precious")
    Path("out/a_mask.png").symlink_to(link_to)

    with pytest.raises(UsageError, match="--overwrite"):
        outputs(["photos/a.jpg"])


def test_two_names_of_one_folder_collide_too(photos: Path) -> None:
    """out/one and out/two are one folder; a_mask.png in both is one file."""
    for name in ("one", "two"):
        write_image(Path("in") / name / "a.jpg", np.zeros((4, 4, 3), dtype=np.uint8))
    Path("out/one").mkdir(parents=True)
    Path("out/two").symlink_to("one")

    with pytest.raises(UsageError, match=r"would both become a_mask\.png"):
        outputs(["in"])


def test_results_below_the_inputs_are_no_inputs_of_the_next_run(photos: Path) -> None:
    write_image(photos / "out" / "a_mask.png", np.zeros((4, 4), dtype=np.uint8))

    def names(leave_out: str) -> list[str]:
        return [str(found.path) for found in find_inputs(["photos"], Path(leave_out))]

    assert names("photos/out") == ["photos/a.jpg", "photos/b.b.png", "photos/sub/a.jpg"]
    assert "photos/out/a_mask.png" in names("photos")
    assert "photos/out/a_mask.png" in names("elsewhere")


def test_videos_are_named_one_by_one_and_kept_as_such(photos: Path) -> None:
    (photos / "clip.MP4").write_text("moving")

    assert str(photos / "clip.MP4") not in outputs([str(photos)])
    [job] = plan_jobs(["photos/clip.MP4"], Path("out"), KINDS)
    assert job.is_video
    assert job.files == [Path("out/clip_background.mp4")]
    [job] = plan_jobs(["photos/clip.MP4"], Path("out"), KINDS, background="transparent")
    assert job.files == [Path("out/clip_cutout.webm")]
    [job] = plan_jobs(["photos/clip.MP4"], Path("new.mp4"), KINDS[:1])
    assert job.files == [Path("new.mp4")]
    for name, background in [("x.mov", "blur"), ("x.MP4", "blur"), ("x.mp4", "transparent")]:
        with pytest.raises(UsageError, match="cannot hold that video"):
            plan_jobs(["photos/clip.MP4"], Path(name), KINDS[:1], background=background)


# ----------------------------------------------------------------- one file, and standard output


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
def test_which_outputs_are_meant(
    save: str | None, background: str | None, panel: bool, output: str, kinds: list[str]
) -> None:
    assert wanted_kinds(save, background, Path(output), panel=panel) == kinds


@pytest.mark.parametrize(
    ("save", "background", "output", "said"),
    [
        ("masks", None, "out", "'masks'"),
        (",", None, "out", "','"),
        ("mask", "blur", "out", "background or panel"),
        ("mask,cutout", None, "x.png", "mask and cutout"),
        ("mask,cutout", None, "-", "mask and cutout"),
    ],
)
def test_outputs_that_make_no_sense_are_refused(
    save: str, background: str | None, output: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        wanted_kinds(save, background, Path(output))


def test_one_picture_goes_into_exactly_the_file_named(photos: Path) -> None:
    for name in ("x.png", "x.PNG", "new/x.png"):
        [job] = plan_jobs(["photos/a.jpg"], Path(name), ["cutout"])
        assert job.outputs == {"cutout": Path(name)}
    [job] = plan_jobs(["photos/a.jpg"], Path("x.jpeg"), ["background"])
    assert job.outputs == {"background": Path("x.jpeg")}
    with pytest.raises(UsageError, match="spoil"):
        plan_jobs(["photos/a.jpg"], Path("x.jpg"), ["background"], background="transparent")


def test_a_folder_may_be_called_like_a_picture(photos: Path) -> None:
    Path("x.png").mkdir()
    [job] = plan_jobs(["photos/a.jpg"], Path("x.png"), ["mask"])
    assert job.files == [Path("x.png/a_mask.png")]


@pytest.mark.parametrize(
    ("inputs", "output", "kind", "said"),
    [
        (["photos"], "x.png", "mask", "3 inputs"),
        (["photos"], "-", "mask", "3 inputs"),
        (["photos/a.jpg"], "x.jpg", "mask", "spoil a mask"),
        (["photos/a.jpg"], "x.jpg", "cutout", "spoil a cutout"),
        (["photos/a.jpg"], "x.webp", "mask", r"\.png or \.jpg"),
        (["photos/a.jpg"], "photos/b.b.png", "mask", "exists"),
        (["photos/a.jpg"], "photos/notes.txt", "mask", "is a file"),
        (["photos/clip.mp4"], "x.png", "mask", "x.mp4"),
    ],
)
def test_a_file_that_cannot_hold_the_results_is_refused(
    photos: Path, inputs: list[str], output: str, kind: str, said: str
) -> None:
    (photos / "clip.mp4").write_text("moving")
    with pytest.raises(UsageError, match=said):
        plan_jobs(inputs, Path(output), [kind])


def test_the_records_are_an_output_like_the_others(photos: Path) -> None:
    def plan(records: str, output: str = "out") -> object:
        return plan_jobs(["photos/a.jpg"], Path(output), ["mask"], records=Path(records))

    assert plan("new.jsonl")
    for records in ("photos/a.jpg", "photos/notes.txt", "out/a_mask.png", "photos"):
        with pytest.raises(UsageError):
            plan(records)
    assert plan("-")
    with pytest.raises(UsageError, match="--jsonl"):
        plan("-", output="-")


def test_tiles(photos: Path) -> None:
    assert [tile_of(text) for text in ("auto", "off", "512")] == ["auto", None, 512]
    for text in ("on", "-5", "1.5", ""):
        with pytest.raises(UsageError, match="--tile"):
            tile_of(text)


# ------------------------------------------------------------------------------- predict as typed


def photo(path: Path, seed: int = 0, size: tuple[int, int] = (30, 40)) -> Path:
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    write_image(path, noise)
    return path


class Standard:
    """Standard input as a pipe from another program."""

    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)

    def isatty(self) -> bool:
        return False


def pixels_of(content: bytes) -> npt.NDArray[np.uint8]:
    with Image.open(io.BytesIO(content)) as picture:
        return np.asarray(picture)


def segtrain_process(
    *arguments: str | Path, **options: object
) -> "subprocess.CompletedProcess[bytes]":
    """The command in a process of its own, where standard output is bytes."""
    home = str(Path(segtrain_files.__file__).parents[1])
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [sys.executable, "-m", "segtrain", *arguments],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": home},
        **options,
    )


def test_a_picture_through_a_pipe_is_the_picture_in_a_file(
    segtrain: Command, trained_run: Path, tmp_path: Path
) -> None:
    path = photo(tmp_path / "a.png")
    assert segtrain("predict", path, "-o", "x.png", "--checkpoint", trained_run).code == 0

    piped = segtrain_process(
        *("predict", "-", "-o", "-", "--save", "cutout", "--checkpoint", trained_run),
        input=path.read_bytes(),
    )

    assert piped.returncode == 0, piped.stderr
    assert piped.stdout == (tmp_path / "x.png").read_bytes()
    assert pixels_of(piped.stdout).shape == (30, 40, 4)
    assert b"checkpoint" in piped.stderr


def test_a_pipe_that_is_closed_early_ends_quietly(trained_run: Path, tmp_path: Path) -> None:
    """A picture larger than a pipe holds, and a reader that wants none of it."""
    path = photo(tmp_path / "a.png", size=(400, 400))
    reading, writing = os.pipe()
    os.close(reading)
    home = str(Path(segtrain_files.__file__).parents[1])
    command = ["predict", str(path), "-o", "-", "--checkpoint", str(trained_run)]
    done = subprocess.run(
        [sys.executable, "-m", "segtrain", *command],
        stdout=writing,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": home},
    )
    os.close(writing)

    assert done.returncode == 128 + signal.SIGPIPE
    assert [line for line in done.stderr.splitlines() if not line.startswith(b"checkpoint")] == []


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "stdin"), (b"no picture", "stdin"), (b"x" * 101, "more than")]
)
def test_standard_input_that_is_no_picture_is_named(
    segtrain: Command,
    trained_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    said: str,
) -> None:
    monkeypatch.setattr("segtrain.prediction.command._LARGEST_STDIN", 100)
    monkeypatch.setattr(sys, "stdin", Standard(content))

    done = segtrain("predict", "-", "--checkpoint", trained_run)

    assert done.code == DATA
    assert said in done.error_lines[0]


def test_a_terminal_is_no_picture(
    segtrain: Command, trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    assert segtrain("predict", "-", "--checkpoint", trained_run).code == USAGE


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> None:
    """A description of results that is quick and known."""
    known = SimpleNamespace(describe=lambda result: {"person_share": 0.25, "num_pieces": 3})
    monkeypatch.setitem(sys.modules, "segtrain.prediction.description", known)


@pytest.mark.usefixtures("described")
def test_json_lines_come_in_the_order_of_the_inputs(
    segtrain: Command, trained_run: Path, tmp_path: Path
) -> None:
    for number in range(6):
        photo(tmp_path / "in" / f"{number}.png", number)
    (tmp_path / "in" / "3.png").write_text("damaged")

    done = segtrain("predict", "in", "--checkpoint", trained_run, "--jsonl", "-", "--save", "mask")

    assert done.code == DATA
    records = [json.loads(line) for line in done.out.splitlines()]
    assert [record["image"] for record in records] == [f"in/{number}.png" for number in range(6)]
    assert "3.png" in records[3].pop("error")
    assert records[3] == {"image": "in/3.png"}
    assert records[0].pop("seconds") > 0
    assert records[0] == {
        "image": "in/0.png",
        "width": 40,
        "height": 30,
        "outputs": {"mask": "predictions/0_mask.png"},
        "person_share": 0.25,
        "num_pieces": 3,
    }


@pytest.mark.usefixtures("described")
def test_json_lines_go_into_a_file_that_is_kept(
    segtrain: Command, trained_run: Path, tmp_path: Path
) -> None:
    command = ("predict", photo(tmp_path / "a.png"), "--checkpoint", trained_run)

    assert segtrain(*command, "--jsonl", "new/all.jsonl").code == 0
    assert len(Path("new/all.jsonl").read_text().splitlines()) == 1
    assert segtrain(*command, "-o", "other", "--jsonl", "new/all.jsonl").code == USAGE
    assert not Path("other").exists()


def test_an_animation_is_said_and_its_first_frame_taken(
    segtrain: Command, trained_run: Path, tmp_path: Path
) -> None:
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    command = ("predict", "a.gif", "--checkpoint", trained_run, "--save", "panel")

    done = segtrain(*command)

    assert done.code == 0
    assert "a.gif is animated; its first frame is taken" in done.err
    panel = read_image(tmp_path / "predictions" / "a_panel.jpg")
    assert np.abs(panel[:, :40].astype(int) - (255, 0, 0)).mean() < 5


# What strangers send, and how a file of it is made: what can be used, and what cannot.
GOOD = {
    "photo.jpg": lambda path: scene((4000, 6000)).save(path),
    "deep.png": lambda path: Image.fromarray(np.full((40, 50), 30_000, np.uint16)).save(path),
    "ink.jpg": lambda path: scene().convert("CMYK").save(path),
    "palette.png": lambda path: scene().quantize(8).save(path),
    "moving.gif": lambda path: scene().save(path, save_all=True, append_images=[scene((40, 51))]),
    "really_png.jpg": lambda path: scene().save(path, format="PNG"),
}
BAD = {
    "truncated.jpg": lambda path: path.write_bytes(content_of(scene())[:-300]),
    "bomb.png": lambda path: Image.new("1", (10_001, 10_000)).save(path),
    "empty.jpg": lambda path: path.touch(),
    "words.webp": lambda path: path.write_text("no picture"),
}


def scene(size: tuple[int, int] = (40, 50)) -> Image.Image:
    rows, columns = np.indices(size)
    return Image.fromarray(np.stack([rows, columns, rows + columns], axis=-1).astype(np.uint8))


def content_of(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=95)
    return file.getvalue()


PREDICT_AND_MEASURE = """
import sys
from pathlib import Path
from segtrain.cli import run
code = run(sys.argv[1:])
# Not ru_maxrss: that one starts at the peak of the process that started this one.
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
sys.exit(code)
"""


@pytest.mark.slow
def test_a_folder_of_strangers_files_takes_less_than_a_gigabyte(
    trained_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "in" / "folder.jpg").mkdir(parents=True)
    for name, make in (GOOD | BAD).items():
        make(tmp_path / "in" / name)
    command = ["predict", "in", "--save", "mask,cutout", "--checkpoint", str(trained_run)]

    done = subprocess.run(
        [sys.executable, "-c", PREDICT_AND_MEASURE, *command],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 3, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("skipped: ")]
    assert len(told) == len(BAD)
    assert all(any(name in line for line in told) for name in BAD)
    written = sorted(path.name for path in Path("predictions").iterdir())
    kinds = ("cutout", "mask")
    assert written == sorted(f"{Path(name).stem}_{kind}.png" for name in GOOD for kind in kinds)
    assert int(done.stdout.split()[-1]) * 1024 < 10**9


def test_improvements_are_made_in_their_order(
    segtrain: Command, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here refining makes everything person, and cleaning takes the left half away."""

    def cleaned(probability: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        columns = np.arange(probability.shape[1]) >= probability.shape[1] // 2
        return probability * columns.astype(np.float32)

    def refined(image: object, probability: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return np.ones_like(probability)

    monkeypatch.setattr("segtrain.prediction.finishing.refined", refined)
    monkeypatch.setattr("segtrain.prediction.finishing.cleaned", cleaned)
    command = ("predict", photo(tmp_path / "a.png"), "--checkpoint", trained_run, "--save", "mask")

    assert segtrain(*command, "--refine", "--clean", "-o", "x.png").code == 0
    mask = pixels_of(Path("x.png").read_bytes())
    assert (mask[:, :20] == 0).all()
    assert (mask[:, 20:] == 255).all()


def test_videos_are_done_after_the_pictures(
    segtrain: Command, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clip.mov").write_text("moving")
    calls = []

    def predict_video(source: Path, target: Path, network: object, **options: object) -> object:
        assert Path("out/a_mask.png").exists()
        calls.append((source, target, options["overwrite"]))
        return SimpleNamespace(person_share=0.0)

    video = SimpleNamespace(predict_video=predict_video)
    monkeypatch.setitem(sys.modules, "segtrain.prediction.video", video)
    command = ("predict", "clip.mov", photo(tmp_path / "a.png"), "--checkpoint", trained_run)

    done = segtrain(*command, "-o", "out", "--background", "#00ff00")
    assert done.code == 0
    assert "no person found in clip.mov" in done.err
    assert done.out == "2 of 2 files done, results in out\n"
    assert calls == [(Path("clip.mov"), Path("out/clip_background.mp4"), False)]


@pytest.mark.parametrize(
    "option",
    [("--save", "mask"), ("--refine",), ("--clean",), ("--jsonl", "x.jsonl")],
    ids=" ".join,
)
def test_what_is_for_pictures_is_refused_beside_a_video(
    segtrain: Command, tmp_path: Path, option: tuple[str, ...]
) -> None:
    (tmp_path / "clip.mov").write_text("moving")
    done = segtrain("predict", "clip.mov", *option)
    assert done.code == 2
    assert "are for pictures" in done.error_lines[0]


@pytest.mark.parametrize("tile", ["100", "33", "96"])
def test_a_side_that_tiles_cannot_have_is_refused_before_any_work(
    segtrain: Command, tile: str
) -> None:
    done = segtrain("predict", "nowhere.jpg", "--tile", tile)
    assert done.code == 2
    assert "multiple of 32" in done.error_lines[0]


def test_a_full_disk_ends_it_and_leaves_whole_files(
    segtrain: Command, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(8):
        photo(tmp_path / "in" / f"{number}.png", number)
    synced, num_synced = os.fsync, 0

    def fills_up(descriptor: int) -> None:
        nonlocal num_synced
        num_synced += 1
        if num_synced > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", fills_up)
    done = segtrain("predict", "in", "--save", "mask", "--checkpoint", trained_run)

    assert done.code == RESOURCE
    assert "No space left" in done.error_lines[0]
    written = sorted((tmp_path / "predictions").iterdir())
    assert len(written) == 3
    assert all(read_image(path).shape == (30, 40, 3) for path in written)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_whole_pictures_and_says_how_many(
    segtrain: Command,
    trained_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
) -> None:
    for index in range(30):
        photo(tmp_path / "in" / f"{index:02}.png", index)
    write, num_written = segtrain_files.write_bytes, 0

    def write_and_signal(path: Path, content: bytes) -> None:
        nonlocal num_written
        num_written += 1
        if num_written == 5:
            os.kill(os.getpid(), number)
        write(path, content)

    monkeypatch.setattr("segtrain.prediction.finishing.write_bytes", write_and_signal)
    done = segtrain("predict", "in", "--checkpoint", trained_run)

    assert done.code == code
    files = list((tmp_path / "predictions").iterdir())
    masks = {path.name.split("_")[0] for path in files if path.name.endswith("_mask.png")}
    cutouts = {path.name.split("_")[0] for path in files if path.name.endswith("_cutout.png")}
    assert masks == cutouts
    assert 2 <= len(masks) < 30
    assert len(files) == 2 * len(masks)
    assert f"{len(masks)} of 30 pictures are done" in done.err
