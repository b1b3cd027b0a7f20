"""Checkpoints: save, load, verify, and rebuild the network from one file.

A checkpoint holds plain types and tensors only and is always read with `weights_only=True`. Its
file is untrusted input, so its sizes are checked before it is unpacked. A sha256 over the content
detects flipped bits, which torch would load silently.
"""

import hashlib
import io
import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segtrain.config.resolve import config_from_dict, config_to_dict
from segtrain.config.schema import Config
from segtrain.errors import CheckpointError, DivergedError, UsageError
from segtrain.models import build_model
from segtrain.runtime.files import atomic_write
from segtrain.types import CLASSES

FORMAT_VERSION = 2

_FIELD_TYPES = {
    "config": dict,
    "weights": dict,
    "epoch": int,
    "global_step": int,
    "metrics": dict,
    "training": dict,
    "data": dict,
}
# The only globals in our own files. torch's safe unpickler allows more, e.g. a bytearray of any
# length.
_SAFE_GLOBALS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch \w+Storage"
)
_MAX_DEPTH = 100


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The content of a checkpoint file.

    config: resolved configuration of the run, including the network and its arguments.
    weights: state dict of the network, contiguous tensors on the CPU.
    epoch, global_step: epochs and optimizer steps done.
    metrics: validation metrics of this epoch by their log names.
    training: state that only resuming needs (optimizer, scaler, EMA, counters, best so far); empty
        in `best.pt`.
    data: hashes of the training and validation selections, and the identities of the training
        images (int64), by which evaluation recognizes them.
    """

    config: Config
    weights: dict[str, Tensor]
    epoch: int
    global_step: int
    metrics: dict[str, float]
    training: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(path: Path, checkpoint: Checkpoint, *, backup: Path | None = None) -> None:
    """Write `checkpoint` atomically: a kill at any moment leaves the old or the new file, complete.

    Args:
        backup: path in the same folder to which the previous file at `path` is moved.

    Raises:
        ResourceError: the disk is full or not writable; `path` is untouched.
        DivergedError: a weight or the optimizer state is NaN or infinite. It would replace a good
            file with one that loading refuses, so nothing is written.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "classes": CLASSES,
        **{key: value for key, value in vars(checkpoint).items() if key != "config"},
        "config": config_to_dict(checkpoint.config),
    }
    content = _plain(content)
    if not _all_finite(content):
        raise DivergedError(
            f"the network or its optimizer became NaN or infinite, {path} is unchanged",
            "--resume with a lower --lr or --precision fp32",
        )
    content["sha256"] = _digest(content)
    # Serialize in memory first: torch reports a disk error as an error of its archive.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_write(path, backup=backup, needs=buffer.getbuffer().nbytes) as file:
        file.write(buffer.getbuffer())


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint. Nothing in the file is executed.

    Raises:
        CheckpointError: the file is missing, damaged, of another format version, or not a
            checkpoint.
    """
    content = _read(path)
    version = content.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {version!r}, this segtrain reads {FORMAT_VERSION}",
            "use the segtrain version that wrote it or train again",
        )
    digest = content.pop("sha256", None)
    _check_content(content, path)
    if digest != _digest(content):
        raise CheckpointError(f"{path} is damaged: its sha256 does not match", "use another copy")
    try:
        for key, kind in _FIELD_TYPES.items():
            if not isinstance(content[key], kind):
                raise TypeError(f"{key} has the wrong type")
        return Checkpoint(
            config=config_from_dict(content["config"]),
            **{key: content[key] for key in Checkpoint.__dataclass_fields__ if key != "config"},
        )
    except (KeyError, TypeError, AttributeError, UsageError) as error:
        raise CheckpointError(f"{path} is not a segtrain checkpoint: {error}") from None


def restore_model(checkpoint: Checkpoint, path: Path) -> nn.Module:
    """Rebuild the network with its weights, in evaluation mode on the CPU.

    Args:
        path: used in error messages only.

    Raises:
        CheckpointError: the weights do not fit the network of the configuration.
    """
    config = checkpoint.config.model
    try:
        # On the meta device a hostile width takes no memory: shapes are compared first.
        with torch.device("meta"):
            model = build_model(config.name, len(CLASSES), **config.kwargs)
        dtypes = {key: value.dtype for key, value in model.state_dict().items()}
        model.load_state_dict(checkpoint.weights, strict=True, assign=True)
        for key, value in model.state_dict().items():
            if value.dtype != dtypes[key]:
                raise TypeError(f"{key} is {value.dtype}, not {dtypes[key]}")
    except (UsageError, RuntimeError, TypeError) as error:
        # The second line of torch's message names the first key that does not fit.
        reason = " ".join(" ".join(str(error).splitlines()[:2]).split())
        raise CheckpointError(
            f"{path}: the weights do not fit model {config.name}: {reason}"
        ) from None
    return model.eval()


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint", "train one or give another path")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
            pickles = [name for name in archive.namelist() if name.lower().endswith(".pkl")]
            # torch stores tensors uncompressed: a file that unpacks to more is a zip bomb.
            if unpacked > path.stat().st_size:
                raise CheckpointError(f"{path} unpacks to more than its size", "do not use it")
            if len(pickles) != 1:
                raise CheckpointError(
                    f"{path} holds {len(pickles)} pickles, not 1", "do not use it"
                )
            _check_pickle(archive.read(pickles[0]))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        # torch's own message explains how to load the file unsafely; ours does not.
        raise CheckpointError(
            f"{path} is damaged or holds more than tensors and numbers, nothing in it was run",
            "use another copy",
        ) from error
    except Exception as error:  # damaged files raise OSError, EOFError, KeyError, RuntimeError ...
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint ({first_line})", "use another copy"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a segtrain checkpoint")
    return content


def _plain(value: Any) -> Any:
    """Copy into plain types; tensors become contiguous, on the CPU, and share no memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


def _all_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return _is_finite(value)
    if isinstance(value, dict | list):
        return all(map(_all_finite, value.values() if isinstance(value, dict) else value))
    return True


def _is_finite(tensor: Tensor) -> bool:
    if tensor.dtype == torch.float32 and tensor.numel() > 0:
        # Ten times as fast as isfinite, which makes several copies. NaN becomes both extremes.
        return all(math.isfinite(extreme.item()) for extreme in tensor.aminmax())
    return bool(tensor.isfinite().all())


def _check_pickle(data: bytes) -> None:
    """Check the globals that the opcodes name, without executing any."""
    for opcode, argument, _ in pickletools.genops(data):
        names_global = opcode.name in {"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"}
        if names_global and not _SAFE_GLOBALS.fullmatch(str(argument)):
            raise pickle.UnpicklingError(f"names {argument}")


def _check_content(content: dict[Any, Any], path: Path) -> None:
    """Refuse content that `save_checkpoint` never writes, before any other code traverses it.

    Every container must occur only once and every tensor must have its own bytes, so a file cannot
    claim more items or more numbers than it holds.
    """
    bytes_left = path.stat().st_size
    seen = set()
    stack: list[tuple[Any, int]] = [(content, 0)]
    while stack:
        value, depth = stack.pop()
        if isinstance(value, Tensor):
            bytes_left -= value.numel() * value.element_size()
            if bytes_left < 0 or not value.is_contiguous() or value.is_conj() or value.is_neg():
                raise CheckpointError(f"{path} holds a tensor with a false shape", "do not use it")
            if not _is_finite(value):
                raise CheckpointError(f"{path} holds NaN or infinite numbers", "use an earlier one")
        elif isinstance(value, dict | list):
            if id(value) in seen or depth > _MAX_DEPTH:
                raise CheckpointError(f"{path} holds cyclic or shared lists", "do not use it")
            seen.add(id(value))
            items = value.values() if isinstance(value, dict) else value
            stack.extend((item, depth + 1) for item in items)
        elif not (value is None or isinstance(value, bool | int | float | str)):
            raise CheckpointError(f"{path} holds a {type(value).__name__}", "do not use it")


def _digest(content: Any) -> str:
    """sha256 over structure, numbers and tensor bytes, independent of torch's file format."""
    sha = hashlib.sha256()

    def update(value: Any) -> None:
        if isinstance(value, Tensor):
            sha.update(f"tensor {value.dtype} {list(value.shape)}\n".encode())
            sha.update(value.flatten().view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            sha.update(f"dict {len(value)}\n".encode())
            for key, item in value.items():
                sha.update(f"{key!r}\n".encode())
                update(item)
        elif isinstance(value, list):
            sha.update(f"list {len(value)}\n".encode())
            for item in value:
                update(item)
        else:
            sha.update(f"{value!r}\n".encode())

    update(content)
    return sha.hexdigest()
