"""What a step of the Tiramisu moves through a GPU's memory, counted by benchmarks/traffic.py."""

import sys
from pathlib import Path

import pytest
import torch

from segtrain.models import build_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_the_kernels_move_half_of_the_textbooks_bytes_and_the_papers_form_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from models import NaiveTiramisu
    from traffic import step_traffic

    for name in ("models", "traffic"):
        monkeypatch.delitem(sys.modules, name)
    ways = {
        "textbook": lambda: NaiveTiramisu(build_model("tiramisu")),
        "paper": lambda: build_model("tiramisu", memory_efficient=False),
        "kernels": lambda: build_model("tiramisu", memory_efficient=True),
    }
    for batch_size in (4, 16, 32):
        moved, operators = {}, {}
        for name, make in ways.items():
            moved[name], operators[name] = step_traffic(make, batch_size, 224, torch.bfloat16)
        assert moved["paper"] <= 1.001 * moved["textbook"]
        assert moved["kernels"] < 0.45 * moved["textbook"]
        assert operators["paper"] <= operators["textbook"] + 5
        assert operators["kernels"] < 0.75 * operators["textbook"]
