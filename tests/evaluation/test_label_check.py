"""The label check: planted errors are found and ranked, correct annotations are not."""

import csv
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest

from segtrain.data.sample import DatasetIndex, Sample
from segtrain.errors import DataError, UsageError
from segtrain.evaluation.label_check import ranking as ranking_module
from segtrain.evaluation.label_check.check import LabelCheck, LabelCheckResult, summary_lines
from segtrain.evaluation.label_check.issues import ISSUE_KINDS, Box, LabelIssue, find_issues
from segtrain.evaluation.label_check.ranking import CROPS_PER_KIND, Crop, Ranking, crop_around
from segtrain.evaluation.label_check.write import draw_issue
from segtrain.evaluation.options import EvalOptions
from segtrain.types import Mask, Probs

HEIGHT, WIDTH = 240, 320
LEFT, RIGHT = (90, 120), (225, 120)
RED, BLUE, YELLOW = (255, 60, 60), (0, 225, 255), (255, 235, 0)


def people(*places: tuple[int, int], shape: tuple[int, int] = (HEIGHT, WIDTH)) -> Mask:
    """Heads on bodies, with their necks at (x, y)."""
    mask = np.zeros(shape, np.uint8)
    for x, y in places:
        cv2.circle(mask, (x, y - 20), 22, 1, -1)
        cv2.ellipse(mask, (x, y + 60), (36, 64), 0, 0, 360, 1, -1)
    return mask


def good_probs(truth: Mask, blur: float = 1.5) -> Probs:
    """The prediction of a good model: the truth with soft edges."""
    return np.clip(cv2.GaussianBlur(truth.astype(np.float32), (0, 0), blur), 0, 1)


def box_of(region: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero(region)
    left, top = int(columns.min()), int(rows.min())
    return left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top


def box_iou(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    def fill(box: tuple[int, ...]) -> np.ndarray:
        canvas = np.zeros((1000, 1000), bool)
        canvas[box[1] : box[1] + box[3], box[0] : box[0] + box[2]] = True
        return canvas

    return float((fill(a) & fill(b)).sum() / (fill(a) | fill(b)).sum())


def issues_by_kind(probs: Probs, mask: Mask) -> dict[str, LabelIssue]:
    return {issue.kind: issue for issue in find_issues(probs, mask)}


def polygon(mask: Mask, tolerance: float) -> Mask:
    """The mask as a polygon with few corners."""
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    corners = [cv2.approxPolyDP(outline, tolerance, closed=True) for outline in outlines]
    return cv2.fillPoly(np.zeros_like(mask), corners, 1)


def dilate(mask: Mask, depth: int) -> Mask:
    return np.asarray(cv2.dilate(mask, np.ones((2 * depth + 1, 2 * depth + 1), np.uint8)))


def erode(mask: Mask, depth: int) -> Mask:
    return np.asarray(cv2.erode(mask, np.ones((2 * depth + 1, 2 * depth + 1), np.uint8)))


@dataclass
class MaskDataset:
    """A data set of masks in memory; its images are gray."""

    masks: list[Mask]
    names: list[str] = field(default_factory=list)
    damaged: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def index(self) -> DatasetIndex:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.masks)

    def sample(self, index: int, short_side: int | None = None) -> Sample:
        assert short_side is None
        if index in self.damaged:
            raise DataError(f"{self.image_path(index)} is damaged; replace it")
        mask = self.masks[index]
        image = np.full((*mask.shape, 3), 100, np.uint8)
        return Sample(image=image, mask=mask, image_id=str(index))

    def image_path(self, index: int) -> Path:
        return Path("images") / f"{self.name(index)}.jpg"

    def name(self, index: int) -> str:
        return self.names[index] if self.names else f"image{index}"


def check_labels(
    masks: list[Mask], predictions: list[Probs], **kwargs: list[str]
) -> LabelCheckResult:
    check = LabelCheck(MaskDataset(masks, **kwargs))
    for index, (probs, mask) in enumerate(zip(predictions, masks, strict=True)):
        check.add(index, probs, mask)
    return check.write(Path("out"))


def rows_of(result: LabelCheckResult) -> list[dict[str, str]]:
    with result.table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- Correct annotations --------------------------------------------------------------------------


@pytest.mark.parametrize("blur", [0.01, 1.5, 4.0], ids=["hard", "soft", "blurred"])
@pytest.mark.parametrize(
    "mask",
    [people(LEFT, RIGHT), people(), people() + 1, people((0, 0), (160, 240)), people() + 255],
    ids=["two", "none", "full", "at the frame", "all ignored"],
)
def test_a_correct_annotation_has_no_issue(mask: Mask, blur: float) -> None:
    truth = (mask > 0).astype(np.uint8)

    assert find_issues(good_probs(truth, blur), mask) == []


@pytest.mark.parametrize("probability", [0.11, 0.5, 0.89])
def test_an_unsure_model_finds_no_issue(probability: float) -> None:
    mask = people(LEFT)
    mask[:, 200:] = 255
    probs = np.full(mask.shape, probability, np.float32)

    assert find_issues(probs, mask) == []


def test_an_outline_off_by_two_pixels_is_accepted() -> None:
    mask = people(LEFT, RIGHT)

    for other in (dilate(mask, 1), erode(mask, 1), np.roll(mask, 1, axis=1)):
        assert find_issues(good_probs(mask), other) == []
        assert find_issues(mask.astype(np.float32), other) == []


def test_ignored_pixels_are_neither_missing_nor_phantom() -> None:
    truth = people(LEFT, RIGHT)
    hidden = np.where(dilate(people(RIGHT), 3) > 0, 255, people(LEFT)).astype(np.uint8)

    assert find_issues(good_probs(truth), hidden) == []
    cut = people(LEFT)
    cut[:, 90:] = 255  # half a person and everything to the right
    assert find_issues(good_probs(people(LEFT)), cut) == []
    truth, crowd = np.zeros((2, HEIGHT, WIDTH), np.uint8)
    truth[50:200, 100:180] = 1
    crowd[40:210, 107:190] = 255  # loosely drawn, as crowds are: a person extends beyond it
    assert find_issues(truth.astype(np.float32), crowd) == []


def test_small_components_are_left_out() -> None:
    truth = people(LEFT)
    truth[20:30, 250:260] = 1
    assert find_issues(truth.astype(np.float32), people(LEFT)) == []
    assert find_issues(people(LEFT).astype(np.float32), truth) == []

    full, nearly = np.ones((2, HEIGHT, WIDTH), np.uint8)
    full[:6, :6], nearly[:14, :14] = 0, 0  # the whole outline is off, but it is short
    assert find_issues(nearly.astype(np.float32), full) == []


# --- Planted errors -------------------------------------------------------------------------------


def test_a_person_removed_from_the_annotation_is_missing() -> None:
    found = issues_by_kind(good_probs(people(LEFT, RIGHT)), people(LEFT))

    assert found.keys() == {"missing person"}
    assert box_iou(found["missing person"].box, box_of(people(RIGHT))) > 0.9


def test_the_box_is_that_of_the_strongest_component() -> None:
    truth = people(RIGHT)
    cv2.circle(truth, LEFT, 20, 1, -1)
    cv2.circle(truth, (160, 200), 18, 1, -1)
    [found] = find_issues(good_probs(truth), np.zeros_like(truth))

    assert box_iou(found.box, box_of(people(RIGHT))) > 0.9


def test_a_speck_beside_a_person_does_not_widen_the_box() -> None:
    truth = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.circle(truth, (160, 120), 50, 1, -1)
    person = box_of(truth)
    truth[173:176, 213:216] = 1
    [found] = find_issues(truth.astype(np.float32), np.zeros_like(truth))

    assert found.box == person


def test_the_box_of_a_missing_person_excludes_an_adjacent_one() -> None:
    beside = (LEFT[0] + 72, LEFT[1])
    found = issues_by_kind(good_probs(people(LEFT, beside)), people(LEFT))

    assert box_iou(found["missing person"].box, box_of(people(beside))) > 0.8


def test_an_annotation_without_a_person_is_a_phantom() -> None:
    found = issues_by_kind(good_probs(people(LEFT)), people(LEFT, RIGHT))

    assert found.keys() == {"phantom person"}
    assert box_iou(found["phantom person"].box, box_of(people(RIGHT))) > 0.9


def test_a_slim_phantom_is_found_although_it_is_all_near_its_outline() -> None:
    slim = people(LEFT)
    slim[40:200, 250:258] = 1
    found = issues_by_kind(good_probs(people(LEFT)), slim)

    assert found.keys() == {"phantom person"}
    assert box_iou(found["phantom person"].box, (250, 40, 8, 160)) > 0.9


@pytest.mark.parametrize(
    "coarsen",
    [
        lambda mask: dilate(mask, 5),
        lambda mask: erode(mask, 5),
        lambda mask: polygon(mask, 14),
        lambda mask: np.roll(mask, 5, axis=1),
    ],
    ids=["wide", "narrow", "few corners", "shifted"],
)
def test_an_outline_that_is_off_is_coarse(coarsen: Callable[[Mask], Mask]) -> None:
    truth = people(LEFT, RIGHT)
    mask = people(LEFT) | coarsen(people(RIGHT))
    found = issues_by_kind(good_probs(truth), mask)

    assert found.keys() == {"coarse edge"}
    assert box_iou(found["coarse edge"].box, box_of(coarsen(people(RIGHT)))) == 1


def test_an_outline_slightly_off_by_more_than_the_band_is_a_coarse_edge() -> None:
    truth = np.zeros((HEIGHT, WIDTH), np.uint8)
    truth[40:200, 80:220] = 1

    assert issues_by_kind(good_probs(truth), erode(truth, 11)).keys() == {"coarse edge"}
    assert issues_by_kind(good_probs(erode(truth, 11)), truth).keys() == {"coarse edge"}


def test_a_hole_deeper_than_the_band_is_missing_and_not_a_coarse_edge() -> None:
    mask = people(LEFT)
    mask[150:200, 60:120] = 0

    assert issues_by_kind(good_probs(people(LEFT)), mask).keys() == {"missing person"}


def test_the_score_of_a_coarse_edge_is_the_fraction_that_is_off() -> None:
    truth, mask = np.zeros((2, HEIGHT, WIDTH), np.uint8)
    truth[60:180, 100:200] = 1
    mask[60:180, 100:204] = 1  # the right side is off by four pixels
    [found] = find_issues(truth.astype(np.float32), mask)

    assert found.kind == "coarse edge"
    assert found.score == pytest.approx(120 / (2 * (104 + 120)), abs=0.03)


@pytest.mark.parametrize("kind", ["missing person", "phantom person", "wrong crowd"])
def test_the_score_of_a_component_is_confidence_times_linear_size(kind: str) -> None:
    """A square of a quarter of the frame, with a probability of 0.95."""
    truth = np.full((200, 200), 0.02, np.float32)
    mask = np.zeros((200, 200), np.uint8)
    truth[50:150, 50:150] = 0.95 if kind == "missing person" else 0.05
    mask[50:150, 50:150] = {"missing person": 0, "phantom person": 1, "wrong crowd": 255}[kind]
    [found] = find_issues(truth, mask)

    assert found.kind == kind
    assert found.score == pytest.approx(0.9 * (100**2 / 200**2) ** 0.5, rel=2e-3)
    assert found.box == (50, 50, 100, 100)


def test_a_crowd_without_people_is_wrong_and_one_with_a_person_is_not() -> None:
    mask = people(LEFT)
    mask[40:, 180:280] = 255
    found = issues_by_kind(good_probs(people(LEFT)), mask)

    assert found.keys() == {"wrong crowd"}
    assert found["wrong crowd"].box == (180, 40, 100, 200)
    assert find_issues(good_probs(people(LEFT, RIGHT)), mask) == []


def test_a_large_image_has_the_same_issues_as_a_small_one() -> None:
    truth, mask = people(LEFT, RIGHT), people(LEFT)
    [small] = find_issues(good_probs(truth), mask)
    large_truth, large_mask = (np.kron(m, np.ones((6, 6), np.uint8)) for m in (truth, mask))
    [large] = find_issues(good_probs(large_truth, 9), large_mask)

    assert large.kind == "missing person"
    assert large.score == pytest.approx(small.score, rel=0.02)
    assert [side / 6 for side in large.box] == pytest.approx(small.box, abs=2)


# --- Ranking --------------------------------------------------------------------------------------


def planted_errors(num: int = 12) -> tuple[list[Mask], list[Probs], dict[str, int]]:
    """Masks, predictions, and the index of the strongest error of each kind."""
    truth, crowd = people(LEFT, RIGHT), people(LEFT)
    crowd[60:200, 180:280] = 255
    masks, predictions = [truth.copy() for _ in range(num)], [good_probs(truth) for _ in range(num)]
    masks[1] = truth.copy()
    # A smaller missing part than the person.
    cv2.circle(masks[1], (RIGHT[0], RIGHT[1] + 60), 30, 0, -1)
    strongest = {"missing person": 7, "phantom person": 2, "coarse edge": 9, "wrong crowd": 4}
    masks[7] = people(LEFT)
    predictions[2] = good_probs(people(LEFT))
    masks[9] = people(LEFT) | dilate(people(RIGHT), 5)
    masks[4], predictions[4] = crowd, good_probs(people(LEFT))
    return masks, predictions, strongest


def test_planted_errors_rank_first_in_their_kind() -> None:
    masks, predictions, strongest = planted_errors()
    result = check_labels(masks, predictions)
    first = {row["kind"]: row["name"] for row in reversed(rows_of(result))}

    assert first == {kind: f"image{index}" for kind, index in strongest.items()}
    assert result.num_issues == {
        "missing person": 2,
        "phantom person": 1,
        "coarse edge": 1,
        "wrong crowd": 1,
    }


def test_order_and_threads_have_no_effect() -> None:
    masks, predictions, _ = planted_errors()
    # Equal scores on both sides of the last crop.
    masks, predictions = masks * 9, predictions * 9
    dataset = MaskDataset(masks)
    sequential, threaded = LabelCheck(dataset), LabelCheck(dataset)
    for index in range(len(masks)):
        sequential.add(index, predictions[index], masks[index])
    shuffled = random.Random(0).sample(range(len(masks)), len(masks))
    with ThreadPoolExecutor(4) as pool:
        list(
            pool.map(lambda index: threaded.add(index, predictions[index], masks[index]), shuffled)
        )
    first, second = sequential.write(Path("first")), threaded.write(Path("second"))

    assert max(first.num_issues.values()) < CROPS_PER_KIND
    assert first.num_issues == second.num_issues
    assert first.table.read_bytes() == second.table.read_bytes()
    assert first.sheet.read_bytes() == second.sheet.read_bytes()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_strongest_issues_get_crops_in_any_order(seed: int) -> None:
    probs = np.zeros((1000, 1000), np.float32)
    scores = [round(i / 400, 2) for i in range(200)]  # many of them equal
    ranking = Ranking()

    def issue(score: float) -> LabelIssue:
        return LabelIssue(kind="phantom person", score=score, box=Box(0, 0, 900, 9))

    for index in random.Random(seed).sample(range(200), 200):
        ranking.add(index, issue(scores[index]), probs)

    expected = sorted(range(200), key=lambda i: (-scores[i], i))
    assert [ranked.index for ranked in ranking.ranked("phantom person")] == expected
    crops = ranking.crops("phantom person")
    assert [ranked.index for ranked, _ in crops] == expected[:CROPS_PER_KIND]
    levels = [crop.levels for _, crop in crops]
    assert all(array.base is None and array.nbytes <= 2**16 for array in levels)
    assert ranking.crops("coarse edge") == []


def test_threads_do_not_keep_too_many_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_crop(probs: Probs, box: Box) -> Crop:
        time.sleep(0.002)  # lets the other threads reach the same point
        return crop_around(probs, box)

    monkeypatch.setattr(ranking_module, "crop_around", slow_crop)
    ranking, probs = Ranking(), np.zeros((20, 20), np.float32)

    def add(index: int) -> None:
        issue = LabelIssue(kind="wrong crowd", score=index / 100, box=Box(0, 0, 9, 9))
        ranking.add(index, issue, probs)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(60)))

    indices = [ranked.index for ranked, _ in ranking.crops("wrong crowd")]
    assert indices == list(range(59, 59 - CROPS_PER_KIND, -1))


# --- Sheet ----------------------------------------------------------------------------------------


def colors_in(pixels: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(color) for color in np.unique(pixels.reshape(-1, 3), axis=0).tolist()}


def test_the_sheet_shows_both_outlines_and_a_box() -> None:
    masks, predictions, _ = planted_errors()
    result = check_labels(masks, predictions)
    with PIL.Image.open(result.sheet) as sheet:
        assert 1500 < sheet.width < 1700
        assert 5 * 40 + 4 * 100 < sheet.height < 5 * 40 + 4 * 300
        assert {RED, BLUE, YELLOW} <= colors_in(np.asarray(sheet.convert("RGB")))


def test_a_small_component_is_enlarged_with_its_box_in_place() -> None:
    truth = np.zeros((480, 640), np.uint8)
    cv2.circle(truth, (520, 220), 20, 1, -1)
    probs = truth.astype(np.float32)
    empty = np.zeros_like(truth)
    sample = Sample(image=np.zeros((480, 640, 3), np.uint8), mask=empty, image_id="x")
    [issue] = find_issues(probs, empty)
    crop = crop_around(probs, issue.box)
    pixels = draw_issue(sample, crop, issue.box)

    assert issue.box == box_of(truth) == (500, 200, 41, 41)
    assert max(pixels.shape) == 256
    assert not (pixels == YELLOW).all(axis=2).any()
    scale = pixels.shape[1] / crop.view.width
    for color in (RED, BLUE):
        left, top, width, height = box_of((pixels == color).all(axis=2))
        assert left / scale + crop.view.left == pytest.approx(500, abs=2)
        assert top / scale + crop.view.top == pytest.approx(200, abs=2)
        assert (width / scale, height / scale) == pytest.approx((41, 41), abs=3)


def test_an_image_damaged_since_is_left_out_of_the_sheet_only() -> None:
    dataset = MaskDataset([people(LEFT)] * 2, damaged={0})
    check = LabelCheck(dataset)
    for index in range(2):
        check.add(index, good_probs(people(LEFT, RIGHT)), dataset.masks[index])
    result = check.write(Path("out"))

    assert [row["name"] for row in rows_of(result)] == ["image0", "image1"]
    with PIL.Image.open(result.sheet) as sheet:
        assert RED in colors_in(np.asarray(sheet.convert("RGB")))


# --- Table and files ------------------------------------------------------------------------------


def test_the_table_lists_name_path_and_box() -> None:
    result = check_labels([people(LEFT)], [good_probs(people(LEFT, RIGHT))])
    [row] = rows_of(result)

    assert (row["kind"], row["rank"], row["name"]) == ("missing person", "1", "image0")
    assert Path(row["image"]) == Path.cwd() / "images" / "image0.jpg"
    box = tuple(int(row[side]) for side in ("left", "top", "width", "height"))
    assert box_iou(box, box_of(people(RIGHT))) > 0.9
    assert 0 < float(row["score"]) < 1


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ('=HYPERLINK("x")', '\'=HYPERLINK("x")'),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@x", "'@x"),
        ("a,b;\n=c", "a,b;\n=c"),
        ("Zoë 张", "Zoë 张"),
    ],
)
def test_awkward_names_stay_in_one_cell_and_are_not_formulas(name: str, cell: str) -> None:
    [row] = rows_of(check_labels([people(LEFT)], [good_probs(people(LEFT, RIGHT))], names=[name]))

    assert row["name"] == cell
    assert row["image"].endswith(f"{name}.jpg")


def test_a_name_that_is_not_utf8_keeps_its_bytes() -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    result = check_labels([people(LEFT)], [good_probs(people(LEFT, RIGHT))], names=[name])

    assert b"caf\xe9" in result.table.read_bytes()


@pytest.mark.parametrize("name", ["label_check.png", "label_check.csv"])
def test_files_are_replaced_only_with_overwrite(name: str) -> None:
    Path("out").mkdir()
    (Path("out") / name).write_text("mine")
    check = LabelCheck(MaskDataset([people(LEFT)]))

    with pytest.raises(UsageError, match=f"out/{name} exists; use --overwrite"):
        check.write(Path("out"))
    assert [path.name for path in Path("out").iterdir()] == [name]
    assert (Path("out") / name).read_text() == "mine"
    check.write(Path("out"), overwrite=True)
    assert (Path("out") / name).read_bytes() != b"mine"


def test_the_check_for_existing_files_makes_no_folder() -> None:
    EvalOptions(report=Path("new"), label_check=True).refuse_existing()

    assert not Path("new").exists()


def test_without_issues_the_files_are_written_too() -> None:
    result = check_labels([people(LEFT)], [good_probs(people(LEFT))])

    assert rows_of(result) == []
    assert set(result.num_issues.values()) == {0}
    assert result.num_issues.keys() == ISSUE_KINDS.keys()
    assert result.sheet.read_bytes().startswith(b"\x89PNG")


def test_the_summary_counts_issues_and_names_the_files() -> None:
    masks, predictions, _ = planted_errors()
    counts, files = summary_lines(check_labels(masks, predictions))

    assert "missing person 2, phantom person 1, coarse edge 1, wrong crowd 1" in counts
    assert "out/label_check.png" in files
    assert "out/label_check.csv" in files


def test_the_module_of_paths_imports_nothing_heavy() -> None:
    script = (
        "import sys, segtrain.evaluation.label_check.paths\n"
        "sys.exit(bool({'torch', 'numpy', 'cv2', 'PIL'} & sys.modules.keys()))"
    )

    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
