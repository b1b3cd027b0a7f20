"""Exported files compared with torch, at many sizes and in every format; and planted faults."""

import hashlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.command import Command, Finished
from helpers.export import TIRAMISU, random_images, torch_probs, write_checkpoint
from safetensors.torch import load_file

import segtrain as segtrain_package
from segtrain.checkpoint import load_checkpoint
from segtrain.export.module import suppress_warnings
from segtrain.export.onnx import load_onnx
from segtrain.export.run import FORMATS, ExportFormat
from segtrain.export.safetensors_file import model_from_bytes
from segtrain.types import Image

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [(1, 64, 64), (3, 65, 97), (1, 33, 120), (2, 128, 47), (1, 31, 31)]
TINY = [(1, 1, 1), (1, 1, 7), (3, 5, 2)]


def run_onnx(path: Path, images: Image) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["probs"], {"image": images})[0]


def assert_one_error(finished: Finished, code: int, *words: str) -> None:
    assert finished.code == code, finished.err
    assert len(finished.error_lines) == 1
    assert "Traceback" not in finished.err
    for word in words:
        assert word in finished.error_lines[0]


# --- ONNX ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SIZES + TINY, ids=str)
def test_onnx_equals_torch_at_every_size(
    exported_unet: tuple[Path, Path], shape: tuple[int, int, int]
) -> None:
    checkpoint, path = exported_unet
    images = random_images(*shape)

    expected = torch_probs(checkpoint, images)

    assert expected.std() > 0.01 or shape in TINY
    np.testing.assert_allclose(run_onnx(path, images), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_images_of_a_batch_are_normalized_independently(segtrain: Command, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiramisu.pt", *TIRAMISU)

    finished = segtrain("export", "--checkpoint", checkpoint)

    assert finished.code == 0, finished.err
    assert finished.out.startswith("tiramisu.onnx: 0.")
    assert "on five sizes:" in finished.err
    assert "any N, H and W" in finished.err
    assert "WARNING" not in finished.err
    for shape in SIZES:
        images = random_images(*shape)
        expected = torch_probs(checkpoint, images)
        assert expected.std() > 0.01
        probs = run_onnx(Path("tiramisu.onnx"), images)
        np.testing.assert_allclose(probs, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sets",
    [
        ("model.base_channels=4", "model.depth=3", "model.norm=group", "model.up=bilinear"),
        ("model.base_channels=4", "model.norm=none"),
        ("model.encoder=alexnet",),
        ("model.encoder=resnet18", "model.up=bilinear", "train.bn_eval=batch"),
        ("model.encoder=mobilenet_v3_large",),
        ("model.encoder=efficientnet_b0",),
        ("model.encoder=convnext_tiny",),
        ("model.encoder=vgg16_bn",),
        ("model.name=fc_densenet56",),
        ("model.name=fc_densenet56", "train.bn_eval=batch"),
    ],
    ids=" ".join,
)
def test_every_kind_of_network_is_exported(
    segtrain: Command, tmp_path: Path, sets: tuple[str, ...]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "network.pt", *sets)

    finished = segtrain("export", "--checkpoint", checkpoint)

    assert finished.code == 0, finished.err
    for shape in [(3, 65, 97), (1, 96, 64)]:
        images = random_images(*shape)
        probs = run_onnx(Path("network.onnx"), images)
        np.testing.assert_allclose(probs, torch_probs(checkpoint, images), rtol=0, atol=1e-3)


def test_the_file_is_valid_with_dynamic_sizes_and_standard_operators(
    exported_unet: tuple[Path, Path],
) -> None:
    model = onnx.load(exported_unet[1])

    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    assert not model.functions
    [image], [probs] = model.graph.input, model.graph.output
    dims = [
        [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (image, probs)
    ]
    assert (image.name, image.type.tensor_type.elem_type) == ("image", onnx.TensorProto.UINT8)
    assert (probs.name, probs.type.tensor_type.elem_type) == ("probs", onnx.TensorProto.FLOAT)
    assert dims == [["batch", "height", "width", 3], ["batch", "height", "width"]]


def test_the_file_has_metadata(exported_unet: tuple[Path, Path]) -> None:
    checkpoint, path = exported_unet

    props = {entry.key: entry.value for entry in onnx.load(path).metadata_props}

    assert props["segtrain.format_version"] == "1"
    assert json.loads(props["segtrain.classes"]) == ["background", "person"]
    assert json.loads(props["segtrain.model"]) == {"name": "unet", "base_channels": 4, "depth": 2}
    assert props["segtrain.short_side"] == "64"
    assert props["segtrain.bn_eval"] == "running"
    assert props["segtrain.precision"] == "fp32"
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert props["segtrain.checkpoint_sha256"] == digest


def assert_has_no_path_of_this_machine(path: Path) -> None:
    content = path.read_bytes()
    package = Path(segtrain_package.__file__).parent
    for folder in (Path(torch.__file__).parent, package, Path.home()):
        assert f"{folder}/".encode() not in content


def test_the_file_has_no_path_of_this_machine(exported_unet: tuple[Path, Path]) -> None:
    assert_has_no_path_of_this_machine(exported_unet[1])


def tamper(content: bytes) -> bytes:
    """Scale the weights of the last convolution by 1.05."""
    model = onnx.load_from_string(content)
    head = [node for node in model.graph.node if node.op_type == "Conv"][-1]
    [weight] = [tensor for tensor in model.graph.initializer if tensor.name == head.input[1]]
    values = onnx.numpy_helper.to_array(weight) * np.float32(1.05)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    return model.SerializeToString()


def test_a_file_that_differs_from_torch_is_not_written(
    segtrain: Command, exported_unet: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = exported_unet[1].read_bytes()
    export_format = ExportFormat(lambda model, metadata: tamper(good), load_onnx)
    monkeypatch.setitem(FORMATS, "onnx", export_format)

    finished = segtrain("export", "--checkpoint", exported_unet[0])

    assert_one_error(finished, 4, "differ from torch by 0.0", "nothing was written")
    assert list(Path().iterdir()) == []


# --- Output path --------------------------------------------------------------------------------


def test_an_existing_file_is_kept(segtrain: Command, exported_unet: tuple[Path, Path]) -> None:
    for name, option in (("unet.onnx", "onnx"), ("unet.json", "safetensors")):
        Path(name).write_text("precious")
        finished = segtrain("export", "--checkpoint", exported_unet[0], "--format", option)
        assert_one_error(finished, 2, f"{name} exists", "--overwrite")
        assert Path(name).read_text() == "precious"


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
@pytest.mark.parametrize(("name", "option"), [("a.onnx", "onnx"), ("a.json", "safetensors")])
def test_a_folder_at_the_output_path_is_reported_before_exporting(
    segtrain: Command,
    exported_unet: tuple[Path, Path],
    name: str,
    option: str,
    overwrite: tuple[str, ...],
) -> None:
    Path(name).mkdir()
    output = Path(name).with_suffix(f".{option}")

    finished = segtrain(
        *("export", "--checkpoint", exported_unet[0], "--format", option),
        *("--output", output, *overwrite),
    )

    assert_one_error(finished, 2, f"{name} is a folder", "another --output")
    assert "exporting" not in finished.err
    assert list(Path().rglob("*")) == [Path(name)]


def test_a_file_among_the_parent_folders_is_reported_before_exporting(
    segtrain: Command, exported_unet: tuple[Path, Path]
) -> None:
    Path("notes").write_text("precious")

    finished = segtrain("export", "--checkpoint", exported_unet[0], "--output", "notes/deep/a.onnx")

    assert_one_error(finished, 2, "notes is a file", "another --output")
    assert Path("notes").read_text() == "precious"


def test_the_file_is_named_after_the_run(segtrain: Command, trained_run: Path) -> None:
    Path(".toy.safetensors.77.tmp").write_text("left by a killed export")
    Path(".other.safetensors.77.tmp").write_text("being written")

    finished = segtrain("export", "--checkpoint", trained_run, "--format", "safetensors")

    assert finished.code == 0, finished.err
    assert sorted(path.name for path in Path().iterdir()) == [
        ".other.safetensors.77.tmp",
        "toy.json",
        "toy.safetensors",
    ]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--output", "network.bin"), ".onnx"),
        (("--format", "torch", "--precision", "fp16"), "--format onnx"),
        (("--data", "somewhere"), "--precision"),
    ],
)
def test_contradicting_options_are_a_usage_error(
    segtrain: Command, exported_unet: tuple[Path, Path], options: tuple[str, ...], word: str
) -> None:
    assert_one_error(segtrain("export", "--checkpoint", exported_unet[0], *options), 2, word)


def test_a_tiled_network_is_refused(segtrain: Command, tmp_path: Path) -> None:
    sets = ("model.padding=valid", "model.norm=none", "model.base_channels=2", "model.depth=1")
    checkpoint = write_checkpoint(tmp_path / "paper.pt", *sets)

    finished = segtrain("export", "--checkpoint", checkpoint)

    assert_one_error(finished, 2, "padding=valid", "--format safetensors")


@pytest.mark.parametrize(
    ("module", "format_name", "extra"),
    [
        ("onnx", "onnx", "onnx"),
        ("onnxscript", "onnx", "onnx"),
        ("onnxruntime", "onnx", "onnx"),
        ("safetensors.torch", "safetensors", "safetensors"),
    ],
)
def test_a_missing_library_is_reported_with_its_extra(
    segtrain: Command,
    exported_unet: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    format_name: str,
    extra: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)

    finished = segtrain("export", "--checkpoint", exported_unet[0], "--format", format_name)

    assert_one_error(finished, 2, f"pip install 'segtrain[{extra}]'")


# --- torch and safetensors ----------------------------------------------------------------------


def test_a_torch_program_equals_torch_at_every_size(
    segtrain: Command, exported_unet: tuple[Path, Path]
) -> None:
    checkpoint = exported_unet[0]
    finished = segtrain("export", "--checkpoint", checkpoint, "--format", "torch")
    assert finished.code == 0, finished.err

    extra = {"segtrain.json": ""}
    program = torch.export.load("unet.pt2", extra_files=extra)

    module = program.module(check_guards=False)
    assert_has_no_path_of_this_machine(Path("unet.pt2"))
    assert json.loads(extra["segtrain.json"])["short_side"] == 64
    for shape in SIZES + TINY:
        images = random_images(*shape)
        probs = module(torch.from_numpy(images)).detach().numpy()
        np.testing.assert_allclose(probs, torch_probs(checkpoint, images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "sets",
    [("model.base_channels=4",), ("model.padding=valid", "model.base_channels=2"), TIRAMISU],
    ids=["unet", "valid", "tiramisu"],
)
def test_safetensors_rebuild_the_same_model(
    segtrain: Command, tmp_path: Path, sets: tuple[str, ...]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "network.pt", *sets)
    finished = segtrain("export", "--checkpoint", checkpoint, "--format", "safetensors")
    assert finished.code == 0, finished.err

    weights = load_file("network.safetensors")
    original = load_checkpoint(checkpoint)

    assert weights.keys() == original.weights.keys()
    for key, weight in weights.items():
        assert torch.equal(weight, original.weights[key]), key
    path = Path("network.safetensors")
    model, metadata = model_from_bytes(path.read_bytes(), path)
    assert metadata.to_dict() == json.loads(Path("network.json").read_text())
    rebuilt = model.state_dict()
    assert all(torch.equal(rebuilt[key], weight) for key, weight in weights.items())


# --- Lower precision ----------------------------------------------------------------------------


def export_lower_precision(segtrain: Command, run: Path, precision: str, *options: Any) -> Finished:
    finished = segtrain("export", "--checkpoint", run, "--precision", precision, *options)
    assert finished.code == 0, finished.err
    assert "WARNING" not in finished.err
    return finished


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_the_accuracy_drop_of_a_lower_precision_is_logged(
    segtrain: Command, trained_run: Path, toy_coco: Path, precision: str
) -> None:
    finished = export_lower_precision(segtrain, trained_run, precision)

    [line] = [line for line in finished.err.splitlines() if line.startswith("fp32 -> ")]
    assert f"-> {precision}: person IoU" in line
    assert "points) on" in line
    assert f"data to measure on: {toy_coco}" in finished.err
    path = Path(f"toy-{precision}.onnx")
    model = onnx.load(path)
    props = {entry.key: entry.value for entry in model.metadata_props}
    assert props["segtrain.precision"] == precision
    weights = [
        tensor for tensor in model.graph.initializer if len(tensor.dims) == 4 and tensor.dims[0] > 1
    ]
    dtypes = {weight.data_type for weight in weights}
    assert dtypes == {getattr(onnx.TensorProto, {"fp16": "FLOAT16", "int8": "INT8"}[precision])}
    images = random_images(2, 65, 97)
    expected = torch_probs(trained_run / "checkpoints" / "best.pt", images)
    difference = np.abs(run_onnx(path, images) - expected)
    assert 0 < difference.mean() < {"fp16": 2e-3, "int8": 0.1}[precision]


def test_the_accuracy_drop_equals_a_count_by_hand(toy_coco: Path) -> None:
    """For two backends that predict one probability everywhere."""
    from segtrain.config.schema import DataConfig
    from segtrain.data.datasets import open_selection
    from segtrain.export.quality import measure_accuracy_drop

    class Constant:
        description = "constant"

        def __init__(self, value: float) -> None:
            self.value = np.float32(value)

        def probs(self, images: list[Image]) -> list[np.ndarray]:
            return [np.full(image.shape[:2], self.value) for image in images]

    config = DataConfig(root=str(toy_coco))
    images = open_selection(config, "val")
    masks = [images.sample(index).mask for index in range(len(images))]
    person = sum(int((mask == 1).sum()) for mask in masks)
    num_pixels = sum(int((mask != 255).sum()) for mask in masks)

    drop = measure_accuracy_drop(Constant(0.75), Constant(0.25), config)

    assert drop.before == pytest.approx(person / num_pixels)
    assert drop.after == 0
    assert (drop.mean_difference, drop.max_difference) == (0.5, 0.5)
    assert drop.num_images == len(masks)
    assert f"({-100 * person / num_pixels:+.2f} points)" in str(drop)


def test_without_training_data_the_accuracy_is_measured_on_drawn_people(
    segtrain: Command,
    exported_unet: tuple[Path, Path],
    toy_coco: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("segtrain.export.quality.demo_people_root", lambda: toy_coco)

    finished = export_lower_precision(segtrain, exported_unet[0], "fp16")

    assert "measured on drawn people" in finished.err


def test_log_handlers_that_a_library_adds_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a handler on the root logger, every line would appear twice on the console."""
    monkeypatch.setattr(logging.root, "handlers", [])

    with suppress_warnings():
        logging.info("as onnxruntime does")  # adds a handler if there is none

    assert logging.root.handlers == []
