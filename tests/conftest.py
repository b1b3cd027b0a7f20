"""What several test files share."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from coco_fixtures import make_toy_coco
from export_cases import write_checkpoint

from segtrain.cli import run

# Read when triton is imported. Without a GPU its kernels are interpreted (test_dense_layer_triton).
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A network and a run small enough to train in a second or two.
TOY_TRAINING = (
    *("--set", "model.base_channels=4", "--set", "model.depth=2", "--set", "optim.warmup_steps=5"),
    *("--image-size", "48", "--batch-size", "4", "--workers", "0", "--precision", "fp32"),
    *("--device", "cpu"),
)


@dataclass(frozen=True)
class Finished:
    """A command line that has run."""

    code: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error:")]


Command = Callable[..., Finished]


@pytest.fixture
def segtrain(capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs `segtrain ARGUMENTS` in this process."""

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
    """A small U-Net as a checkpoint and as the .onnx that `segtrain export` makes of it."""
    folder = tmp_path_factory.mktemp("exported")
    checkpoint = write_checkpoint(folder / "unet.pt", "model.base_channels=4", "model.depth=2")
    onnx = folder / "unet.onnx"
    assert run(["export", "--checkpoint", str(checkpoint), "--output", str(onnx), "--debug"]) == 0
    return checkpoint, onnx


@pytest.fixture(autouse=True)
def _own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the user's data, checkpoints, cache or runs."""
    for name in ("SEGTRAIN_DATA", "SEGTRAIN_CHECKPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SEGTRAIN_CACHE", str(tmp_path / "cache"))
    # Nor a signal that another one has sent.
    monkeypatch.setattr("segtrain.stopping._received", [])
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _own_float32() -> Iterator[None]:
    """Training sets these switches for good; no test computes in the precision of another."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For files with such small pictures that threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within, whatever waits for the GPU raises."""
    with warnings.catch_warnings():
        # As an exception it would come when the mode is set, and leave it so for all other tests.
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """For files with many toy runs, most of whose seconds go into drawing their curves."""
    monkeypatch.setattr("segtrain.training.outputs.write_curves", lambda path, history: None)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real people, where a checkout has them beside it: never part of the project."""
    path = Path(__file__).parents[2] / "shared" / "data"
    path = Path(os.environ.get("SEGTRAIN_REAL_DATA", path))
    if not path.is_dir():
        pytest.skip("no real data beside the checkout; set SEGTRAIN_REAL_DATA")
    return path
