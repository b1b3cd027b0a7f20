"""One file that rebuilds everything: save, load, verify, rebuild the network.

Checkpoints hold plain types and tensors only and are read with `weights_only=True`, never without.
They come from strangers, so a file is measured before it is unpacked, and a sha256 over the content
catches the flipped bit that torch would load without a word.
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

from segtrain.classes import CLASSES
from segtrain.config import Config, config_from_tree, tree_from_config
from segtrain.errors import CheckpointError, DivergedError, UsageError
from segtrain.files import atomic_write
from segtrain.models import build_model

FORMAT_VERSION = 1

_FIELD_TYPES = {
    "config": dict,
    "weights": dict,
    "epoch": int,
    "global_step": int,
    "metrics": dict,
    "training": dict,
    "data": dict,
}
# All that our own files name. torch's safe unpickler allows more, e.g. a bytearray of any length.
_SAFE_NAMES = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch \w+Storage"
)
_DEEPEST = 100


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a file holds.

    config: the resolved configuration of the run, which names the network and its arguments.
    weights: state dict of the network, contiguous tensors on the CPU.
    epoch, global_step: epochs and optimizer steps done.
    metrics: validation metrics of this epoch by their log names.
    data: hashes of the training and validation selections, and the identities of the training
        pictures (int64), so that evaluation knows them again.
    training: what only resuming needs (optimizer, scaler, random states, best so far); empty in
        `best.pt`.
    """

    config: Config
    weights: dict[str, Tensor]
    epoch: int
    global_step: int
    metrics: dict[str, float]
    training: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(path: Path, checkpoint: Checkpoint, *, keep_as: Path | None = None) -> None:
    """Write `checkpoint` so that a kill at any moment leaves the old file or the new one, whole.

    Args:
        keep_as: what stood at `path` before stays there, in the same folder.

    Raises:
        ResourceError: the disk is full or not writable; what stood at `path` is untouched.
        DivergedError: a weight or the optimizer's state is NaN or infinite; it would replace a
            good file by one that loading refuses, so nothing is written.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "classes": CLASSES,
        **{key: value for key, value in vars(checkpoint).items() if key != "config"},
        "config": tree_from_config(checkpoint.config),
    }
    content = _plain(content)
    if not _all_finite(content):
        raise DivergedError(
            f"the network or its optimizer became NaN or infinite, so {path} is kept as it was; "
            "--resume with a lower --lr or --precision fp32"
        )
    content["sha256"] = _digest(content)
    # Packed in memory first: torch turns the disk's own error into one of its archive.
    packed = io.BytesIO()
    torch.save(content, packed)
    with atomic_write(path, keep_as=keep_as, needs=packed.getbuffer().nbytes) as file:
        file.write(packed.getbuffer())


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint; nothing in it is ever executed.

    Raises:
        CheckpointError: the file is missing, damaged, of another format, or not a checkpoint.
    """
    content = _read(path)
    version = content.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {version!r}, this segtrain reads {FORMAT_VERSION}; "
            "use the version that wrote it"
        )
    digest = content.pop("sha256", None)
    _check_content(content, path)
    if digest != _digest(content):
        raise CheckpointError(f"{path} is damaged: its sha256 does not match; use another copy")
    content.setdefault("data", {})  # files of earlier versions do not say
    try:
        for key, kind in _FIELD_TYPES.items():
            if not isinstance(content[key], kind):
                raise TypeError(f"{key} has a wrong type")
        return Checkpoint(
            config=config_from_tree(content["config"]),
            **{key: content[key] for key in Checkpoint.__dataclass_fields__ if key != "config"},
        )
    except (KeyError, TypeError, AttributeError, UsageError) as error:
        raise CheckpointError(f"{path} is no checkpoint of segtrain: {error}") from None


def restore_model(checkpoint: Checkpoint, path: Path) -> nn.Module:
    """The network with its weights, in evaluation mode on the CPU.

    Args:
        path: named in errors only.

    Raises:
        CheckpointError: the weights do not fit the network that the configuration names.
    """
    config = checkpoint.config.model
    try:
        # On the meta device a hostile width costs no memory: shapes are compared first.
        with torch.device("meta"):
            model = build_model(config.name, len(CLASSES), **config.kwargs)
        dtypes = {key: value.dtype for key, value in model.state_dict().items()}
        model.load_state_dict(checkpoint.weights, strict=True, assign=True)
        for key, value in model.state_dict().items():
            if value.dtype != dtypes[key]:
                raise TypeError(f"{key} is {value.dtype}, not {dtypes[key]}")
    except (UsageError, RuntimeError, TypeError) as error:
        # torch names the first key that does not fit in the second line.
        reason = " ".join(" ".join(str(error).splitlines()[:2]).split())
        raise CheckpointError(
            f"{path}: the weights do not fit model {config.name}: {reason}"
        ) from None
    return model.eval()


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}; train one or name another")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
            pickles = [name for name in archive.namelist() if name.lower().endswith(".pkl")]
            # torch stores tensors uncompressed: a file that unpacks to more than itself is a bomb.
            if unpacked > path.stat().st_size:
                raise CheckpointError(f"{path} unpacks to more than its size; it is no checkpoint")
            if len(pickles) != 1:
                raise CheckpointError(f"{path} holds not exactly one pickle; it is no checkpoint")
            _check_pickle(archive.read(pickles[0]))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        # torch's own message recommends reading it unsafely; ours does not.
        raise CheckpointError(
            f"{path} holds more than tensors and numbers or is damaged; nothing in it was run; "
            "use another copy"
        ) from error
    except Exception as error:  # damaged files raise OSError, EOFError, KeyError, RuntimeError ...
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} is damaged or no checkpoint; use another copy ({first_line})"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no checkpoint of segtrain")
    return content


def _plain(value: Any) -> Any:
    """A copy in plain types, with tensors contiguous on the CPU and sharing no memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} does not belong in a checkpoint")


def _all_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return _is_finite(value)
    if isinstance(value, dict | list):
        return all(map(_all_finite, value.values() if isinstance(value, dict) else value))
    return True


def _is_finite(tensor: Tensor) -> bool:
    if tensor.dtype == torch.float32 and tensor.numel() > 0:
        # A tenth of isfinite's time, which makes several copies; NaN becomes both extremes.
        return all(math.isfinite(extreme.item()) for extreme in tensor.aminmax())
    return bool(tensor.isfinite().all())


def _check_pickle(data: bytes) -> None:
    """Look at the instructions without following them."""
    for opcode, argument, _ in pickletools.genops(data):
        named = opcode.name in {"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"}
        if named and not _SAFE_NAMES.fullmatch(str(argument)):
            raise pickle.UnpicklingError(f"names {argument}")


def _check_content(content: dict[Any, Any], path: Path) -> None:
    """Refuse what `save_checkpoint` never writes, before anything walks over or adds up more.

    Every container stands in one place and every tensor has bytes of its own, so a file can promise
    neither more items nor more numbers than it holds.
    """
    bytes_left = path.stat().st_size
    seen = set()
    waiting: list[tuple[Any, int]] = [(content, 0)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, Tensor):
            bytes_left -= value.numel() * value.element_size()
            if bytes_left < 0 or not value.is_contiguous() or value.is_conj() or value.is_neg():
                raise CheckpointError(f"{path} holds a tensor with a false shape; do not use it")
            if not _is_finite(value):
                raise CheckpointError(f"{path} holds NaN or infinite numbers; use an earlier one")
        elif isinstance(value, dict | list):
            if id(value) in seen or depth > _DEEPEST:
                raise CheckpointError(f"{path} holds lists within themselves; do not use it")
            seen.add(id(value))
            items = value.values() if isinstance(value, dict) else value
            waiting.extend((item, depth + 1) for item in items)
        elif not (value is None or isinstance(value, bool | int | float | str)):
            raise CheckpointError(f"{path} holds a {type(value).__name__}; do not use it")


def _digest(content: Any) -> str:
    """sha256 over structure, numbers and tensor bytes, independent of how torch packs them."""
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
