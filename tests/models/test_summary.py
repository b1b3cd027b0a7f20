"""Model costs of `segtrain models`, compared with manual counts and with real tensors."""

import json

import pytest
import torch
from helpers.command import Command
from torch import Tensor, nn

from segtrain.models import MODELS, build_model
from segtrain.models.encoders import ENCODERS
from segtrain.models.summary import (
    compute_cost,
    count_kept_bytes,
    count_multiply_adds,
    model_variants,
)


def test_multiply_adds_of_convolutions_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),  # 10 x 12 outputs of 8 channels, 3 * 9 products each
        nn.ReLU(),
        nn.Conv2d(8, 4, 1, stride=2),  # 5 x 6 outputs of 4 channels, 8 products each
        nn.ConvTranspose2d(4, 5, 2, stride=2),  # 5 x 6 inputs of 4 channels, 5 * 4 products each
    )
    expected = 10 * 12 * 8 * 27 + 5 * 6 * 4 * 8 + 5 * 6 * 4 * 20
    assert count_multiply_adds(model, torch.zeros(1, 3, 10, 12)) == expected
    assert count_multiply_adds(model, torch.zeros(7, 3, 10, 12)) == expected


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * torch.ones(1, requires_grad=True)).square()


def test_kept_bytes_by_hand() -> None:
    # The product with a trainable number saves the other factor; the square saves its input.
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
def test_costs_match_those_of_a_real_model(name: str) -> None:
    row, _, encoder = name.partition(" encoder=")
    kwargs = {"encoder": encoder} if encoder else {}
    if row == "unet":
        kwargs |= {"base_channels": 4}
    cost = compute_cost(row, **kwargs)
    model = build_model(row, **kwargs)
    image = torch.zeros(2, 3, 224, 224)
    assert cost.num_parameters == sum(p.numel() for p in model.parameters())
    assert cost.multiply_adds == count_multiply_adds(model, image)
    assert cost.kept_bytes == pytest.approx(count_kept_bytes(model, image), rel=2e-3)


def fc_densenet103_macs(size: int) -> int:
    """Sum of the multiply-adds of table 2 of the paper."""
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
def test_cost_of_the_tiramisu() -> None:
    cost = compute_cost("tiramisu")
    assert cost.multiply_adds == fc_densenet103_macs(224)
    assert cost.num_parameters == 9_319_778
    assert cost.plain_kept_bytes is not None
    assert cost.kept_bytes < 200e6 < cost.plain_kept_bytes


@pytest.mark.slow
def test_every_model_is_in_the_table(segtrain: Command) -> None:
    rows = json.loads(segtrain("models", "--json").out)
    names = [row["name"] for row in rows]
    assert set(MODELS) < set(names)
    assert {f"unet encoder={encoder}" for encoder in ENCODERS} < set(names)
    assert len(names) == len(list(model_variants()))
    table = segtrain("models").out
    for row in rows:
        # Nothing is truncated at a terminal width of 80 characters.
        assert f"{row['name']} " in table
        assert f"{row['num_parameters']:,}" in table
        assert row["has_pretrained"] == ("encoder" in row["name"])


def test_a_new_row_of_models_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def per_pixel(num_classes: int = 2) -> nn.Module:
        return nn.Conv2d(3, num_classes, 1)

    monkeypatch.setitem(MODELS, "per_pixel", per_pixel)
    assert ("per_pixel", {}) in list(model_variants())
    cost = compute_cost("per_pixel")
    assert (cost.num_parameters, cost.multiply_adds) == (8, 224 * 224 * 6)
    assert cost.plain_kept_bytes is None
    assert not cost.has_pretrained
