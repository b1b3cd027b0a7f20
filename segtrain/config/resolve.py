"""Resolve a configuration in the order defaults < YAML < flags and `--set`.

Every mistake is reported in one line that names the key.
"""

import copy
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from segtrain.config.schema import Config, ModelConfig, Stage
from segtrain.errors import UsageError

NestedDict = dict[str, Any]
"""Section → key → value, as in YAML."""

_CONFIG_ADAPTER = TypeAdapter(Config)

# Keys of each section that a stage may change; None allows every key.
_STAGE_KEYS: dict[str, frozenset[str] | None] = {
    "data": frozenset({"image_size", "augment", "scale", "whole"}),
    "loss": None,
    "optim": None,
    "train": frozenset(
        {
            "batch_size",
            "accumulation_steps",
            "effective_batch",
            "patience",
            "freeze_encoder_epochs",
            "ema_decay",
        }
    ),
}


def load_config(
    yaml_path: Path | None = None,
    *,
    base: Mapping[str, Any] | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Iterable[str] = (),
) -> Config:
    """Resolve defaults < `base` < YAML file < flags and `--set`.

    Args:
        yaml_path: file of differences from the defaults.
        base: nested mapping that replaces the defaults, e.g. of a run that is resumed.
        flags: dotted key → value; None means that the flag was not given.
        sets: `section.key=value` strings, the value parsed as YAML.

    Raises:
        UsageError: the file is unreadable, a key is unknown or set twice, or a value is out of
            range.
    """
    values: NestedDict = {section: copy.copy(part) for section, part in (base or {}).items()}
    if yaml_path is not None:
        _apply(values, _flatten(_read_yaml(yaml_path)))
    overrides = {key: value for key, value in (flags or {}).items() if value is not None}
    for assignment in sets:
        key, value = _parse_set(assignment)
        if key in overrides:
            raise UsageError(f"{key} is given twice on the command line", "keep one of the two")
        overrides[key] = value
    _apply(values, overrides)
    return config_from_dict(values)


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """Validate a nested mapping as written in YAML.

    Raises:
        UsageError: a key is unknown (the message suggests the closest one), or a value is out of
            range.
    """
    values = {section: _check_section(section, part) for section, part in values.items()}
    if "model" in values:
        model = dict(values["model"])
        name = {"name": model.pop("name")} if "name" in model else {}
        values["model"] = {**name, "kwargs": model}
    try:
        config = _CONFIG_ADAPTER.validate_python(values)
    except ValidationError as error:
        raise _usage_error(error.errors()[0]) from None
    stage_configs(config)
    return config


def config_to_dict(config: Config) -> NestedDict:
    """Return the nested dict of plain types that `config_from_dict` reads back."""
    values = asdict(config)
    model = values["model"]
    values["model"] = {"name": model["name"], **model["kwargs"]}
    plain: NestedDict = _tuples_to_lists(values)
    return plain


def stage_configs(config: Config) -> list[Config]:
    """The configuration of each stage of a training: first `config` itself, then its `stages`.

    Raises:
        UsageError: a stage changes a key that must stay the same within a run, or sets a value out
            of range.
    """
    base = config_to_dict(config)
    base.pop("stages")
    configs = [replace(config, stages=())]
    for number, stage in enumerate(config.stages, 2):
        values = {name: dict(section) for name, section in base.items()}
        for section, allowed in _STAGE_KEYS.items():
            changes = getattr(stage, section)
            if fixed := [key for key in changes if allowed is not None and key not in allowed]:
                raise UsageError(f"stage {number} cannot set {section}.{fixed[0]}", "drop it there")
            values[section].update(changes)
        values["train"]["epochs"] = stage.epochs
        try:
            configs.append(config_from_dict(values))
        except UsageError as error:
            raise UsageError(f"stage {number}: {error}") from None
    return configs


def dump_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `--config` reads back, one line per section."""
    return yaml.safe_dump(
        config_to_dict(config), sort_keys=False, default_flow_style=None, width=1000
    )


def differing_keys(old: Config, new: Config) -> list[str]:
    """Dotted keys whose values differ, in the order of the dataclasses."""
    before, after = _flatten(config_to_dict(old)), _flatten(config_to_dict(new))
    return [key for key in {**before, **after} if before.get(key) != after.get(key)]


def _read_yaml(path: Path) -> NestedDict:
    hint = "see configs/ for examples"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"cannot read {path}: {reason}", "give --config a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path} is not valid YAML{line}", hint) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold sections such as `train:`", hint)
    return {section: _check_section(section, part) for section, part in values.items()}


def _parse_set(assignment: str) -> tuple[str, Any]:
    key, equals, text = assignment.partition("=")
    if not equals or key.count(".") != 1 or not all(key.split(".")):
        raise UsageError(f"--set {assignment!r} is not section.key=value", "e.g. optim.lr=1e-4")
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"the value in --set {assignment!r} is not valid YAML") from None


def _check_section(name: str, values: Any) -> Any:
    known = [f.name for f in fields(Config)]
    if name not in known:
        raise _unknown(f"configuration section {name!r}", str(name), known)
    if name == "stages":
        if not isinstance(values, list | tuple):
            raise UsageError("stages must be a list of `- epochs: 10` with sections below each")
        return values
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise UsageError(f"configuration section {name!r} must hold `key: value` lines")
    return {str(key): value for key, value in values.items()}


def _flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key → value; the list of stages is one value."""
    flat: dict[str, Any] = {}
    for name, part in values.items():
        if name == "stages":
            flat[name] = part
        else:
            flat.update({f"{name}.{key}": value for key, value in part.items()})
    return flat


def _apply(values: NestedDict, overrides: Mapping[str, Any]) -> None:
    """Apply dotted keys in place. Another model name drops the arguments of the previous model."""
    name = overrides.get("model.name")
    if name is not None and name != values.get("model", {}).get("name", ModelConfig().name):
        values["model"] = {}
    for dotted, value in overrides.items():
        section, _, key = dotted.partition(".")
        if key:
            values.setdefault(section, {})[key] = value
        else:
            values[section] = value


def _tuples_to_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples_to_lists(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_tuples_to_lists(item) for item in value]
    return value


def _usage_error(problem: ErrorDetails) -> UsageError:
    location = [str(part) for part in problem["loc"]]
    if location[:1] == ["stages"]:
        return _stage_error(problem)
    dotted = ".".join(location[:2])
    if problem["type"] == "unexpected_keyword_argument":
        section = next(f for f in fields(Config) if f.name == location[0])
        known = [f.name for f in fields(section.default_factory)]  # type: ignore[arg-type]
        return _unknown(f"configuration key {dotted!r}", location[-1], known)
    if problem["type"] == "value_error":
        return UsageError(str(problem["ctx"]["error"]))
    return UsageError(f"{dotted}: {problem['msg'].lower()}, but it is {problem['input']!r}")


def _stage_error(problem: ErrorDetails) -> UsageError:
    _, index, *keys = problem["loc"]
    stage = f"stage {int(index) + 2}"  # counted from 1; the sections themselves are stage 1
    if problem["type"] == "unexpected_keyword_argument":
        known = [f.name for f in fields(Stage)]
        return _unknown(f"key {keys[0]!r} in {stage}", str(keys[0]), known)
    if problem["type"] == "missing":
        return UsageError(f"{stage}: {keys[0]} is missing")
    where = f"{stage}: {keys[0]}" if keys else stage
    return UsageError(f"{where}: {problem['msg'].lower()}, but it is {problem['input']!r}")


def _unknown(what: str, word: str, known: list[str]) -> UsageError:
    close = difflib.get_close_matches(word, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"available: {', '.join(known)}"
    return UsageError(f"unknown {what}", hint)
