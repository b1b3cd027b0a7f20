"""Import rules between the layers of the package, checked on the syntax trees."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "segtrain"

# Bottom to top. A module may import from its own part and from every lower layer.
LAYERS = [
    {"types", "errors"},
    {"config"},
    {"runtime"},
    {"imaging", "runs"},
    {"data", "models"},
    {"checkpoint", "demo"},
    {"inference"},
    {"evaluation", "prediction"},
    {"training", "export"},
    {"doctor"},
    {"cli"},
    # The package itself imports its public names lazily.
    {"__init__", "__main__"},
]
LEVELS = {part: level for level, parts in enumerate(LAYERS) for part in parts}
MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The folder or module of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """Dotted names of all imports in a file, at any level."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_parts(path: Path) -> set[str]:
    names = [name.split(".") for name in imported_modules(path)]
    parts = {name[1] for name in names if name[0] == "segtrain" and len(name) > 1}
    return parts & LEVELS.keys()


def test_every_module_has_a_layer() -> None:
    assert {part_of(path) for path in MODULES} <= LEVELS.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    part = part_of(path)

    for other in imported_parts(path) - {part}:
        assert LEVELS[other] < LEVELS[part], f"{part} must not import {other}"


def test_only_transforms_imports_albumentations() -> None:
    importers = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        if any(name.split(".")[0] == "albumentations" for name in imported_modules(path))
    }

    assert importers == {"data/transforms.py"}


def test_the_schema_does_not_import_torch() -> None:
    names = imported_modules(PACKAGE / "config" / "schema.py")

    assert not any(name.split(".")[0] == "torch" for name in names)


def test_the_training_step_imports_no_config_files_or_loggers() -> None:
    path = PACKAGE / "training" / "step.py"

    assert imported_parts(path) <= {"types", "runtime", "training"}
    assert {name for name in imported_modules(path) if name.startswith("segtrain.training")} <= {
        "segtrain.training.losses",
        "segtrain.training.losses.LossFn",
        "segtrain.training.step_graph",
        "segtrain.training.step_graph.StepGraph",
    }


def test_no_module_is_named_utils_and_no_import_is_a_star() -> None:
    for path in MODULES:
        assert path.name != "utils.py"
        assert not any(name.endswith(".*") for name in imported_modules(path))


HEAVY = {"torch", "albumentations", "matplotlib"}
IMAGE_LIBRARIES = {"numpy", "cv2", "PIL"}


@pytest.mark.parametrize(
    ("arguments", "forbidden"),
    [
        (["--help"], HEAVY | IMAGE_LIBRARIES),
        (["train", "--help"], HEAVY | IMAGE_LIBRARIES),
        (["train", "--nonsense"], HEAVY | IMAGE_LIBRARIES),
        (["train", "--config", "nope.yaml"], HEAVY | IMAGE_LIBRARIES),
        (["train", "--set", "optim.lrr=1"], HEAVY | IMAGE_LIBRARIES),
        (["eval", "--split", "test"], HEAVY | IMAGE_LIBRARIES),
        (["predict", "nope.jpg"], HEAVY),
        (["export", "--precision", "int8", "--format", "torch"], HEAVY | IMAGE_LIBRARIES),
        (["export", "--checkpoint", "nope.pt"], HEAVY | IMAGE_LIBRARIES),
        (["prepare", "a", "b", "--set", "data.x=1"], HEAVY | IMAGE_LIBRARIES),
        (["prepare", "nowhere", "b"], HEAVY),
        (["runs"], HEAVY | IMAGE_LIBRARIES),
        (["runs", "."], HEAVY | IMAGE_LIBRARIES),
        (["runs", "--compare", "a", "b"], HEAVY | IMAGE_LIBRARIES),
        (["doctor", "--help"], HEAVY | IMAGE_LIBRARIES),
        (["doctor", "--set", "data.x=1"], HEAVY | IMAGE_LIBRARIES),
    ],
)
def test_help_and_usage_errors_import_no_heavy_library(
    arguments: list[str], forbidden: set[str]
) -> None:
    script = (
        "import sys\n"
        "from segtrain.cli.main import run\n"
        f"run({arguments!r})\n"
        f"imported = {forbidden!r} & sys.modules.keys()\n"
        "sys.exit(f'imported: {imported}' if imported else 0)\n"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
