"""The rooms and who may import whom, held over the syntax trees."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "segtrain"

# Bottom to top. A module may import from its own storey's folder and from every lower storey.
STOREYS = [
    {"errors", "classes", "stopping", "cores", "rgb"},
    {"config", "files", "progress", "tiles", "extras"},
    {"images", "devices", "runs", "locking", "distributed", "pieces", "asking"},
    {"data", "models", "overview", "sheets"},
    {"checkpoint"},
    {"evaluation"},
    {"training", "prediction"},
    {"doctor", "export"},
    {"cli"},
    # The face of the package imports what it offers only when that is asked for.
    {"__init__", "__main__", "launch"},
]
STOREY = {room: number for number, rooms in enumerate(STOREYS) for room in rooms}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """Dotted names of everything a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_rooms(path: Path) -> set[str]:
    parts = [name.split(".") for name in imported_modules(path)]
    found = {p[1] for p in parts if p[0] == "segtrain" and len(p) > 1}
    return {name for name in found if name in STOREY}


def test_every_module_has_a_storey() -> None:
    assert {room(path) for path in MODULES} <= STOREY.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = room(path)

    for other in imported_rooms(path) - {own}:
        assert STOREY[other] < STOREY[own], f"{own} must not import {other}"


def test_only_transforms_imports_albumentations() -> None:
    importers = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        if any(name.split(".")[0] == "albumentations" for name in imported_modules(path))
    }

    assert importers == {"data/transforms.py"}


def test_config_knows_no_torch() -> None:
    names = imported_modules(PACKAGE / "config.py")

    assert not any(name.split(".")[0] == "torch" for name in names)


def test_engine_sees_no_config_no_files_no_loggers() -> None:
    path = PACKAGE / "training" / "engine.py"

    assert imported_rooms(path) <= {"classes", "devices", "pieces", "training"}
    assert {name for name in imported_modules(path) if name.startswith("segtrain.training")} <= {
        "segtrain.training.losses",
        "segtrain.training.losses.LossFn",
        "segtrain.training.step_graph",
        "segtrain.training.step_graph.StepGraph",
    }


def test_there_is_no_utils_and_no_star_import() -> None:
    for path in MODULES:
        assert path.name != "utils.py"
        assert not any(name.endswith(".*") for name in imported_modules(path))


HEAVY = {"torch", "albumentations", "matplotlib"}
PICTURES = {"numpy", "cv2", "PIL"}


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [
        (["--help"], HEAVY | PICTURES),
        (["train", "--help"], HEAVY | PICTURES),
        (["train", "--nonsense"], HEAVY | PICTURES),
        (["train", "--config", "nope.yaml"], HEAVY | PICTURES),
        (["train", "--set", "optim.lrr=1"], HEAVY | PICTURES),
        (["eval", "--split", "test"], HEAVY | PICTURES),
        (["predict", "nope.jpg"], HEAVY),
        (["export", "--precision", "int8", "--format", "torch"], HEAVY | PICTURES),
        (["export", "--checkpoint", "nope.pt"], HEAVY | PICTURES),
        (["prepare", "a", "b", "--set", "data.x=1"], HEAVY | PICTURES),
        (["prepare", "nowhere", "b"], HEAVY),
        (["runs"], HEAVY | PICTURES),
        (["runs", "."], HEAVY | PICTURES),
        (["runs", "--compare", "a", "b"], HEAVY | PICTURES),
        (["doctor", "--help"], HEAVY | PICTURES),
        (["doctor", "--set", "data.x=1"], HEAVY | PICTURES),
    ],
)
def test_help_and_usage_errors_import_no_heavy_library(
    arguments: list[str], unwanted: set[str]
) -> None:
    script = (
        "import sys\n"
        "from segtrain.cli import run\n"
        f"run({arguments!r})\n"
        f"heavy = {unwanted!r}\n"
        "sys.exit(f'imported: {heavy & sys.modules.keys()}' if heavy & sys.modules.keys() else 0)\n"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
