"""What a training run is made of: frozen dataclasses, filled from defaults < YAML < flags.

Knows no torch. The resolved configuration is printed, saved as `config.yaml` in the run folder and
carried by the checkpoint, so a run can always be read back.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from segtrain.errors import UsageError

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

Precision = Literal["auto", "fp32", "bf16", "fp16"]
BnEval = Literal["running", "batch", "recalibrate"]
Tree = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network. Written flat in YAML: every key but `name` is an argument of its factory."""

    __pydantic_config__ = _STRICT

    name: str = "unet"
    """A row of `segtrain.models.MODELS`."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the factory; checked against its signature when the network is built."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learnt from, and at which size."""

    __pydantic_config__ = _STRICT

    root: str | tuple[str, ...] | None = None
    """Data sets, in COCO's layout or as images/ and masks/; None takes $SEGTRAIN_DATA, else the
    drawn demo people."""
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """Share of each root in the pictures of an epoch; None lets every picture count the same."""
    image_size: Annotated[int, Field(ge=48, le=4096)] = 224
    """Side of the square training crops and short side of whole images in validation, pixels."""
    augment: Literal["paper", "standard", "strong"] = "paper"
    """What is done to training pictures; see `segtrain.data.transforms`."""
    scale: tuple[float, float] | None = None
    """Before the crop the short side becomes `image_size` times a factor from this range; None
    leaves it to `augment`."""
    person_area: tuple[float, float] | None = None
    """Only pictures of which people cover a share in this range, e.g. [0.2, 0.7]."""
    min_person_area: Annotated[float, Field(ge=0, le=1)] = 0.0
    """A person that covers less of the frame is ignored, as crowds are."""
    max_people: Annotated[int, Field(ge=1)] | None = None
    """Only pictures with at most so many people."""
    largest_only: bool = False
    """Only the largest person of a picture is learnt, the others are ignored."""
    negatives: Annotated[float, Field(ge=0, le=0.99)] | None = None
    """Share of pictures without people, as far as there are any; None takes them as they come."""
    crowd: Literal["ignore", "person", "drop"] = "ignore"
    """What crowd regions are; drop leaves out the pictures that have one."""
    invert_masks: bool = False
    """In folders of masks, white is background."""
    workers: Annotated[int, Field(ge=0, le=256)] | Literal["auto"] = "auto"
    """Loader processes; 0 loads in the main process. The batches are the same either way."""

    def __post_init__(self) -> None:
        if self.scale is not None and not 0.25 <= self.scale[0] <= self.scale[1] <= 8:
            raise ValueError(
                f"data.scale must be two factors with 0.25 <= a <= b <= 8: {self.scale}"
            )
        if (
            self.person_area is not None
            and not 0 <= self.person_area[0] <= self.person_area[1] <= 1
        ):
            raise ValueError(
                f"data.person_area must be two shares with 0 <= a <= b <= 1: {self.person_area}"
            )
        num_roots = len(self.root) if isinstance(self.root, tuple) else 1
        if self.weights is not None and len(self.weights) != num_roots:
            raise ValueError("data.weights must have a number for each root")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """RMSProp as in the Tiramisu paper (arXiv 1611.09326, section 4.1), every constant stated.

    torch's own defaults (alpha 0.99, eps 1e-8) would make the first update ten times `lr`.
    """

    __pydantic_config__ = _STRICT

    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate of the first epoch after warm-up."""
    lr_decay: Annotated[float, Field(gt=0, le=1)] = 0.995
    """The paper's small decay: the factor on the learning rate from one epoch to the next."""
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    """Optimizer steps over which the learning rate grows linearly from near 0 to `lr`."""
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Smoothing constant of the squared gradient (rho in Keras and Lasagne)."""
    eps: Annotated[float, Field(gt=0)] = 1e-7
    """Added to the root of the smoothed squared gradient."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Momentum on the scaled gradient."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """L2 penalty, added to the gradient."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how precisely, where, and into which folder."""

    __pydantic_config__ = _STRICT

    epochs: Annotated[int, Field(ge=1)] = 30
    """Passes over the training images."""
    batch_size: Annotated[int, Field(ge=1)] = 4
    """Images an optimizer step (the Tiramisu paper takes 3 to 5); the last may be smaller."""
    precision: Precision = "auto"
    """auto: bf16 where the device computes it natively, else fp32."""
    bn_eval: BnEval = "running"
    """Batch norm outside training: running statistics, those of each picture itself (the Tiramisu
    paper's way), or running ones measured anew on training images before every validation."""
    freeze_encoder_epochs: Annotated[int, Field(ge=0)] = 0
    """For so many epochs an encoder's weights and statistics stay as they are."""
    device: str = "auto"
    """auto: CUDA where there is one, else the CPU. A device named and absent is an error."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Every draw comes from (seed, epoch, sample index)."""
    output: str = "runs"
    """Folder of all runs."""
    name: str | None = None
    """Folder of this run inside `output`; None makes one from the model and the time."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole training run."""

    __pydantic_config__ = _STRICT

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


_CONFIG = TypeAdapter(Config)

# What a resumed run may change without becoming another experiment.
SAFE_TO_CHANGE = frozenset(
    {
        "data.root",
        "data.workers",
        # Set anew at every step: a diverged run goes on from its last epoch with a lower one.
        "optim.lr",
        "optim.lr_decay",
        "train.epochs",
        "train.device",
        # A scaler that was not saved starts afresh.
        "train.precision",
        # The gradients are the same, bit for bit on a CPU.
        "model.memory_efficient",
        "train.bn_eval",
        "train.output",
        "train.name",
    }
)


def config_from_tree(tree: Mapping[str, Any]) -> Config:
    """Validate a nested mapping as written in YAML.

    Raises:
        UsageError: an unknown key (with the nearest known one) or a value out of range.
    """
    tree = {section: _section(section, values) for section, values in tree.items()}
    if "model" in tree:
        model = dict(tree["model"])
        name = {"name": model.pop("name")} if "name" in model else {}
        tree["model"] = {**name, "kwargs": model}
    try:
        return _CONFIG.validate_python(tree)
    except ValidationError as error:
        raise UsageError(_first_problem(error)) from None


def tree_from_config(config: Config) -> Tree:
    """The nested mapping of plain types that `config_from_tree` reads back."""
    tree = asdict(config)
    model = tree["model"]
    tree["model"] = {"name": model["name"], **model["kwargs"]}
    tree["data"] = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in tree["data"].items()
    }
    return tree


def load_config(
    yaml_path: Path | None = None,
    *,
    base: Mapping[str, Any] | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Iterable[str] = (),
) -> Config:
    """Resolve defaults < `base` < YAML file < flags and `--set`.

    Args:
        yaml_path: file of deltas from the defaults.
        base: tree that takes the place of the defaults, e.g. of a run that is resumed.
        flags: dotted key → value; None means the flag was not given.
        sets: `section.key=value` strings, the value read as YAML.

    Raises:
        UsageError: the file is unreadable, a key unknown, a value out of range, or the same key is
            set twice.
    """
    tree: Tree = {section: dict(values) for section, values in (base or {}).items()}
    if yaml_path is not None:
        _merge(tree, _flatten(_read_yaml(yaml_path)))
    overrides = {key: value for key, value in (flags or {}).items() if value is not None}
    for assignment in sets:
        key, value = _parse_set(assignment)
        if key in overrides:
            raise UsageError(f"{key} is given twice on the command line; keep one of the two")
        overrides[key] = value
    _merge(tree, overrides)
    return config_from_tree(tree)


def dump_yaml(config: Config) -> str:
    """The resolved configuration as YAML text that `--config` reads back, a line a section."""
    return yaml.safe_dump(
        tree_from_config(config), sort_keys=False, default_flow_style=None, width=1000
    )


def differing_keys(old: Config, new: Config) -> list[str]:
    """Dotted keys in which two configurations differ, in the order of the dataclasses."""
    before, after = _flatten(tree_from_config(old)), _flatten(tree_from_config(new))
    return [key for key in {**before, **after} if before.get(key) != after.get(key)]


def _read_yaml(path: Path) -> Tree:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UsageError(f"cannot read {path}: {reason}; give --config a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path} is not valid YAML{line}; see configs/ for examples") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"{path} must hold sections such as `train:`; see configs/ for examples")
    return {section: _section(section, values) for section, values in tree.items()}


def _section(name: str, values: Any) -> Tree:
    known = [f.name for f in fields(Config)]
    if name not in known:
        raise UsageError(f"unknown configuration section {name!r}{_nearest(str(name), known)}")
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise UsageError(f"configuration section {name!r} must hold `key: value` lines")
    return {str(key): value for key, value in values.items()}


def _flatten(tree: Mapping[str, Mapping[str, Any]]) -> Tree:
    return {f"{name}.{key}": value for name, part in tree.items() for key, value in part.items()}


def _merge(tree: Tree, overrides: Mapping[str, Any]) -> None:
    """Lay dotted keys over `tree`; another model's arguments go when the model changes."""
    new_name = overrides.get("model.name")
    if new_name is not None and new_name != tree.get("model", {}).get("name", ModelConfig().name):
        tree["model"] = {}
    for dotted, value in overrides.items():
        section, _, key = dotted.partition(".")
        tree.setdefault(section, {})[key] = value


def _parse_set(assignment: str) -> tuple[str, Any]:
    key, equals, text = assignment.partition("=")
    if not equals or key.count(".") != 1 or not all(key.split(".")):
        raise UsageError(f"--set {assignment!r} is not section.key=value, e.g. optim.lr=1e-4")
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"the value in --set {assignment!r} is not valid YAML") from None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    dotted = ".".join(location[:2])
    if problem["type"] == "unexpected_keyword_argument":
        section = next(f for f in fields(Config) if f.name == location[0])
        known = [f.name for f in fields(section.default_factory)]  # type: ignore[arg-type]
        return f"unknown configuration key {dotted!r}{_nearest(location[-1], known)}"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{dotted}: {problem['msg'].lower()}, but it is {problem['input']!r}"


def _nearest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
