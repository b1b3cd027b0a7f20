"""`segtrain doctor` passes healthy data and reports planted faults."""

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
from helpers.coco import annotation_file, annotation_row, image_row, make_toy_coco, write_coco
from helpers.command import Command, Finished
from PIL import Image, ImageEnhance

from segtrain.data.datasets import open_dataset
from segtrain.doctor import environment, image_scan, opencv, overfit_check
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

# Checks of the machine that runs the tests, not of the data.
MACHINE_CHECKS = {"gpu", "memory", "disk", "shared-memory"}


@dataclass(frozen=True)
class Report:
    """The output of `segtrain doctor --json`."""

    finished: Finished
    content: dict[str, Any]

    def texts(self, check: str, level: str) -> str:
        """Messages and remedies of a check at a level; there must be at least one."""
        findings = self.content["findings"]
        texts = [
            f"{finding['message']} → {finding['remedy']}"
            for finding in findings
            if (finding["check"], finding["level"]) == (check, level)
        ]
        assert texts, f"no {level} of {check} in {findings}"
        return "\n".join(texts)

    def data_problems(self) -> list[dict[str, Any]]:
        """Warnings and errors about the data."""
        return [
            finding
            for finding in self.content["findings"]
            if finding["level"] in {"warning", "error"} and finding["check"] not in MACHINE_CHECKS
        ]


Doctor = Callable[..., Report]


@pytest.fixture
def doctor(segtrain: Command) -> Doctor:
    """Run `segtrain doctor ARGUMENTS --json`, by default without the overfitting check."""

    def run(*arguments: str | Path, learning: bool = False) -> Report:
        options = [] if learning else ["--no-learning"]
        finished = segtrain("doctor", *arguments, "--json", "--output", "out", *options)
        assert "Traceback" not in finished.err
        return Report(finished, json.loads(finished.out))

    return run


@pytest.fixture(autouse=True)
def _healthy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Isolate the tests of data from the machine; importing OpenCV in a process takes 0.5 s."""
    monkeypatch.setattr(opencv, "_try_import", lambda: ("5.0", ""))
    monkeypatch.setattr(environment, "_memory", lambda: (8_000_000_000, 8_000_000_000))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 10**12))


@pytest.fixture(scope="module")
def healthy_coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("healthy") / "coco"
    return make_toy_coco(root, num_train=NUM_TRAIN, num_val=NUM_VAL, size=(96, 128))


@pytest.fixture(scope="module")
def healthy_folder(healthy_coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as JPEGs, with masks of 0 and 255."""
    root = tmp_path_factory.mktemp("healthy") / "folder"
    for split in ("train", "val"):
        source = open_dataset(healthy_coco, split)
        for name in ("images", "masks"):
            (root / split / name).mkdir(parents=True)
        for index in range(len(source)):
            sample, name = source.sample(index), f"{split}{index:02d}"
            image = Image.fromarray(sample.image)
            image.save(root / split / "images" / f"{name}.jpg", quality=90)
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


def snapshot(root: Path) -> dict[str, tuple[str, int]]:
    """Every file with its content hash and modification time."""
    return {
        str(path.relative_to(root)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def list_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def edit_annotations(root: Path, split: str, edit: Callable[[dict[str, Any]], object]) -> None:
    path = annotation_file(root, split)
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def repaint(folder: Path, paint: Callable[[np.ndarray], np.ndarray]) -> None:
    """Apply `paint` to every mask in the folder."""
    for path in list_files(folder):
        Image.fromarray(paint(np.asarray(Image.open(path)))).save(path)


# Healthy data.


@pytest.mark.parametrize("kind", ["coco", "folder"])
def test_healthy_data_passes_and_is_not_modified(
    kind: str, doctor: Doctor, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(f"healthy_{kind}")
    before = snapshot(root)

    report = doctor(root, "--show-augmentations")

    assert report.data_problems() == []
    assert report.finished.code in {0, 10}  # 10: a warning about the machine that runs the tests
    assert report.finished.error_lines == []
    assert snapshot(root) == before
    train = report.content["data"]["train"]
    assert (train["images"], train["looked_at"], train["damaged"]) == (NUM_TRAIN, NUM_TRAIN, 0)
    assert train["without_people"] == 1
    for written in report.content["images"]:
        with Image.open(written) as image:
            assert 700 < image.width < 2500
            assert 400 < image.height < 3000
    names = [Path(written).name for written in report.content["images"]]
    assert names == ["contact_sheet.png", "person_area.png", "augmentations.png"]


@pytest.mark.usefixtures("one_thread")
def test_healthy_images_can_be_overfitted(doctor: Doctor, healthy_coco: Path) -> None:
    report = doctor(healthy_coco, "--device", "cpu", learning=True)

    text = report.texts("learning", "ok")
    assert "4 images" in text
    assert float(text.split("person IoU of ")[1].split()[0]) > 0.9


@pytest.mark.usefixtures("one_thread")
def test_masks_unrelated_to_the_images_cannot_be_overfitted(
    doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [image_row(i, 80, 80) for i in range(1, 5)]
    boxes = [[x, y, x + 40, y, x + 40, y + 40, x, y + 40] for x in (0, 40) for y in (0, 40)]
    people = [annotation_row(i, i, [box]) for i, box in enumerate(boxes, start=1)]
    for split in ("train", "val"):
        write_coco(tmp_path / "gray", split, rows, people)  # all images are the same gray
    monkeypatch.setattr(overfit_check, "_SIDE", 32)
    monkeypatch.setattr(overfit_check, "_ROUNDS", 7)
    report = doctor(tmp_path / "gray", "--device", "cpu", learning=True)

    assert "contact_sheet.png" in report.texts("learning", "warning")
    assert report.finished.code == 10


def test_too_few_overfitting_steps_are_not_a_warning() -> None:
    result = overfit_check.OverfitResult(person_iou=0.4, num_images=4, num_steps=9, seconds=20)

    [(level, message, _)] = overfit_check.check_overfitting(result)

    assert level == "note"
    assert "9 steps" in message


def test_the_table_has_the_findings_of_the_json(
    segtrain: Command, doctor: Doctor, coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    next((coco / "train2017").iterdir()).unlink()
    report = doctor(coco)
    finished = segtrain("doctor", coco, "--output", "out", "--overwrite", "--no-learning")

    assert finished.code == report.finished.code == report.content["exit_code"]
    lines = finished.out.splitlines()
    for finding in report.content["findings"]:
        assert any(
            finding["level"] in line and finding["check"] in line and finding["message"] in line
            for line in lines
        ), finding
    counts = report.content["counts"]
    assert f"errors: {counts['error']}, warnings: {counts['warning']}" in lines[-1]
    assert "out/contact_sheet.png" in lines[-1]
    assert sum(counts.values()) == len(report.content["findings"])


def test_without_data_only_the_machine_is_checked(doctor: Doctor) -> None:
    report = doctor()

    assert "segtrain doctor FOLDER" in report.texts("data", "note")
    assert report.content["images"] == []
    assert not Path("out").exists()
    assert report.content["environment"]["versions"]["torch"] == torch.__version__


def test_data_from_the_environment_variable_with_a_selection(
    doctor: Doctor, healthy_coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEGTRAIN_DATA", str(healthy_coco))
    report = doctor("--set", "data.person_area=[0.01,1]")

    assert report.content["data"]["train"]["images"] == NUM_TRAIN - 1


def test_several_roots_are_joined(doctor: Doctor, healthy_coco: Path, healthy_folder: Path) -> None:
    report = doctor(healthy_coco, healthy_folder)

    parts = report.content["data"]["train"]["parts"]
    assert [part["kind"] for part in parts] == ["COCO", "folders of masks"]


def test_images_are_overwritten_only_with_overwrite(segtrain: Command, healthy_coco: Path) -> None:
    Path("out").mkdir()
    Path("out/person_area.png").write_text("old")
    finished = segtrain("doctor", healthy_coco, "--output", "out", "--no-learning")

    assert finished.code == 2
    assert "--overwrite" in finished.error_lines[0]
    assert Path("out/person_area.png").read_text() == "old"
    assert not Path("out/contact_sheet.png").exists()

    finished = segtrain("doctor", healthy_coco, "--output", "out", "--no-learning", "--overwrite")
    assert Path("out/person_area.png").read_bytes().startswith(b"\x89PNG")


# Planted faults: each function breaks a copy of a healthy dataset.


def delete_masks(folder: Path) -> None:
    for path in list_files(folder / "train" / "masks")[:3]:
        path.unlink()


def swap_images_and_masks(folder: Path) -> None:
    for split in ("train", "val"):
        (folder / split / "images").rename(folder / split / "x")
        (folder / split / "masks").rename(folder / split / "images")
        (folder / split / "x").rename(folder / split / "masks")


def invert_masks(folder: Path) -> None:
    repaint(folder / "train" / "masks", lambda mask: 255 - mask)


def truncate_image(folder: Path) -> None:
    path = list_files(folder / "train" / "images")[5]
    path.write_bytes(path.read_bytes()[:1500])


def truncate_three(folder: Path) -> None:
    for path in list_files(folder / "train" / "images")[5:8]:
        path.write_bytes(path.read_bytes()[:1500])


def resize_masks(folder: Path) -> None:
    for path in list_files(folder / "train" / "masks")[:2]:
        Image.open(path).resize((50, 50), Image.Resampling.NEAREST).save(path)


def zero_masks(folder: Path) -> None:
    repaint(folder / "train" / "masks", lambda mask: mask * 0)


def fill_masks(folder: Path) -> None:
    repaint(folder / "train" / "masks", lambda mask: mask * 0 + 255)


def fill_two_masks(folder: Path) -> None:
    for path in list_files(folder / "train" / "masks")[2:4]:
        Image.new("L", (128, 96), 255).save(path)


def smooth_photo(width: int, height: int) -> Image.Image:
    """Unlike the noise of toy images, it looks the same at any scale, as photos do."""
    tiny = np.random.default_rng(7).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(tiny).resize((width, height), Image.Resampling.BICUBIC)


def reencode_to_val(folder: Path) -> None:
    """A training image again in validation: smaller, brighter and re-encoded."""
    original = smooth_photo(128, 96)
    original.save(folder / "train" / "images" / "train07.jpg")
    image = original.resize((100, 75))
    image = ImageEnhance.Brightness(image).enhance(1.02)
    image.save(folder / "val" / "images" / "copy.jpg", quality=60)
    mask = Image.open(folder / "train" / "masks" / "train07.png")
    mask.resize((100, 75), Image.Resampling.NEAREST).save(folder / "val" / "masks" / "copy.png")


def copy_file_to_val(folder: Path) -> None:
    for name, suffix in (("images", ".jpg"), ("masks", ".png")):
        shutil.copy(folder / "train" / name / f"train07{suffix}", folder / "val" / name)


def delete_val(folder: Path) -> None:
    shutil.rmtree(folder / "val")


def keep_six_val_images(folder: Path) -> None:
    for name in ("images", "masks"):
        for path in list_files(folder / "val" / name)[6:]:
            path.unlink()


def rotate_by_exif(coco: Path) -> None:
    path = list_files(coco / "train2017")[3]
    image = Image.open(path)
    exif = image.getexif()
    exif[0x0112] = 3
    image.save(path, exif=exif)


def break_polygons(coco: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        for row in content["annotations"][:3]:
            row["segmentation"] = [[1, 2, float("nan"), 4, 5, 6]]

    edit_annotations(coco, "train", edit)


def delete_images(coco: Path) -> None:
    for path in list_files(coco / "train2017")[:3]:
        path.unlink()


def write_invalid_json(coco: Path) -> None:
    annotation_file(coco, "train").write_text("{")


@pytest.mark.parametrize(
    ("kind", "plant_fault", "check", "level", "words"),
    [
        ("folder", delete_masks, "opening", "error", ["train00", "a mask must have the name"]),
        ("folder", swap_images_and_masks, "opening", "error", ["train00", "exchanged?"]),
        ("folder", invert_masks, "inverted", "warning", ["train: ", "data.invert_masks=true"]),
        ("folder", truncate_image, "damaged", "warning", ["train05.jpg", "replace"]),
        ("folder", truncate_three, "damaged", "error", ["train05.jpg", "train07.jpg", "replace"]),
        ("folder", resize_masks, "opening", "error", ["differ in size", "train00.png"]),
        ("folder", zero_masks, "people", "error", ["train: no mask shows a person", "right masks"]),
        ("folder", fill_masks, "masks", "error", ["train: every mask covers all", "black"]),
        ("folder", fill_two_masks, "masks", "warning", ["train02.jpg", "train03.jpg"]),
        ("folder", reencode_to_val, "duplicates", "warning", ["train07.jpg = ", "copy.jpg"]),
        ("folder", copy_file_to_val, "same-names", "warning", ["train07.jpg", "remove them"]),
        ("folder", delete_val, "opening", "error", ["val"]),
        ("folder", keep_six_val_images, "images", "warning", ["val: only 6 images"]),
        ("coco", rotate_by_exif, "orientation", "warning", ["000000000004.png", "without EXIF"]),
        ("coco", break_polygons, "opening", "error", ["3 of 23", "polygon malformed", "download"]),
        ("coco", delete_images, "opening", "error", ["000000000001.png", "download"]),
        ("coco", write_invalid_json, "opening", "error", ["instances_train2017.json", "download"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_planted_fault_is_found(
    kind: str,
    plant_fault: Callable[[Path], None],
    check: str,
    level: str,
    words: list[str],
    doctor: Doctor,
    request: pytest.FixtureRequest,
) -> None:
    root = request.getfixturevalue(kind)
    plant_fault(root)
    before = snapshot(root)

    report = doctor(root)

    text = report.texts(check, level)
    for word in words:
        assert word in text
    assert report.finished.code == {"warning": 10, "error": 3}[level]
    assert len(report.finished.error_lines) == (level == "error")
    assert all(len(line) <= 200 for line in report.finished.error_lines)
    assert snapshot(root) == before


def test_a_missing_split_does_not_prevent_checking_the_other(doctor: Doctor, folder: Path) -> None:
    delete_val(folder)
    report = doctor(folder)

    assert report.content["data"].keys() == {"train"}
    assert "out/contact_sheet.png" in report.content["images"]


def test_a_folder_without_a_dataset_and_an_empty_selection(
    doctor: Doctor, tmp_path: Path, coco: Path
) -> None:
    (tmp_path / "nothing").mkdir()
    report = doctor(tmp_path / "nothing", coco, "--set", "data.person_area=[0.98,0.99]")

    errors = [f for f in report.data_problems() if f["level"] == "error"]
    assert [finding["check"] for finding in errors].count("opening") == 1
    assert "data.person_area" in report.texts("selection", "error")
    assert report.finished.code == 3


def test_equal_names_of_different_images_are_not_duplicates(doctor: Doctor, tmp_path: Path) -> None:
    root, rng = tmp_path / "renamed", np.random.default_rng(0)
    for split in ("train", "val"):
        rows = [image_row(i, 70, 80) for i in range(1, 22)]
        outline = [[10, 10, 60, 10, 60, 50, 10, 50]]
        people = [annotation_row(i, i, outline) for i in range(1, 22)]
        shapes = {i: rng.integers(0, 256, (7, 8, 3)).astype(np.uint8) for i in range(1, 22)}
        images = {i: np.kron(s, np.ones((10, 10, 1), np.uint8)) for i, s in shapes.items()}
        write_coco(root, split, rows, people, pixels=images)

    report = doctor(root)

    assert "different images" in report.texts("same-names", "note")
    assert report.data_problems() == []


def test_flat_and_mirrored_images_are_not_duplicates() -> None:
    flat = [np.full((64, 64, 3), 90 + i, np.uint8) for i in range(4)]
    photo = np.asarray(smooth_photo(72, 72))
    a = [fingerprint(image) for image in [*flat, photo]]
    b = [fingerprint(image) for image in [*flat, photo[:, ::-1].copy(), photo[1:, 1:].copy()]]

    assert list(near_duplicates(a, b)) == [(4, 5)]
    assert list(near_duplicates([], b)) == []


def test_scanning_part_of_the_images_is_reported(
    doctor: Doctor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_scan, "MAX_SCANNED", 10)
    report = doctor(folder)

    assert report.content["data"]["train"]["looked_at"] == 10
    assert "10 images (of 24, evenly spaced)" in report.texts("damaged", "ok")


def test_the_scan_stops_at_the_time_limit(
    doctor: Doctor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_scan, "_MAX_SECONDS_PER_SPLIT", 0.0)
    report = doctor(folder)

    assert report.content["data"]["train"]["looked_at"] == 1
    assert "1 images (of 24, evenly spaced)" in report.texts("damaged", "ok")


# The machine.


def test_two_opencv_wheels_are_an_error(
    doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = tmp_path / "site" / "opencv_python-4.12.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: opencv-python\nVersion: 4.12.0\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    report = doctor()

    text = report.texts("opencv", "error")
    assert "pip uninstall -y opencv-python opencv-python-headless" in text
    assert "pip install opencv-python-headless" in text
    assert report.finished.code == 5
    assert "pip install opencv-python-headless" in report.finished.error_lines[0]


def test_opencv_without_libgl_is_an_error(
    doctor: Doctor, healthy_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    report = doctor(healthy_coco)

    assert "libGL.so.1" in report.texts("opencv", "error")
    assert report.finished.code == 5
    assert report.content["data"] == {}


def test_a_broken_opencv_is_reported_without_importing_it(tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open')\n")
    finished = subprocess.run(
        [sys.executable, "-m", "segtrain", "doctor"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )

    assert finished.returncode == 5, finished.stderr
    assert "pip install opencv-python-headless" in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize(("free", "level", "code"), [(10**8, "error", 5), (10**9, "warning", 10)])
def test_low_disk_space_is_reported(
    free: int, level: str, code: int, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def usage(path: Path) -> Usage:
        return Usage(10**12, 0, 10**12 if Path(path) == Path("/dev/shm") else free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    report = doctor()

    text = report.texts("disk", level)
    assert "free at least 2 GB" in text
    assert "cache" in text
    assert report.finished.code == code


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no shared memory here")
def test_too_little_shared_memory_is_a_warning(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def usage(path: Path) -> Usage:
        return Usage(10**12, 0, 10**6 if Path(path) == Path("/dev/shm") else 10**12)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    report = doctor("--set", "data.workers=4", "--set", "train.batch_size=16")

    text = report.texts("shared-memory", "warning")
    assert "--workers 0" in text
    assert "--shm-size=8g" in text
    assert report.finished.code == 10
    assert "--workers 0" not in doctor("--set", "data.workers=0").finished.out


def test_a_gpu_that_torch_cannot_use_is_a_warning(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = DriverGpu(name="NVIDIA T4", driver="570.1")
    monkeypatch.setattr(environment, "query_driver_gpus", lambda: [gpu])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    report = doctor()

    text = report.texts("gpu", "warning")
    assert "NVIDIA T4 would stay unused" in text
    assert "reinstall torch" in text
    assert report.finished.code == 10

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "driver 570.1 may be too old" in doctor().texts("gpu", "warning")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "unset CUDA_VISIBLE_DEVICES" in doctor().texts("gpu", "warning")


@pytest.mark.parametrize(
    ("gpu", "levels", "words"),
    [
        (Gpu(**H100), ["ok"], "85.0 GB (80.0 free), compute capability 9.0, bf16, driver 570.1"),
        (Gpu(**{**H100, "bf16": False}), ["ok"], "no bf16"),
        (Gpu(**{**H100, "free": 10**9}), ["ok", "warning"], "only 1.0 GB are free on cuda:0"),
        (Gpu(**H100, problem="no kernel image"), ["error"], "does not work: no kernel image"),
    ],
)
def test_gpus_available_to_torch_are_checked(gpu: Gpu, levels: list[str], words: str) -> None:
    machine = environment.inspect_machine(device_problem="", folders={}, shared_memory_needed=0)
    driver = [DriverGpu(name="NVIDIA H100", driver="570.1")]
    machine = replace(machine, gpus=[gpu], driver_gpus=driver)

    results = list(environment.check_gpus(machine))

    assert [level for level, _, _ in results] == levels
    assert words in results[-1][1]


def test_nvidia_smi_output_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 570.86.15'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    gpus = environment.query_driver_gpus()
    assert gpus == [DriverGpu(name="NVIDIA H100 80GB HBM3", driver="570.86.15")]
    tool.write_text("#!/bin/sh\necho 'has failed because it could not communicate'\nexit 9\n")
    assert environment.query_driver_gpus() == []


def test_no_gpu_is_a_note_but_a_requested_gpu_is_an_error(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "query_driver_gpus", list)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    assert "no GPU" in doctor().texts("gpu", "note")
    report = doctor("--device", "cuda:1")
    assert "--device auto" in report.texts("device", "error")
    assert report.finished.code == 5


def test_an_invalid_device_is_a_usage_error(segtrain: Command) -> None:
    assert segtrain("doctor", "--device", "gpu").code == 2


def test_an_unwritable_output_is_an_error(doctor: Doctor, healthy_coco: Path) -> None:
    Path("out").write_text("a file")
    report = doctor(healthy_coco)

    assert "another --output" in report.texts("writing", "error")
    assert report.finished.code == 5


@pytest.mark.gpu
def test_the_gpu_is_described(doctor: Doctor) -> None:
    text = doctor().texts("gpu", "ok")

    assert torch.cuda.get_device_name(0) in text
    assert "compute capability" in text


@pytest.mark.parametrize("name", ["coco-person-mini", "portraits-mini"])
def test_real_data_has_no_errors(name: str, doctor: Doctor, real_data: Path) -> None:
    report = doctor(real_data / name)

    assert report.data_problems() == []
