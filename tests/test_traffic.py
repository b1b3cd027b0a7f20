"""GPU memory traffic of a training step of the Tiramisu, as counted by benchmarks/traffic.py."""

import sys
from pathlib import Path

import pytest
import torch

from segtrain.models import build_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_the_kernels_move_less_than_half_the_bytes_of_the_naive_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from models import NaiveTiramisu
    from traffic import step_traffic

    for name in ("models", "traffic"):
        monkeypatch.delitem(sys.modules, name)
    variants = {
        "naive": lambda: NaiveTiramisu(build_model("tiramisu")),
        "paper": lambda: build_model("tiramisu", memory_efficient=False),
        "kernels": lambda: build_model("tiramisu", memory_efficient=True),
    }
    for batch_size in (4, 16, 32):
        moved, operators = {}, {}
        for name, build in variants.items():
            moved[name], operators[name] = step_traffic(build, batch_size, 224, torch.bfloat16)
        assert moved["paper"] <= 1.001 * moved["naive"]
        assert moved["kernels"] < 0.45 * moved["naive"]
        assert operators["paper"] <= operators["naive"] + 5
        assert operators["kernels"] < 0.75 * operators["naive"]
