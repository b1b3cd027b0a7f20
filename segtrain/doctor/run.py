"""`segtrain doctor`: check the machine, then the data.

OpenCV is checked first. Modules that need it are imported only if it works.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from segtrain.config.schema import Config
from segtrain.doctor.environment import (
    CACHE,
    ENVIRONMENT_CHECKS,
    IMAGES,
    RUNS,
    inspect_machine,
)
from segtrain.doctor.findings import Diagnosis, Finding, run_checks
from segtrain.doctor.opencv import check_opencv
from segtrain.errors import UsageError
from segtrain.runtime.devices import resolve_device


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Options of `segtrain doctor`.

    output: folder for the images; it is created with the first image.
    learning: whether to run the overfitting check.
    """

    config: Config
    output: Path
    show_augmentations: bool
    learning: bool


def run_doctor(options: DoctorOptions) -> Diagnosis:
    """Run all checks. Problems that a user can cause become findings, not exceptions.

    Raises:
        UsageError: the device name is invalid.
        Stopped: a signal was received.
    """
    device, device_problem = _resolve_device(options.config.train.device)
    folders = {RUNS: Path(options.config.train.output), IMAGES: options.output}
    opencv_findings = list(run_checks({"opencv": lambda _: check_opencv()}, None))
    if not any(finding.level == "error" for finding in opencv_findings):
        return _check_machine_and_data(options, device, device_problem, folders, opencv_findings)
    machine = inspect_machine(
        device_problem=device_problem, folders=folders, shared_memory_needed=0
    )
    return Diagnosis(
        environment=machine.as_json(),
        environment_findings=[*opencv_findings, *run_checks(ENVIRONMENT_CHECKS, machine)],
        data={},
        data_findings=[
            Finding(level="note", check="data", message="data not checked: it needs OpenCV")
        ],
        images=[],
    )


def _check_machine_and_data(
    options: DoctorOptions,
    device: torch.device | None,
    device_problem: str,
    folders: dict[str, Path],
    opencv_findings: list[Finding],
) -> Diagnosis:
    from segtrain.doctor.data_report import (
        check_data,
        describe_split,
        loader_bytes,
        open_splits,
        write_images,
    )
    from segtrain.runtime.cache import cache_dir

    splits, opening_findings = open_splits(options.config)
    machine = inspect_machine(
        device_problem=device_problem,
        folders={**folders, CACHE: cache_dir()},
        shared_memory_needed=loader_bytes(options.config, splits),
    )
    environment_findings = [*opencv_findings, *run_checks(ENVIRONMENT_CHECKS, machine)]
    splits, data_findings = check_data(splits, device if options.learning else None)
    images, writing_findings = write_images(
        splits, options.config, options.output, augmentations=options.show_augmentations
    )
    return Diagnosis(
        environment=machine.as_json(),
        environment_findings=[*environment_findings, *writing_findings],
        data={split.name: describe_split(split) for split in splits},
        data_findings=[*opening_findings, *data_findings],
        images=images,
    )


def _resolve_device(name: str) -> tuple[torch.device | None, str]:
    """The device, or the reason why it is unavailable."""
    try:
        return resolve_device(name), ""
    except UsageError as error:
        if not re.fullmatch(r"cuda(:\d+)?", name):
            raise
        return None, str(error)
