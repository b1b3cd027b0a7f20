"""Augmentation: image and mask stay aligned, and each draw depends only on its key."""

import hashlib
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import segtrain
from segtrain.data.sample import Sample
from segtrain.data.transforms import PRESETS, Augment, Preset, TrainTransform
from segtrain.types import Image, Mask

SIZE = 32
FILL = (124, 116, 104)


def coordinate_sample(height: int, width: int) -> Sample:
    """Make an image of column and row numbers; the mask is a block and an ignored stripe."""
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[height // 4 : 3 * height // 4, width // 5 : width // 2] = 1
    mask[height // 2 :, 2 * width // 3 :] = 255
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return Sample(image=np.dstack([columns, rows, mask]), mask=mask, image_id="x")


def mask_colored_sample(height: int, width: int) -> Sample:
    """Make an image of the mask: person white, ignored gray, background black."""
    mask = coordinate_sample(height, width).mask
    gray = np.select([mask == 1, mask == 255], [250, 128], 5).astype(np.uint8)
    return Sample(image=np.repeat(gray[..., None], 3, axis=2), mask=mask, image_id="x")


def augment_epochs(transform: TrainTransform, sample: Sample, count: int) -> Iterator[Sample]:
    return (transform(sample, seed=0, epoch=epoch, index=3) for epoch in range(count))


def reduced_transform(
    augment: Augment,
    image_size: int = SIZE,
    *,
    still: bool = False,
    margin: bool = True,
    paste: float = 0.0,
    pixels: list[str] | None = None,
) -> TrainTransform:
    """Build a preset without geometry (`still`) and with only the named pixel transforms."""

    def reduced_preset(size: int) -> Preset:
        preset = PRESETS[augment](size)
        kept = [t for t in preset.pixels if type(t).__name__ in (pixels or [])]
        if still:
            preset = replace(preset, geometry=[])
        if still or not margin:
            preset = replace(preset, margin=0)
        return replace(preset, paste=paste, pixels=kept)

    with pytest.MonkeyPatch.context() as patch:
        rows = {**PRESETS, "reduced": reduced_preset}
        patch.setattr("segtrain.data.transforms.PRESETS", rows)
        return TrainTransform(image_size, "reduced")  # type: ignore[arg-type]


# --------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("augment", ["paper", "standard"])
@pytest.mark.parametrize(("height", "width"), [(SIZE, 90), (90, SIZE), (50, 70)])
def test_a_crop_is_a_window_of_image_and_mask(augment: Augment, height: int, width: int) -> None:
    sample = coordinate_sample(height, width)
    flips, corners = [0, 0], set()
    for crop in augment_epochs(reduced_transform(augment), sample, 80):
        columns, rows = crop.image[..., 0], crop.image[..., 1]
        flipped = bool(columns[0, 0] > columns[0, -1])
        left, top = int(columns.min()), int(rows.min())
        window = np.s_[top : top + SIZE, left : left + SIZE]
        image, mask = sample.image[window], sample.mask[window]
        if flipped:
            image, mask = image[:, ::-1], mask[:, ::-1]
        assert np.array_equal(crop.image, image)
        assert np.array_equal(crop.mask, mask)
        flips[flipped] += 1
        corners.add((left, top))
    assert min(flips) >= 20
    assert len(corners) >= 25


@pytest.mark.parametrize("augment", ["paper", "standard"])
@pytest.mark.parametrize(("height", "width"), [(20, 90), (20, 20), (90, 7), (1, 1)])
def test_pixels_outside_a_small_image_are_ignored(
    augment: Augment, height: int, width: int
) -> None:
    sample = coordinate_sample(height, width)
    positions = set()
    for crop in augment_epochs(reduced_transform(augment), sample, 40):
        assert crop.image.shape == (SIZE, SIZE, 3)
        outside = (crop.image == FILL).all(axis=2)
        assert (crop.mask[outside] == 255).all()
        rows, columns = np.nonzero(~outside)
        assert np.ptp(rows) + 1 == min(height, SIZE)
        assert np.ptp(columns) + 1 == min(width, SIZE)
        # Pixels inside still encode their mask value.
        assert np.array_equal(crop.image[..., 2][~outside], crop.mask[~outside])
        positions.add((rows.min(), columns.min()))
    assert len(positions) > 3


def test_rotated_and_deformed_masks_stay_aligned_with_the_image() -> None:
    """Where all neighbors in the mask agree, the image has the color of the mask."""
    sample = mask_colored_sample(80, 110)
    compared = 0
    for crop in augment_epochs(reduced_transform("strong", 64), sample, 60):
        outside = (np.abs(crop.image.astype(int) - FILL).max(axis=2) < 3) & (crop.mask == 255)
        color = np.select([crop.mask == 1, crop.mask == 255], [250, 128], 5)
        inside = far_from_edges(crop.mask, 2) & ~outside
        assert np.abs(crop.image[..., 0][inside].astype(int) - color[inside]).max(initial=0) < 9
        compared += int(inside.sum())
    assert compared > 60 * 64 * 64 / 2


@pytest.mark.parametrize("margin", [True, False])
def test_pixels_outside_a_rotated_or_deformed_image_are_ignored(margin: bool) -> None:
    """A white person fills the image, so darker pixels are outside the image.

    With a margin, the fill color comes from the crop; without it, from rotation and deformation.
    """
    sample = all_person_sample(70, 70)
    outside = 0
    for crop in augment_epochs(reduced_transform("strong", 64, margin=margin), sample, 60):
        assert (crop.mask[(crop.image == FILL).all(axis=2)] == 255).all()
        assert (crop.mask[(crop.image == 250).all(axis=2)] == 1).all()
        outside += int((crop.image == FILL).all(axis=2).sum())
    assert 0.004 < outside / (60 * 64 * 64) < 0.04


def test_an_image_that_is_not_rotated_or_deformed_is_only_cropped() -> None:
    """Also if the image is not larger than the crop: the margin costs no pixel."""
    sample = coordinate_sample(SIZE, SIZE)
    originals = {bytes_of(sample), bytes_of(flip(sample))}
    actual = Counter(
        bytes_of(crop) for crop in augment_epochs(reduced_transform("strong"), sample, 100)
    )
    assert all(actual[original] >= 8 for original in originals)


def test_rotation_uses_the_pixels_beside_the_crop() -> None:
    crops = list(
        augment_epochs(reduced_transform("strong"), all_person_sample(40 * SIZE, 40 * SIZE), 60)
    )
    assert sum((crop.mask == 1).all() for crop in crops) >= 54


def all_person_sample(height: int, width: int) -> Sample:
    image = np.full((height, width, 3), 250, dtype=np.uint8)
    return Sample(image=image, mask=np.ones((height, width), dtype=np.uint8), image_id="x")


def flip(sample: Sample) -> Sample:
    return Sample(image=sample.image[:, ::-1], mask=sample.mask[:, ::-1], image_id="x")


def far_from_edges(mask: Mask, reach: int) -> npt.NDArray[np.bool_]:
    side = 2 * reach + 1
    windows = np.lib.stride_tricks.sliding_window_view(mask, (side, side))
    return np.pad(windows.min(axis=(2, 3)) == windows.max(axis=(2, 3)), reach)


def test_strong_rotates_up_to_twenty_degrees_and_deforms_some_images() -> None:
    """The slope of a vertical edge is the angle; a deformed edge deviates from its line."""
    mask = np.zeros((300, 200), dtype=np.uint8)
    mask[:, 100:] = 1
    image = np.repeat(mask[..., None] * np.uint8(250), 3, axis=2)
    transform = reduced_transform("strong", 160)
    angles, bends = [], []
    for crop in augment_epochs(transform, Sample(image=image, mask=mask, image_id="x"), 60):
        people = crop.mask[20:140, 20:140] == 1
        edges = people.argmax(axis=1) if not people[:, 0].any() else (~people).argmax(axis=1)
        assert edges.min() > 0  # the edge crosses every row
        line = np.polyfit(np.arange(120), edges, 1)
        angles.append(abs(np.degrees(np.arctan(line[0]))))
        bends.append(np.abs(np.polyval(line, np.arange(120)) - edges).max())
    assert max(angles) <= 32  # deformation adds to the rotation
    assert sum(angle > 5 for angle in angles) > 10
    assert sum(angle < 1 for angle in angles) > 5
    assert sum(bend > 1.5 for bend in bends) > 5
    assert sum(bend < 1 for bend in bends) > 15


# --------------------------------------------------------------------------- any image


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 150),
    augment=st.sampled_from(sorted(PRESETS)),
    seed=st.integers(0, 2**32 - 1),
    index=st.integers(0, 2**40),
)
def test_any_image_becomes_a_uint8_crop(
    height: int, width: int, augment: Augment, seed: int, index: int
) -> None:
    rng = np.random.default_rng(seed)
    sample = Sample(
        image=rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        mask=rng.choice(np.array([0, 1, 255], dtype=np.uint8), (height, width)),
        image_id="x",
    )
    before = sample.image.copy(), sample.mask.copy()
    actual = TRANSFORMS[augment](
        sample, seed=seed, epoch=1, index=index, backdrop=lambda number: backdrop_image()
    )

    assert actual.image.shape == (SIZE, SIZE, 3)
    assert actual.mask.shape == (SIZE, SIZE)
    assert actual.image.dtype == actual.mask.dtype == np.uint8
    assert actual.image.flags.c_contiguous
    assert actual.mask.flags.c_contiguous
    assert set(np.unique(actual.mask)) <= {0, 1, 255}
    assert np.array_equal(sample.image, before[0])
    assert np.array_equal(sample.mask, before[1])
    assert not np.may_share_memory(actual.image, sample.image)
    assert not np.may_share_memory(actual.mask, sample.mask)


def backdrop_image() -> Image:
    image = np.zeros((40, 50, 3), dtype=np.uint8)
    image[..., 1] = 255
    return image


TRANSFORMS = {augment: TrainTransform(SIZE, augment) for augment in PRESETS}


# --------------------------------------------------------------------------- draws


def bytes_of(sample: Sample) -> bytes:
    return sample.image.tobytes() + sample.mask.tobytes()


@pytest.mark.parametrize("augment", PRESETS)
def test_a_draw_depends_only_on_its_key(augment: Augment) -> None:
    sample = coordinate_sample(60, 80)
    keys = list(product((0, 1), range(8), (0, 7)))

    def drawn(transform: TrainTransform, key: tuple[int, int, int]) -> bytes:
        seed, epoch, index = key
        return bytes_of(
            transform(
                sample,
                seed=seed,
                epoch=epoch,
                index=index,
                backdrop=lambda number: np.roll(backdrop_image(), number % 7, axis=1),
            )
        )

    first = {key: drawn(TrainTransform(SIZE, augment), key) for key in keys}
    again = TrainTransform(SIZE, augment)
    for key in reversed(keys):
        random.seed(str(key))
        np.random.seed(sum(key))  # noqa: NPY002 - the legacy global generator is meant
        cv2.setRNGSeed(sum(key))
        before = global_generators()
        assert drawn(again, key) == first[key]
        assert global_generators() == before
    assert len(set(first.values())) == len(keys)


def global_generators() -> tuple[object, str]:
    numpy_state = np.random.get_state()  # noqa: NPY002 - the legacy global generator is meant
    return random.getstate(), repr(numpy_state)


def crops_of_all_presets() -> str:
    actual = [
        bytes_of(crop)
        for augment in TRANSFORMS
        for crop in augment_epochs(TrainTransform(SIZE, augment), coordinate_sample(60, 80), 40)
    ]
    return hashlib.sha256(b"".join(actual)).hexdigest()


def test_another_process_draws_the_same_crops() -> None:
    tests = Path(__file__).parents[1]
    folders = [Path(segtrain.__file__).parents[1], tests, tests / "data"]
    code = "import test_transforms; print(test_transforms.crops_of_all_presets())"
    output = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(map(str, folders)), "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output.strip() == crops_of_all_presets()


@pytest.mark.parametrize("augment", PRESETS)
def test_augmentations_are_applied_independently(augment: Augment) -> None:
    """Equal seeds for all transforms would flip exactly the images that are rotated."""
    sample = coordinate_sample(60, 80)
    transform = TrainTransform(SIZE, augment)
    steps = [*transform._preset.geometry, *transform._preset.pixels]
    steps = [step for step in steps if step.p < 1]
    done, tops = [], []
    for crop in augment_epochs(transform, sample, 500):
        done.append([bool(step.get_applied_params()) for step in steps])
        tops.append([float(crop.image[..., 1].mean())])
    assert np.mean(done, axis=0) == pytest.approx([step.p for step in steps], abs=0.06)
    correlation = np.corrcoef(np.hstack([done, tops]), rowvar=False)
    assert np.abs(correlation - np.eye(len(steps) + 1)).max() < 0.15


@pytest.mark.parametrize(
    ("augment", "scale", "smallest", "largest"),
    [
        ("paper", None, 32, 48),
        ("standard", None, 16, 64),
        ("strong", None, 16, 64),
        ("paper", (1.0, 1.0), 32, 32),
        ("standard", (2.0, 3.0), 64, 96),
    ],
)
def test_the_scale_is_drawn_from_its_whole_range(
    augment: Augment, scale: tuple[float, float] | None, smallest: int, largest: int
) -> None:
    transform = TrainTransform(SIZE, augment, scale)
    sides = [transform.short_side(seed=0, epoch=epoch, index=1) for epoch in range(400)]
    assert (min(sides), max(sides)) == (smallest, largest)
    assert sides[7] == transform.short_side(seed=0, epoch=7, index=1)
    if smallest < largest:
        assert np.mean(sides) == pytest.approx((smallest + largest) / 2, rel=0.06)


# --------------------------------------------------------------------------- pixels


def test_only_paper_does_not_change_pixel_values() -> None:
    sample = mask_colored_sample(SIZE, SIZE)
    for augment, least in (("paper", 0), ("standard", 25), ("strong", 25)):
        crops = list(augment_epochs(TrainTransform(SIZE, augment, (1.0, 1.0)), sample, 40))  # type: ignore[arg-type]
        colors = {5, 128, 250}
        recolored = sum(not set(np.unique(c.image).tolist()) <= colors for c in crops)
        assert recolored >= least
        assert augment != "paper" or recolored == 0


def test_photometric_transforms_do_not_change_the_mask() -> None:
    sample = coordinate_sample(60, 80)
    for with_pixels, plain in zip(
        augment_epochs(TrainTransform(SIZE, "standard"), sample, 60),
        augment_epochs(reduced_transform("standard"), sample, 60),
        strict=True,
    ):
        assert np.array_equal(with_pixels.mask, plain.mask)


def test_holes_are_ignored_and_the_rest_of_the_mask_is_unchanged() -> None:
    sample = mask_colored_sample(90, 90)
    transform, plain = TrainTransform(SIZE, "strong"), reduced_transform("strong")
    with_holes = 0
    pairs = zip(
        augment_epochs(transform, sample, 80), augment_epochs(plain, sample, 80), strict=True
    )
    for crop, other in pairs:
        differing = crop.mask != other.mask
        assert (crop.mask[differing] == 255).all()
        assert (crop.image[differing] == FILL).all()
        with_holes += bool(differing.any())
    assert 12 <= with_holes <= 40


@pytest.mark.parametrize("name", ["ColorJitter", "GaussianBlur", "ImageCompression", "ToGray"])
def test_each_photometric_transform_changes_some_images_and_no_mask(name: str) -> None:
    rng = np.random.default_rng(0)
    image = cv2.blur(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8), (3, 3))
    sample = Sample(
        image=np.asarray(image, np.uint8), mask=coordinate_sample(60, 80).mask, image_id="x"
    )
    photos = list(
        augment_epochs(reduced_transform("strong", still=True, pixels=[name]), sample, 100)
    )
    plain = list(augment_epochs(reduced_transform("strong", still=True), sample, 100))
    assert all(np.array_equal(a.mask, b.mask) for a, b in zip(photos, plain, strict=True))
    differing = sum(bytes_of(a) != bytes_of(b) for a, b in zip(photos, plain, strict=True))
    assert 3 <= differing <= 90


# --------------------------------------------------------------------------- other backgrounds


KEYS = [{"seed": 0, "epoch": epoch, "index": 0} for epoch in range(20)]


def test_people_are_pasted_on_other_backgrounds() -> None:
    sample = mask_colored_sample(60, 60)
    plain, pasting = (
        reduced_transform("strong", still=True),
        reduced_transform("strong", still=True, paste=1.0),
    )
    blended = 0
    for key in KEYS:
        crop = pasting(sample, **key, backdrop=lambda number: backdrop_image())
        original = plain(sample, **key)
        assert np.array_equal(crop.mask, original.mask)
        inside = far_from_edges(crop.mask, 1)
        person, background = inside & (crop.mask == 1), inside & (crop.mask == 0)
        ignored = inside & (crop.mask == 255)
        assert np.array_equal(crop.image[person], original.image[person])
        assert np.array_equal(crop.image[ignored], original.image[ignored])
        assert (crop.image[background] == (0, 255, 0)).all()
        # The red channel blends from 250 (person) to 0 (backdrop) at the edge.
        steps = np.isin(crop.image[..., 0], range(60, 200)) & (crop.mask != 255)
        blended += int(steps.any()) if person.any() and background.any() else 1
    assert blended == len(KEYS)


@pytest.mark.parametrize(("height", "width"), [(SIZE, SIZE), (50, 70), (70, 33)])
def test_a_backdrop_is_cropped_at_a_random_position(height: int, width: int) -> None:
    sample, backdrop_sample = mask_colored_sample(60, 60), coordinate_sample(height, width)
    pasting, corners = reduced_transform("strong", still=True, paste=1.0), set()
    for key in KEYS:
        crop = pasting(sample, **key, backdrop=lambda number: backdrop_sample.image)
        behind = far_from_edges(crop.mask, 1) & (crop.mask == 0)
        rows, columns = np.nonzero(behind)
        if not len(rows):
            continue
        # Every pixel encodes its source: one common shift, inside the backdrop.
        tops, lefts = crop.image[behind][:, 1] - rows, crop.image[behind][:, 0] - columns
        shifts = {*zip(tops.tolist(), lefts.tolist(), strict=True)}
        assert len(shifts) == 1
        corners |= shifts
    assert all(0 <= top <= height - SIZE and 0 <= left <= width - SIZE for top, left in corners)
    assert len(corners) >= min(8, (height - SIZE + 1) * (width - SIZE + 1))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (8, 8), (1, 100_000), (20_000, 2), (16, 90)])
def test_a_small_backdrop_is_upsampled_to_the_crop(height: int, width: int) -> None:
    image = np.full((height, width, 3), (0, 255, 0), dtype=np.uint8)
    pasting = reduced_transform("strong", still=True, paste=1.0)
    for key in KEYS[:5]:
        crop = pasting(mask_colored_sample(60, 60), **key, backdrop=lambda number: image)
        behind = far_from_edges(crop.mask, 1) & (crop.mask == 0)
        assert (crop.image[behind] == (0, 255, 0)).all()


def test_only_strong_pastes_and_only_if_there_are_people() -> None:
    negative = Sample(
        image=mask_colored_sample(60, 60).image,
        mask=np.zeros((60, 60), dtype=np.uint8),
        image_id="x",
    )
    requested: list[int] = []

    def backdrop(number: int) -> Image:
        requested.append(number)
        return backdrop_image()

    for augment, sample, expected in (
        ("paper", mask_colored_sample(60, 60), 0),
        ("standard", mask_colored_sample(60, 60), 0),
        ("strong", negative, 0),
        ("strong", mask_colored_sample(60, 60), 30),
    ):
        requested.clear()
        transform = TrainTransform(SIZE, augment)  # type: ignore[arg-type]
        for epoch in range(100):
            transform(sample, seed=0, epoch=epoch, index=0, backdrop=backdrop)
        assert abs(len(requested) - expected) <= expected / 2
        assert len(set(requested)) == len(requested)


def test_without_a_backdrop_nothing_is_pasted() -> None:
    transform = reduced_transform("strong", paste=1.0)
    sample = mask_colored_sample(60, 60)
    for key in KEYS[:5]:
        with_none = transform(sample, **key, backdrop=lambda number: None)
        assert bytes_of(with_none) == bytes_of(transform(sample, **key))
