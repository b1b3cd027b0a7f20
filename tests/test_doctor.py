"""`segtrain doctor`: it passes what is healthy and names what is not."""

import hashlib
import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_fixtures import annotation_file, annotation_row, image_row, make_toy_coco, write_coco
from conftest import Command, Finished
from PIL import Image, ImageEnhance

from segtrain.data import open_dataset
from segtrain.doctor import environment, inspection, learning, opencv
from segtrain.doctor.duplicates import fingerprint, near_duplicates
from segtrain.doctor.environment import DriverGpu, Gpu

NUM_TRAIN, NUM_VAL = 24, 20
Usage = namedtuple("Usage", "total used free")

H100: dict[str, Any] = {
    "name": "NVIDIA H100",
    "memory": 85 * 10**9,
    "free": 80 * 10**9,
    "capability": "9.0",
    "bf16": True,
}

# Of the machine that runs the tests, not of the data.
OF_THE_MACHINE = {"gpu", "memory", "disk", "shared-memory"}


@dataclass(frozen=True)
class Examined:
    """What the doctor said with --json."""

    done: Finished
    content: dict[str, Any]

    def found(self, check: str, level: str) -> str:
        """Messages and remedies of a check at a level; there must be some."""
        findings = self.content["findings"]
        texts = [
            f"{finding['message']} → {finding['remedy']}"
            for finding in findings
            if (finding["check"], finding["level"]) == (check, level)
        ]
        assert texts, f"no {level} of {check} in {findings}"
        return "\n".join(texts)

    def bad(self) -> list[dict[str, Any]]:
        """Warnings and errors about data."""
        return [
            finding
            for finding in self.content["findings"]
            if finding["level"] in {"warning", "error"} and finding["check"] not in OF_THE_MACHINE
        ]


Doctor = Callable[..., Examined]


@pytest.fixture
def doctor(segtrain: Command) -> Doctor:
    """Runs `segtrain doctor ARGUMENTS --json`; without learning unless `learning`."""

    def examine(*arguments: str | Path, learning: bool = False) -> Examined:
        more = [] if learning else ["--no-learning"]
        done = segtrain("doctor", *arguments, "--json", "--output", "out", *more)
        assert "Traceback" not in done.err
        return Examined(done, json.loads(done.out))

    return examine


@pytest.fixture(autouse=True)
def _healthy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests of data should not depend on; OpenCV's own import takes half a second."""
    monkeypatch.setattr(opencv, "_try_import", lambda: ("5.0", ""))
    monkeypatch.setattr(environment, "_memory", lambda: (8_000_000_000, 8_000_000_000))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 10**12))


@pytest.fixture(scope="module")
def healthy_coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("healthy") / "coco"
    return make_toy_coco(root, num_train=NUM_TRAIN, num_val=NUM_VAL, size=(96, 128))


@pytest.fixture(scope="module")
def healthy_folder(healthy_coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same people as JPEGs and masks of 0 and 255."""
    root = tmp_path_factory.mktemp("healthy") / "folder"
    for split in ("train", "val"):
        source = open_dataset(healthy_coco, split)
        for name in ("images", "masks"):
            (root / split / name).mkdir(parents=True)
        for index in range(len(source)):
            sample, name = source.sample(index), f"{split}{index:02d}"
            picture = Image.fromarray(sample.image)
            picture.save(root / split / "images" / f"{name}.jpg", quality=90)
            Image.fromarray(sample.mask * np.uint8(255)).save(
                root / split / "masks" / f"{name}.png"
            )
    return root


@pytest.fixture
def coco(healthy_coco: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(healthy_coco, tmp_path / "coco"))


@pytest.fixture
def folder(healthy_folder: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(healthy_folder, tmp_path / "folder"))


def tree(root: Path) -> dict[str, tuple[str, int]]:
    """Every file with the hash of its content and its time."""
    return {
        str(path.relative_to(root)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def edit_annotations(root: Path, split: str, edit: Callable[[dict[str, Any]], object]) -> None:
    path = annotation_file(root, split)
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def repaint(folder: Path, paint: Callable[[np.ndarray], np.ndarray]) -> None:
    """Every mask below, changed."""
    for path in files(folder):
        Image.fromarray(paint(np.asarray(Image.open(path)))).save(path)


# What is healthy.


@pytest.mark.parametrize("kind", ["coco", "folder"])
def test_passes_healthy_data_and_leaves_it_alone(
    kind: str, doctor: Doctor, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(f"healthy_{kind}")
    before = tree(root)

    examined = doctor(root, "--show-augmentations")

    assert examined.bad() == []
    assert examined.done.code in {0, 10}  # 10: the machine that tests may have a fault of its own
    assert examined.done.error_lines == []
    assert tree(root) == before
    train = examined.content["data"]["train"]
    assert (train["pictures"], train["looked_at"], train["damaged"]) == (NUM_TRAIN, NUM_TRAIN, 0)
    assert train["without_people"] == 1
    for written in examined.content["pictures"]:
        with Image.open(written) as picture:
            assert 700 < picture.width < 2500
            assert 400 < picture.height < 3000
    names = [Path(written).name for written in examined.content["pictures"]]
    assert names == ["contact_sheet.png", "person_area.png", "augmentations.png"]


@pytest.mark.usefixtures("one_thread")
def test_learns_healthy_pictures_by_heart(doctor: Doctor, healthy_coco: Path) -> None:
    examined = doctor(healthy_coco, "--device", "cpu", learning=True)

    said = examined.found("learning", "ok")
    assert "4 pictures" in said
    assert float(said.split("person IoU of ")[1].split()[0]) > 0.9


@pytest.mark.usefixtures("one_thread")
def test_masks_that_follow_nothing_cannot_be_learnt(
    doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [image_row(i, 80, 80) for i in range(1, 5)]
    boxes = [[x, y, x + 40, y, x + 40, y + 40, x, y + 40] for x in (0, 40) for y in (0, 40)]
    people = [annotation_row(i, i, [box]) for i, box in enumerate(boxes, start=1)]
    for split in ("train", "val"):
        write_coco(tmp_path / "gray", split, rows, people)  # all pictures the same gray
    monkeypatch.setattr(learning, "_SIDE", 32)
    monkeypatch.setattr(learning, "_ROUNDS", 7)
    examined = doctor(tmp_path / "gray", "--device", "cpu", learning=True)

    assert "contact_sheet.png" in examined.found("learning", "warning")
    assert examined.done.code == 10


def test_a_machine_too_slow_to_tell_is_no_warning() -> None:
    learnt = learning.Learnt(person_iou=0.4, num_pictures=4, num_steps=9, seconds=20)

    [(level, message, _)] = learning.judge_learning(learnt)

    assert level == "note"
    assert "9 steps" in message


def test_the_table_says_what_json_says(
    segtrain: Command, doctor: Doctor, coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    next((coco / "train2017").iterdir()).unlink()
    examined = doctor(coco)
    done = segtrain("doctor", coco, "--output", "out", "--overwrite", "--no-learning")

    assert done.code == examined.done.code == examined.content["exit_code"]
    lines = done.out.splitlines()
    for finding in examined.content["findings"]:
        assert any(
            finding["level"] in line and finding["check"] in line and finding["message"] in line
            for line in lines
        ), finding
    counts = examined.content["counts"]
    assert f"errors: {counts['error']}, warnings: {counts['warning']}" in lines[-1]
    assert "out/contact_sheet.png" in lines[-1]
    assert sum(counts.values()) == len(examined.content["findings"])


def test_without_data_only_the_machine_is_looked_at(doctor: Doctor) -> None:
    examined = doctor()

    assert "segtrain doctor FOLDER" in examined.found("data", "note")
    assert examined.content["pictures"] == []
    assert not Path("out").exists()
    assert examined.content["environment"]["versions"]["torch"] == torch.__version__


def test_data_of_the_environment_and_a_selection(
    doctor: Doctor, healthy_coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEGTRAIN_DATA", str(healthy_coco))
    examined = doctor("--set", "data.person_area=[0.01,1]")

    assert examined.content["data"]["train"]["pictures"] == NUM_TRAIN - 1


def test_several_roots_are_joined(doctor: Doctor, healthy_coco: Path, healthy_folder: Path) -> None:
    examined = doctor(healthy_coco, healthy_folder)

    parts = examined.content["data"]["train"]["parts"]
    assert [part["kind"] for part in parts] == ["COCO", "folders of masks"]


def test_pictures_are_replaced_only_if_allowed(segtrain: Command, healthy_coco: Path) -> None:
    Path("out").mkdir()
    Path("out/person_area.png").write_text("mine")
    done = segtrain("doctor", healthy_coco, "--output", "out", "--no-learning")

    assert done.code == 2
    assert "--overwrite" in done.error_lines[0]
    assert Path("out/person_area.png").read_text() == "mine"
    assert not Path("out/contact_sheet.png").exists()

    done = segtrain("doctor", healthy_coco, "--output", "out", "--no-learning", "--overwrite")
    assert Path("out/person_area.png").read_bytes().startswith(b"\x89PNG")


# Planted faults: `break_it` breaks a copy of a healthy set.


def unpaired(folder: Path) -> None:
    for path in files(folder / "train" / "masks")[:3]:
        path.unlink()


def swapped(folder: Path) -> None:
    for split in ("train", "val"):
        (folder / split / "images").rename(folder / split / "x")
        (folder / split / "masks").rename(folder / split / "images")
        (folder / split / "x").rename(folder / split / "masks")


def invert(folder: Path) -> None:
    repaint(folder / "train" / "masks", lambda mask: 255 - mask)


def truncate(folder: Path) -> None:
    path = files(folder / "train" / "images")[5]
    path.write_bytes(path.read_bytes()[:1500])


def truncate_many(folder: Path) -> None:
    for path in files(folder / "train" / "images")[5:8]:
        path.write_bytes(path.read_bytes()[:1500])


def other_size(folder: Path) -> None:
    for path in files(folder / "train" / "masks")[:2]:
        Image.open(path).resize((50, 50), Image.Resampling.NEAREST).save(path)


def empty(folder: Path) -> None:
    repaint(folder / "train" / "masks", lambda mask: mask * 0)


def full(folder: Path) -> None:
    repaint(folder / "train" / "masks", lambda mask: mask * 0 + 255)


def some_full(folder: Path) -> None:
    for path in files(folder / "train" / "masks")[2:4]:
        Image.new("L", (128, 96), 255).save(path)


def smooth_photo(width: int, height: int) -> Image.Image:
    """Like photos, and unlike the noise of the toys, it looks the same at any scale."""
    few = np.random.default_rng(7).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC)


def copied(folder: Path) -> None:
    """A training picture again in validation: smaller, lighter and encoded anew."""
    original = smooth_photo(128, 96)
    original.save(folder / "train" / "images" / "train07.jpg")
    picture = original.resize((100, 75))
    picture = ImageEnhance.Brightness(picture).enhance(1.02)
    picture.save(folder / "val" / "images" / "again.jpg", quality=60)
    mask = Image.open(folder / "train" / "masks" / "train07.png")
    mask.resize((100, 75), Image.Resampling.NEAREST).save(folder / "val" / "masks" / "again.png")


def copied_whole(folder: Path) -> None:
    for name, suffix in (("images", ".jpg"), ("masks", ".png")):
        shutil.copy(folder / "train" / name / f"train07{suffix}", folder / "val" / name)


def no_validation(folder: Path) -> None:
    shutil.rmtree(folder / "val")


def too_few(folder: Path) -> None:
    for name in ("images", "masks"):
        for path in files(folder / "val" / name)[6:]:
            path.unlink()


def turned(coco: Path) -> None:
    path = files(coco / "train2017")[3]
    picture = Image.open(path)
    exif = picture.getexif()
    exif[0x0112] = 3
    picture.save(path, exif=exif)


def malformed(coco: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        for row in content["annotations"][:3]:
            row["segmentation"] = [[1, 2, float("nan"), 4, 5, 6]]

    edit_annotations(coco, "train", edit)


def missing(coco: Path) -> None:
    for path in files(coco / "train2017")[:3]:
        path.unlink()


def no_json(coco: Path) -> None:
    annotation_file(coco, "train").write_text("{")


@pytest.mark.parametrize(
    ("kind", "break_it", "check", "level", "words"),
    [
        ("folder", unpaired, "opening", "error", ["train00", "a mask has the name"]),
        ("folder", swapped, "opening", "error", ["train00", "exchanged?"]),
        ("folder", invert, "inverted", "warning", ["train: ", "data.invert_masks=true"]),
        ("folder", truncate, "damaged", "warning", ["train05.jpg", "replace"]),
        ("folder", truncate_many, "damaged", "error", ["train05.jpg", "train07.jpg", "replace"]),
        ("folder", other_size, "opening", "error", ["another size", "train00.png"]),
        ("folder", empty, "people", "error", ["train: no mask shows a person", "right masks"]),
        ("folder", full, "masks", "error", ["train: every mask covers all", "black"]),
        ("folder", some_full, "masks", "warning", ["train02.jpg", "train03.jpg"]),
        ("folder", copied, "duplicates", "warning", ["train07.jpg = ", "again.jpg"]),
        ("folder", copied_whole, "same-names", "warning", ["train07.jpg", "take them out"]),
        ("folder", no_validation, "opening", "error", ["val"]),
        ("folder", too_few, "pictures", "warning", ["val: only 6 pictures"]),
        ("coco", turned, "orientation", "warning", ["000000000004.png", "without EXIF"]),
        ("coco", malformed, "opening", "error", ["3 of 23", "polygon malformed", "download"]),
        ("coco", missing, "opening", "error", ["000000000001.png", "download"]),
        ("coco", no_json, "opening", "error", ["instances_train2017.json", "download"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_finds(
    kind: str,
    break_it: Callable[[Path], None],
    check: str,
    level: str,
    words: list[str],
    doctor: Doctor,
    request: pytest.FixtureRequest,
) -> None:
    root = request.getfixturevalue(kind)
    break_it(root)
    before = tree(root)

    examined = doctor(root)

    said = examined.found(check, level)
    for word in words:
        assert word in said
    assert examined.done.code == {"warning": 10, "error": 3}[level]
    assert len(examined.done.error_lines) == (level == "error")
    assert all(len(line) <= 200 for line in examined.done.error_lines)
    assert tree(root) == before


def test_a_missing_split_does_not_hide_the_other(doctor: Doctor, folder: Path) -> None:
    no_validation(folder)
    examined = doctor(folder)

    assert examined.content["data"].keys() == {"train"}
    assert "out/contact_sheet.png" in examined.content["pictures"]


def test_no_data_set_and_an_empty_selection(doctor: Doctor, tmp_path: Path, coco: Path) -> None:
    (tmp_path / "nothing").mkdir()
    examined = doctor(tmp_path / "nothing", coco, "--set", "data.person_area=[0.98,0.99]")

    errors = [f for f in examined.bad() if f["level"] == "error"]
    assert [finding["check"] for finding in errors].count("opening") == 1
    assert "data.person_area" in examined.found("selection", "error")
    assert examined.done.code == 3


def test_names_given_anew_in_each_split_are_no_duplicates(doctor: Doctor, tmp_path: Path) -> None:
    root, rng = tmp_path / "renamed", np.random.default_rng(0)
    for split in ("train", "val"):
        rows = [image_row(i, 70, 80) for i in range(1, 22)]
        outline = [[10, 10, 60, 10, 60, 50, 10, 50]]
        people = [annotation_row(i, i, outline) for i in range(1, 22)]
        shapes = {i: rng.integers(0, 256, (7, 8, 3)).astype(np.uint8) for i in range(1, 22)}
        pictures = {i: np.kron(s, np.ones((10, 10, 1), np.uint8)) for i, s in shapes.items()}
        write_coco(root, split, rows, people, pictures=pictures)

    examined = doctor(root)

    assert "different pictures" in examined.found("same-names", "note")
    assert examined.bad() == []


def test_flat_pictures_and_mirrored_ones_are_no_duplicates() -> None:
    flat = [np.full((64, 64, 3), 90 + i, np.uint8) for i in range(4)]
    photo = np.asarray(smooth_photo(72, 72))
    ours = [fingerprint(image) for image in [*flat, photo]]
    theirs = [fingerprint(image) for image in [*flat, photo[:, ::-1].copy(), photo[1:, 1:].copy()]]

    assert list(near_duplicates(ours, theirs)) == [(4, 5)]
    assert list(near_duplicates([], theirs)) == []


def test_a_sample_is_said_to_be_one(
    doctor: Doctor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "MOST_LOOKS", 10)
    examined = doctor(folder)

    assert examined.content["data"]["train"]["looked_at"] == 10
    assert "10 pictures (of 24, evenly chosen)" in examined.found("damaged", "ok")


def test_when_time_is_up_the_rest_is_left(
    doctor: Doctor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "_SECONDS_A_SPLIT", 0.0)
    examined = doctor(folder)

    assert examined.content["data"]["train"]["looked_at"] == 1
    assert "1 pictures (of 24, evenly chosen)" in examined.found("damaged", "ok")


# The machine.


def test_two_wheels_of_opencv(
    doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = tmp_path / "site" / "opencv_python-4.12.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: opencv-python\nVersion: 4.12.0\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    examined = doctor()

    said = examined.found("opencv", "error")
    assert "pip uninstall -y opencv-python opencv-python-headless" in said
    assert "pip install opencv-python-headless" in said
    assert examined.done.code == 5
    assert "pip install opencv-python-headless" in examined.done.error_lines[0]


def test_opencv_without_libgl(
    doctor: Doctor, healthy_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    examined = doctor(healthy_coco)

    assert "libGL.so.1" in examined.found("opencv", "error")
    assert examined.done.code == 5
    assert examined.content["data"] == {}


def test_a_broken_opencv_is_told_without_importing_it(tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open')\n")
    done = subprocess.run(
        [sys.executable, "-m", "segtrain", "doctor"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )

    assert done.returncode == 5, done.stderr
    assert "pip install opencv-python-headless" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("free", "level", "code"), [(10**8, "error", 5), (10**9, "warning", 10)])
def test_a_full_disk(
    free: int, level: str, code: int, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def usage(path: Path) -> Usage:
        return Usage(10**12, 0, 10**12 if Path(path) == Path("/dev/shm") else free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    examined = doctor()

    said = examined.found("disk", level)
    assert "free at least 2 GB" in said
    assert "cache" in said
    assert examined.done.code == code


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no shared memory here")
def test_a_tiny_shared_memory(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    def usage(path: Path) -> Usage:
        return Usage(10**12, 0, 10**6 if Path(path) == Path("/dev/shm") else 10**12)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    examined = doctor("--set", "data.workers=4", "--set", "train.batch_size=16")

    said = examined.found("shared-memory", "warning")
    assert "--workers 0" in said
    assert "--shm-size=8g" in said
    assert examined.done.code == 10
    assert "--workers 0" not in doctor("--set", "data.workers=0").done.out


def test_a_gpu_that_torch_would_not_use(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = DriverGpu(name="NVIDIA T4", driver="570.1")
    monkeypatch.setattr(environment, "driver_gpus", lambda: [gpu])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    examined = doctor()

    said = examined.found("gpu", "warning")
    assert "NVIDIA T4 would stay unused" in said
    assert "reinstall torch" in said
    assert examined.done.code == 10

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "driver 570.1 may be too old" in doctor().found("gpu", "warning")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "unset CUDA_VISIBLE_DEVICES" in doctor().found("gpu", "warning")


@pytest.mark.parametrize(
    ("gpu", "levels", "words"),
    [
        (Gpu(**H100), ["ok"], "85.0 GB (80.0 free), compute capability 9.0, bf16, driver 570.1"),
        (Gpu(**{**H100, "bf16": False}), ["ok"], "no bf16"),
        (Gpu(**{**H100, "free": 10**9}), ["ok", "warning"], "only 1.0 GB are free on cuda:0"),
        (Gpu(**H100, problem="no kernel image"), ["error"], "does not work: no kernel image"),
    ],
)
def test_gpus_that_torch_sees(gpu: Gpu, levels: list[str], words: str) -> None:
    machine = environment.look_at_machine(device_problem="", folders={}, shared_memory_needed=0)
    driver = [DriverGpu(name="NVIDIA H100", driver="570.1")]
    machine = replace(machine, gpus=[gpu], driver_gpus=driver)

    verdicts = list(environment.check_gpus(machine))

    assert [level for level, _, _ in verdicts] == levels
    assert words in verdicts[-1][1]


def test_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 570.86.15'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    found = environment.driver_gpus()
    assert found == [DriverGpu(name="NVIDIA H100 80GB HBM3", driver="570.86.15")]
    tool.write_text("#!/bin/sh\necho 'has failed because it could not communicate'\nexit 9\n")
    assert environment.driver_gpus() == []


def test_no_gpu_is_a_plain_note_and_a_named_one_an_error(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "driver_gpus", list)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    assert "no GPU" in doctor().found("gpu", "note")
    examined = doctor("--device", "cuda:1")
    assert "--device auto" in examined.found("device", "error")
    assert examined.done.code == 5


def test_a_device_nobody_knows_is_a_mistake_in_the_command(segtrain: Command) -> None:
    assert segtrain("doctor", "--device", "gpu").code == 2


def test_an_output_that_cannot_be_written(doctor: Doctor, healthy_coco: Path) -> None:
    Path("out").write_text("a file")
    examined = doctor(healthy_coco)

    assert "another --output" in examined.found("writing", "error")
    assert examined.done.code == 5


@pytest.mark.gpu
def test_the_gpu_is_described(doctor: Doctor) -> None:
    said = doctor().found("gpu", "ok")

    assert torch.cuda.get_device_name(0) in said
    assert "compute capability" in said


@pytest.mark.parametrize("name", ["coco-person-mini", "portraits-mini"])
def test_real_data_has_no_errors(name: str, doctor: Doctor, real_data: Path) -> None:
    examined = doctor(real_data / name)

    assert examined.bad() == []
