"""`segtrain export`, from the plan to the last line told."""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from segtrain.checkpoint import Checkpoint, load_checkpoint, restore_model
from segtrain.config import tree_from_config
from segtrain.errors import CheckpointError
from segtrain.export import onnx_file, torch_program, weights_file
from segtrain.export.checking import TOLERANCE, Ask, ask_torch, largest_difference
from segtrain.export.quality import data_to_measure_on, measure_loss, pictures_to_calibrate_on
from segtrain.export.quantising import int8_bytes
from segtrain.export.wishes import FormatName, Plan
from segtrain.files import sweep_beside, write_bytes, write_text
from segtrain.prediction.metadata import INPUT, OUTPUT, Metadata
from segtrain.prediction.network import HowToRun, open_network

Tell = Callable[[str], object]


@dataclass(frozen=True)
class Format:
    """A kind of file: how its content is made, and how it is asked."""

    make: Callable[[nn.Module, Metadata], bytes]
    opened: Callable[[bytes, Path], Ask]


FORMATS: dict[FormatName, Format] = {
    "onnx": Format(onnx_file.onnx_bytes, onnx_file.opened),
    "torch": Format(torch_program.program_bytes, torch_program.opened),
    "safetensors": Format(weights_file.weights_bytes, weights_file.opened),
}


def export(plan: Plan, *, tell: Tell) -> None:
    """Write the file that was asked for, if it answers as torch does.

    Args:
        tell: takes a line for the user.

    Raises:
        UserError: of any kind; nothing is written then.
        Stopped: a signal came.
    """
    started = time.perf_counter()
    checkpoint = load_checkpoint(plan.checkpoint)
    tell(f"checkpoint: {plan.checkpoint} ({plan.chosen_by})")
    metadata = _metadata(checkpoint, plan)
    if plan.wishes.precision == "fp32":
        content = _like_torch(checkpoint, plan, metadata, tell)
    else:
        content = _in_lower_precision(checkpoint, plan, metadata, tell)
    sweep_beside(plan.output)
    write_bytes(plan.output, content)
    if plan.beside is not None:
        write_text(plan.beside, json.dumps(metadata.as_tree(), indent=2) + "\n")
        tell(f"{plan.beside}: what rebuilds the network; the weights' file holds it, too")
    else:
        tell(f"input  {INPUT}")
        tell(f"output {OUTPUT}")
    seconds = time.perf_counter() - started
    print(f"{plan.output}: {len(content) / 1e6:.1f} MB, {seconds:.0f} s")


def _like_torch(checkpoint: Checkpoint, plan: Plan, metadata: Metadata, tell: Tell) -> bytes:
    """The content of the file in float32, compared with torch.

    Raises:
        CheckpointError: it differs.
    """
    content, difference = _made_and_compared(checkpoint, plan, metadata, tell)
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"{plan.output} would differ from torch by {difference:.2g}, and {TOLERANCE} is the "
            "most allowed; nothing was written; try another --format"
        )
    return content


def _in_lower_precision(
    checkpoint: Checkpoint, plan: Plan, metadata: Metadata, tell: Tell
) -> bytes:
    """The content of the file, with what the precision costs measured and told."""
    data = data_to_measure_on(checkpoint.config.data, plan.wishes.data, tell)
    if metadata.precision == "fp16":
        content, _ = _made_and_compared(checkpoint, plan, metadata, tell)
    else:
        exact = _like_torch(checkpoint, plan, replace(metadata, precision="fp32"), tell)
        pictures = pictures_to_calibrate_on(data)
        tell(f"calibrating int8 on {len(pictures)} training pictures ...")
        content = int8_bytes(exact, pictures, metadata)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "exported.onnx")
        path.write_bytes(content)
        before = open_network(plan.checkpoint, HowToRun())
        after = open_network(path, HowToRun(device="cpu"))
        tell(f"fp32 -> {metadata.precision}: {measure_loss(before, after, data)}")
    return content


def _made_and_compared(
    checkpoint: Checkpoint, plan: Plan, metadata: Metadata, tell: Tell
) -> tuple[bytes, float]:
    """The content of the file, and the largest difference from torch in float32."""
    form = FORMATS[plan.wishes.format]
    tell(f"making {plan.output.name}; tracing a deep network takes a minute or two ...")
    content = form.make(restore_model(checkpoint, plan.checkpoint), metadata)
    reference = ask_torch(restore_model(checkpoint, plan.checkpoint), metadata.bn_eval)
    ask = form.opened(content, plan.output)
    difference = largest_difference(ask, reference, metadata.short_side)
    tell(f"largest difference of a probability from torch, on five sizes: {difference:.1e}")
    return content, difference


def _metadata(checkpoint: Checkpoint, plan: Plan) -> Metadata:
    config = checkpoint.config
    with plan.checkpoint.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return Metadata(
        model=tree_from_config(config)["model"],
        short_side=config.data.image_size,
        bn_eval=config.train.bn_eval,
        precision=plan.wishes.precision,
        checkpoint_sha256=digest.hexdigest(),
    )
