"""`segtrain export`: export a checkpoint, compare the result with torch, and write it."""

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from segtrain.checkpoint import Checkpoint, load_checkpoint, restore_model
from segtrain.config.resolve import config_to_dict
from segtrain.errors import CheckpointError
from segtrain.export.onnx import int8_bytes, load_onnx, onnx_bytes
from segtrain.export.options import ExportPlan, FormatName
from segtrain.export.quality import (
    choose_measurement_data,
    load_calibration_images,
    measure_accuracy_drop,
)
from segtrain.export.safetensors_file import load_safetensors, safetensors_bytes
from segtrain.export.torch_program import load_program, program_bytes
from segtrain.export.verify import TOLERANCE, Predict, max_difference, torch_predict
from segtrain.inference.load import load_backend
from segtrain.inference.onnx_metadata import INPUT, OUTPUT, Metadata
from segtrain.inference.options import InferenceOptions
from segtrain.runtime.files import remove_temp_files_beside, write_bytes, write_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportFormat:
    """How to serialize a model, and how to load the result for the comparison with torch."""

    serialize: Callable[[nn.Module, Metadata], bytes]
    load: Callable[[bytes, Path], Predict]


FORMATS: dict[FormatName, ExportFormat] = {
    "onnx": ExportFormat(onnx_bytes, load_onnx),
    "torch": ExportFormat(program_bytes, load_program),
    "safetensors": ExportFormat(safetensors_bytes, load_safetensors),
}


def export(plan: ExportPlan) -> None:
    """Write the file if its probabilities equal those of torch.

    Raises:
        UserError: of any kind; nothing is written then.
        Stopped: a signal was received.
    """
    started = time.perf_counter()
    checkpoint = load_checkpoint(plan.checkpoint)
    log.info(f"checkpoint: {plan.checkpoint} ({plan.chosen_by})")
    metadata = _build_metadata(checkpoint, plan)
    log.info(f"exporting {plan.output.name} ...")
    if plan.options.precision == "fp32":
        content = _export_fp32(checkpoint, plan, metadata)
    else:
        content = _export_lower_precision(checkpoint, plan, metadata)
    remove_temp_files_beside(plan.output)
    write_bytes(plan.output, content)
    if plan.json_path is not None:
        write_text(plan.json_path, json.dumps(metadata.to_dict(), indent=2) + "\n")
        log.info(f"{plan.json_path}: the metadata, which is also in the safetensors file")
    else:
        log.info(f"input  {INPUT}")
        log.info(f"output {OUTPUT}")
    seconds = time.perf_counter() - started
    print(f"{plan.output}: {len(content) / 1e6:.1f} MB, {seconds:.0f} s")


def _export_fp32(checkpoint: Checkpoint, plan: ExportPlan, metadata: Metadata) -> bytes:
    """The content of the file in float32, verified against torch.

    Raises:
        CheckpointError: it differs from torch.
    """
    content, difference = _export_and_compare(checkpoint, plan, metadata)
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"{plan.output} would differ from torch by {difference:.2g}, more than {TOLERANCE}, "
            "so nothing was written",
            "try another --format",
        )
    return content


def _export_lower_precision(checkpoint: Checkpoint, plan: ExportPlan, metadata: Metadata) -> bytes:
    """The content of the file in fp16 or int8; measures and logs the accuracy drop."""
    data = choose_measurement_data(checkpoint.config.data, plan.options.data)
    if metadata.precision == "fp16":
        content, _ = _export_and_compare(checkpoint, plan, metadata)
    else:
        fp32_content = _export_fp32(checkpoint, plan, replace(metadata, precision="fp32"))
        images = load_calibration_images(data)
        log.info(f"calibrating int8 on {len(images)} training images ...")
        content = int8_bytes(fp32_content, images, metadata)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "exported.onnx")
        path.write_bytes(content)
        before = load_backend(plan.checkpoint, InferenceOptions())
        after = load_backend(path, InferenceOptions(device="cpu"))
        log.info(f"fp32 -> {metadata.precision}: {measure_accuracy_drop(before, after, data)}")
    return content


def _export_and_compare(
    checkpoint: Checkpoint, plan: ExportPlan, metadata: Metadata
) -> tuple[bytes, float]:
    """The content of the file, and its largest difference from torch in float32."""
    export_format = FORMATS[plan.options.format]
    content = export_format.serialize(restore_model(checkpoint, plan.checkpoint), metadata)
    reference = torch_predict(restore_model(checkpoint, plan.checkpoint), metadata.bn_eval)
    predict = export_format.load(content, plan.output)
    difference = max_difference(predict, reference, metadata.short_side)
    log.info(f"largest difference of a probability from torch, on five sizes: {difference:.1e}")
    return content, difference


def _build_metadata(checkpoint: Checkpoint, plan: ExportPlan) -> Metadata:
    config = checkpoint.config
    with plan.checkpoint.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return Metadata(
        model=config_to_dict(config)["model"],
        short_side=config.data.image_size,
        bn_eval=config.train.bn_eval,
        precision=plan.options.precision,
        checkpoint_sha256=digest.hexdigest(),
    )
