"""People in COCO layout: `train2017/ val2017/ annotations/instances_train2017.json ...`."""

import hashlib
import os
from collections import Counter
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import numpy.typing as npt

from segtrain.classes import BACKGROUND, IGNORE, PERSON
from segtrain.data.cache import Arrays, cached_arrays
from segtrain.data.coco_index import INDEX_VERSION, CocoIndex, read_index
from segtrain.data.sample import Catalog, LabelRules, Sample, tolerated
from segtrain.errors import DataError
from segtrain.images import read_sized_image, resize_image, scaled_size
from segtrain.progress import progress_bar

Mask = npt.NDArray[np.uint8]


def is_coco(root: Path) -> bool:
    """Whether `root` has COCO's layout."""
    return any((root / "annotations").glob("instances_*2017.json"))


class CocoPeople:
    """Person masks of one split; pictures without people are kept as negatives.

    Several people are one union, crowd regions become ignore except where a person is drawn.

    Args:
        root: folder in COCO layout. Nothing outside it is ever opened.
        split: "train" or "val".
        rules: which regions are person and which are ignored.

    Raises:
        DataError: no such split, a malformed annotation file, or more than 1 % of its person
            annotations or pictures unusable. Fewer are left out and counted in `skipped`.
    """

    def __init__(self, root: Path, split: str, rules: LabelRules = LabelRules()) -> None:  # noqa: B008
        self.root = root
        self.rules = rules
        self.notes: list[str] = []
        self.image_dir = root / f"{split}2017"
        path = root / "annotations" / f"instances_{split}2017.json"
        self.index = read_index(path)
        self.skipped = Counter(self.index.skipped)
        names = self.index.all_names()
        present = self._present(names)
        if not present.any():
            raise DataError(f"{path} lists no picture that exists in {self.image_dir}")
        areas = _measured(self.index, rules)
        self._region_areas = areas["region_areas"]
        self._rows = np.flatnonzero(present)
        self.catalog = _catalog(self.index, areas["people_areas"]).take(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, index: int, short_side: int | None = None) -> Sample:
        """As `Source.sample`; the mask is drawn at the size that is asked for."""
        row = int(self._rows[index])
        height, width = int(self.index.heights[row]), int(self.index.widths[row])
        path = self.picture_path(index)
        # COCO's annotations mean the stored pixels, whatever EXIF says.
        image, stored = read_sized_image(path, upright=False, short_side=short_side)
        if stored != (height, width):
            raise DataError(
                f"{path} is {stored[1]}x{stored[0]}, its annotation says {width}x{height}; "
                "restore the original picture"
            )
        size = (height, width)
        if short_side is not None:
            size = scaled_size(height, width, short_side)
            image = resize_image(image, size)
        mask = _draw(self.index, row, _roles(self.index, row, self.rules, self._region_areas), size)
        return Sample(image=image, mask=mask, image_id=str(self.index.image_ids[row]))

    def picture_path(self, index: int) -> Path:
        return self.image_dir / self.index.name(int(self._rows[index]))

    def stem(self, index: int) -> str:
        return str(PurePosixPath(self.index.name(int(self._rows[index]))).with_suffix(""))

    def _present(self, names: list[str]) -> npt.NDArray[np.bool_]:
        """Which pictures are there; many missing ones are an error."""
        if not self.image_dir.is_dir():
            raise DataError(f"{self.image_dir} is missing; put the pictures of the split there")
        # Names may hold sub-folders, so each folder is listed once instead of asking file by file.
        folders = {name.rpartition("/")[0] for name in names}
        there = {
            f"{folder}/{name}" if folder else name
            for folder in folders
            for name in _names(self.image_dir / folder)
        }
        present = np.fromiter((name in there for name in names), dtype=bool, count=len(names))
        missing = [name for name in names if name not in there]
        if len(missing) > tolerated(len(names)):
            raise DataError(
                f"{len(missing)} of {len(names)} pictures are missing in {self.image_dir}, first "
                f"{', '.join(missing[:5])}; download them again"
            )
        if missing:
            self.skipped["picture missing"] = len(missing)
        return present


def _names(folder: Path) -> list[str]:
    """Names in a folder; none where there is no such folder or no disk could hold its name."""
    try:
        return os.listdir(folder)  # noqa: PTH208, a Path each would take seconds
    except (OSError, ValueError):
        return []


def _catalog(index: CocoIndex, people_areas: npt.NDArray[np.int64]) -> Catalog:
    counts = np.diff(index.region_starts)
    owners = np.repeat(np.arange(len(index)), counts)
    num_crowds = np.bincount(owners[index.crowd], minlength=len(index))
    sizes = np.stack([index.heights, index.widths], axis=1)
    frames = sizes.astype(np.int64).prod(axis=1)
    return Catalog(
        sizes=sizes,
        person_share=(people_areas / frames).astype(np.float32),
        num_people=(counts - num_crowds).astype(np.int32),
        has_crowd=num_crowds > 0,
        identities=index.identities,
    )


def _measured(index: CocoIndex, rules: LabelRules) -> dict[str, npt.NDArray[np.int64]]:
    """Pixels of every region, and of the people of every picture under the rules."""

    def measure() -> Arrays:
        from pycocotools import mask as coco_mask

        region_areas = np.zeros(len(index.crowd), dtype=np.int64)
        people_areas = np.zeros(len(index), dtype=np.int64)
        with progress_bar(total=len(index), desc="measuring people") as bar:
            for row in range(len(index)):
                size = int(index.heights[row]), int(index.widths[row])
                for region in index.regions(row):
                    rle = _encoded(index, region, size)
                    region_areas[region] = coco_mask.area(rle)
                roles = _roles(index, row, rules, region_areas)
                people = [_encoded(index, r, size) for r, role in roles.items() if role == PERSON]
                if people:
                    people_areas[row] = coco_mask.area(coco_mask.merge(people))
                bar.update()
        return {"region_areas": region_areas, "people_areas": people_areas}

    of = hashlib.sha256(f"{index.digest} {rules}".encode()).hexdigest()
    kept = cached_arrays(f"coco-areas-v{INDEX_VERSION}-{of}", measure)
    return {name: array.astype(np.int64) for name, array in kept.items()}


def _roles(
    index: CocoIndex, row: int, rules: LabelRules, region_areas: npt.NDArray[np.int64]
) -> dict[int, int]:
    """Region → PERSON or IGNORE, for the regions of one picture."""
    regions = index.regions(row)
    crowd_role = PERSON if rules.crowd == "person" else IGNORE
    roles = {region: crowd_role if index.crowd[region] else PERSON for region in regions}
    people = [region for region in regions if not index.crowd[region]]
    smallest = rules.min_person_area * int(index.heights[row]) * int(index.widths[row])
    largest = max(people, key=lambda region: int(region_areas[region]), default=None)
    for region in people:
        too_small = region_areas[region] < smallest
        if too_small or (rules.largest_only and region != largest):
            roles[region] = IGNORE
    return roles


def _draw(index: CocoIndex, row: int, roles: dict[int, int], size: tuple[int, int]) -> Mask:
    """H W uint8 in {0, 1, 255} at any size."""
    mask = np.full(size, BACKGROUND, dtype=np.uint8)
    original = int(index.heights[row]), int(index.widths[row])
    # Where a person is drawn over a crowd, it is a person.
    for role in (IGNORE, PERSON):
        regions = [region for region, its_role in roles.items() if its_role == role]
        polygons = [polygon for region in regions for polygon in index.polygons(region)]
        if polygons:
            mask[_filled(polygons, original, size)] = role
        for region in regions:
            if len(index.runs[region]):
                mask[_unrolled(index.runs[region], original, size)] = role
    return mask


def _filled(
    polygons: list[npt.NDArray[np.float64]], original: tuple[int, int], size: tuple[int, int]
) -> npt.NDArray[np.bool_]:
    """Union of polygons, given at the original size and drawn at `size`: H W bool."""
    from pycocotools import mask as coco_mask

    if size != original:
        factors = np.array([size[1] / original[1], size[0] / original[0]])
        polygons = [(polygon.reshape(-1, 2) * factors).ravel() for polygon in polygons]
    decoded = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *size)))
    # It comes column by column; OpenCV turns it several times faster than numpy.
    return np.asarray(cv2.transpose(decoded.T), dtype=np.uint8).view(bool)


def _unrolled(
    runs: npt.NDArray[np.int32], original: tuple[int, int], size: tuple[int, int]
) -> npt.NDArray[np.bool_]:
    """COCO's run lengths, which go down the columns: H W bool at `size`."""
    height, width = original
    values = (np.arange(len(runs)) % 2).astype(np.uint8)
    region = np.repeat(values, runs).reshape(width, height).T
    if size != original:
        # Plain INTER_NEAREST would move the region by half a pixel.
        region = np.asarray(
            cv2.resize(
                np.ascontiguousarray(region), size[::-1], interpolation=cv2.INTER_NEAREST_EXACT
            ),
            dtype=np.uint8,
        )
    return region.view(bool)


def _encoded(index: CocoIndex, region: int, size: tuple[int, int]) -> dict[str, object]:
    """A region as pycocotools' compressed run lengths."""
    from pycocotools import mask as coco_mask

    if len(index.runs[region]):
        counts = index.runs[region].tolist()
        encoded = coco_mask.frPyObjects({"counts": counts, "size": list(size)}, *size)
    else:
        encoded = coco_mask.merge(coco_mask.frPyObjects(index.polygons(region), *size))
    return encoded  # type: ignore[no-any-return]
