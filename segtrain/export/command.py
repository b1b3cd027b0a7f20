"""`segtrain export`, from the plan to the last line told."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from segtrain.checkpoint import Checkpoint, load_checkpoint, restore_model
from segtrain.config import tree_from_config
from segtrain.errors import CheckpointError
from segtrain.export import onnx_file
from segtrain.export.checking import TOLERANCE, Ask, ask_torch, largest_difference
from segtrain.export.network import Exportable
from segtrain.export.wishes import FormatName, Plan
from segtrain.files import write_bytes
from segtrain.prediction.metadata import INPUT, OUTPUT, Metadata

Tell = Callable[[str], object]


@dataclass(frozen=True)
class Format:
    """A kind of file: how its content is made and how it is asked."""

    make: Callable[[Exportable, Metadata], bytes]
    opened: Callable[[bytes, Path], Ask]


FORMATS: dict[FormatName, Format] = {
    "onnx": Format(onnx_file.onnx_bytes, onnx_file.opened),
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
    tell("tracing the network, up to two minutes for a deep one ...")
    metadata = _metadata(checkpoint, plan)
    form = FORMATS[plan.wishes.format]
    bn_eval = checkpoint.config.train.bn_eval
    content = form.make(Exportable(restore_model(checkpoint, plan.checkpoint), bn_eval), metadata)
    reference = ask_torch(restore_model(checkpoint, plan.checkpoint), bn_eval)
    ask = form.opened(content, plan.output)
    difference = largest_difference(ask, reference, checkpoint.config.data.image_size)
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"{plan.output} would differ from torch by {difference:.2g}, more than {TOLERANCE}; "
            "nothing was written; please report it with the checkpoint"
        )
    write_bytes(plan.output, content)
    tell(f"input  {INPUT}")
    tell(f"output {OUTPUT}")
    tell(f"largest difference from torch on five sizes: {difference:.1e}")
    seconds = time.perf_counter() - started
    print(f"{plan.output}: {len(content) / 1e6:.1f} MB, {seconds:.0f} s")


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
