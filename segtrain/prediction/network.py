"""What predict asks of a network, whatever runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from segtrain.images import Pixels
from segtrain.prediction.probability import Probability

if TYPE_CHECKING:  # the configuration's checks take a tenth of a second to import
    from segtrain.config import Precision, Tta


@dataclass(frozen=True, kw_only=True)
class HowToRun:
    """What the user says about running a network.

    size: short side at which it sees pictures, pixels; None: as trained.
    tile: side of the square tiles in which it sees the scaled picture, pixels; "auto": whole up to
        a megapixel, else tiles of 512; None: whole.
    """

    device: str = "auto"
    precision: Precision = "fp32"
    size: int | None = None
    tta: Tta = "none"
    tile: int | Literal["auto"] | None = "auto"


class Network(Protocol):
    """A trained network."""

    @property
    def description(self) -> str:
        """Which network on which device, for people."""
        ...

    @property
    def at_once(self) -> int:
        """How many pictures of one size it is best asked about together."""
        ...

    def probs(self, pictures: Sequence[Pixels]) -> list[Probability]:
        """Probability of person at every pixel of every picture.

        Args:
            pictures: H W 3 uint8 RGB, upright, of any sizes; neighbours of one size go together.

        Returns:
            H W float32 in 0..1 for each, at its own size.
        """
        ...


def open_network(path: Path, how: HowToRun) -> Network:
    """The network in a checkpoint or, without torch, in an .onnx file that `segtrain export` wrote.

    Raises:
        CheckpointError: the file is missing, damaged or no checkpoint.
        UsageError: the device is not there, or onnxruntime is not installed.
    """
    if path.suffix == ".onnx":
        from segtrain.prediction.onnx_network import OnnxNetwork

        return OnnxNetwork(path, how)
    from segtrain.prediction.torch_network import TorchNetwork

    return TorchNetwork(path, how)
