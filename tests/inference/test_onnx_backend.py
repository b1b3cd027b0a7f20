"""Prediction from an .onnx file: equal to torch, without importing torch; and untrusted files."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
from helpers.command import Command, assert_one_error
from helpers.export import random_images
from onnx import TensorProto, helper

from segtrain.config.schema import BnEval
from segtrain.errors import CheckpointError, UsageError
from segtrain.imaging.images import write_image
from segtrain.inference.load import load_backend
from segtrain.inference.onnx_backend import OnnxBackend
from segtrain.inference.onnx_metadata import _BN_EVALS
from segtrain.inference.options import InferenceOptions
from segtrain.inference.tiles import tile_spans, tile_weights
from segtrain.inference.torch_backend import TorchBackend
from segtrain.types import Image

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    write_image(path, random_images(1, 90, 70)[0])
    return path


# --- Equality with torch ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (InferenceOptions(), (64, 64)),
        (InferenceOptions(), (150, 201)),
        (InferenceOptions(), (40, 33)),
        (InferenceOptions(size=97), (64, 300)),
        (InferenceOptions(tta="flip"), (90, 121)),
        (InferenceOptions(size=200, tile=128), (150, 230)),
        (InferenceOptions(size=200, tile=128, tta="flip"), (230, 150)),
        (InferenceOptions(size=160, tile=None), (160, 200)),
        (InferenceOptions(size=1040), (52, 53)),
    ],
    ids=str,
)
def test_probabilities_equal_torch(
    exported_unet: tuple[Path, Path], options: InferenceOptions, size: tuple[int, int]
) -> None:
    checkpoint, path = exported_unet
    # Noise in blocks of 10 pixels: pixel noise would be nearly uniform after scaling.
    blocks = random_images(1, -(-size[0] // 10), -(-size[1] // 10))[0]
    image = blocks.repeat(10, axis=0).repeat(10, axis=1)[: size[0], : size[1]]

    [expected] = TorchBackend(checkpoint, options).probs([image])
    [actual] = OnnxBackend(path, options).probs([image])

    assert np.asarray(expected).std() > 0.01
    assert np.asarray(actual).dtype == np.float32
    assert actual.shape == size
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


def test_scales_differ_from_torch_only_by_rounding_to_bytes(
    exported_unet: tuple[Path, Path],
) -> None:
    checkpoint, path = exported_unet
    image, options = random_images(1, 90, 121)[0], InferenceOptions(tta="scales")

    [expected] = TorchBackend(checkpoint, options).probs([image])
    [actual] = OnnxBackend(path, options).probs([image])
    difference = np.abs(np.asarray(actual) - np.asarray(expected))

    assert difference.max() < 0.02
    assert difference.mean() < 1e-3


def test_metadata_accepts_every_bn_eval() -> None:
    """The list is duplicated because the configuration schema is slow to import."""
    assert set(_BN_EVALS) == set(get_args(BnEval))


@pytest.mark.parametrize(
    ("length", "tile_size"), [(100, 128), (500, 128), (1000, 256), (4001, 512)]
)
def test_tile_weights_sum_to_exactly_one(length: int, tile_size: int) -> None:
    total = np.zeros(length)
    spans, weights = tile_spans(length, tile_size), tile_weights(length, tile_size)
    for span, weight in zip(spans, weights, strict=True):
        total[span] += weight
    np.testing.assert_array_equal(total, np.ones(length))


def test_the_description_names_the_runtime(exported_unet: tuple[Path, Path]) -> None:
    backend = load_backend(exported_unet[1], InferenceOptions(device="cpu"))

    assert backend.description == "unet (fp32) on onnxruntime CPU"


# --- Without torch ------------------------------------------------------------------------------


def test_predict_does_not_import_torch(exported_unet: tuple[Path, Path], image: Path) -> None:
    script = (
        "import sys\n"
        "from segtrain.cli.main import run\n"
        "code = run(sys.argv[1:])\n"
        "heavy = {'torch', 'torchvision', 'matplotlib', 'albumentations', 'onnx'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
        "sys.exit(code)\n"
    )
    arguments = ["predict", str(image), "--checkpoint", str(exported_unet[1])]

    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert Path("predictions/photo_mask.png").is_file()


def test_predict_writes_the_same_mask_as_torch(
    segtrain: Command, exported_unet: tuple[Path, Path], image: Path
) -> None:
    contents = []
    for index, checkpoint in enumerate(exported_unet):
        output = Path(str(index))
        finished = segtrain("predict", image, "--checkpoint", checkpoint, "--output", output)
        assert finished.code == 0, finished.err
        contents.append((output / "photo_mask.png").read_bytes())

    assert contents[0] == contents[1]


def test_the_environment_variable_can_name_the_file(
    segtrain: Command,
    exported_unet: tuple[Path, Path],
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SEGTRAIN_CHECKPOINT", str(exported_unet[1]))

    finished = segtrain("predict", image)

    assert finished.code == 0, finished.err
    assert "onnxruntime" in finished.err


def test_without_onnxruntime_the_error_names_the_extra(
    segtrain: Command,
    exported_unet: tuple[Path, Path],
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)

    finished = segtrain("predict", image, "--checkpoint", exported_unet[1])

    assert_one_error(finished, 2, "pip install 'segtrain[onnx]'")


# --- Unsupported options ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "tpu"}, "unknown"),
        ({"device": "cuda:x"}, "unknown"),
        ({"precision": "bf16"}, "computes in fp32"),
        ({"tile": 100}, "invalid tile size"),
    ],
)
def test_unsupported_options_are_rejected(
    exported_unet: tuple[Path, Path], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        OnnxBackend(exported_unet[1], InferenceOptions(**options))


def test_an_onnxruntime_without_cuda_is_an_error(exported_unet: tuple[Path, Path]) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(UsageError, match="onnxruntime-gpu"):
        OnnxBackend(exported_unet[1], InferenceOptions(device="cuda"))


BROKEN_CUDA = {
    "silent fallback": "cannot be loaded",
    "CUDA failure 101: invalid device ordinal": "invalid device ordinal",
}


@pytest.fixture(params=BROKEN_CUDA)
def problem(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An onnxruntime built for CUDA that cannot use it: it silently uses the CPU, or raises."""
    import onnxruntime

    real_session = onnxruntime.InferenceSession
    falls_back = request.param == "silent fallback"

    def open_session(content: bytes, options: Any, *, providers: Any, **others: Any) -> Any:
        if providers[0][0] == "CUDAExecutionProvider" and not falls_back:
            raise RuntimeError(request.param)
        return real_session(content, options, providers=["CPUExecutionProvider"], **others)

    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    return BROKEN_CUDA[request.param]


def test_cuda_runs_without_tf32_and_without_benchmarking(
    exported_unet: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import onnxruntime

    real_session, requested = onnxruntime.InferenceSession, []

    def open_session(content: bytes, options: Any, *, providers: Any, **others: Any) -> Any:
        requested.extend(providers)
        return real_session(content, options, providers=["CPUExecutionProvider"], **others)

    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print(preloaded.append("CUDA")))
    preloaded: list[str] = []

    with pytest.raises(UsageError, match="cannot be loaded"):
        OnnxBackend(exported_unet[1], InferenceOptions(device="cuda:1"))
    OnnxBackend(exported_unet[1], InferenceOptions(device="cpu"))

    assert preloaded == ["CUDA"]
    assert capsys.readouterr().out == ""
    [(provider, options), cpu] = requested
    assert provider == "CUDAExecutionProvider"
    assert options["device_id"] == "1"
    assert options["use_tf32"] == "0"
    assert options["cudnn_conv_algo_search"] == "HEURISTIC"
    assert cpu == ("CPUExecutionProvider", {})


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_unusable_cuda_is_an_error_if_it_is_requested(
    exported_unet: tuple[Path, Path], problem: str, device: str
) -> None:
    with pytest.raises(UsageError) as caught:
        OnnxBackend(exported_unet[1], InferenceOptions(device=device))

    for words in (f"--device {device} ", problem, "--device cpu"):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_auto_falls_back_to_the_cpu_and_reports_it(
    exported_unet: tuple[Path, Path], problem: str
) -> None:
    image = random_images(1, 60, 80)[0]
    [expected] = OnnxBackend(exported_unet[1], InferenceOptions(device="cpu")).probs([image])

    backend = OnnxBackend(exported_unet[1], InferenceOptions())

    assert "onnxruntime CPU (cannot use CUDA: " in backend.description
    assert problem in backend.description
    np.testing.assert_array_equal(backend.probs([image])[0], expected)


def test_a_damaged_file_is_not_reported_as_a_cuda_problem(tmp_path: Path, problem: str) -> None:
    path = tmp_path / "damaged.onnx"
    path.write_bytes(b"not a network")

    with pytest.raises(CheckpointError, match="damaged"):
        OnnxBackend(path, InferenceOptions(device="cuda"))


# --- Untrusted files ----------------------------------------------------------------------------


def edit_model(content: bytes, change: Callable[[Any], object]) -> bytes:
    model = onnx.load_from_string(content)
    change(model)
    return model.SerializeToString()


def set_metadata(key: str, value: str | None) -> Callable[[bytes], bytes]:
    """Replace a metadata entry; None removes it."""

    def change(model: Any) -> None:
        entries = {entry.key: entry.value for entry in model.metadata_props}
        entries.pop(f"segtrain.{key}")
        del model.metadata_props[:]
        helper.set_model_props(model, entries)
        if value is not None:
            model.metadata_props.add(key=f"segtrain.{key}", value=value)

    return lambda content: edit_model(content, change)


def with_custom_operator(content: bytes) -> bytes:
    def change(model: Any) -> None:
        model.opset_import.append(helper.make_opsetid("stranger", 1))
        model.graph.node[-1].domain = "stranger"

    return edit_model(content, change)


def with_external_data(content: bytes) -> bytes:
    def change(model: Any) -> None:
        weight = model.graph.initializer[0]
        weight.data_location = TensorProto.EXTERNAL
        weight.ClearField("raw_data")
        for key, value in {"location": "secrets.bin", "offset": "0", "length": "4"}.items():
            weight.external_data.add(key=key, value=value)

    return edit_model(content, change)


def with_nan(content: bytes) -> bytes:
    def change(model: Any) -> None:
        head = [node for node in model.graph.node if node.op_type == "Conv"][-1]
        [weight] = [tensor for tensor in model.graph.initializer if tensor.name == head.input[1]]
        values = onnx.numpy_helper.to_array(weight) * np.float32("nan")
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))

    return edit_model(content, change)


def other_network(content: bytes) -> bytes:
    """A network that takes floats, with our metadata."""
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
    "other origin": (set_metadata("format_version", None), "segtrain export did not write it"),
    "newer format": (set_metadata("format_version", "2"), "export the checkpoint again"),
    "other classes": (set_metadata("classes", '["cat", "dog"]'), "classes"),
    "invalid JSON": (set_metadata("classes", "{"), "cannot use"),
    "deep JSON": (set_metadata("model", "[" * 100_000), "cannot use"),
    "no model": (set_metadata("model", "[]"), "no name"),
    "no size": (set_metadata("short_side", "-5"), "short_side"),
    "huge size": (set_metadata("short_side", "9" * 30), "short_side"),
    "no precision": (set_metadata("precision", "fp8"), "precision"),
    "no batch norm": (set_metadata("bn_eval", "x"), "bn_eval"),
    "custom operator": (with_custom_operator, "stranger"),
    "external data": (with_external_data, "other files"),
    "other network": (other_network, "its signature"),
    "nan": (with_nan, "invalid probabilities"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_is_one_error_line(
    segtrain: Command, exported_unet: tuple[Path, Path], image: Path, fault: str
) -> None:
    damage, words = FAULTS[fault]
    Path("faulty.onnx").write_bytes(damage(exported_unet[1].read_bytes()))

    finished = segtrain("predict", image, "--checkpoint", "faulty.onnx")

    assert_one_error(finished, 4, "faulty.onnx", words)
    assert not list(Path().glob("predictions/*"))


def test_an_output_of_another_size_is_rejected(exported_unet: tuple[Path, Path]) -> None:
    backend = OnnxBackend(exported_unet[1], InferenceOptions())

    class WrongSize:
        def run(self, names: None, inputs: dict[str, Image]) -> list[np.ndarray]:
            return [np.zeros((1, 2, 3), dtype=np.float32)]

    backend._session._session = WrongSize()

    with pytest.raises(CheckpointError, match="invalid probabilities"):
        backend.probs([random_images(1, 64, 64)[0]])


def test_out_of_memory_is_not_reported_as_damage(exported_unet: tuple[Path, Path]) -> None:
    backend = OnnxBackend(exported_unet[1], InferenceOptions())

    class OutOfMemory:
        def run(self, names: None, inputs: dict[str, Image]) -> list[np.ndarray]:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 99")

    backend._session._session = OutOfMemory()

    with pytest.raises(MemoryError):
        backend.probs([random_images(1, 64, 64)[0]])
