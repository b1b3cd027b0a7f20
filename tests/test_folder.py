"""Folders of masks: what belongs together, what the values mean, what is refused."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from segtrain.data import kind_of, open_dataset
from segtrain.data.folder import FolderPeople
from segtrain.data.folder_layout import is_folder
from segtrain.data.mask_files import load_mask
from segtrain.data.sample import LabelRules, identity
from segtrain.errors import DataError

Pixels = npt.NDArray[np.uint8]

HEIGHT, WIDTH = 40, 60
NUM = 12


def person(index: int = 0) -> Pixels:
    """H W 0/1: a block in the middle, and a small one beside it."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[8 : 32 - index % 4, 20:40] = 1
    mask[4:8, 50:54] = 1
    return mask


def photo(index: int) -> Image.Image:
    rng = np.random.default_rng(index)
    noise = Image.fromarray(rng.integers(0, 256, (5, 8, 3), dtype=np.uint8))
    return noise.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


Draw = Callable[[int], Image.Image]


def make_folder(
    root: Path,
    draw: Draw = lambda index: Image.fromarray(person(index) * 255),
    *,
    suffix: str = ".png",
    names: list[str] | None = None,
    inner: str = "",
) -> Path:
    """Pairs of pictures and masks drawn by `draw`."""
    for index, name in enumerate(names or [f"p{index}" for index in range(NUM)]):
        for kind, picture, ending in (
            ("images", photo(index), ".jpg"),
            ("masks", draw(index), suffix),
        ):
            path = root / kind / inner / f"{name}{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    return root


def everything(root: Path, rules: LabelRules | None = None) -> FolderPeople:
    """All pairs as one split."""
    stems = sorted(
        path.relative_to(root / "images").with_suffix("").as_posix()
        for path in (root / "images").rglob("*.*")
    )
    (root / "train.txt").write_text("\n".join(stems))
    return FolderPeople(root, "train", rules or LabelRules())


def masks_of(source: FolderPeople) -> dict[str, Pixels]:
    return {source.stem(i): source.sample(i).mask for i in range(len(source))}


def expected(value: int = 1) -> dict[str, Pixels]:
    return {f"p{index}": person(index) * np.uint8(value) for index in range(NUM)}


def assert_equal(found: dict[str, Pixels], wanted: dict[str, Pixels]) -> None:
    assert found.keys() == wanted.keys()
    for name, mask in wanted.items():
        assert np.array_equal(found[name], mask), name


# --------------------------------------------------------------------------- what values mean


def as_numbers(index: int) -> Image.Image:
    mask = person(index)
    mask[4:8, 50:54] *= 2
    mask[:4, :4] = 7
    return Image.fromarray(mask)


def as_colours(index: int) -> Image.Image:
    colours = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    colours[person(index) == 1] = (200, 30, 90)
    colours[4:8, 50:54] = (0, 90, 250)
    return Image.fromarray(colours)


def with_palette(index: int, colours: list[int]) -> Image.Image:
    picture = Image.frombytes("P", (WIDTH, HEIGHT), person(index).tobytes())
    picture.putpalette(colours)
    return picture


def as_alpha(index: int) -> Image.Image:
    alpha = person(index) * np.uint8(255)
    picture = np.dstack([np.asarray(photo(index)), alpha])
    return Image.fromarray(picture)


def soft(index: int) -> Image.Image:
    """Black and white, and every gray in some rows: those below 128 where nobody is."""
    mask = person(index).astype(int) * 255
    ramp = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 128
    rows = np.arange(HEIGHT)[:, None] % 5 == 0
    return Image.fromarray(np.where(rows, mask // 255 * 128 + ramp, mask).astype(np.uint8))


DARK_BLUE = np.array([0, 0, 5], dtype=np.uint8)
ENCODINGS: dict[str, tuple[Draw, str, str]] = {
    "0/1": (lambda i: Image.fromarray(person(i)), ".png", "0/1"),
    "0/255": (lambda i: Image.fromarray(person(i) * 255), ".png", "0/255"),
    "one bit": (lambda i: Image.fromarray(person(i) == 1), ".png", "0/255"),
    "one gray": (lambda i: Image.fromarray(person(i) * 90), ".png", "one level"),
    "gray as RGB": (lambda i: Image.fromarray(person(i) * 255).convert("RGB"), ".png", "0/255"),
    "colours": (as_colours, ".png", "colours"),
    "dark blue": (lambda i: Image.fromarray(person(i)[..., None] * DARK_BLUE), ".png", "one level"),
    "palette": (lambda i: with_palette(i, [0, 0, 0, 220, 20, 60]), ".png", "0/1"),
    "black palette": (lambda i: with_palette(i, [0, 0, 0, 0, 0, 0]), ".png", "0/1"),
    "gray palette": (lambda i: with_palette(i, [0, 0, 0, 255, 255, 255]), ".png", "0/255"),
    "alpha": (as_alpha, ".png", "alpha"),
    "soft": (soft, ".png", "soft"),
    "16 bits": (lambda i: Image.fromarray(person(i).astype(np.uint16) * 65535), ".png", "0/255"),
    "BMP": (lambda i: Image.fromarray(person(i) * 255), ".bmp", "0/255"),
    "GIF": (lambda i: Image.fromarray(person(i) * 255), ".gif", "0/255"),
    "TIFF": (lambda i: Image.fromarray(person(i) * 255), ".tif", "0/255"),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_encoding_gives_the_same_masks(name: str, tmp_path: Path) -> None:
    draw, suffix, note = ENCODINGS[name]
    source = everything(make_folder(tmp_path, draw, suffix=suffix))

    assert_equal(masks_of(source), expected())
    assert note in source.notes[0]
    shares = [mask.mean() for mask in (person(source_index(source, i)) for i in range(NUM))]
    assert source.catalog.person_share == pytest.approx(shares)


def source_index(source: FolderPeople, index: int) -> int:
    return int(source.stem(index)[1:])


def test_lossy_masks_are_cut_at_the_middle(tmp_path: Path) -> None:
    source = everything(
        make_folder(tmp_path, lambda i: Image.fromarray(person(i) * 255), suffix=".jpg")
    )
    for name, mask in masks_of(source).items():
        assert (mask != expected()[name]).mean() < 0.01
    assert "soft" in source.notes[0]


@pytest.mark.parametrize("level", [255, 200])
def test_the_ringing_of_a_jpeg_is_nobody(level: int, tmp_path: Path) -> None:
    """At 200 nothing is white, and the blocks around the person hold 1, 2, 3 ..."""

    def draw(index: int) -> Image.Image:
        return Image.fromarray(person(index) * np.uint8(level))

    source = everything(make_folder(tmp_path, draw, suffix=".jpg"))
    assert (source.sample(0).mask[:4, :40] == 0).all()
    assert (source.sample(0).mask[12:28, 24:36] == 1).all()
    assert set(source.catalog.num_people.tolist()) == {2}


def test_shades_without_black_and_white_are_cut_at_the_middle(tmp_path: Path) -> None:
    shades = np.arange(WIDTH, dtype=np.uint8) % 3
    source = everything(
        make_folder(tmp_path, lambda i: Image.fromarray(person(i) * np.uint8(250) + shades))
    )
    assert_equal(masks_of(source), expected())


def test_wide_grays_are_no_reason_to_ignore_white(tmp_path: Path) -> None:
    """One file with gray between black and white must not make the white of all files void."""

    def draw(index: int) -> Image.Image:
        mask = person(index) * np.uint8(255)
        if index == 0:
            mask[:12] = 128
        return Image.fromarray(mask)

    found = masks_of(everything(make_folder(tmp_path, draw)))
    assert not any((mask == 255).any() for mask in found.values())
    del found["p0"]
    assert_equal(found, {name: mask for name, mask in expected().items() if name != "p0"})


@pytest.mark.parametrize(("dtype", "number"), [(np.uint16, 300), (np.int32, 70_000)])
def test_large_numbers_of_people_stay_apart(
    dtype: type[np.generic], number: int, tmp_path: Path
) -> None:
    def draw(index: int) -> Image.Image:
        mask = person(index).astype(dtype)
        mask[4:8, 50:54] = number
        return Image.fromarray(mask)

    source = everything(make_folder(tmp_path, draw, suffix=".tif"))
    assert_equal(masks_of(source), expected())
    assert set(source.catalog.num_people.tolist()) == {2}


def test_one_number_is_one_person_where_other_files_have_several(tmp_path: Path) -> None:
    def draw(index: int) -> Image.Image:
        mask = person(index)
        if index == 0:
            mask[4:8, 50:54] = 2
        return Image.fromarray(mask)

    source = everything(make_folder(tmp_path, draw))
    people = {source.stem(i): int(source.catalog.num_people[i]) for i in range(NUM)}
    assert people == {f"p{i}": 2 if i == 0 else 1 for i in range(NUM)}
    assert not any("mixed" in note for note in source.notes)


@pytest.mark.parametrize("number", [1, 15])
def test_one_number_in_all_files_tells_nobody_apart(number: int, tmp_path: Path) -> None:
    def draw(index: int) -> Image.Image:
        mask = person(index) * np.uint8(number)
        mask[0] = 255
        return Image.fromarray(mask)

    source = everything(make_folder(tmp_path, draw))
    assert set(source.catalog.num_people.tolist()) == {2}


def test_numbers_tell_people_apart(tmp_path: Path) -> None:
    source = everything(make_folder(tmp_path, as_numbers))
    wanted = expected()
    for mask in wanted.values():
        mask[:4, :4] = 1
    assert_equal(masks_of(source), wanted)
    assert set(source.catalog.num_people.tolist()) == {3}


def test_255_beside_numbers_is_ignored_in_all_files(tmp_path: Path) -> None:
    """VOC's way: the border of a person is void, and a picture may hold nothing but void."""

    def draw(index: int) -> Image.Image:
        mask = person(index) if index else np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        mask[0] = 255
        return Image.fromarray(mask)

    found = masks_of(everything(make_folder(tmp_path, draw)))

    assert (found["p0"][0] == 255).all()
    assert not found["p0"][1:].any()
    assert (found["p1"][0] == 255).all()
    assert np.array_equal(found["p1"][1:], person(1)[1:])


def with_void(*, numbers: int, both: int, white: int, path: Path) -> FolderPeople:
    """So many files of 0/1, of 0/1/255 and of 0/255, where white is the first row alone."""

    def draw(index: int) -> Image.Image:
        mask = person(index)
        if index >= numbers + both:
            mask[:] = 0
        if index >= numbers:
            mask[0] = 255
        return Image.fromarray(mask)

    names = [f"p{index}" for index in range(numbers + both + white)]
    return everything(make_folder(path, draw, names=names))


@pytest.mark.parametrize(
    ("numbers", "both", "white", "meaning"),
    [
        (0, 10, 20, 255),  # VOC: fewer pictures have people than void
        (30, 4, 1, 255),  # void is rare, and rarer alone
        (10, 1, 10, 1),  # 0/1 and 0/255 are mixed, and there is a stray file
        (0, 1, 30, 1),  # 0/255, and a stray file
    ],
)
def test_what_white_alone_means_depends_on_all_files(
    numbers: int, both: int, white: int, meaning: int, tmp_path: Path
) -> None:
    source = with_void(numbers=numbers, both=both, white=white, path=tmp_path)
    found = masks_of(source)
    for index in range(numbers, numbers + both):
        assert (found[f"p{index}"][0] == 255).all()
    for index in range(numbers + both, numbers + both + white):
        assert (found[f"p{index}"][0] == meaning).all()
        assert not found[f"p{index}"][1:].any()
    assert any("255 is ignored" in note for note in source.notes) == (meaning == 255)
    assert any("mixed encodings" in note for note in source.notes) == (meaning == 1)


def test_both_splits_are_read_alike(tmp_path: Path) -> None:
    """The few masks for validation hold void alone; only those for training tell that it is."""
    with_void(numbers=0, both=10, white=2, path=tmp_path)
    (tmp_path / "train.txt").write_text("\n".join(f"p{index}" for index in range(10)))
    found = masks_of(FolderPeople(tmp_path, "val"))
    assert found.keys() == {"p10", "p11"}
    assert all((mask[0] == 255).all() for mask in found.values())


def test_counts_are_kept_for_one_reading_only(tmp_path: Path) -> None:
    """A changed file of the other split may change what the files of this one mean."""
    with_void(numbers=0, both=10, white=2, path=tmp_path)
    (tmp_path / "train.txt").write_text("\n".join(f"p{index}" for index in range(10)))
    assert not FolderPeople(tmp_path, "val").catalog.person_share.any()
    for index in range(10):
        Image.fromarray(person(index) * 255).save(tmp_path / "masks" / f"p{index}.png")
    source = FolderPeople(tmp_path, "val")
    assert (source.sample(0).mask[0] == 1).all()
    assert source.catalog.person_share == pytest.approx(1 / HEIGHT)


def test_zero_one_and_zero_255_may_be_mixed(tmp_path: Path) -> None:
    source = everything(
        make_folder(tmp_path, lambda i: Image.fromarray(person(i) * (255 if i % 2 else 1)))
    )
    assert_equal(masks_of(source), expected())
    assert "0/1 (6)" in source.notes[0]
    assert "0/255 (6)" in source.notes[0]


def test_inverted_masks_are_found_and_turned_on_request(tmp_path: Path) -> None:
    root = make_folder(tmp_path, lambda i: Image.fromarray((1 - person(i)) * 255))
    found = everything(root)
    turned = everything(root, LabelRules(invert_masks=True))

    assert any("inverted" in note and "data.invert_masks=true" in note for note in found.notes)
    assert not any("inverted" in note for note in turned.notes)
    assert_equal(masks_of(turned), expected())
    assert found.catalog.person_share == pytest.approx(1 - turned.catalog.person_share)


def test_ordinary_masks_do_not_look_inverted(tmp_path: Path) -> None:
    assert not any("inverted" in note for note in everything(make_folder(tmp_path)).notes)


def test_empty_masks_are_said(tmp_path: Path) -> None:
    source = everything(make_folder(tmp_path, lambda i: Image.new("L", (WIDTH, HEIGHT))))
    assert "all empty" in source.notes[0]
    assert not source.catalog.num_people.any()


def test_masks_without_anybody_are_said(tmp_path: Path) -> None:
    """Read as soft masks should be, and still hardly what the user meant."""

    def draw(index: int) -> Image.Image:
        return Image.fromarray(person(index) * np.uint8(100))

    dim = everything(make_folder(tmp_path / "dim", draw, suffix=".jpg"))
    assert any("no mask has a person" in note for note in dim.notes)
    good = everything(make_folder(tmp_path / "good"))
    assert not any("no mask has a person" in note for note in good.notes)


# --------------------------------------------------------------------------- rules


@pytest.mark.parametrize("draw", [None, as_colours], ids=["blocks", "colours"])
def test_the_largest_person_alone(draw: Draw | None, tmp_path: Path) -> None:
    root = make_folder(tmp_path, draw) if draw else make_folder(tmp_path)
    for rules in (LabelRules(largest_only=True), LabelRules(min_person_area=0.05)):
        source = everything(root, rules)
        for name, mask in masks_of(source).items():
            wanted = expected()[name]
            wanted[4:8, 50:54] = 255
            assert np.array_equal(mask, wanted), (name, rules)
        assert set(source.catalog.num_people.tolist()) == {2}
        index = 3
        share = (source.sample(index).mask == 1).mean()
        assert source.catalog.person_share[index] == pytest.approx(share)


@pytest.mark.parametrize("draw", [as_colours, as_numbers], ids=["colours", "numbers"])
def test_rules_hold_for_inverted_masks_too(draw: Draw, tmp_path: Path) -> None:
    """The one person is then all that is black."""
    root = make_folder(tmp_path, draw)
    plain = masks_of(everything(root))
    source = everything(root, LabelRules(invert_masks=True, largest_only=True))
    assert_equal(masks_of(source), {name: 1 - mask for name, mask in plain.items()})
    assert set(source.catalog.num_people.tolist()) == {1}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    levels=st.lists(st.integers(0, 255), min_size=1, max_size=5),
    mode=st.sampled_from(["1", "L", "P", "LA", "RGB", "RGBA", "I;16"]),
    largest_only=st.booleans(),
    invert_masks=st.booleans(),
    min_person_area=st.sampled_from([0.0, 0.01, 0.3]),
)
def test_the_catalog_agrees_with_the_masks(
    seed: int,
    levels: list[int],
    mode: str,
    largest_only: bool,
    invert_masks: bool,
    min_person_area: float,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    def draw(index: int) -> Image.Image:
        rng = np.random.default_rng([seed, index])
        blocks = rng.choice(levels, (5, 5)).repeat(8, axis=0).repeat(12, axis=1)
        if mode == "I;16":
            return Image.fromarray(blocks.astype(np.uint16) * 200)
        picture = Image.fromarray(blocks.astype(np.uint8)).convert(mode)
        if mode in {"LA", "RGBA"}:
            picture.putalpha(Image.fromarray(blocks.T.astype(np.uint8)).resize(picture.size))
        return picture

    root = make_folder(tmp_path_factory.mktemp("any"), draw, names=["p0", "p1", "p2"])
    rules = LabelRules(
        largest_only=largest_only, invert_masks=invert_masks, min_person_area=min_person_area
    )
    try:
        source = everything(root, rules)
    except DataError:
        return
    for index in range(len(source)):
        mask = source.sample(index).mask
        assert set(np.unique(mask)) <= {0, 1, 255}
        assert source.catalog.person_share[index] == pytest.approx((mask == 1).mean())
        if (mask == 1).any():
            assert source.catalog.num_people[index] >= 1


# --------------------------------------------------------------------------- pairs and splits


def stems(root: Path, split: str) -> list[str]:
    source = FolderPeople(root, split)
    return [source.stem(index) for index in range(len(source))]


def test_names_pair_exactly(tmp_path: Path) -> None:
    names = ["1", "10", "a/1", "a.b", "x_mask"]
    root = make_folder(tmp_path, names=names)
    source = everything(root)
    assert [source.stem(i) for i in range(5)] == sorted(names)
    for index in range(5):
        assert source.picture_path(index).stem == source.mask_path(index).stem
        number = names.index(source.stem(index))
        assert np.array_equal(source.sample(index).mask, person(number))


def test_lists_name_the_splits(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    (root / "train.txt").write_text("p0\r\np1.jpg\n\np2.png\n")
    (root / "val.txt").write_text("p5\n")
    assert stems(root, "train") == ["p0", "p1", "p2"]
    assert stems(root, "val") == ["p5"]
    (root / "train.txt").unlink()
    assert stems(root, "train") == sorted({f"p{i}" for i in range(NUM)} - {"p5"})


def test_a_name_in_both_lists_is_an_error(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    (root / "train.txt").write_text("p0\np1\np2")
    (root / "val.txt").write_text("p1\np2")
    with pytest.raises(DataError, match=r"2 names are in train\.txt and val\.txt, first p1, p2"):
        FolderPeople(root, "val")


def test_lists_lead_nowhere_else(tmp_path: Path) -> None:
    """Neither by dots nor by a linked folder; what is listed so is as good as missing."""
    make_folder(tmp_path / "secret", names=["s"])
    root = make_folder(tmp_path / "set")
    for kind in ("images", "masks"):
        (root / kind / "link").symlink_to(tmp_path / "secret" / kind)
    (root / "train.txt").write_text("p0\np1\nlink/s")
    assert stems(root, "train") == ["p0", "p1"]
    (root / "train.txt").write_text(f"p0\n../../secret/images/s\n{tmp_path}/secret/images/s.jpg")
    with pytest.raises(DataError, match=r"2 of 3 are listed .* but not there"):
        FolderPeople(root, "train")


@pytest.mark.parametrize("outer", [True, False])
def test_folders_name_the_splits(outer: bool, tmp_path: Path) -> None:
    for split, names in (("train", ["a", "b"]), ("val", ["a", "c"])):
        if outer:
            make_folder(tmp_path / split, names=names)
        else:
            make_folder(tmp_path, names=names, inner=split)
    assert is_folder(tmp_path)
    assert stems(tmp_path, "train") == ["a", "b"]
    assert stems(tmp_path, "val") == ["a", "c"]


def test_without_lists_a_stable_tenth_is_for_validation(tmp_path: Path) -> None:
    names = [f"n{index}" for index in range(60)]
    few = make_folder(tmp_path / "few", names=names[:40])
    many = make_folder(tmp_path / "many", names=names)

    for split in ("train", "val"):
        assert set(stems(few, split)) == set(stems(many, split)) & set(names[:40])
    train, val = stems(many, "train"), stems(many, "val")
    assert sorted(train + val) == sorted(names)
    assert 1 <= len(val) <= 15
    assert val == sorted(n for n in names if identity("split", n) % 10 == 0)


def test_a_few_without_partner_are_counted_and_many_are_an_error(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    (root / "masks" / "p3.png").unlink()
    source = everything(root)
    assert len(source) == NUM - 1
    assert [reason for reason in source.skipped if "without a mask: p3" in reason]

    (root / "masks" / "p4.png").unlink()
    with pytest.raises(DataError, match=r"2 of 12 are in .* without a mask, first p3, p4"):
        everything(root)


def test_a_common_ending_of_masks_is_pointed_out(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    for path in (root / "masks").iterdir():
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    with pytest.raises(DataError, match=r"masks end in '_mask': rename"):
        FolderPeople(root, "train")


def test_two_of_one_name_are_an_error(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    photo(0).save(root / "images" / "p3.png")
    with pytest.raises(DataError, match=r"p3\.(png|jpg) and p3\.(png|jpg) have the same name"):
        everything(root)


def test_what_is_no_picture_is_not_seen(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    for folder in ("images", "masks"):
        (root / folder / "Thumbs.db").write_bytes(b"x")
        (root / folder / ".hidden.png").write_bytes(b"x")
        (root / folder / "notes.txt").write_text("x")
    assert len(FolderPeople(root, "train")) + len(FolderPeople(root, "val")) == NUM


def test_the_kind_is_recognised(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set")
    assert kind_of(root) == "folders of masks"
    assert isinstance(open_dataset(root, "train"), FolderPeople)
    shutil.rmtree(root / "masks")
    assert not is_folder(root)


# --------------------------------------------------------------------------- what is wrong


def test_exchanged_folders_are_recognised(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    (root / "images").rename(root / "x")
    (root / "masks").rename(root / "images")
    (root / "x").rename(root / "masks")
    with pytest.raises(DataError, match="are images/ and masks/ exchanged"):
        everything(root)


def test_gray_photos_are_no_masks(tmp_path: Path) -> None:
    root = make_folder(tmp_path, lambda i: photo(i).convert("L"))
    with pytest.raises(DataError, match="the masks are gray photos; are images/ and masks/ exch"):
        everything(root)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: Image.new("L", (WIDTH, HEIGHT + 1)).save(path), "another size"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "damaged"),
        (lambda path: path.write_bytes(b"no mask"), "damaged"),
        (lambda path: photo(3).resize((WIDTH, HEIGHT)).save(path), "photo"),
    ],
    ids=["size", "cut", "text", "photo"],
)
def test_one_bad_mask_is_left_out_and_two_are_an_error(
    spoil: Callable[[Path], object], reason: str, tmp_path: Path
) -> None:
    root = make_folder(tmp_path)
    spoil(root / "masks" / "p3.png")
    source = everything(root)
    assert "p3" not in masks_of(source)
    assert len(source) == NUM - 1
    assert [found for found in source.skipped if reason in found]

    spoil(root / "masks" / "p4.png")
    with pytest.raises(DataError, match=rf"{reason}.* in 2 of 12 pairs, first p3\.png, p4\.png"):
        everything(root)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mask_lies_on", ["upright", "stored"])
def test_exif_is_obeyed_where_the_mask_fits_the_upright_picture(
    orientation: int, mask_lies_on: str, tmp_path: Path
) -> None:
    root = make_folder(tmp_path)
    turned = orientation >= 5
    exif = Image.Exif()
    exif[0x0112] = orientation
    size = (HEIGHT, WIDTH) if turned and mask_lies_on == "upright" else (WIDTH, HEIGHT)
    for index in range(NUM):
        photo(index).save(root / "images" / f"p{index}.jpg", exif=exif)
        Image.fromarray(person(index) * 255).resize(size).save(root / "masks" / f"p{index}.png")
    source = everything(root)
    sample = source.sample(0)

    assert sample.image.shape[:2] == sample.mask.shape == size[::-1]
    assert source.catalog.sizes[0].tolist() == list(size[::-1])
    with Image.open(source.picture_path(0)) as picture:
        stored = np.asarray(picture)
    as_stored = np.array_equal(sample.image, stored)
    assert as_stored == (orientation == 1 or (turned and mask_lies_on == "stored"))


def test_a_picture_damaged_later_is_a_data_error(tmp_path: Path) -> None:
    source = everything(make_folder(tmp_path))
    source.picture_path(2).write_bytes(b"gone")
    with pytest.raises(DataError, match=source.picture_path(2).name):
        source.sample(2)


def test_a_mask_that_changes_its_size_later_is_a_data_error(tmp_path: Path) -> None:
    source = everything(make_folder(tmp_path))
    Image.new("L", (5, 5)).save(source.mask_path(2))
    with pytest.raises(DataError, match="differ in size"):
        source.sample(2)


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "1"])
def test_a_damaged_png_is_an_error_and_never_half_a_mask(
    mode: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mask = np.random.default_rng(0).integers(0, 2, (12, 20), dtype=np.uint8) * 255
    path = tmp_path / "mask.png"
    Image.fromarray(mask).convert(mode).save(path)
    good = path.read_bytes()
    assert set(np.unique(load_mask(path).levels)) == {0, 255}
    spoiled = [good[:cut] for cut in range(len(good))]
    spoiled += [good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :] for at in range(len(good))]
    for content in spoiled:
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"mask\.png"):
            load_mask(path)
    assert capfd.readouterr() == ("", "")  # the decoders are not asked to complain


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=200), seed=st.integers(0, 2**32), cut=st.floats(0, 1))
def test_whatever_lies_in_masks_a_mask_is_a_mask(
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
        masks = masks_of(everything(root))
    except DataError:
        return
    assert all(set(np.unique(mask)) <= {0, 1, 255} for mask in masks.values())


# --------------------------------------------------------------------------- scale and speed


@pytest.mark.parametrize("short_side", [10, 20, 40, 100])
def test_image_and_mask_are_scaled_together(short_side: int, tmp_path: Path) -> None:
    """The picture is painted from the mask, so after scaling it still says where the mask is."""
    root = make_folder(tmp_path)
    for index in range(NUM):
        painted = np.repeat(person(index)[..., None] * np.uint8(255), 3, axis=2)
        Image.fromarray(painted).save(root / "images" / f"p{index}.png")
        (root / "images" / f"p{index}.jpg").unlink()
    source = everything(root)
    for index in range(NUM):
        sample = source.sample(index, short_side)
        assert min(sample.mask.shape) == short_side
        assert sample.mask.shape == sample.image.shape[:2]
        differing = (sample.image[..., 0] >= 128) != (sample.mask == 1)
        assert differing.mean() < 2.5 / short_side


@pytest.mark.parametrize("short_side", [7, 13, 19])
def test_scaling_does_not_move_the_mask(short_side: int, tmp_path: Path) -> None:
    """The centre of a person stays where it is in the frame, to a quarter of a pixel."""

    def draw(index: int) -> Image.Image:
        mask = np.zeros((HEIGHT * 5, WIDTH * 5), dtype=np.uint8)
        mask[40:160, 60:240] = 255
        return Image.fromarray(mask)

    root = make_folder(tmp_path, draw, names=["p0"])
    photo(0).resize((WIDTH * 5, HEIGHT * 5)).save(root / "images" / "p0.jpg")
    mask = everything(root).sample(0, short_side).mask
    rows, columns = np.nonzero(mask == 1)
    scale = short_side / (HEIGHT * 5)
    assert abs(rows.mean() + 0.5 - 100 * scale) <= 0.25
    assert abs(columns.mean() + 0.5 - 150 * scale) <= 0.25


def test_a_second_opening_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path)
    first = everything(root)
    for module in ("folder", "folder_scan"):
        monkeypatch.setattr(f"segtrain.data.{module}.load_mask", None)
    second = everything(root)
    assert second.notes == first.notes
    for name in ("sizes", "person_share", "num_people", "identities"):
        assert np.array_equal(getattr(first.catalog, name), getattr(second.catalog, name))


def test_an_edited_mask_is_noticed(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    before = everything(root).catalog.person_share.copy()
    path = root / "masks" / "p0.png"
    Image.fromarray(np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)).save(path)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    after = everything(root).catalog.person_share
    assert (before != after).sum() == 1
    assert after.max() == 1


# --------------------------------------------------------------------------- prepared folders


def write_manifest(root: Path, **changes: object) -> None:
    content = {
        "mask_values": {"background": 0, "person": 255, "ignore": 128},
        "pictures": {
            "train/p0": {"identity": "00000000000000ff", "num_people": 3, "has_crowd": True}
        },
    }
    (root / "manifest.json").write_text(json.dumps({**content, **changes}))


def test_a_manifest_says_what_gray_means_and_who_is_there(tmp_path: Path) -> None:
    def draw(index: int) -> Image.Image:
        mask = person(index) * np.uint8(255)
        mask[-1] = 128
        return Image.fromarray(mask)

    root = make_folder(tmp_path, draw)
    write_manifest(root)
    source = everything(root)
    for name, mask in masks_of(source).items():
        wanted = expected()[name]
        wanted[-1] = 255
        assert np.array_equal(mask, wanted)
    row = [source.stem(i) for i in range(NUM)].index("p0")
    assert source.catalog.identities[row] == 255
    assert source.catalog.num_people[row] == 3
    assert source.catalog.has_crowd.sum() == 1


def test_masks_that_are_not_as_the_manifest_says_are_not_used(tmp_path: Path) -> None:
    """Zeros and ones would be nothing but background to a manifest that says 0 and 255."""
    root = make_folder(tmp_path, lambda i: Image.fromarray(person(i) * np.uint8(255 if i else 1)))
    write_manifest(root)
    source = everything(root)
    assert_equal(masks_of(source), {n: mask for n, mask in expected().items() if n != "p0"})
    assert source.skipped == {"mask has values that manifest.json does not name": 1}

    Image.fromarray(person(1)).save(root / "masks" / "p1.png")
    with pytest.raises(DataError, match=r"not name in 2 of 12 pairs, first p0\.png, p1\.png; prep"):
        everything(root)


def test_people_of_a_prepared_folder_are_told_apart_by_their_places(tmp_path: Path) -> None:
    def draw(index: int) -> Image.Image:
        mask = person(index) * np.uint8(255)
        mask[-10:] = 128  # so much that black and white are not nearly all
        return Image.fromarray(mask)

    root = make_folder(tmp_path, draw)
    write_manifest(root, pictures={})
    source = everything(root, LabelRules(largest_only=True))
    assert (source.sample(0).mask[4:8, 50:54] == 255).all()
    assert (source.sample(0).mask[8:28, 20:40] == 1).all()
    assert set(source.catalog.num_people.tolist()) == {2}


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    root = make_folder(tmp_path, names=["only"])
    (root / "masks" / "only.png").write_bytes(b"x")
    with pytest.raises(DataError, match="no usable pair"):
        everything(root)


@pytest.mark.parametrize(
    "changes",
    [
        {"mask_values": {"background": 0, "person": 999, "ignore": 128}},
        {"mask_values": {"background": 0, "person": 255, "ignore": 255}},
        {"mask_values": [1, 2]},
        {"pictures": {"train/p0": {"identity": "xyz", "num_people": 1, "has_crowd": False}}},
        {"pictures": {"train/p0": {"identity": "ff", "num_people": -1, "has_crowd": False}}},
        {"pictures": 3},
    ],
)
def test_a_damaged_manifest_is_an_error(changes: dict[str, object], tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    write_manifest(root, **changes)
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        everything(root)


def test_a_manifest_of_somebody_else_is_not_ours(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    (root / "manifest.json").write_text('{"name": "an app"}')
    assert_equal(masks_of(everything(root)), expected())


# --------------------------------------------------------------------------- real people


def test_portraits_are_read_as_pillow_reads_them(real_data: Path) -> None:
    root = real_data / "portraits-mini"
    sources = {split: FolderPeople(root, split) for split in ("train", "val")}
    assert {split: len(source) for split, source in sources.items()} == {"train": 1200, "val": 95}
    for split, source in sources.items():
        assert source.notes == [f"masks: 0/255 ({len(source)})"]
        assert not source.skipped
        for index in range(0, len(source), len(source) // 10):
            sample = source.sample(index)
            with Image.open(root / "masks" / f"{source.stem(index)}.png") as mask:
                assert np.array_equal(sample.mask, np.asarray(mask.convert("L")) // 255), split
