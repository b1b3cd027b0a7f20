"""Checks of versions, GPUs, disks and shared memory. Imports nothing that needs OpenCV."""

import csv
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from segtrain.doctor.findings import CheckResult
from segtrain.runtime.cpu import available_cpus

# Uses of a folder. Runs and images must be writable; the cache is optional.
RUNS, IMAGES, CACHE = "runs", "these images", "the cache"

_GB, _MB = 1e9, 1e6
_ENOUGH_DISK, _MIN_DISK = 2 * _GB, 200 * _MB
_ENOUGH_MEMORY = 4 * _GB
_ENOUGH_GPU_MEMORY = 2 * _GB
_SHARED_MEMORY = Path("/dev/shm")
_PACKAGES = ("torchvision", "albumentations", "numpy", "Pillow")
_NVIDIA_SMI_TIMEOUT_SECONDS = 20


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU that torch can use; memory in bytes."""

    name: str
    memory: int
    free: int
    capability: str
    bf16: bool
    problem: str = ""
    """The error of a first small kernel; empty if it runs."""


@dataclass(frozen=True, kw_only=True)
class DriverGpu:
    """A GPU that the driver lists, whether or not torch can use it."""

    name: str
    driver: str


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder that training writes into."""

    path: str
    use: str
    free: int
    problem: str = ""
    """Why it is not writable; empty if it is."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The state of the machine; sizes in bytes, None where the system does not report them."""

    versions: dict[str, str]
    cuda_of_torch: str | None
    torch_problem: str
    """Why torch cannot use any GPU; empty if it can."""
    device_problem: str
    """Why the requested device is unavailable; empty if it is available."""
    gpus: list[Gpu]
    driver_gpus: list[DriverGpu]
    cores: int
    memory: int | None
    memory_free: int | None
    folders: list[Folder]
    shared_memory_free: int | None
    shared_memory_needed: int

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def inspect_machine(
    *, device_problem: str, folders: dict[str, Path], shared_memory_needed: int
) -> Machine:
    """Query the system, torch and the driver.

    Args:
        device_problem: why the requested device is unavailable, or "".
        folders: use → folder, which need not exist yet.
        shared_memory_needed: bytes of the batches that loader processes hold.
    """
    problem = _cuda_problem()
    shared_memory_free = shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else None
    memory, memory_free = _memory()
    return Machine(
        versions=_versions(),
        cuda_of_torch=torch.version.cuda or torch.version.hip,
        torch_problem=problem,
        device_problem=device_problem,
        gpus=[] if problem else [_inspect_gpu(index) for index in range(torch.cuda.device_count())],
        driver_gpus=query_driver_gpus(),
        cores=available_cpus(),
        memory=memory,
        memory_free=memory_free,
        folders=[_inspect_folder(use, path) for use, path in folders.items()],
        shared_memory_free=shared_memory_free,
        shared_memory_needed=shared_memory_needed,
    )


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    return versions


def _cuda_problem() -> str:
    """Why torch cannot use any GPU; empty if it can."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return ""
    return " ".join(str(caught[0].message).split()) if caught else "torch finds no GPU"


def _inspect_gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    problem, free = "", 0
    try:
        # The first kernel fails if this torch was not built for this GPU.
        torch.ones(8, device=f"cuda:{index}").sum().item()
        free = torch.cuda.mem_get_info(index)[0]
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
    with torch.cuda.device(index):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Gpu(
        name=properties.name,
        memory=properties.total_memory,
        free=free,
        capability=f"{properties.major}.{properties.minor}",
        bf16=bf16,
        problem=problem,
    )


def query_driver_gpus() -> list[DriverGpu]:
    """The GPUs that nvidia-smi lists."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(
            query, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []  # nvidia-smi is installed without a driver or a GPU
    rows = [row for row in csv.reader(result.stdout.splitlines()) if len(row) == 2]
    return [DriverGpu(name=name.strip(), driver=driver.strip()) for name, driver in rows]


def _memory() -> tuple[int | None, int | None]:
    """Total and available bytes; a container's limit applies if it is lower."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        total, free = kilobytes["MemTotal"] * 1024, kilobytes["MemAvailable"] * 1024
    except (OSError, ValueError, KeyError, IndexError):
        return None, None
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no container, or the limit "max"
        return total, free
    return min(total, limit), min(free, max(0, limit - used))


def _inspect_folder(use: str, path: Path) -> Folder:
    existing = next(
        parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists()
    )
    problem = ""
    try:
        # Permissions are not enough: the whole file system may be read-only.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        problem = error.strerror or str(error)
    return Folder(path=str(path), use=use, free=shutil.disk_usage(existing).free, problem=problem)


def check_versions(machine: Machine) -> Iterator[CheckResult]:
    names = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    cuda = f"CUDA {machine.cuda_of_torch}" if machine.cuda_of_torch else "no CUDA"
    yield "ok", f"{names}; torch is built with {cuda}", ""
    if missing := [name for name, number in machine.versions.items() if number == "missing"]:
        yield "error", f"{', '.join(missing)} is not installed", f"pip install {' '.join(missing)}"


def check_gpus(machine: Machine) -> Iterator[CheckResult]:
    """GPUs, above all those that torch would not use."""
    for index, gpu in enumerate(machine.gpus):
        yield from _check_gpu(index, gpu, machine.driver_gpus)
    if machine.gpus:
        return
    names = ", ".join(gpu.name for gpu in machine.driver_gpus)
    if not names:
        yield "note", "no GPU: training runs on the CPU, many times slower", ""
    elif machine.cuda_of_torch is None:
        yield (
            "warning",
            f"{names} would stay unused: torch {machine.versions['torch']} is built without CUDA",
            "reinstall torch and torchvision with CUDA, see pytorch.org for your driver",
        )
    elif os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"}:
        yield (
            "warning",
            f"{names} would stay unused: $CUDA_VISIBLE_DEVICES hides it",
            "unset CUDA_VISIBLE_DEVICES",
        )
    else:
        yield (
            "warning",
            f"{names} would stay unused: {machine.torch_problem}",
            f"driver {machine.driver_gpus[0].driver} may be too old for CUDA "
            f"{machine.cuda_of_torch}: update it, or install a torch for an older CUDA",
        )


def _check_gpu(index: int, gpu: Gpu, driver_gpus: list[DriverGpu]) -> Iterator[CheckResult]:
    if gpu.problem:
        yield (
            "error",
            f"cuda:{index} {gpu.name} (compute capability {gpu.capability}) does not work: "
            f"{gpu.problem}",
            "install a torch that is built for it, see pytorch.org, or restart the machine",
        )
        return
    driver = f", driver {driver_gpus[0].driver}" if driver_gpus else ""
    precision = "bf16" if gpu.bf16 else "no bf16: fp32, or --precision fp16"
    yield (
        "ok",
        f"cuda:{index} {gpu.name}, {gpu.memory / _GB:.1f} GB ({gpu.free / _GB:.1f} free), compute "
        f"capability {gpu.capability}, {precision}{driver}",
        "",
    )
    if gpu.free < _ENOUGH_GPU_MEMORY:
        yield (
            "warning",
            f"only {gpu.free / _GB:.1f} GB are free on cuda:{index}",
            "see with nvidia-smi which processes use the rest, or use a smaller --batch-size",
        )


def check_device(machine: Machine) -> Iterator[CheckResult]:
    """The requested device; doctor does not fall back to another one."""
    if machine.device_problem:
        message, _, remedy = machine.device_problem.partition("; ")
        yield "error", message, remedy


def check_memory(machine: Machine) -> Iterator[CheckResult]:
    if machine.memory is None or machine.memory_free is None:
        yield "ok", f"{machine.cores} cores", ""
        return
    text = (
        f"{machine.cores} cores, {machine.memory / _GB:.1f} GB of memory "
        f"({machine.memory_free / _GB:.1f} free)"
    )
    if machine.memory_free < _ENOUGH_MEMORY:
        yield "warning", text, "use a small --batch-size and few --workers"
    else:
        yield "ok", text, ""


def check_disk(machine: Machine) -> Iterator[CheckResult]:
    for folder in machine.folders:
        text = f"{folder.free / _GB:.1f} GB free for {folder.use} in {folder.path}"
        if folder.free < _MIN_DISK:
            yield "error", text, "free at least 2 GB there, or choose another folder"
        elif folder.free < _ENOUGH_DISK:
            yield "warning", text, "free at least 2 GB there before a long training"
        else:
            yield "ok", text, ""


def check_writing(machine: Machine) -> Iterator[CheckResult]:
    for folder in machine.folders:
        if not folder.problem:
            continue
        text = f"cannot write {folder.use} to {folder.path}: {folder.problem}"
        if folder.use == CACHE:
            yield "warning", f"{text}; every start will be slow", "set $SEGTRAIN_CACHE"
        else:
            yield "error", text, "choose another --output, or fix the permissions"


def check_shared_memory(machine: Machine) -> Iterator[CheckResult]:
    """If shared memory is full, batches of loader processes are lost without an error."""
    if machine.shared_memory_free is None:
        return
    free, needed = machine.shared_memory_free, machine.shared_memory_needed
    text = (
        f"{free / _MB:.0f} MB free in {_SHARED_MEMORY}, the loader may need {needed / _MB:.0f} MB"
    )
    if free < needed:
        yield "warning", text, "use --workers 0, or docker run --shm-size=8g"
    else:
        yield "ok", text, ""


# To add a check, write one function and add one row.
ENVIRONMENT_CHECKS: dict[str, Callable[[Machine], Iterable[CheckResult]]] = {
    "versions": check_versions,
    "gpu": check_gpus,
    "device": check_device,
    "memory": check_memory,
    "disk": check_disk,
    "writing": check_writing,
    "shared-memory": check_shared_memory,
}
