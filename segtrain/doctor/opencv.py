"""Check that OpenCV works. Imports nothing that needs it.

Four wheels install into the same `cv2` folder. With two of them, one overwrites the other's files,
and uninstalling either breaks both. The two wheels with windows need libGL, which servers lack.
"""

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator

from segtrain.doctor.findings import CheckResult

_WHEELS = frozenset(
    {
        "opencv-python",
        "opencv-python-headless",
        "opencv-contrib-python",
        "opencv-contrib-python-headless",
    }
)
_IMPORT_TIMEOUT_SECONDS = 60


def check_opencv() -> Iterator[CheckResult]:
    """Exactly one wheel is installed, and cv2 imports."""
    wheels = _installed_wheels()
    remedy = (
        f"pip uninstall -y {' '.join(wheels or ['opencv-python-headless'])}; "
        "pip install opencv-python-headless"
    )
    version, problem = _try_import()
    if len(wheels) > 1:
        state = "cv2 does not even import" if problem else "cv2 may break at any time"
        yield "error", f"{' and '.join(wheels)} share one cv2 folder: {state}", remedy
    elif problem:
        yield "error", f"cannot import cv2: {problem}", remedy
    else:
        yield "ok", f"OpenCV {version}", ""


def _installed_wheels() -> list[str]:
    names = {
        (distribution.metadata["Name"] or "").lower().replace("_", "-")
        for distribution in importlib.metadata.distributions()
    }
    return sorted(names & _WHEELS)


def _try_import() -> tuple[str, str]:
    """OpenCV's version and the import error; one of them is empty.

    Runs in a subprocess, because a broken library can crash the process that loads it.
    """
    try:
        result = subprocess.run(
            [sys.executable, "-c", "import cv2; print(cv2.__version__)"],
            capture_output=True,
            text=True,
            timeout=_IMPORT_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "", f"it takes more than {_IMPORT_TIMEOUT_SECONDS} seconds"
    if result.returncode == 0:
        return result.stdout.strip(), ""
    last_line = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
    return "", last_line
