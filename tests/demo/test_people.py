"""The drawn demo people are deterministic, varied, and annotated as drawn."""

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from segtrain.demo.appearance import random_appearance
from segtrain.demo.canvas import Light
from segtrain.demo.coco_writer import mask_to_polygons, write_demo_people
from segtrain.demo.figures import Figure, Placement
from segtrain.demo.poses import Pose
from segtrain.demo.scenes import Scene, draw_person_scene

_TRAIN, _VAL = 24, 8


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("people")
    write_demo_people(root, num_train=_TRAIN, num_val=_VAL, seed=3)
    return root


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_person_scene(11, index, width=240, height=180) for index in range(150)]


def _read(path: Path) -> np.ndarray:
    image = cv2.imread(str(path))
    assert image is not None
    return image[..., ::-1]


def _digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*.*"))
    }


def _rasterize(polygons: list[list[float]], shape: tuple[int, int]) -> np.ndarray:
    height, width = shape
    if not polygons:
        return np.zeros(shape, np.uint8)
    rles = coco_mask.frPyObjects(polygons, height, width)
    return np.asarray(coco_mask.decode(coco_mask.merge(rles)))


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


def test_same_seed_writes_the_same_bytes(root: Path, tmp_path: Path) -> None:
    write_demo_people(tmp_path, num_train=_TRAIN, num_val=_VAL, seed=3)
    assert _digests(tmp_path) == _digests(root)


def test_an_image_does_not_depend_on_the_number_of_images(root: Path, tmp_path: Path) -> None:
    write_demo_people(tmp_path, num_train=3, num_val=1, seed=3)
    images = {name: d for name, d in _digests(tmp_path).items() if name.endswith(".jpg")}
    assert len(images) == 4
    assert images.items() <= _digests(root).items()


def test_seeds_and_splits_share_no_image(root: Path, tmp_path: Path) -> None:
    write_demo_people(tmp_path, num_train=4, num_val=4, seed=4)
    roots = (root, tmp_path)
    digests = [d for path in roots for name, d in _digests(path).items() if "jpg" in name]
    assert len(set(digests)) == len(digests) == _TRAIN + _VAL + 8


def test_scenes_do_not_use_or_change_the_global_random_state() -> None:
    np.random.seed(0)  # noqa: NPY002 - the state that must not change
    first = draw_person_scene(0, 5)
    number = np.random.random()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    assert number == np.random.random()  # noqa: NPY002
    assert np.array_equal(first.image, draw_person_scene(0, 5).image)


def test_files_are_valid_coco(root: Path) -> None:
    for split, count in (("train2017", _TRAIN), ("val2017", _VAL)):
        data = json.loads((root / "annotations" / f"instances_{split}.json").read_text("utf-8"))
        assert data["categories"] == [{"id": 1, "name": "person", "supercategory": "person"}]
        assert data["info"]["seed"] == 3
        assert data["licenses"] == []
        assert len({image["id"] for image in data["images"]}) == count
        sizes = {image["id"]: (image["width"], image["height"]) for image in data["images"]}
        for image in data["images"]:
            photo = _read(root / split / image["file_name"])
            assert photo.shape == (image["height"], image["width"], 3)
        ids = [annotation["id"] for annotation in data["annotations"]]
        assert len(set(ids)) == len(ids) > 0
        for annotation in data["annotations"]:
            width, height = sizes[annotation["image_id"]]
            x, y, w, h = annotation["bbox"]
            assert annotation["category_id"] == 1
            assert annotation["iscrowd"] == 0
            assert x >= 0
            assert y >= 0
            assert x + w <= width
            assert y + h <= height
            assert 0 < annotation["area"] <= w * h
            assert annotation["segmentation"]
            for polygon in annotation["segmentation"]:
                points = np.array(polygon)
                assert len(polygon) >= 6
                assert len(polygon) % 2 == 0
                assert np.isfinite(points).all()
                assert points.min() >= 0
                assert points[0::2].max() <= width
                assert points[1::2].max() <= height


def test_image_sizes_vary(root: Path) -> None:
    images = COCO(str(root / "annotations" / "instances_train2017.json")).dataset["images"]
    sizes = {(image["width"], image["height"]) for image in images}
    assert len(sizes) >= 4
    assert any(w > h for w, h in sizes)
    assert any(w < h for w, h in sizes)
    assert any(w == h for w, h in sizes)


def test_polygons_rasterize_to_the_masks(scenes: list[Scene]) -> None:
    overlaps = []
    for scene in scenes:
        for mask in scene.people:
            overlap = _iou(_rasterize(mask_to_polygons(mask), mask.shape), mask)
            overlaps.append(overlap)
            assert mask.sum() <= 200 or overlap >= 0.9
    assert np.mean(overlaps) >= 0.97


def test_annotation_on_disk_matches_the_drawn_people(root: Path) -> None:
    coco = COCO(str(root / "annotations" / "instances_val2017.json"))
    for image in coco.dataset["images"]:
        scene = draw_person_scene(3, image["id"], width=image["width"], height=image["height"])
        annotations = coco.loadAnns(coco.getAnnIds(image["id"]))
        assert [a["area"] for a in annotations] == [int(m.sum()) for m in scene.people]
        stored = _read(root / "val2017" / image["file_name"])
        assert np.abs(stored.astype(int) - scene.image).mean() < 12  # JPEG artifacts only


def test_holes_stay_holes() -> None:
    mask = np.zeros((60, 80), np.uint8)
    cv2.rectangle(mask, (10, 10), (60, 50), 1, cv2.FILLED)
    cv2.circle(mask, (25, 25), 8, 0, cv2.FILLED)
    cv2.circle(mask, (45, 35), 6, 0, cv2.FILLED)
    cv2.rectangle(mask, (68, 0), (79, 59), 1, cv2.FILLED)  # clipped by the frame
    polygons = mask_to_polygons(mask)
    assert len(polygons) == 2
    assert _iou(_rasterize(polygons, mask.shape), mask) > 0.985


def test_empty_mask_has_no_polygon() -> None:
    assert mask_to_polygons(np.zeros((20, 30), np.uint8)) == []


def test_a_backpack_is_drawn_but_is_not_person() -> None:
    rng = np.random.default_rng(0)
    appearance = random_appearance(rng, 200)
    figure = Figure(appearance, Pose(), Placement(x=100, ground=230, adult_px=200, yaw=np.pi), rng)
    light = Light(-0.6, -0.8, 15)
    covered = {}
    for figure.bag in ("none", "backpack"):
        cutout = figure.draw(light, 200, 240)
        assert cutout is not None
        covered[figure.bag] = (cutout.alpha >= 0.5).sum(), (cutout.person >= 0.5).sum()
    assert covered["none"][0] == pytest.approx(covered["none"][1], rel=0.01)
    assert covered["backpack"][1] < 0.9 * covered["none"][1]
    assert covered["backpack"][0] >= covered["none"][0]


def test_visible_masks_of_different_people_are_disjoint(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert all(mask.shape == scene.image.shape[:2] for mask in scene.people)
        assert all(set(np.unique(mask)) == {0, 1} for mask in scene.people)
        assert not scene.people or np.sum(scene.people, axis=0).max() == 1


def test_person_areas_and_counts_have_the_intended_distribution(scenes: list[Scene]) -> None:
    counts = np.array([len(scene.people) for scene in scenes])
    fractions = np.array([np.sum([m.mean() for m in s.people]) for s in scenes if s.people])
    assert 0.05 <= (counts == 0).mean() <= 0.22
    assert counts.max() >= 4
    assert 0.11 <= np.median(fractions) <= 0.19
    assert fractions.min() < 0.03
    assert 0.4 <= fractions.max() <= 0.8


def test_mask_edges_are_on_image_edges(scenes: list[Scene]) -> None:
    """Masks shifted by three pixels must fit the image's edges clearly worse."""

    def edge_strength(dx: int) -> float:
        means = []
        for scene in scenes[:60]:
            gray = cv2.cvtColor(scene.image, cv2.COLOR_RGB2GRAY).astype(np.float32)
            gx, gy = cv2.Sobel(gray, cv2.CV_32F, 1, 0), cv2.Sobel(gray, cv2.CV_32F, 0, 1)
            gradient = np.hypot(gx, gy)
            for mask in scene.people:
                rim = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((2, 2), np.uint8))
                means.append(gradient[np.roll(rim, dx, axis=1) > 0].mean())
        return float(np.mean(means))

    assert edge_strength(0) > 1.3 * max(edge_strength(-3), edge_strength(3))


def test_an_unwritable_root_is_an_os_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(OSError, match="file"):
        write_demo_people(blocked, num_train=1, num_val=0)


def test_progress_is_reported_once_per_image(tmp_path: Path) -> None:
    calls: list[None] = []
    write_demo_people(tmp_path, num_train=2, num_val=1, on_image=lambda: calls.append(None))
    assert len(calls) == 3
