"""Folders of masks: pairs and splits, mask encodings, and errors."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segtrain.data.datasets import dataset_kind, open_dataset
from segtrain.data.mask_folder.dataset import MaskFolderDataset
from segtrain.data.mask_folder.encoding import load_mask
from segtrain.data.mask_folder.layout import is_mask_folder
from segtrain.data.sample import LabelRules, identity_hash
from segtrain.errors import DataError
from segtrain.types import Mask

HEIGHT, WIDTH = 40, 60
NUM = 12


def person(index: int = 0) -> Mask:
    """Draw a block in the center and a small one beside it, H W in {0, 1}."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[8 : 32 - index % 4, 20:40] = 1
    mask[4:8, 50:54] = 1
    return mask


def photo(index: int) -> PIL.Image.Image:
    rng = np.random.default_rng(index)
    noise = PIL.Image.fromarray(rng.integers(0, 256, (5, 8, 3), dtype=np.uint8))
    return noise.resize((WIDTH, HEIGHT), PIL.Image.Resampling.BICUBIC)


Draw = Callable[[int], PIL.Image.Image]


def make_folder(
    root: Path,
    draw: Draw = lambda index: PIL.Image.fromarray(person(index) * 255),
    *,
    suffix: str = ".png",
    names: list[str] | None = None,
    inner: str = "",
) -> Path:
    """Write pairs of images and masks drawn by `draw`."""
    for index, name in enumerate(names or [f"p{index}" for index in range(NUM)]):
        for kind, image, ending in (
            ("images", photo(index), ".jpg"),
            ("masks", draw(index), suffix),
        ):
            path = root / kind / inner / f"{name}{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return root


def open_all(root: Path, rules: LabelRules | None = None) -> MaskFolderDataset:
    """Open all pairs as one split."""
    names = sorted(
        path.relative_to(root / "images").with_suffix("").as_posix()
        for path in (root / "images").rglob("*.*")
    )
    (root / "train.txt").write_text("\n".join(names))
    return MaskFolderDataset(root, "train", rules or LabelRules())


def masks_of(dataset: MaskFolderDataset) -> dict[str, Mask]:
    return {dataset.name(i): dataset.sample(i).mask for i in range(len(dataset))}


def expected_masks() -> dict[str, Mask]:
    return {f"p{index}": person(index) for index in range(NUM)}


def assert_equal(actual: dict[str, Mask], expected: dict[str, Mask]) -> None:
    assert actual.keys() == expected.keys()
    for name, mask in expected.items():
        assert np.array_equal(actual[name], mask), name


# --------------------------------------------------------------------------- encodings


def draw_numbers(index: int) -> PIL.Image.Image:
    mask = person(index)
    mask[4:8, 50:54] *= 2
    mask[:4, :4] = 7
    return PIL.Image.fromarray(mask)


def draw_colors(index: int) -> PIL.Image.Image:
    colors = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    colors[person(index) == 1] = (200, 30, 90)
    colors[4:8, 50:54] = (0, 90, 250)
    return PIL.Image.fromarray(colors)


def draw_palette(index: int, colors: list[int]) -> PIL.Image.Image:
    image = PIL.Image.frombytes("P", (WIDTH, HEIGHT), person(index).tobytes())
    image.putpalette(colors)
    return image


def draw_alpha(index: int) -> PIL.Image.Image:
    alpha = person(index) * np.uint8(255)
    image = np.dstack([np.asarray(photo(index)), alpha])
    return PIL.Image.fromarray(image)


def draw_soft(index: int) -> PIL.Image.Image:
    """Draw black and white, and every gray level in some rows: below 128 in the background."""
    mask = person(index).astype(int) * 255
    ramp = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 128
    rows = np.arange(HEIGHT)[:, None] % 5 == 0
    return PIL.Image.fromarray(np.where(rows, mask // 255 * 128 + ramp, mask).astype(np.uint8))


DARK_BLUE = np.array([0, 0, 5], dtype=np.uint8)
ENCODINGS: dict[str, tuple[Draw, str, str]] = {
    "0/1": (lambda i: PIL.Image.fromarray(person(i)), ".png", "0/1"),
    "0/255": (lambda i: PIL.Image.fromarray(person(i) * 255), ".png", "0/255"),
    "one bit": (lambda i: PIL.Image.fromarray(person(i) == 1), ".png", "0/255"),
    "one gray": (lambda i: PIL.Image.fromarray(person(i) * 90), ".png", "one level"),
    "gray as RGB": (lambda i: PIL.Image.fromarray(person(i) * 255).convert("RGB"), ".png", "0/255"),
    "colors": (draw_colors, ".png", "colors"),
    "dark blue": (
        lambda i: PIL.Image.fromarray(person(i)[..., None] * DARK_BLUE),
        ".png",
        "one level",
    ),
    "palette": (lambda i: draw_palette(i, [0, 0, 0, 220, 20, 60]), ".png", "0/1"),
    "black palette": (lambda i: draw_palette(i, [0, 0, 0, 0, 0, 0]), ".png", "0/1"),
    "gray palette": (lambda i: draw_palette(i, [0, 0, 0, 255, 255, 255]), ".png", "0/255"),
    "alpha": (draw_alpha, ".png", "alpha"),
    "soft": (draw_soft, ".png", "soft"),
    "16 bits": (
        lambda i: PIL.Image.fromarray(person(i).astype(np.uint16) * 65535),
        ".png",
        "0/255",
    ),
    "BMP": (lambda i: PIL.Image.fromarray(person(i) * 255), ".bmp", "0/255"),
    "GIF": (lambda i: PIL.Image.fromarray(person(i) * 255), ".gif", "0/255"),
    "TIFF": (lambda i: PIL.Image.fromarray(person(i) * 255), ".tif", "0/255"),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_all_encodings_give_the_same_masks(name: str, tmp_path: Path) -> None:
    draw, suffix, note = ENCODINGS[name]
    dataset = open_all(make_folder(tmp_path, draw, suffix=suffix))

    assert_equal(masks_of(dataset), expected_masks())
    assert note in dataset.notes[0]
    shares = [mask.mean() for mask in (person(pair_number(dataset, i)) for i in range(NUM))]
    assert dataset.index.person_fraction == pytest.approx(shares)


def pair_number(dataset: MaskFolderDataset, index: int) -> int:
    return int(dataset.name(index)[1:])


def test_lossy_masks_are_thresholded_at_128(tmp_path: Path) -> None:
    dataset = open_all(
        make_folder(tmp_path, lambda i: PIL.Image.fromarray(person(i) * 255), suffix=".jpg")
    )
    for name, mask in masks_of(dataset).items():
        assert (mask != expected_masks()[name]).mean() < 0.01
    assert "soft" in dataset.notes[0]


@pytest.mark.parametrize("level", [255, 200])
def test_jpeg_ringing_is_background(level: int, tmp_path: Path) -> None:
    """At level 200 no pixel is white, and the blocks around the person contain 1, 2, 3 ..."""

    def draw(index: int) -> PIL.Image.Image:
        return PIL.Image.fromarray(person(index) * np.uint8(level))

    dataset = open_all(make_folder(tmp_path, draw, suffix=".jpg"))
    assert (dataset.sample(0).mask[:4, :40] == 0).all()
    assert (dataset.sample(0).mask[12:28, 24:36] == 1).all()
    assert set(dataset.index.num_people.tolist()) == {2}


def test_shades_without_black_and_white_are_thresholded_at_128(tmp_path: Path) -> None:
    shades = np.arange(WIDTH, dtype=np.uint8) % 3
    dataset = open_all(
        make_folder(tmp_path, lambda i: PIL.Image.fromarray(person(i) * np.uint8(250) + shades))
    )
    assert_equal(masks_of(dataset), expected_masks())


def test_a_gray_area_does_not_make_white_void(tmp_path: Path) -> None:
    """A file with gray between black and white must not make the white of all files void."""

    def draw(index: int) -> PIL.Image.Image:
        mask = person(index) * np.uint8(255)
        if index == 0:
            mask[:12] = 128
        return PIL.Image.fromarray(mask)

    masks = masks_of(open_all(make_folder(tmp_path, draw)))
    assert not any((mask == 255).any() for mask in masks.values())
    del masks["p0"]
    assert_equal(masks, {name: mask for name, mask in expected_masks().items() if name != "p0"})


@pytest.mark.parametrize(("dtype", "number"), [(np.uint16, 300), (np.int32, 70_000)])
def test_large_instance_numbers_are_kept_apart(
    dtype: type[np.generic], number: int, tmp_path: Path
) -> None:
    def draw(index: int) -> PIL.Image.Image:
        mask = person(index).astype(dtype)
        mask[4:8, 50:54] = number
        return PIL.Image.fromarray(mask)

    dataset = open_all(make_folder(tmp_path, draw, suffix=".tif"))
    assert_equal(masks_of(dataset), expected_masks())
    assert set(dataset.index.num_people.tolist()) == {2}


def test_one_number_is_one_person_if_other_files_have_several(tmp_path: Path) -> None:
    def draw(index: int) -> PIL.Image.Image:
        mask = person(index)
        if index == 0:
            mask[4:8, 50:54] = 2
        return PIL.Image.fromarray(mask)

    dataset = open_all(make_folder(tmp_path, draw))
    people = {dataset.name(i): int(dataset.index.num_people[i]) for i in range(NUM)}
    assert people == {f"p{i}": 2 if i == 0 else 1 for i in range(NUM)}
    assert not any("mixed" in note for note in dataset.notes)


@pytest.mark.parametrize("number", [1, 15])
def test_one_number_in_all_files_does_not_distinguish_people(number: int, tmp_path: Path) -> None:
    def draw(index: int) -> PIL.Image.Image:
        mask = person(index) * np.uint8(number)
        mask[0] = 255
        return PIL.Image.fromarray(mask)

    dataset = open_all(make_folder(tmp_path, draw))
    assert set(dataset.index.num_people.tolist()) == {2}


def test_numbers_distinguish_people(tmp_path: Path) -> None:
    dataset = open_all(make_folder(tmp_path, draw_numbers))
    expected = expected_masks()
    for mask in expected.values():
        mask[:4, :4] = 1
    assert_equal(masks_of(dataset), expected)
    assert set(dataset.index.num_people.tolist()) == {3}


def test_255_with_numbers_is_ignored_in_all_files(tmp_path: Path) -> None:
    """As in VOC: the border of a person is void, and an image may contain only void."""

    def draw(index: int) -> PIL.Image.Image:
        mask = person(index) if index else np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        mask[0] = 255
        return PIL.Image.fromarray(mask)

    masks = masks_of(open_all(make_folder(tmp_path, draw)))

    assert (masks["p0"][0] == 255).all()
    assert not masks["p0"][1:].any()
    assert (masks["p1"][0] == 255).all()
    assert np.array_equal(masks["p1"][1:], person(1)[1:])


def make_void_folder(*, numbers: int, both: int, white: int, path: Path) -> MaskFolderDataset:
    """Make files of 0/1, of 0/1/255 and of 0/255, where only the first row is white."""

    def draw(index: int) -> PIL.Image.Image:
        mask = person(index)
        if index >= numbers + both:
            mask[:] = 0
        if index >= numbers:
            mask[0] = 255
        return PIL.Image.fromarray(mask)

    names = [f"p{index}" for index in range(numbers + both + white)]
    return open_all(make_folder(path, draw, names=names))


@pytest.mark.parametrize(
    ("numbers", "both", "white", "meaning"),
    [
        (0, 10, 20, 255),  # VOC: fewer images have people than void
        (30, 4, 1, 255),  # void is rare, and even rarer without numbers
        (10, 1, 10, 1),  # mixed 0/1 and 0/255, and one stray file
        (0, 1, 30, 1),  # 0/255, and one stray file
    ],
)
def test_the_meaning_of_white_depends_on_all_files(
    numbers: int, both: int, white: int, meaning: int, tmp_path: Path
) -> None:
    dataset = make_void_folder(numbers=numbers, both=both, white=white, path=tmp_path)
    masks = masks_of(dataset)
    for index in range(numbers, numbers + both):
        assert (masks[f"p{index}"][0] == 255).all()
    for index in range(numbers + both, numbers + both + white):
        assert (masks[f"p{index}"][0] == meaning).all()
        assert not masks[f"p{index}"][1:].any()
    assert any("255 is ignored" in note for note in dataset.notes) == (meaning == 255)
    assert any("mixed encodings" in note for note in dataset.notes) == (meaning == 1)


def test_both_splits_have_the_same_encoding(tmp_path: Path) -> None:
    """The validation masks contain only void; the training masks reveal it."""
    make_void_folder(numbers=0, both=10, white=2, path=tmp_path)
    (tmp_path / "train.txt").write_text("\n".join(f"p{index}" for index in range(10)))
    masks = masks_of(MaskFolderDataset(tmp_path, "val"))
    assert masks.keys() == {"p10", "p11"}
    assert all((mask[0] == 255).all() for mask in masks.values())


def test_cached_counts_depend_on_the_encoding(tmp_path: Path) -> None:
    """A changed file of the other split may change the encoding of this one."""
    make_void_folder(numbers=0, both=10, white=2, path=tmp_path)
    (tmp_path / "train.txt").write_text("\n".join(f"p{index}" for index in range(10)))
    assert not MaskFolderDataset(tmp_path, "val").index.person_fraction.any()
    for index in range(10):
        PIL.Image.fromarray(person(index) * 255).save(tmp_path / "masks" / f"p{index}.png")
    dataset = MaskFolderDataset(tmp_path, "val")
    assert (dataset.sample(0).mask[0] == 1).all()
    assert dataset.index.person_fraction == pytest.approx(1 / HEIGHT)


def test_zero_one_and_zero_255_may_be_mixed(tmp_path: Path) -> None:
    dataset = open_all(
        make_folder(tmp_path, lambda i: PIL.Image.fromarray(person(i) * (255 if i % 2 else 1)))
    )
    assert_equal(masks_of(dataset), expected_masks())
    assert "0/1 (6)" in dataset.notes[0]
    assert "0/255 (6)" in dataset.notes[0]


def test_inverted_masks_are_noted_and_inverted_on_request(tmp_path: Path) -> None:
    root = make_folder(tmp_path, lambda i: PIL.Image.fromarray((1 - person(i)) * 255))
    original = open_all(root)
    inverted = open_all(root, LabelRules(invert_masks=True))

    assert any("inverted" in note and "data.invert_masks=true" in note for note in original.notes)
    assert not any("inverted" in note for note in inverted.notes)
    assert_equal(masks_of(inverted), expected_masks())
    assert original.index.person_fraction == pytest.approx(1 - inverted.index.person_fraction)


def test_ordinary_masks_do_not_look_inverted(tmp_path: Path) -> None:
    assert not any("inverted" in note for note in open_all(make_folder(tmp_path)).notes)


def test_a_note_reports_empty_masks(tmp_path: Path) -> None:
    dataset = open_all(make_folder(tmp_path, lambda i: PIL.Image.new("L", (WIDTH, HEIGHT))))
    assert "all empty" in dataset.notes[0]
    assert not dataset.index.num_people.any()


def test_a_note_reports_masks_without_people(tmp_path: Path) -> None:
    """They are valid soft masks, but probably not what the user meant."""

    def draw(index: int) -> PIL.Image.Image:
        return PIL.Image.fromarray(person(index) * np.uint8(100))

    dim = open_all(make_folder(tmp_path / "dim", draw, suffix=".jpg"))
    assert any("no mask has a person" in note for note in dim.notes)
    good = open_all(make_folder(tmp_path / "good"))
    assert not any("no mask has a person" in note for note in good.notes)


# --------------------------------------------------------------------------- label rules


@pytest.mark.parametrize("draw", [None, draw_colors], ids=["blocks", "colors"])
def test_only_the_largest_person_is_kept(draw: Draw | None, tmp_path: Path) -> None:
    root = make_folder(tmp_path, draw) if draw else make_folder(tmp_path)
    for rules in (LabelRules(largest_only=True), LabelRules(min_person_area=0.05)):
        dataset = open_all(root, rules)
        for name, mask in masks_of(dataset).items():
            expected = expected_masks()[name]
            expected[4:8, 50:54] = 255
            assert np.array_equal(mask, expected), (name, rules)
        assert set(dataset.index.num_people.tolist()) == {2}
        index = 3
        share = (dataset.sample(index).mask == 1).mean()
        assert dataset.index.person_fraction[index] == pytest.approx(share)


@pytest.mark.parametrize("draw", [draw_colors, draw_numbers], ids=["colors", "numbers"])
def test_label_rules_apply_to_inverted_masks(draw: Draw, tmp_path: Path) -> None:
    """The only person is then the black area."""
    root = make_folder(tmp_path, draw)
    plain = masks_of(open_all(root))
    dataset = open_all(root, LabelRules(invert_masks=True, largest_only=True))
    assert_equal(masks_of(dataset), {name: 1 - mask for name, mask in plain.items()})
    assert set(dataset.index.num_people.tolist()) == {1}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    levels=st.lists(st.integers(0, 255), min_size=1, max_size=5),
    mode=st.sampled_from(["1", "L", "P", "LA", "RGB", "RGBA", "I;16"]),
    largest_only=st.booleans(),
    invert_masks=st.booleans(),
    min_person_area=st.sampled_from([0.0, 0.01, 0.3]),
)
def test_the_index_agrees_with_the_masks(
    seed: int,
    levels: list[int],
    mode: str,
    largest_only: bool,
    invert_masks: bool,
    min_person_area: float,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    def draw(index: int) -> PIL.Image.Image:
        rng = np.random.default_rng([seed, index])
        blocks = rng.choice(levels, (5, 5)).repeat(8, axis=0).repeat(12, axis=1)
        if mode == "I;16":
            return PIL.Image.fromarray(blocks.astype(np.uint16) * 200)
        image = PIL.Image.fromarray(blocks.astype(np.uint8)).convert(mode)
        if mode in {"LA", "RGBA"}:
            image.putalpha(PIL.Image.fromarray(blocks.T.astype(np.uint8)).resize(image.size))
        return image

    root = make_folder(tmp_path_factory.mktemp("any"), draw, names=["p0", "p1", "p2"])
    rules = LabelRules(
        largest_only=largest_only, invert_masks=invert_masks, min_person_area=min_person_area
    )
    try:
        dataset = open_all(root, rules)
    except DataError:
        return
    for index in range(len(dataset)):
        mask = dataset.sample(index).mask
        assert set(np.unique(mask)) <= {0, 1, 255}
        assert dataset.index.person_fraction[index] == pytest.approx((mask == 1).mean())
        if (mask == 1).any():
            assert dataset.index.num_people[index] >= 1


# --------------------------------------------------------------------------- pairs and splits


def split_names(root: Path, split: str) -> list[str]:
    dataset = MaskFolderDataset(root, split)
    return [dataset.name(index) for index in range(len(dataset))]


def test_names_must_match_exactly(tmp_path: Path) -> None:
    names = ["1", "10", "a/1", "a.b", "x_mask"]
    root = make_folder(tmp_path, names=names)
    dataset = open_all(root)
    assert [dataset.name(i) for i in range(5)] == sorted(names)
    for index in range(5):
        assert dataset.image_path(index).stem == dataset.mask_path(index).stem
        number = names.index(dataset.name(index))
        assert np.array_equal(dataset.sample(index).mask, person(number))


def test_lists_define_the_splits(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    (root / "train.txt").write_text("p0\r\np1.jpg\n\np2.png\n")
    (root / "val.txt").write_text("p5\n")
    assert split_names(root, "train") == ["p0", "p1", "p2"]
    assert split_names(root, "val") == ["p5"]
    (root / "train.txt").unlink()
    assert split_names(root, "train") == sorted({f"p{i}" for i in range(NUM)} - {"p5"})


def test_a_name_in_both_lists_is_an_error(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    (root / "train.txt").write_text("p0\np1\np2")
    (root / "val.txt").write_text("p1\np2")
    with pytest.raises(
        DataError, match=r"2 names are in both train\.txt and val\.txt, first p1, p2"
    ):
        MaskFolderDataset(root, "val")


def test_lists_cannot_refer_to_other_folders(tmp_path: Path) -> None:
    """Neither by `..` nor by a symbolic link; such entries count as missing."""
    make_folder(tmp_path / "secret", names=["s"])
    root = make_folder(tmp_path / "set")
    for kind in ("images", "masks"):
        (root / kind / "link").symlink_to(tmp_path / "secret" / kind)
    (root / "train.txt").write_text("p0\np1\nlink/s")
    assert split_names(root, "train") == ["p0", "p1"]
    (root / "train.txt").write_text(f"p0\n../../secret/images/s\n{tmp_path}/secret/images/s.jpg")
    with pytest.raises(DataError, match=r"2 of 3 are listed .* but missing"):
        MaskFolderDataset(root, "train")


@pytest.mark.parametrize("outer", [True, False])
def test_folders_define_the_splits(outer: bool, tmp_path: Path) -> None:
    for split, names in (("train", ["a", "b"]), ("val", ["a", "c"])):
        if outer:
            make_folder(tmp_path / split, names=names)
        else:
            make_folder(tmp_path, names=names, inner=split)
    assert is_mask_folder(tmp_path)
    assert split_names(tmp_path, "train") == ["a", "b"]
    assert split_names(tmp_path, "val") == ["a", "c"]


def test_without_lists_a_stable_tenth_is_for_validation(tmp_path: Path) -> None:
    names = [f"n{index}" for index in range(60)]
    few = make_folder(tmp_path / "few", names=names[:40])
    many = make_folder(tmp_path / "many", names=names)

    for split in ("train", "val"):
        assert set(split_names(few, split)) == set(split_names(many, split)) & set(names[:40])
    train, val = split_names(many, "train"), split_names(many, "val")
    assert sorted(train + val) == sorted(names)
    assert 1 <= len(val) <= 15
    assert val == sorted(n for n in names if identity_hash("split", n) % 10 == 0)


def test_a_few_unpaired_files_are_counted_and_many_are_an_error(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    (root / "masks" / "p3.png").unlink()
    dataset = open_all(root)
    assert len(dataset) == NUM - 1
    assert [reason for reason in dataset.skipped if "without a mask: p3" in reason]

    (root / "masks" / "p4.png").unlink()
    with pytest.raises(DataError, match=r"2 of 12 are in .* without a mask, first p3, p4"):
        open_all(root)


def test_the_error_names_a_common_suffix_of_masks(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    for path in (root / "masks").iterdir():
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    with pytest.raises(DataError, match=r"masks end in '_mask': rename"):
        MaskFolderDataset(root, "train")


def test_duplicate_names_are_an_error(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    photo(0).save(root / "images" / "p3.png")
    with pytest.raises(DataError, match=r"p3\.(png|jpg) and p3\.(png|jpg) have the same name"):
        open_all(root)


def test_other_files_are_not_read(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    for folder in ("images", "masks"):
        (root / folder / "Thumbs.db").write_bytes(b"x")
        (root / folder / ".hidden.png").write_bytes(b"x")
        (root / folder / "notes.txt").write_text("x")
    assert len(MaskFolderDataset(root, "train")) + len(MaskFolderDataset(root, "val")) == NUM


def test_the_layout_is_recognized(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set")
    assert dataset_kind(root) == "folders of masks"
    assert isinstance(open_dataset(root, "train"), MaskFolderDataset)
    shutil.rmtree(root / "masks")
    assert not is_mask_folder(root)


# --------------------------------------------------------------------------- errors


def test_exchanged_folders_are_recognized(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    (root / "images").rename(root / "x")
    (root / "masks").rename(root / "images")
    (root / "x").rename(root / "masks")
    with pytest.raises(DataError, match="are images/ and masks/ exchanged"):
        open_all(root)


def test_gray_photos_are_not_masks(tmp_path: Path) -> None:
    root = make_folder(tmp_path, lambda i: photo(i).convert("L"))
    with pytest.raises(DataError, match="the masks are gray photos; are images/ and masks/ exch"):
        open_all(root)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: PIL.Image.new("L", (WIDTH, HEIGHT + 1)).save(path), "differ in size"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "damaged"),
        (lambda path: path.write_bytes(b"no mask"), "damaged"),
        (lambda path: photo(3).resize((WIDTH, HEIGHT)).save(path), "photo"),
    ],
    ids=["size", "truncated", "text", "photo"],
)
def test_one_bad_mask_is_skipped_and_two_are_an_error(
    damage: Callable[[Path], object], reason: str, tmp_path: Path
) -> None:
    root = make_folder(tmp_path)
    damage(root / "masks" / "p3.png")
    dataset = open_all(root)
    assert "p3" not in masks_of(dataset)
    assert len(dataset) == NUM - 1
    assert [key for key in dataset.skipped if reason in key]

    damage(root / "masks" / "p4.png")
    with pytest.raises(DataError, match=rf"{reason}.* in 2 of 12 pairs, first p3\.png, p4\.png"):
        open_all(root)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mask_matches", ["upright", "stored"])
def test_exif_is_applied_if_the_mask_matches_the_upright_image(
    orientation: int, mask_matches: str, tmp_path: Path
) -> None:
    root = make_folder(tmp_path)
    rotated = orientation >= 5
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    size = (HEIGHT, WIDTH) if rotated and mask_matches == "upright" else (WIDTH, HEIGHT)
    for index in range(NUM):
        photo(index).save(root / "images" / f"p{index}.jpg", exif=exif)
        PIL.Image.fromarray(person(index) * 255).resize(size).save(root / "masks" / f"p{index}.png")
    dataset = open_all(root)
    sample = dataset.sample(0)

    assert sample.image.shape[:2] == sample.mask.shape == size[::-1]
    assert dataset.index.sizes[0].tolist() == list(size[::-1])
    with PIL.Image.open(dataset.image_path(0)) as image:
        stored = np.asarray(image)
    as_stored = np.array_equal(sample.image, stored)
    assert as_stored == (orientation == 1 or (rotated and mask_matches == "stored"))


def test_an_image_damaged_after_the_scan_is_an_error(tmp_path: Path) -> None:
    dataset = open_all(make_folder(tmp_path))
    dataset.image_path(2).write_bytes(b"gone")
    with pytest.raises(DataError, match=dataset.image_path(2).name):
        dataset.sample(2)


def test_a_mask_resized_after_the_scan_is_an_error(tmp_path: Path) -> None:
    dataset = open_all(make_folder(tmp_path))
    PIL.Image.new("L", (5, 5)).save(dataset.mask_path(2))
    with pytest.raises(DataError, match="differ in size"):
        dataset.sample(2)


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "1"])
def test_a_damaged_png_is_an_error_and_never_a_partial_mask(
    mode: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mask = np.random.default_rng(0).integers(0, 2, (12, 20), dtype=np.uint8) * 255
    path = tmp_path / "mask.png"
    PIL.Image.fromarray(mask).convert(mode).save(path)
    good = path.read_bytes()
    assert set(np.unique(load_mask(path).levels)) == {0, 255}
    damaged = [good[:cut] for cut in range(len(good))]
    damaged += [good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :] for at in range(len(good))]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"mask\.png"):
            load_mask(path)
    assert capfd.readouterr() == ("", "")  # the decoders print nothing


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=200), seed=st.integers(0, 2**32), cut=st.floats(0, 1))
def test_any_mask_file_gives_valid_masks_or_an_error(
    content: bytes, seed: int, cut: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = make_folder(tmp_path_factory.mktemp("odd"), names=[f"p{i}" for i in range(4)])
    rng = random.Random(seed)
    path = root / "masks" / "p0.png"
    good = bytearray(path.read_bytes())
    good[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
    path.write_bytes(
        bytes(good[: int(cut * len(good))]) + content if rng.random() < 0.5 else content
    )
    try:
        masks = masks_of(open_all(root))
    except DataError:
        return
    assert all(set(np.unique(mask)) <= {0, 1, 255} for mask in masks.values())


# --------------------------------------------------------------------------- scaling and caching


@pytest.mark.parametrize("short_side", [10, 20, 40, 100])
def test_image_and_mask_are_scaled_together(short_side: int, tmp_path: Path) -> None:
    """The image is drawn from the mask, so after scaling it still shows where the mask is."""
    root = make_folder(tmp_path)
    for index in range(NUM):
        drawn = np.repeat(person(index)[..., None] * np.uint8(255), 3, axis=2)
        PIL.Image.fromarray(drawn).save(root / "images" / f"p{index}.png")
        (root / "images" / f"p{index}.jpg").unlink()
    dataset = open_all(root)
    for index in range(NUM):
        sample = dataset.sample(index, short_side)
        assert min(sample.mask.shape) == short_side
        assert sample.mask.shape == sample.image.shape[:2]
        differing = (sample.image[..., 0] >= 128) != (sample.mask == 1)
        assert differing.mean() < 2.5 / short_side


@pytest.mark.parametrize("short_side", [7, 13, 19])
def test_scaling_does_not_shift_the_mask(short_side: int, tmp_path: Path) -> None:
    """The center of a person keeps its relative position within a quarter of a pixel."""

    def draw(index: int) -> PIL.Image.Image:
        mask = np.zeros((HEIGHT * 5, WIDTH * 5), dtype=np.uint8)
        mask[40:160, 60:240] = 255
        return PIL.Image.fromarray(mask)

    root = make_folder(tmp_path, draw, names=["p0"])
    photo(0).resize((WIDTH * 5, HEIGHT * 5)).save(root / "images" / "p0.jpg")
    mask = open_all(root).sample(0, short_side).mask
    rows, columns = np.nonzero(mask == 1)
    scale = short_side / (HEIGHT * 5)
    assert abs(rows.mean() + 0.5 - 100 * scale) <= 0.25
    assert abs(columns.mean() + 0.5 - 150 * scale) <= 0.25


def test_opening_again_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path)
    first = open_all(root)
    for module in ("dataset", "scan"):
        monkeypatch.setattr(f"segtrain.data.mask_folder.{module}.load_mask", None)
    second = open_all(root)
    assert second.notes == first.notes
    for name in ("sizes", "person_fraction", "num_people", "identities"):
        assert np.array_equal(getattr(first.index, name), getattr(second.index, name))


def test_an_edited_mask_is_scanned_again(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    before = open_all(root).index.person_fraction.copy()
    path = root / "masks" / "p0.png"
    PIL.Image.fromarray(np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)).save(path)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    after = open_all(root).index.person_fraction
    assert (before != after).sum() == 1
    assert after.max() == 1


# --------------------------------------------------------------------------- prepared folders


def write_manifest(root: Path, **changes: object) -> None:
    content = {
        "mask_values": {"background": 0, "person": 255, "ignore": 128},
        "images": {
            "train/p0": {"identity": "00000000000000ff", "num_people": 3, "has_crowd": True}
        },
    }
    (root / "manifest.json").write_text(json.dumps({**content, **changes}))


def test_a_manifest_defines_mask_values_and_people(tmp_path: Path) -> None:
    def draw(index: int) -> PIL.Image.Image:
        mask = person(index) * np.uint8(255)
        mask[-1] = 128
        return PIL.Image.fromarray(mask)

    root = make_folder(tmp_path, draw)
    write_manifest(root)
    dataset = open_all(root)
    for name, mask in masks_of(dataset).items():
        expected = expected_masks()[name]
        expected[-1] = 255
        assert np.array_equal(mask, expected)
    row = [dataset.name(i) for i in range(NUM)].index("p0")
    assert dataset.index.identities[row] == 255
    assert dataset.index.num_people[row] == 3
    assert dataset.index.has_crowd.sum() == 1


def test_masks_with_values_not_in_the_manifest_are_skipped(tmp_path: Path) -> None:
    """With a manifest of 0 and 255, a mask of zeros and ones would be all background."""
    root = make_folder(
        tmp_path, lambda i: PIL.Image.fromarray(person(i) * np.uint8(255 if i else 1))
    )
    write_manifest(root)
    dataset = open_all(root)
    assert_equal(masks_of(dataset), {n: mask for n, mask in expected_masks().items() if n != "p0"})
    assert dataset.skipped == {"mask has values that manifest.json does not name": 1}

    PIL.Image.fromarray(person(1)).save(root / "masks" / "p1.png")
    with pytest.raises(DataError, match=r"not name in 2 of 12 pairs, first p0\.png, p1\.png; prep"):
        open_all(root)


def test_people_of_a_prepared_folder_are_connected_components(tmp_path: Path) -> None:
    def draw(index: int) -> PIL.Image.Image:
        mask = person(index) * np.uint8(255)
        mask[-10:] = 128  # large enough that many pixels are neither black nor white
        return PIL.Image.fromarray(mask)

    root = make_folder(tmp_path, draw)
    write_manifest(root, images={})
    dataset = open_all(root, LabelRules(largest_only=True))
    assert (dataset.sample(0).mask[4:8, 50:54] == 255).all()
    assert (dataset.sample(0).mask[8:28, 20:40] == 1).all()
    assert set(dataset.index.num_people.tolist()) == {2}


def test_no_usable_pair_is_an_error(tmp_path: Path) -> None:
    root = make_folder(tmp_path, names=["only"])
    (root / "masks" / "only.png").write_bytes(b"x")
    with pytest.raises(DataError, match="no usable pair"):
        open_all(root)


@pytest.mark.parametrize(
    "changes",
    [
        {"mask_values": {"background": 0, "person": 999, "ignore": 128}},
        {"mask_values": {"background": 0, "person": 255, "ignore": 255}},
        {"mask_values": [1, 2]},
        {"images": {"train/p0": {"identity": "xyz", "num_people": 1, "has_crowd": False}}},
        {"images": {"train/p0": {"identity": "ff", "num_people": -1, "has_crowd": False}}},
        {"images": 3},
    ],
)
def test_a_damaged_manifest_is_an_error(changes: dict[str, object], tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    write_manifest(root, **changes)
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        open_all(root)


def test_the_manifest_of_another_program_is_ignored(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    (root / "manifest.json").write_text('{"name": "an app"}')
    assert_equal(masks_of(open_all(root)), expected_masks())


# --------------------------------------------------------------------------- real data


def test_portraits_match_pillow(real_data: Path) -> None:
    root = real_data / "portraits-mini"
    sources = {split: MaskFolderDataset(root, split) for split in ("train", "val")}
    assert {split: len(dataset) for split, dataset in sources.items()} == {"train": 1200, "val": 95}
    for split, dataset in sources.items():
        assert dataset.notes == [f"masks: 0/255 ({len(dataset)})"]
        assert not dataset.skipped
        for index in range(0, len(dataset), len(dataset) // 10):
            sample = dataset.sample(index)
            with PIL.Image.open(root / "masks" / f"{dataset.name(index)}.png") as mask:
                assert np.array_equal(sample.mask, np.asarray(mask.convert("L")) // 255), split
