"""Fixtures shared by several test files."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.coco import make_toy_coco
from helpers.command import TOY_TRAINING, Command, Finished
from helpers.export import write_checkpoint

from segtrain.cli.main import run

# triton reads it on import. Without a GPU its kernels are interpreted (test_dense_layer_triton).
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def segtrain(capfd: pytest.CaptureFixture[str]) -> Command:
    """Run `segtrain ARGUMENTS` in this process."""

    def command(*arguments: str | Path) -> Finished:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Finished(code, out, err)

    return command


@pytest.fixture(scope="session")
def toy_coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny data set in COCO layout that a tiny network can learn."""
    return make_toy_coco(tmp_path_factory.mktemp("toy") / "coco")


@pytest.fixture(scope="session")
def trained_run(toy_coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished toy run."""
    output = tmp_path_factory.mktemp("trained")
    arguments = ["--data", str(toy_coco), "--output", str(output), "--name", "toy"]
    assert run(["train", *arguments, "--epochs", "2", *TOY_TRAINING, "--debug"]) == 0
    return output / "toy"


@pytest.fixture(scope="session")
def exported_unet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small U-Net as a checkpoint, and its `segtrain export` to ONNX."""
    folder = tmp_path_factory.mktemp("exported")
    checkpoint = write_checkpoint(folder / "unet.pt", "model.base_channels=4", "model.depth=2")
    onnx = folder / "unet.onnx"
    assert run(["export", "--checkpoint", str(checkpoint), "--output", str(onnx), "--debug"]) == 0
    return checkpoint, onnx


@pytest.fixture(autouse=True)
def _isolated_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the user's data, checkpoints, cache and runs, and signals received in other tests."""
    for name in ("SEGTRAIN_DATA", "SEGTRAIN_CHECKPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SEGTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("segtrain.runtime.signals._received", [])
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _restore_float32_precision() -> Iterator[None]:
    """Training sets these switches permanently; restore them for the next test."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For files whose images are so small that threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """For files with many toy runs, which would spend most of their time on plots."""
    monkeypatch.setattr("segtrain.training.reporting.write_curves", lambda path, history: None)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Images of real people beside the checkout, if any; they are not part of the project."""
    path = Path(__file__).parents[2] / "shared" / "data"
    path = Path(os.environ.get("SEGTRAIN_REAL_DATA", path))
    if not path.is_dir():
        pytest.skip("no real data beside the checkout; set SEGTRAIN_REAL_DATA")
    return path
