"""`segtrain models`: what it counts, against counting by hand and on real tensors."""

import json

import pytest
import torch
from conftest import Command
from torch import Tensor, nn

from segtrain.models import MODELS, build_model
from segtrain.models.encoders import ENCODERS
from segtrain.models.overview import cost_of, count_kept_bytes, count_multiply_adds, variants


def test_multiply_adds_of_convolutions_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),  # 10 x 12 outputs of 8 channels, each of 3 * 9 products
        nn.ReLU(),
        nn.Conv2d(8, 4, 1, stride=2),  # 5 x 6 outputs of 4 channels, each of 8 products
        nn.ConvTranspose2d(4, 5, 2, stride=2),  # 5 x 6 inputs of 4 channels, each to 5 * 4 places
    )
    expected = 10 * 12 * 8 * 27 + 5 * 6 * 4 * 8 + 5 * 6 * 4 * 20
    assert count_multiply_adds(model, torch.zeros(1, 3, 10, 12)) == expected
    assert count_multiply_adds(model, torch.zeros(7, 3, 10, 12)) == expected


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * torch.ones(1, requires_grad=True)).square()


def test_kept_bytes_by_hand() -> None:
    # Multiplying by a learnt number keeps what it is multiplied with, squaring keeps the product.
    image = torch.zeros(2, 3, 10, 10)
    assert count_kept_bytes(Square(), image, dtype=None) == 2 * 3 * 10 * 10 * 4


@pytest.mark.parametrize(
    "name",
    [
        "unet",
        pytest.param("fc_densenet56", marks=pytest.mark.slow),
        "unet encoder=mobilenet_v3_large",
    ],
)
def test_what_is_counted_without_tensors_is_what_tensors_show(name: str) -> None:
    row, _, encoder = name.partition(" encoder=")
    kwargs = {"encoder": encoder} if encoder else {}
    if row == "unet":
        kwargs |= {"base_channels": 4}
    cost = cost_of(row, **kwargs)
    model = build_model(row, **kwargs)
    image = torch.zeros(2, 3, 224, 224)
    assert cost.num_parameters == sum(p.numel() for p in model.parameters())
    assert cost.multiply_adds == count_multiply_adds(model, image)
    assert cost.kept_bytes == pytest.approx(count_kept_bytes(model, image), rel=2e-3)


def macs_of_fc_densenet103(size: int) -> int:
    """Table 2 of the paper, added up."""
    pixels = [(size >> level) ** 2 for level in range(6)]
    channels, total, skips = 48, 3 * 48 * 9 * pixels[0], []
    for level, num_layers in enumerate((4, 5, 7, 10, 12)):
        total += sum((channels + 16 * i) * 16 * 9 for i in range(num_layers)) * pixels[level]
        channels += 16 * num_layers
        skips.append(channels)
        total += channels * channels * pixels[level]
    total += sum((channels + 16 * i) * 16 * 9 for i in range(15)) * pixels[5]
    new = 16 * 15
    for level, num_layers in zip((4, 3, 2, 1, 0), (12, 10, 7, 5, 4), strict=True):
        total += new * new * 9 * pixels[level + 1]
        channels = new + skips[level]
        total += sum((channels + 16 * i) * 16 * 9 for i in range(num_layers)) * pixels[level]
        new = 16 * num_layers
    return total + (channels + new) * 2 * pixels[0]


@pytest.mark.slow
def test_the_papers_networks() -> None:
    cost = cost_of("tiramisu")
    assert cost.multiply_adds == macs_of_fc_densenet103(224)
    assert cost.num_parameters == 9_319_778
    assert cost.plain_kept_bytes is not None
    assert cost.kept_bytes < 200e6 < cost.plain_kept_bytes


@pytest.mark.slow
def test_every_network_is_in_the_table(segtrain: Command) -> None:
    rows = json.loads(segtrain("models", "--json").out)
    names = [row["name"] for row in rows]
    assert set(MODELS) < set(names)
    assert {f"unet encoder={encoder}" for encoder in ENCODERS} < set(names)
    assert len(names) == len(list(variants()))
    table = segtrain("models").out
    for row in rows:
        # On a terminal of 80 characters nothing is cut off.
        assert f"{row['name']} " in table
        assert f"{row['num_parameters']:,}" in table
        assert row["has_pretrained"] == ("encoder" in row["name"])


def test_a_new_row_shows_up_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def per_pixel(num_classes: int = 2) -> nn.Module:
        return nn.Conv2d(3, num_classes, 1)

    monkeypatch.setitem(MODELS, "per_pixel", per_pixel)
    assert ("per_pixel", {}) in list(variants())
    cost = cost_of("per_pixel")
    assert (cost.num_parameters, cost.multiply_adds) == (8, 224 * 224 * 6)
    assert cost.plain_kept_bytes is None
    assert not cost.has_pretrained
