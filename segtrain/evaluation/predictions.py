"""Prediction sources: a model, or a folder of masks written by any tool."""

from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL.Image
from torch import nn

from segtrain.data.datasets import ImageSelection
from segtrain.data.loader import eval_batches
from segtrain.data.sample import max_bad_samples
from segtrain.data.workers import worker_errors
from segtrain.errors import DataError
from segtrain.imaging.images import FORMATS, find_images, map_decode_errors
from segtrain.inference.options import InferenceOptions
from segtrain.inference.predict import predict_batches
from segtrain.runtime.cpu import available_cpus
from segtrain.runtime.devices import autocast_for
from segtrain.runtime.distributed import DistributedContext
from segtrain.types import Mask, Probs

# `segtrain predict` appends this to the name of an image.
_MASK_SUFFIX = "_mask"


@dataclass(frozen=True)
class Prediction:
    """The prediction for an image, and its ground truth.

    index: of the image in the selection.
    probs: H W float32 in 0..1, probability of person.
    mask: H W uint8 in {0, 1, 255}.
    """

    index: int
    probs: Probs
    mask: Mask


class PredictionSource(Protocol):
    """Predictions for every readable image; each process of a job makes its share."""

    @property
    def damaged(self) -> set[str]:
        """A message for each image that could not be read."""
        ...

    def predictions(
        self, images: ImageSelection, world: DistributedContext
    ) -> Iterator[list[Prediction]]:
        """Yield the predictions of a few images at a time.

        Raises:
            UserError: of any kind.
        """
        ...


def refuse_too_many_damaged(damaged: Collection[str], num_images: int) -> None:
    """Raise DataError if more images are damaged than `max_bad_samples` allows."""
    if len(damaged) > max_bad_samples(num_images):
        raise DataError(
            f"{len(damaged)} of {num_images} images cannot be used, first: {min(damaged)}"
        )


@dataclass(kw_only=True)
class ModelPredictions:
    """Predictions of a model, in float32.

    model: on its device.
    options: with size and batch-norm statistics resolved.
    loading: further arguments of `segtrain.data.loader.eval_batches`.
    """

    model: nn.Module
    options: InferenceOptions
    batch_size: int
    loading: dict[str, Any]
    damaged: set[str] = field(default_factory=set)

    def predictions(
        self, images: ImageSelection, world: DistributedContext
    ) -> Iterator[list[Prediction]]:
        """As `PredictionSource.predictions`."""
        assert self.options.bn is not None
        device = next(self.model.parameters()).device
        batches = eval_batches(
            images,
            image_size=self.options.loaded_short_side,
            # With batch statistics, images of a batch would influence each other.
            batch_size=1 if self.options.bn == "batch" else self.batch_size,
            rank=world.rank,
            world_size=world.size,
            **self.loading,
        )
        with worker_errors(batches.tracker):
            for batch, probs in predict_batches(
                self.model,
                batches,
                options=self.options,
                device=device,
                autocast=autocast_for("fp32", device),
                bn_eval=self.options.bn,
            ):
                masks = batch["mask"].cpu().numpy()
                yield list(map(Prediction, batch["index"], probs.cpu().numpy(), masks))
        self.damaged = batches.damaged


@dataclass(kw_only=True)
class MaskFolderPredictions:
    """Predictions read from a folder of masks."""

    folder: "MaskFolder"
    damaged: set[str] = field(default_factory=set)

    def predictions(
        self, images: ImageSelection, world: DistributedContext
    ) -> Iterator[list[Prediction]]:
        """As `PredictionSource.predictions`.

        Raises:
            DataError: a mask is missing, damaged or of another size than its image.
        """
        names = [images.name(index) for index in range(len(images))]
        self.folder.refuse_missing(names)
        class_masks, workers = self.folder.are_class_masks(names), available_cpus()

        def read(index: int) -> Prediction | str:
            try:
                mask = images.sample(index).mask
            except DataError as error:
                return str(error)
            size = (mask.shape[0], mask.shape[1])
            probs = self.folder.read_probs(names[index], size, class_masks=class_masks)
            return Prediction(index, probs, mask)

        with ThreadPoolExecutor(workers) as pool:
            indices = range(len(images))[world.rank :: world.size]
            for start in range(0, len(indices), 4 * workers):
                results = list(pool.map(read, indices[start : start + 4 * workers]))
                self.damaged.update(result for result in results if isinstance(result, str))
                refuse_too_many_damaged(self.damaged, len(images))
                yield [result for result in results if isinstance(result, Prediction)]


class MaskFolder:
    """A folder of masks, found by the names of their images.

    Args:
        folder: searched recursively.

    Raises:
        DataError: the folder does not exist or contains no images.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder", "--predictions takes a folder of masks")
        self._paths: dict[str, list[Path]] = {}
        for path in find_images(folder):
            stem = path.relative_to(folder).with_suffix("").as_posix()
            for name in {stem, stem.removesuffix(_MASK_SUFFIX)}:
                self._paths.setdefault(name, []).append(path)
        if not self._paths:
            raise DataError(f"no images in {folder}", "give the folder that contains the masks")

    def refuse_missing(self, names: list[str]) -> None:
        """Raise DataError if an image has no mask."""
        missing = [name for name in names if name not in self._paths]
        if missing:
            raise DataError(
                f"{self.folder} has no mask for {len(missing)} of {len(names)} images, "
                f"first {', '.join(missing[:3])}",
                "give each mask the name of its image",
            )

    def are_class_masks(self, names: Iterable[str]) -> bool:
        """Whether the masks hold the classes 0 and 1: no mask has a level above 1.

        A single mask is not enough: a soft mask of an image without people may end at 1, too.

        Args:
            names: of the images.

        Raises:
            DataError: a mask is damaged, or an image has two masks.
        """
        return all(read_levels(self._path(name))[0].max() <= 1 for name in names)

    def read_probs(self, name: str, size: tuple[int, int], *, class_masks: bool) -> Probs:
        """Read the mask of an image as probabilities of person.

        Args:
            name: of the image in its split, with slashes and without suffix. The name of the mask
                may end in `_mask`.
            size: the required height and width.
            class_masks: the result of `are_class_masks`.

        Returns:
            H W float32 in 0..1.

        Raises:
            DataError: the mask is damaged or of another size, or the image has two masks.
        """
        path = self._path(name)
        levels, white = read_levels(path)
        if levels.shape != size:
            raise DataError(
                f"{path} has {levels.shape[1]}x{levels.shape[0]} pixels, its image "
                f"{size[1]}x{size[0]}",
                "resize the mask to the size of its image",
            )
        return levels / np.float32(1 if class_masks else white)

    def _path(self, name: str) -> Path:
        paths = self._paths[name]
        if len(paths) > 1:
            raise DataError(
                f"{paths[0]} and {paths[1].name} are both masks of {name}", "remove one of them"
            )
        return paths[0]


def read_levels(path: Path) -> tuple[Probs, int]:
    """Read the alpha channel of a cutout, else gray levels.

    Gray with a fully opaque alpha channel is gray. In a palette image, all colors but the first are
    white.

    Returns:
        H W float32 integers, and the level of white.

    Raises:
        DataError: the file is missing, not an image, damaged or too large.
    """
    with map_decode_errors(path), PIL.Image.open(path, formats=FORMATS) as image:
        image.load()
        return _levels(image)


def _levels(image: PIL.Image.Image) -> tuple[Probs, int]:
    if image.mode == "F":
        raise ValueError("its pixels are neither 8-bit nor 16-bit")
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.asarray(image, dtype=np.float32)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("its pixels are neither 8-bit nor 16-bit")
        return levels, 65535
    if image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA"))
        is_gray = (rgba[..., :3].max(axis=2) == rgba[..., :3].min(axis=2)).all()
        is_opaque = rgba[..., 3].min() == 255
        return rgba[..., 0 if is_gray and is_opaque else 3].astype(np.float32), 255
    if image.mode in {"P", "1"}:
        return (np.asarray(image) != 0).astype(np.float32), 1
    return np.asarray(image.convert("L"), dtype=np.float32), 255
