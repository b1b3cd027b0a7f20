"""The label check: planted label faults are found and ranked; what is right is left alone."""

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
import pytest
from PIL import Image

from segtrain.data.sample import Catalog, Sample
from segtrain.errors import DataError, UsageError
from segtrain.evaluation.labels import ranking as ranking_module
from segtrain.evaluation.labels.check import LabelCheck, LabelCheckResult, summary_lines
from segtrain.evaluation.labels.close_up import CloseUp, close_up
from segtrain.evaluation.labels.outputs import check_outputs
from segtrain.evaluation.labels.pieces import Box
from segtrain.evaluation.labels.ranking import PICTURES_A_KIND, Ranking
from segtrain.evaluation.labels.sheet import drawn
from segtrain.evaluation.labels.suspicion import KINDS, Suspicion, suspicions_of
from segtrain.evaluation.picture import Probs
from segtrain.images import Pixels

HEIGHT, WIDTH = 240, 320
LEFT, RIGHT = (90, 120), (225, 120)
RED, BLUE, YELLOW = (255, 60, 60), (0, 225, 255), (255, 235, 0)


def people(*places: tuple[int, int], shape: tuple[int, int] = (HEIGHT, WIDTH)) -> Pixels:
    """Heads on bodies with their necks at x, y."""
    mask = np.zeros(shape, np.uint8)
    for x, y in places:
        cv2.circle(mask, (x, y - 20), 22, 1, -1)
        cv2.ellipse(mask, (x, y + 60), (36, 64), 0, 0, 360, 1, -1)
    return mask


def seen(truth: Pixels, blur: float = 1.5) -> Probs:
    """What a good network says: the truth with soft edges."""
    return np.clip(cv2.GaussianBlur(truth.astype(np.float32), (0, 0), blur), 0, 1)


def box_of(region: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero(region)
    left, top = int(columns.min()), int(rows.min())
    return left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top


def box_iou(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    def painted(box: tuple[int, ...]) -> np.ndarray:
        canvas = np.zeros((1000, 1000), bool)
        canvas[box[1] : box[1] + box[3], box[0] : box[0] + box[2]] = True
        return canvas

    return float((painted(a) & painted(b)).sum() / (painted(a) | painted(b)).sum())


def kinds_of(probs: Probs, mask: Pixels) -> dict[str, Suspicion]:
    return {suspicion.kind: suspicion for suspicion in suspicions_of(probs, mask)}


def polygon(mask: Pixels, tolerance: float) -> Pixels:
    """The outline with few corners, as somebody in a hurry would click it."""
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    corners = [cv2.approxPolyDP(outline, tolerance, closed=True) for outline in outlines]
    return cv2.fillPoly(np.zeros_like(mask), corners, 1)


def dilated(mask: Pixels, depth: int) -> Pixels:
    return np.asarray(cv2.dilate(mask, np.ones((2 * depth + 1, 2 * depth + 1), np.uint8)))


def eroded(mask: Pixels, depth: int) -> Pixels:
    return np.asarray(cv2.erode(mask, np.ones((2 * depth + 1, 2 * depth + 1), np.uint8)))


@dataclass
class Drawn:
    """A data set of masks in memory; its pictures are gray."""

    masks: list[Pixels]
    names: list[str] = field(default_factory=list)
    damaged: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def catalog(self) -> Catalog:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.masks)

    def sample(self, index: int, short_side: int | None = None) -> Sample:
        assert short_side is None
        if index in self.damaged:
            raise DataError(f"{self.picture_path(index)} is damaged; replace it")
        mask = self.masks[index]
        image = np.full((*mask.shape, 3), 100, np.uint8)
        return Sample(image=image, mask=mask, image_id=str(index))

    def picture_path(self, index: int) -> Path:
        return Path("pictures") / f"{self.stem(index)}.jpg"

    def stem(self, index: int) -> str:
        return self.names[index] if self.names else f"picture{index}"


def checked(masks: list[Pixels], answers: list[Probs], **about: list[str]) -> LabelCheckResult:
    check = LabelCheck(Drawn(masks, **about))
    for index, (probs, mask) in enumerate(zip(answers, masks, strict=True)):
        check.add(index, probs, mask)
    return check.write(Path("out"))


def rows_of(result: LabelCheckResult) -> list[dict[str, str]]:
    with result.table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# What is right.


@pytest.mark.parametrize("blur", [0.01, 1.5, 4.0], ids=["hard", "soft", "blurred"])
@pytest.mark.parametrize(
    "mask",
    [people(LEFT, RIGHT), people(), people() + 1, people((0, 0), (160, 240)), people() + 255],
    ids=["two", "none", "full", "at the frame", "all ignored"],
)
def test_a_right_annotation_is_not_suspected(mask: Pixels, blur: float) -> None:
    truth = (mask > 0).astype(np.uint8)

    assert suspicions_of(seen(truth, blur), mask) == []


@pytest.mark.parametrize("probability", [0.11, 0.5, 0.89])
def test_a_network_that_is_not_sure_suspects_nothing(probability: float) -> None:
    mask = people(LEFT)
    mask[:, 200:] = 255
    probs = np.full(mask.shape, probability, np.float32)

    assert suspicions_of(probs, mask) == []


def test_an_outline_two_pixels_off_is_as_good_as_one_can_ask_for() -> None:
    mask = people(LEFT, RIGHT)

    for other in (dilated(mask, 1), eroded(mask, 1), np.roll(mask, 1, axis=1)):
        assert suspicions_of(seen(mask), other) == []
        assert suspicions_of(mask.astype(np.float32), other) == []


def test_what_is_ignored_is_neither_missing_nor_a_phantom() -> None:
    truth = people(LEFT, RIGHT)
    hidden = np.where(dilated(people(RIGHT), 3) > 0, 255, people(LEFT)).astype(np.uint8)

    assert suspicions_of(seen(truth), hidden) == []
    cut = people(LEFT)
    cut[:, 90:] = 255  # half a person and everything right of him
    assert suspicions_of(seen(people(LEFT)), cut) == []
    truth, crowd = np.zeros((2, HEIGHT, WIDTH), np.uint8)
    truth[50:200, 100:180] = 1
    crowd[40:210, 107:190] = 255  # drawn loosely, as crowds are: somebody sticks out of it
    assert suspicions_of(truth.astype(np.float32), crowd) == []


def test_what_is_small_is_left_alone() -> None:
    truth = people(LEFT)
    truth[20:30, 250:260] = 1
    assert suspicions_of(truth.astype(np.float32), people(LEFT)) == []
    assert suspicions_of(people(LEFT).astype(np.float32), truth) == []

    full, nearly = np.ones((2, HEIGHT, WIDTH), np.uint8)
    full[:6, :6], nearly[:14, :14] = 0, 0  # all of what little outline there is, is off
    assert suspicions_of(nearly.astype(np.float32), full) == []


# Planted faults.


def test_a_person_taken_out_of_the_annotation_is_missing() -> None:
    found = kinds_of(seen(people(LEFT, RIGHT)), people(LEFT))

    assert found.keys() == {"missing person"}
    assert box_iou(found["missing person"].box, box_of(people(RIGHT))) > 0.9


def test_of_several_the_strongest_is_boxed() -> None:
    truth = people(RIGHT)
    cv2.circle(truth, LEFT, 20, 1, -1)
    cv2.circle(truth, (160, 200), 18, 1, -1)
    [found] = suspicions_of(seen(truth), np.zeros_like(truth))

    assert box_iou(found.box, box_of(people(RIGHT))) > 0.9


def test_a_speck_beside_a_person_does_not_widen_the_box() -> None:
    truth = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.circle(truth, (160, 120), 50, 1, -1)
    person = box_of(truth)
    truth[173:176, 213:216] = 1
    [found] = suspicions_of(truth.astype(np.float32), np.zeros_like(truth))

    assert found.box == person


def test_a_missing_person_who_touches_another_is_boxed_alone() -> None:
    beside = (LEFT[0] + 72, LEFT[1])
    found = kinds_of(seen(people(LEFT, beside)), people(LEFT))

    assert box_iou(found["missing person"].box, box_of(people(beside))) > 0.8


def test_an_annotation_where_nobody_is_is_a_phantom() -> None:
    found = kinds_of(seen(people(LEFT)), people(LEFT, RIGHT))

    assert found.keys() == {"phantom person"}
    assert box_iou(found["phantom person"].box, box_of(people(RIGHT))) > 0.9


def test_a_slim_phantom_is_one_though_it_is_all_near_its_own_outline() -> None:
    slim = people(LEFT)
    slim[40:200, 250:258] = 1
    found = kinds_of(seen(people(LEFT)), slim)

    assert found.keys() == {"phantom person"}
    assert box_iou(found["phantom person"].box, (250, 40, 8, 160)) > 0.9


@pytest.mark.parametrize(
    "coarsen",
    [
        lambda mask: dilated(mask, 5),
        lambda mask: eroded(mask, 5),
        lambda mask: polygon(mask, 14),
        lambda mask: np.roll(mask, 5, axis=1),
    ],
    ids=["wide", "narrow", "few corners", "shifted"],
)
def test_an_outline_that_is_off_is_coarse(coarsen: Callable[[Pixels], Pixels]) -> None:
    truth = people(LEFT, RIGHT)
    mask = people(LEFT) | coarsen(people(RIGHT))
    found = kinds_of(seen(truth), mask)

    assert found.keys() == {"coarse edge"}
    assert box_iou(found["coarse edge"].box, box_of(coarsen(people(RIGHT)))) == 1


def test_an_outline_that_is_off_by_little_more_than_the_band_hides_nobody() -> None:
    truth = np.zeros((HEIGHT, WIDTH), np.uint8)
    truth[40:200, 80:220] = 1

    assert kinds_of(seen(truth), eroded(truth, 11)).keys() == {"coarse edge"}
    assert kinds_of(seen(eroded(truth, 11)), truth).keys() == {"coarse edge"}


def test_a_hole_deeper_than_the_band_is_a_missing_part_and_no_coarse_edge() -> None:
    mask = people(LEFT)
    mask[150:200, 60:120] = 0

    assert kinds_of(seen(people(LEFT)), mask).keys() == {"missing person"}


def test_the_score_of_a_coarse_edge_is_the_share_of_the_outline_that_is_off() -> None:
    truth, mask = np.zeros((2, HEIGHT, WIDTH), np.uint8)
    truth[60:180, 100:200] = 1
    mask[60:180, 100:204] = 1  # the right side is four pixels too far to the right
    [found] = suspicions_of(truth.astype(np.float32), mask)

    assert found.kind == "coarse edge"
    assert found.score == pytest.approx(120 / (2 * (104 + 120)), abs=0.03)


@pytest.mark.parametrize("kind", ["missing person", "phantom person", "wrong crowd"])
def test_the_score_of_a_piece_is_certainty_times_linear_size(kind: str) -> None:
    """By hand: a square of a quarter of the frame's pixels, of which the network is 95 % sure."""
    truth = np.full((200, 200), 0.02, np.float32)
    mask = np.zeros((200, 200), np.uint8)
    truth[50:150, 50:150] = 0.95 if kind == "missing person" else 0.05
    mask[50:150, 50:150] = {"missing person": 0, "phantom person": 1, "wrong crowd": 255}[kind]
    [found] = suspicions_of(truth, mask)

    assert found.kind == kind
    assert found.score == pytest.approx(0.9 * (100**2 / 200**2) ** 0.5, rel=2e-3)
    assert found.box == (50, 50, 100, 100)


def test_a_crowd_over_nobody_is_wrong_and_one_with_somebody_is_not() -> None:
    mask = people(LEFT)
    mask[40:, 180:280] = 255
    found = kinds_of(seen(people(LEFT)), mask)

    assert found.keys() == {"wrong crowd"}
    assert found["wrong crowd"].box == (180, 40, 100, 200)
    assert suspicions_of(seen(people(LEFT, RIGHT)), mask) == []


def test_a_large_picture_is_judged_as_a_small_one_is() -> None:
    truth, mask = people(LEFT, RIGHT), people(LEFT)
    [small] = suspicions_of(seen(truth), mask)
    large_truth, large_mask = (np.kron(m, np.ones((6, 6), np.uint8)) for m in (truth, mask))
    [large] = suspicions_of(seen(large_truth, 9), large_mask)

    assert large.kind == "missing person"
    assert large.score == pytest.approx(small.score, rel=0.02)
    assert [side / 6 for side in large.box] == pytest.approx(small.box, abs=2)


# The ranking.


def faulty_set(num: int = 12) -> tuple[list[Pixels], list[Probs], dict[str, int]]:
    """Good pictures, and one of each fault among many that are fine or hardly wrong."""
    truth, crowd = people(LEFT, RIGHT), people(LEFT)
    crowd[60:200, 180:280] = 255
    masks, answers = [truth.copy() for _ in range(num)], [seen(truth) for _ in range(num)]
    masks[1] = truth.copy()
    cv2.circle(
        masks[1], (RIGHT[0], RIGHT[1] + 60), 30, 0, -1
    )  # a smaller missing piece than the person
    faults = {"missing person": 7, "phantom person": 2, "coarse edge": 9, "wrong crowd": 4}
    masks[7] = people(LEFT)
    answers[2] = seen(people(LEFT))
    masks[9] = people(LEFT) | dilated(people(RIGHT), 5)
    masks[4], answers[4] = crowd, seen(people(LEFT))
    return masks, answers, faults


def test_planted_faults_come_first_of_their_kinds() -> None:
    masks, answers, faults = faulty_set()
    result = checked(masks, answers)
    first = {row["kind"]: row["name"] for row in reversed(rows_of(result))}

    assert first == {kind: f"picture{index}" for kind, index in faults.items()}
    assert result.num_suspicious == {
        "missing person": 2,
        "phantom person": 1,
        "coarse edge": 1,
        "wrong crowd": 1,
    }


def test_neither_order_nor_threads_change_anything() -> None:
    masks, answers, _ = faulty_set()
    # Equal ones on both sides of what is shown.
    masks, answers = masks * 9, answers * 9
    source = Drawn(masks)
    one, other = LabelCheck(source), LabelCheck(source)
    for index in range(len(masks)):
        one.add(index, answers[index], masks[index])
    shuffled = random.Random(0).sample(range(len(masks)), len(masks))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda index: other.add(index, answers[index], masks[index]), shuffled))
    ours, theirs = one.write(Path("one")), other.write(Path("other"))

    assert max(ours.num_suspicious.values()) < PICTURES_A_KIND
    assert ours.num_suspicious == theirs.num_suspicious
    assert ours.table.read_bytes() == theirs.table.read_bytes()
    assert ours.sheet.read_bytes() == theirs.sheet.read_bytes()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_strongest_are_shown_whatever_came_first(seed: int) -> None:
    probs = np.zeros((1000, 1000), np.float32)
    scores = [round(i / 400, 2) for i in range(200)]  # many of them equal
    ranking = Ranking()

    def suspicion(score: float) -> Suspicion:
        return Suspicion(kind="phantom person", score=score, box=Box(0, 0, 900, 9))

    for index in random.Random(seed).sample(range(200), 200):
        ranking.add(index, suspicion(scores[index]), probs)

    expected = sorted(range(200), key=lambda i: (-scores[i], i))
    assert [ranked.index for ranked in ranking.ranked("phantom person")] == expected
    shown = ranking.shown("phantom person")
    assert [ranked.index for ranked, _ in shown] == expected[:PICTURES_A_KIND]
    kept = [view.answer for _, view in ranking.shown("phantom person")]
    assert all(answer.base is None and answer.nbytes <= 2**16 for answer in kept)
    assert ranking.shown("coarse edge") == []


def test_threads_together_keep_no_more_than_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(probs: Probs, box: Box) -> CloseUp:
        time.sleep(0.002)  # lets all others come to the same point
        return close_up(probs, box)

    monkeypatch.setattr(ranking_module, "close_up", slowly)
    ranking, probs = Ranking(), np.zeros((20, 20), np.float32)

    def add(index: int) -> None:
        suspicion = Suspicion(kind="wrong crowd", score=index / 100, box=Box(0, 0, 9, 9))
        ranking.add(index, suspicion, probs)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(60)))

    shown = [ranked.index for ranked, _ in ranking.shown("wrong crowd")]
    assert shown == list(range(59, 59 - PICTURES_A_KIND, -1))


# The sheet.


def colours_in(pixels: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(colour) for colour in np.unique(pixels.reshape(-1, 3), axis=0).tolist()}


def test_the_sheet_shows_both_outlines_and_a_box() -> None:
    masks, answers, _ = faulty_set()
    result = checked(masks, answers)
    with Image.open(result.sheet) as sheet:
        assert 1500 < sheet.width < 1700
        assert 5 * 40 + 4 * 100 < sheet.height < 5 * 40 + 4 * 300
        assert {RED, BLUE, YELLOW} <= colours_in(np.asarray(sheet.convert("RGB")))


def test_a_small_piece_is_enlarged_and_boxed_where_it_is() -> None:
    truth = np.zeros((480, 640), np.uint8)
    cv2.circle(truth, (520, 220), 20, 1, -1)
    probs = truth.astype(np.float32)
    nobody = np.zeros_like(truth)
    sample = Sample(image=np.zeros((480, 640, 3), np.uint8), mask=nobody, image_id="x")
    [suspicion] = suspicions_of(probs, nobody)
    view = close_up(probs, suspicion.box)
    pixels = drawn(sample, view, suspicion.box)

    assert suspicion.box == box_of(truth) == (500, 200, 41, 41)
    assert max(pixels.shape) == 256
    assert not (pixels == YELLOW).all(axis=2).any()
    enlarged = pixels.shape[1] / view.view.width
    for colour in (RED, BLUE):
        left, top, width, height = box_of((pixels == colour).all(axis=2))
        assert left / enlarged + view.view.left == pytest.approx(500, abs=2)
        assert top / enlarged + view.view.top == pytest.approx(200, abs=2)
        assert (width / enlarged, height / enlarged) == pytest.approx((41, 41), abs=3)


def test_a_picture_that_can_no_longer_be_read_is_left_out_of_the_sheet_alone() -> None:
    source = Drawn([people(LEFT)] * 2, damaged={0})
    check = LabelCheck(source)
    for index in range(2):
        check.add(index, seen(people(LEFT, RIGHT)), source.masks[index])
    result = check.write(Path("out"))

    assert [row["name"] for row in rows_of(result)] == ["picture0", "picture1"]
    with Image.open(result.sheet) as sheet:
        assert RED in colours_in(np.asarray(sheet.convert("RGB")))


# The table, and where things go.


def test_the_table_says_where_to_look() -> None:
    result = checked([people(LEFT)], [seen(people(LEFT, RIGHT))])
    [row] = rows_of(result)

    assert (row["kind"], row["rank"], row["name"]) == ("missing person", "1", "picture0")
    assert Path(row["picture"]) == Path.cwd() / "pictures" / "picture0.jpg"
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
def test_awkward_names_stay_in_one_cell_and_are_no_formula(name: str, cell: str) -> None:
    [row] = rows_of(checked([people(LEFT)], [seen(people(LEFT, RIGHT))], names=[name]))

    assert row["name"] == cell
    assert row["picture"].endswith(f"{name}.jpg")


def test_a_name_that_is_no_utf8_keeps_its_bytes() -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    result = checked([people(LEFT)], [seen(people(LEFT, RIGHT))], names=[name])

    assert b"caf\xe9" in result.table.read_bytes()


@pytest.mark.parametrize("name", ["label_check.png", "label_check.csv"])
def test_files_are_replaced_only_if_allowed(name: str) -> None:
    Path("out").mkdir()
    (Path("out") / name).write_text("mine")
    check = LabelCheck(Drawn([people(LEFT)]))

    with pytest.raises(UsageError, match=f"out/{name} exists; give --overwrite"):
        check.write(Path("out"))
    assert [path.name for path in Path("out").iterdir()] == [name]
    assert (Path("out") / name).read_text() == "mine"
    check.write(Path("out"), overwrite=True)
    assert (Path("out") / name).read_bytes() != b"mine"
    check_outputs(Path("new"), overwrite=False)
    assert not Path("new").exists()


def test_nothing_suspicious_is_written_down_too() -> None:
    result = checked([people(LEFT)], [seen(people(LEFT))])

    assert rows_of(result) == []
    assert set(result.num_suspicious.values()) == {0}
    assert result.num_suspicious.keys() == KINDS.keys()
    assert result.sheet.read_bytes().startswith(b"\x89PNG")


def test_the_summary_counts_and_points_to_the_files() -> None:
    masks, answers, _ = faulty_set()
    counts, where = summary_lines(checked(masks, answers))

    assert "missing person 2, phantom person 1, coarse edge 1, wrong crowd 1" in counts
    assert "out/label_check.png" in where
    assert "out/label_check.csv" in where


def test_the_check_beforehand_imports_nothing_heavy() -> None:
    script = (
        "import sys, segtrain.evaluation.labels.outputs\n"
        "sys.exit(bool({'torch', 'numpy', 'cv2', 'PIL'} & sys.modules.keys()))"
    )

    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
