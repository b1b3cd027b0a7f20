"""One check-up, from the machine to the data: what `segtrain doctor` runs.

OpenCV is examined first, and what needs it is imported only if it works.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from segtrain.config import Config
from segtrain.devices import resolve_device
from segtrain.doctor.environment import (
    CACHE,
    ENVIRONMENT_CHECKS,
    PICTURES,
    RUNS,
    look_at_machine,
)
from segtrain.doctor.findings import Diagnosis, Finding, run_checks
from segtrain.doctor.opencv import check_opencv
from segtrain.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the doctor is asked to do.

    output: folder for the pictures; it is made when the first one is written.
    """

    config: Config
    output: Path
    show_augmentations: bool
    learning: bool


def check_up(wishes: Wishes) -> Diagnosis:
    """Look at everything. What a user can cause becomes a finding and ends nothing.

    Raises:
        UsageError: the device has a name that no device has.
        Stopped: a signal has come.
    """
    device, device_problem = _device(wishes.config.train.device)
    folders = {RUNS: Path(wishes.config.train.output), PICTURES: wishes.output}
    opencv = list(run_checks({"opencv": lambda _: check_opencv()}, None))
    if any(finding.level == "error" for finding in opencv):
        machine = look_at_machine(
            device_problem=device_problem, folders=folders, shared_memory_needed=0
        )
        return Diagnosis(
            facts=machine.as_json(),
            environment_findings=[*opencv, *run_checks(ENVIRONMENT_CHECKS, machine)],
            data={},
            data_findings=[
                Finding(level="note", check="data", message="no data looked at without OpenCV")
            ],
            pictures=[],
        )
    return _with_data(wishes, device, device_problem, folders, opencv)


def _with_data(
    wishes: Wishes,
    device: torch.device | None,
    device_problem: str,
    folders: dict[str, Path],
    opencv: list[Finding],
) -> Diagnosis:
    from segtrain.data.cache import cache_folder
    from segtrain.doctor.examination import describe, draw, examine, loader_bytes, open_data

    opened = open_data(wishes.config)
    machine = look_at_machine(
        device_problem=device_problem,
        folders={**folders, CACHE: cache_folder()},
        shared_memory_needed=loader_bytes(wishes.config, opened.splits),
    )
    environment = [*opencv, *run_checks(ENVIRONMENT_CHECKS, machine)]
    splits, findings = examine(opened.splits, device if wishes.learning else None)
    pictures, problems = draw(
        splits, wishes.config, wishes.output, augmentations=wishes.show_augmentations
    )
    return Diagnosis(
        facts=machine.as_json(),
        environment_findings=[*environment, *problems],
        data={split.name: describe(split) for split in splits},
        data_findings=[*opened.findings, *findings],
        pictures=pictures,
    )


def _device(name: str) -> tuple[torch.device | None, str]:
    """The device, or why there is no such one."""
    try:
        return resolve_device(name), ""
    except UsageError as error:
        if not re.fullmatch(r"cuda(:\d+)?", name):
            raise
        return None, str(error)
