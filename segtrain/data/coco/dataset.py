"""COCO layout: `train2017/ val2017/ annotations/instances_train2017.json ...`."""

import hashlib
import os
from collections import Counter
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import numpy.typing as npt

from segtrain.data.coco.index import INDEX_VERSION, CocoIndex, read_index
from segtrain.data.sample import DatasetIndex, LabelRules, Sample, max_bad_samples
from segtrain.errors import DataError
from segtrain.imaging.images import read_sized_image, resize_image, scaled_size
from segtrain.runtime.cache import Arrays, cached_arrays
from segtrain.runtime.progress import progress_bar
from segtrain.runtime.signals import raise_if_stopped
from segtrain.types import BACKGROUND, IGNORE, PERSON, BoolMask, Mask


def is_coco(root: Path) -> bool:
    """Whether `root` has COCO's layout."""
    return any((root / "annotations").glob("instances_*2017.json"))


class CocoDataset:
    """Person masks of one split; images without people stay as negatives.

    The mask is the union of all people. Crowd regions are ignored except where a person is drawn.

    Args:
        root: folder in COCO layout. Nothing outside it is ever opened.
        split: "train" or "val".
        rules: which regions are person and which are ignored.

    Raises:
        DataError: the split is missing, the annotation file is malformed, or more than 1 % of its
            person annotations or images are unusable. Fewer are skipped and counted in `skipped`.
    """

    def __init__(self, root: Path, split: str, rules: LabelRules = LabelRules()) -> None:  # noqa: B008
        self.root = root
        self.rules = rules
        self.notes: list[str] = []
        self.image_dir = root / f"{split}2017"
        path = root / "annotations" / f"instances_{split}2017.json"
        self.coco = read_index(path)
        self.skipped = Counter(self.coco.skipped)
        present = self._find_present(self.coco.all_names())
        if not present.any():
            raise DataError(f"{path} lists no image that exists in {self.image_dir}")
        areas = _person_areas(self.coco, rules)
        self._region_areas = areas["region_areas"]
        self._rows = np.flatnonzero(present)
        self.index = _dataset_index(self.coco, areas["people_areas"]).take(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, index: int, short_side: int | None = None) -> Sample:
        """See `SegmentationDataset.sample`; the mask is drawn at the requested size."""
        row = int(self._rows[index])
        height, width = int(self.coco.heights[row]), int(self.coco.widths[row])
        path = self.image_path(index)
        # COCO annotations refer to the stored pixels, regardless of EXIF.
        image, stored = read_sized_image(path, upright=False, short_side=short_side)
        if stored != (height, width):
            raise DataError(
                f"{path} is {stored[1]}x{stored[0]}, but its annotation says {width}x{height}",
                "restore the original image",
            )
        size = (height, width)
        if short_side is not None:
            size = scaled_size(height, width, short_side)
            image = resize_image(image, size)
        classes = _region_classes(self.coco, row, self.rules, self._region_areas)
        mask = _draw_mask(self.coco, row, classes, size)
        return Sample(image=image, mask=mask, image_id=str(self.coco.image_ids[row]))

    def image_path(self, index: int) -> Path:
        return self.image_dir / self.coco.name(int(self._rows[index]))

    def name(self, index: int) -> str:
        return str(PurePosixPath(self.coco.name(int(self._rows[index]))).with_suffix(""))

    def _find_present(self, names: list[str]) -> npt.NDArray[np.bool_]:
        """Mark the images that exist; more than 1 % missing is an error."""
        if not self.image_dir.is_dir():
            raise DataError(f"{self.image_dir} is missing", "put the images of the split there")
        # Names may contain subfolders. List each folder once instead of checking every file.
        folders = {name.rpartition("/")[0] for name in names}
        existing = {
            f"{folder}/{name}" if folder else name
            for folder in folders
            for name in _list_folder(self.image_dir / folder)
        }
        present = np.fromiter((name in existing for name in names), dtype=bool, count=len(names))
        missing = [name for name in names if name not in existing]
        if len(missing) > max_bad_samples(len(names)):
            raise DataError(
                f"{len(missing)} of {len(names)} images are missing in {self.image_dir}, first "
                f"{', '.join(missing[:5])}",
                "download them again",
            )
        if missing:
            self.skipped["image missing"] = len(missing)
        return present


def _list_folder(folder: Path) -> list[str]:
    """List a folder; empty if it does not exist or its name is not valid on any disk."""
    try:
        return os.listdir(folder)  # noqa: PTH208, a Path per name would take seconds
    except (OSError, ValueError):
        return []


def _dataset_index(coco: CocoIndex, people_areas: npt.NDArray[np.int64]) -> DatasetIndex:
    num_regions = np.diff(coco.region_starts)
    image_of_region = np.repeat(np.arange(len(coco)), num_regions)
    num_crowds = np.bincount(image_of_region[coco.crowd], minlength=len(coco))
    sizes = np.stack([coco.heights, coco.widths], axis=1)
    image_areas = sizes.astype(np.int64).prod(axis=1)
    return DatasetIndex(
        sizes=sizes,
        person_fraction=(people_areas / image_areas).astype(np.float32),
        num_people=(num_regions - num_crowds).astype(np.int32),
        has_crowd=num_crowds > 0,
        identities=coco.identities,
    )


def _person_areas(coco: CocoIndex, rules: LabelRules) -> dict[str, npt.NDArray[np.int64]]:
    """Measure the area of every region, and of the people of every image under the rules."""

    def measure() -> Arrays:
        from pycocotools import mask as coco_mask

        region_areas = np.zeros(len(coco.crowd), dtype=np.int64)
        people_areas = np.zeros(len(coco), dtype=np.int64)
        with progress_bar(total=len(coco), desc="measuring people") as bar:
            for row in range(len(coco)):
                size = int(coco.heights[row]), int(coco.widths[row])
                for region in coco.regions(row):
                    region_areas[region] = coco_mask.area(_encode_rle(coco, region, size))
                classes = _region_classes(coco, row, rules, region_areas)
                people = [_encode_rle(coco, r, size) for r, cls in classes.items() if cls == PERSON]
                if people:
                    people_areas[row] = coco_mask.area(coco_mask.merge(people))
                raise_if_stopped()
                bar.update()
        return {"region_areas": region_areas, "people_areas": people_areas}

    key = hashlib.sha256(f"{coco.digest} {rules}".encode()).hexdigest()
    arrays = cached_arrays(f"coco-areas-v{INDEX_VERSION}-{key}", measure)
    return {name: array.astype(np.int64) for name, array in arrays.items()}


def _region_classes(
    coco: CocoIndex, row: int, rules: LabelRules, region_areas: npt.NDArray[np.int64]
) -> dict[int, int]:
    """Map each region of an image to PERSON or IGNORE."""
    regions = coco.regions(row)
    crowd_class = PERSON if rules.crowd == "person" else IGNORE
    classes = {region: crowd_class if coco.crowd[region] else PERSON for region in regions}
    people = [region for region in regions if not coco.crowd[region]]
    min_area = rules.min_person_area * int(coco.heights[row]) * int(coco.widths[row])
    largest = max(people, key=lambda region: int(region_areas[region]), default=None)
    for region in people:
        is_small = region_areas[region] < min_area
        if is_small or (rules.largest_only and region != largest):
            classes[region] = IGNORE
    return classes


def _draw_mask(coco: CocoIndex, row: int, classes: dict[int, int], size: tuple[int, int]) -> Mask:
    """Draw the mask of an image at any size, H W uint8 in {0, 1, 255}."""
    mask = np.full(size, BACKGROUND, dtype=np.uint8)
    original = int(coco.heights[row]), int(coco.widths[row])
    # PERSON is last: a person drawn over a crowd is a person.
    for cls in (IGNORE, PERSON):
        regions = [region for region, region_class in classes.items() if region_class == cls]
        polygons = [polygon for region in regions for polygon in coco.polygons(region)]
        if polygons:
            mask[_draw_polygons(polygons, original, size)] = cls
        for region in regions:
            if len(coco.runs[region]):
                mask[_decode_runs(coco.runs[region], original, size)] = cls
    return mask


def _draw_polygons(
    polygons: list[npt.NDArray[np.float64]], original: tuple[int, int], size: tuple[int, int]
) -> BoolMask:
    """Draw the union of polygons with coordinates at the original size: H W bool at `size`."""
    from pycocotools import mask as coco_mask

    if size != original:
        factors = np.array([size[1] / original[1], size[0] / original[0]])
        polygons = [(polygon.reshape(-1, 2) * factors).ravel() for polygon in polygons]
    decoded = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *size)))
    # The result is column-major. OpenCV transposes it several times faster than numpy.
    return np.asarray(cv2.transpose(decoded.T), dtype=np.uint8).view(bool)


def _decode_runs(
    runs: npt.NDArray[np.int32], original: tuple[int, int], size: tuple[int, int]
) -> BoolMask:
    """Decode COCO run lengths, which are column-major: H W bool at `size`."""
    height, width = original
    values = (np.arange(len(runs)) % 2).astype(np.uint8)
    region = np.repeat(values, runs).reshape(width, height).T
    if size != original:
        # Plain INTER_NEAREST would shift the region by half a pixel.
        region = np.asarray(
            cv2.resize(
                np.ascontiguousarray(region), size[::-1], interpolation=cv2.INTER_NEAREST_EXACT
            ),
            dtype=np.uint8,
        )
    return region.view(bool)


def _encode_rle(coco: CocoIndex, region: int, size: tuple[int, int]) -> dict[str, object]:
    """Encode a region as pycocotools' compressed run lengths."""
    from pycocotools import mask as coco_mask

    if len(coco.runs[region]):
        counts = coco.runs[region].tolist()
        encoded = coco_mask.frPyObjects({"counts": counts, "size": list(size)}, *size)
    else:
        encoded = coco_mask.merge(coco_mask.frPyObjects(coco.polygons(region), *size))
    return encoded  # type: ignore[no-any-return]
