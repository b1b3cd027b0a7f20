"""Help texts, short flags and shell completion."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.command import Command

from segtrain.cli.main import _COMMANDS
from segtrain.config.resolve import config_to_dict
from segtrain.config.schema import Config


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each option takes one line."""
    monkeypatch.setenv("COLUMNS", "250")


@pytest.mark.parametrize("command", [(), *((name,) for name in _COMMANDS)], ids=" ".join)
def test_h_is_help(segtrain: Command, command: tuple[str, ...]) -> None:
    finished = segtrain(*command, "--help")

    assert finished.code == 0
    assert "Usage" in finished.out
    assert finished.err == ""
    assert segtrain(*command, "-h") == finished


@pytest.mark.parametrize("command", [(), *((name,) for name in _COMMANDS)], ids=" ".join)
def test_flags_show_no_value_type(segtrain: Command, command: tuple[str, ...]) -> None:
    out = segtrain(*command, "--help").out

    assert re.search(r"│ --help +-h +Show", out)
    assert "bool" not in out


@pytest.mark.parametrize(
    ("command", "keys", "in_words"),
    [
        (
            "train",
            {
                "--model": "model.name",
                "--image-size": "data.image_size",
                "--workers": "data.workers",
                "--epochs": "train.epochs",
                "--batch-size": "train.batch_size",
                "--lr": "optim.lr",
                "--precision": "train.precision",
                "--device": "train.device",
                "--seed": "train.seed",
                "--output": "train.output",
            },
            {"--data", "--name", "--save-every"},
        ),
        (
            "doctor",
            {"--device": "train.device", "--augment": "data.augment"},
            {"--learning", "--output"},
        ),
    ],
)
def test_help_shows_the_defaults_of_the_schema(
    segtrain: Command, command: str, keys: dict[str, str], in_words: set[str]
) -> None:
    out = segtrain(command, "--help").out
    shown = dict(re.findall(r"│ (--[a-z-]+) .*\[default: (.*?)\]", out))
    defaults = config_to_dict(Config())

    assert shown.keys() == keys.keys() | in_words
    for option, key in keys.items():
        section, name = key.split(".")
        assert shown[option] == str(defaults[section][name]), option


@pytest.mark.parametrize(
    ("batch_size", "workers", "config"),
    [("-b", "-j", "-c"), ("--batch-size", "--workers", "--config")],
    ids=["short", "long"],
)
def test_short_flags_of_train(
    segtrain: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: str,
    workers: str,
    config: str,
) -> None:
    configs: list[Config] = []
    monkeypatch.setattr(
        "segtrain.training.train.train", lambda resolved, **options: configs.append(resolved)
    )
    (tmp_path / "c.yaml").write_text("train: {epochs: 7}\n")

    finished = segtrain("train", batch_size, "3", workers, "1", config, "c.yaml")

    assert finished.code == 0, finished.err
    [resolved] = configs
    assert (resolved.train.batch_size, resolved.data.workers, resolved.train.epochs) == (3, 1, 7)


@pytest.mark.parametrize(("batch_size", "workers"), [("-b", "-j"), ("--batch-size", "--workers")])
def test_short_flags_of_eval(
    segtrain: Command, monkeypatch: pytest.MonkeyPatch, batch_size: str, workers: str
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(
        "segtrain.evaluation.evaluate.evaluate", lambda options, **_: calls.append(options)
    )

    finished = segtrain("eval", batch_size, "3", workers, "1")

    assert finished.code == 0, finished.err
    [options] = calls
    assert (options.batch_size, options.workers) == (3, 1)


@pytest.mark.parametrize("workers", ["-j", "--workers"])
def test_short_flag_of_prepare(
    segtrain: Command, toy_coco: Path, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    calls: list[int] = []

    def prepare(config: Any, folder: Path, *, short_side: int, workers: int) -> SimpleNamespace:
        calls.append(workers)
        return SimpleNamespace(num_images={}, num_bytes=0, num_kept=0, damaged=[])

    monkeypatch.setattr("segtrain.data.prepare.prepare", prepare)

    finished = segtrain("prepare", toy_coco, "new", workers, "3")

    assert finished.code == 0, finished.err
    assert calls == [3]


# --- Shell completion ---------------------------------------------------------------------------

SEGTRAIN = """
import sys
from segtrain.cli.main import run
sys.argv[0] = "segtrain"
code = run(sys.argv[1:])
sys.exit("torch is imported" if "torch" in sys.modules else code)
"""


def complete(words: str) -> list[str]:
    """The completions of bash for the last of `words`."""
    environment = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", SEGTRAIN],
        env={**os.environ, **environment, "_SEGTRAIN_COMPLETE": "complete_bash"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        ("segtrain tr", ["train"]),
        ("segtrain pre", ["predict", "prepare"]),
        ("segtrain train --acc", []),
        ("segtrain train --batch", ["--batch-size"]),
        ("segtrain export --format ", ["onnx", "torch", "safetensors"]),
    ],
)
def test_completion_imports_no_torch(words: str, completions: list[str]) -> None:
    assert complete(words) == completions


def test_completion_lists_all_commands() -> None:
    assert complete("segtrain ") == list(_COMMANDS)


@pytest.mark.parametrize("way", ["--show-completion", "source_bash"])
def test_the_script_for_bash_is_shown(way: str) -> None:
    arguments = ["--show-completion"] if way == "--show-completion" else []
    variable = {} if arguments else {"_SEGTRAIN_COMPLETE": way}
    # typer detects the shell among the parent processes; without `exit` bash replaces itself.
    done = subprocess.run(
        ["bash", "-c", '"$@"; exit $?', "bash", sys.executable, "-c", SEGTRAIN, *arguments],
        env={**os.environ, **variable},
        capture_output=True,
        text=True,
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert "complete -o default -F _segtrain_completion segtrain" in done.stdout
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0
