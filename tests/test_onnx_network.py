"""Predicting from an .onnx file: as torch does, without torch; and files from strangers."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
from conftest import Command
from export_cases import random_images
from onnx import TensorProto, helper
from test_export import assert_one_error

from segtrain.config import BnEval
from segtrain.errors import CheckpointError, UsageError
from segtrain.images import Pixels, write_image
from segtrain.prediction.metadata import _BN_EVALS
from segtrain.prediction.network import HowToRun, open_network
from segtrain.prediction.onnx_network import OnnxNetwork
from segtrain.prediction.torch_network import TorchNetwork
from segtrain.tiles import spans, weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    write_image(path, random_images(1, 90, 70)[0])
    return path


# --- The same answers as torch ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "size"),
    [
        (HowToRun(), (64, 64)),
        (HowToRun(), (150, 201)),
        (HowToRun(), (40, 33)),
        (HowToRun(size=97), (64, 300)),
        (HowToRun(tta="flip"), (90, 121)),
        (HowToRun(size=200, tile=128), (150, 230)),
        (HowToRun(size=200, tile=128, tta="flip"), (230, 150)),
        (HowToRun(size=160, tile=None), (160, 200)),
        (HowToRun(size=1040), (52, 53)),
    ],
    ids=str,
)
def test_the_answers_are_those_of_torch(
    exported_unet: tuple[Path, Path], how: HowToRun, size: tuple[int, int]
) -> None:
    checkpoint, path = exported_unet
    # Noise in blocks, for noise pixel by pixel looks the same everywhere when it is scaled.
    blocks = random_images(1, -(-size[0] // 10), -(-size[1] // 10))[0]
    image = blocks.repeat(10, axis=0).repeat(10, axis=1)[: size[0], : size[1]]

    [expected] = TorchNetwork(checkpoint, how).probs([image])
    [found] = OnnxNetwork(path, how).probs([image])

    assert np.asarray(expected).std() > 0.01
    assert np.asarray(found).dtype == np.float32
    assert found.shape == size
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_several_scales_differ_by_the_rounding_to_bytes(exported_unet: tuple[Path, Path]) -> None:
    checkpoint, path = exported_unet
    image, how = random_images(1, 90, 121)[0], HowToRun(tta="scales")

    [expected] = TorchNetwork(checkpoint, how).probs([image])
    [found] = OnnxNetwork(path, how).probs([image])
    difference = np.abs(np.asarray(found) - np.asarray(expected))

    assert difference.max() < 0.02
    assert difference.mean() < 1e-3


def test_a_file_may_hold_every_way_of_batch_norm() -> None:
    """They are written down twice, for the configuration takes long to import."""
    assert set(_BN_EVALS) == set(get_args(BnEval))


@pytest.mark.parametrize(("length", "side"), [(100, 128), (500, 128), (1000, 256), (4001, 512)])
def test_weights_of_tiles_sum_to_one_to_the_last_bit(length: int, side: int) -> None:
    total = np.zeros(length)
    for where, weight in zip(spans(length, side), weights(length, side), strict=True):
        total[where] += weight
    np.testing.assert_array_equal(total, np.ones(length))


def test_the_description_says_what_runs_it(exported_unet: tuple[Path, Path]) -> None:
    network = open_network(exported_unet[1], HowToRun(device="cpu"))

    assert network.description == "unet (fp32) on onnxruntime CPU"


# --- Without torch ------------------------------------------------------------------------------


def test_predict_imports_no_torch(exported_unet: tuple[Path, Path], picture: Path) -> None:
    script = (
        "import sys\n"
        "from segtrain.cli import run\n"
        "code = run(sys.argv[1:])\n"
        "heavy = {'torch', 'torchvision', 'matplotlib', 'albumentations', 'onnx'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
        "sys.exit(code)\n"
    )
    arguments = ["predict", str(picture), "--checkpoint", str(exported_unet[1])]

    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert Path("predictions/photo_mask.png").is_file()


def test_predict_writes_what_torch_would(
    segtrain: Command, exported_unet: tuple[Path, Path], picture: Path
) -> None:
    contents = []
    for number, network in enumerate(exported_unet):
        output = Path(str(number))
        finished = segtrain("predict", picture, "--checkpoint", network, "--output", output)
        assert finished.code == 0, finished.err
        contents.append((output / "photo_mask.png").read_bytes())

    assert contents[0] == contents[1]


def test_the_environment_can_name_the_file(
    segtrain: Command,
    exported_unet: tuple[Path, Path],
    picture: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SEGTRAIN_CHECKPOINT", str(exported_unet[1]))

    finished = segtrain("predict", picture)

    assert finished.code == 0, finished.err
    assert "onnxruntime" in finished.err


def test_without_onnxruntime_its_extra_is_named(
    segtrain: Command,
    exported_unet: tuple[Path, Path],
    picture: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)

    finished = segtrain("predict", picture, "--checkpoint", exported_unet[1])

    assert_one_error(finished, 2, "pip install 'segtrain[onnx]'")


# --- Wishes that a file cannot meet -------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (HowToRun(device="tpu"), "unknown"),
        (HowToRun(device="cuda:x"), "unknown"),
        (HowToRun(precision="bf16"), "computes in fp32"),
        (HowToRun(tile=100), "tiles cannot have a side"),
    ],
)
def test_a_wish_that_it_cannot_meet(
    exported_unet: tuple[Path, Path], how: HowToRun, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        OnnxNetwork(exported_unet[1], how)


def test_cuda_that_this_onnxruntime_has_not(exported_unet: tuple[Path, Path]) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("it has CUDA")
    with pytest.raises(UsageError, match="onnxruntime-gpu"):
        OnnxNetwork(exported_unet[1], HowToRun(device="cuda"))


BROKEN_CUDA = {
    "without a word": "cannot be loaded",
    "CUDA failure 101: invalid device ordinal": "invalid device ordinal",
}


@pytest.fixture(params=BROKEN_CUDA)
def problem(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An onnxruntime built for CUDA that cannot use it: it takes the CPU silently, or raises."""
    import onnxruntime

    real_session = onnxruntime.InferenceSession
    takes_the_cpu = request.param == "without a word"

    def session(content: bytes, options: Any, *, providers: Any, **others: Any) -> Any:
        if providers[0][0] == "CUDAExecutionProvider" and not takes_the_cpu:
            raise RuntimeError(request.param)
        return real_session(content, options, providers=["CPUExecutionProvider"], **others)

    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    return BROKEN_CUDA[request.param]


def test_on_cuda_float32_is_float32_and_no_size_of_picture_is_tried_out(
    exported_unet: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import onnxruntime

    real_session, asked = onnxruntime.InferenceSession, []

    def session(content: bytes, options: Any, *, providers: Any, **others: Any) -> Any:
        asked.extend(providers)
        return real_session(content, options, providers=["CPUExecutionProvider"], **others)

    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print(loaded.append("CUDA")))
    loaded: list[str] = []

    with pytest.raises(UsageError, match="cannot be loaded"):
        OnnxNetwork(exported_unet[1], HowToRun(device="cuda:1"))
    OnnxNetwork(exported_unet[1], HowToRun(device="cpu"))

    assert loaded == ["CUDA"]
    assert capsys.readouterr().out == ""
    [(provider, options), cpu] = asked
    assert provider == "CUDAExecutionProvider"
    assert options["device_id"] == "1"
    assert options["use_tf32"] == "0"
    assert options["cudnn_conv_algo_search"] == "HEURISTIC"
    assert cpu == ("CPUExecutionProvider", {})


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_that_cannot_be_used_is_refused_where_it_was_asked_for(
    exported_unet: tuple[Path, Path], problem: str, device: str
) -> None:
    with pytest.raises(UsageError) as caught:
        OnnxNetwork(exported_unet[1], HowToRun(device=device))

    for words in (f"--device {device} ", problem, "--device cpu"):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_auto_takes_the_cpu_where_cuda_cannot_be_used_and_says_so(
    exported_unet: tuple[Path, Path], problem: str
) -> None:
    picture = random_images(1, 60, 80)[0]
    [expected] = OnnxNetwork(exported_unet[1], HowToRun(device="cpu")).probs([picture])

    network = OnnxNetwork(exported_unet[1], HowToRun())

    assert "onnxruntime CPU, for it cannot use CUDA" in network.description
    assert problem in network.description
    np.testing.assert_array_equal(network.probs([picture])[0], expected)


def test_a_damaged_file_is_not_blamed_on_cuda(tmp_path: Path, problem: str) -> None:
    path = tmp_path / "damaged.onnx"
    path.write_bytes(b"no network")

    with pytest.raises(CheckpointError, match="damaged"):
        OnnxNetwork(path, HowToRun(device="cuda"))


# --- Files from strangers -----------------------------------------------------------------------


def changed(content: bytes, change: Callable[[Any], object]) -> bytes:
    model = onnx.load_from_string(content)
    change(model)
    return model.SerializeToString()


def set_said(key: str, value: str | None) -> Callable[[bytes], bytes]:
    """Another metadata entry; None for none."""

    def change(model: Any) -> None:
        said = {entry.key: entry.value for entry in model.metadata_props}
        said.pop(f"segtrain.{key}")
        del model.metadata_props[:]
        helper.set_model_props(model, said)
        if value is not None:
            model.metadata_props.add(key=f"segtrain.{key}", value=value)

    return lambda content: changed(content, change)


def with_foreign_operator(content: bytes) -> bytes:
    def change(model: Any) -> None:
        model.opset_import.append(helper.make_opsetid("stranger", 1))
        model.graph.node[-1].domain = "stranger"

    return changed(content, change)


def with_other_files(content: bytes) -> bytes:
    def change(model: Any) -> None:
        weight = model.graph.initializer[0]
        weight.data_location = TensorProto.EXTERNAL
        weight.ClearField("raw_data")
        for key, value in {"location": "secrets.bin", "offset": "0", "length": "4"}.items():
            weight.external_data.add(key=key, value=value)

    return changed(content, change)


def with_nan(content: bytes) -> bytes:
    def change(model: Any) -> None:
        head = [node for node in model.graph.node if node.op_type == "Conv"][-1]
        [weight] = [one for one in model.graph.initializer if one.name == head.input[1]]
        values = onnx.numpy_helper.to_array(weight) * np.float32("nan")
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))

    return changed(content, change)


def other_network(content: bytes) -> bytes:
    """Our metadata on a network that takes floats."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", "h", "w", 3])
    probs = helper.make_tensor_value_info("probs", TensorProto.FLOAT, ["n", "h", "w", 3])
    node = helper.make_node("Identity", ["image"], ["probs"])
    graph = helper.make_graph([node], "g", [image], [probs])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    model.metadata_props.extend(onnx.load_from_string(content).metadata_props)
    return model.SerializeToString()


FAULTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "damaged"),
    "garbage": (lambda content: b"garbage" * 100, "damaged"),
    "cut short": (lambda content: content[: len(content) // 2], "damaged"),
    "not ours": (set_said("format_version", None), "segtrain export did not write it"),
    "newer": (set_said("format_version", "2"), "export the checkpoint again"),
    "other classes": (set_said("classes", '["cat", "dog"]'), "classes"),
    "no list": (set_said("classes", "{"), "cannot be used"),
    "deep": (set_said("model", "[" * 100_000), "cannot be used"),
    "no model": (set_said("model", "[]"), "no name"),
    "no size": (set_said("short_side", "-5"), "short_side"),
    "huge size": (set_said("short_side", "9" * 30), "short_side"),
    "no precision": (set_said("precision", "fp8"), "precision"),
    "no batch norm": (set_said("bn_eval", "x"), "bn_eval"),
    "foreign operator": (with_foreign_operator, "stranger"),
    "other files": (with_other_files, "other files"),
    "other network": (other_network, "does not take"),
    "not a number": (with_nan, "nonsense"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_ends_in_one_line(
    segtrain: Command, exported_unet: tuple[Path, Path], picture: Path, fault: str
) -> None:
    spoil, word = FAULTS[fault]
    Path("faulty.onnx").write_bytes(spoil(exported_unet[1].read_bytes()))

    finished = segtrain("predict", picture, "--checkpoint", "faulty.onnx")

    assert_one_error(finished, 4, "faulty.onnx", word)
    assert not list(Path().glob("predictions/*"))


def test_an_answer_of_another_size_is_nonsense(exported_unet: tuple[Path, Path]) -> None:
    network = OnnxNetwork(exported_unet[1], HowToRun())

    class Liar:
        def run(self, names: None, inputs: dict[str, Pixels]) -> list[np.ndarray]:
            return [np.zeros((1, 2, 3), dtype=np.float32)]

    network._session._session = Liar()

    with pytest.raises(CheckpointError, match="nonsense"):
        network.probs([random_images(1, 64, 64)[0]])


def test_out_of_memory_is_no_damage(exported_unet: tuple[Path, Path]) -> None:
    network = OnnxNetwork(exported_unet[1], HowToRun())

    class Full:
        def run(self, names: None, inputs: dict[str, Pixels]) -> list[np.ndarray]:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 99")

    network._session._session = Full()

    with pytest.raises(MemoryError):
        network.probs([random_images(1, 64, 64)[0]])
