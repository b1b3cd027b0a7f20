"""Whether OpenCV works. Imports nothing that needs it.

Four wheels put their files into the same `cv2` folder. With two of them installed one overwrites
the other's files, and removing either breaks both; the two with windows need libGL, which servers
lack.
"""

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator

from segtrain.doctor.findings import Verdict

_WHEELS = frozenset(
    {
        "opencv-python",
        "opencv-python-headless",
        "opencv-contrib-python",
        "opencv-contrib-python-headless",
    }
)
_IMPORT_SECONDS = 60


def check_opencv() -> Iterator[Verdict]:
    """Exactly one wheel, and it can be imported."""
    wheels = _installed_wheels()
    repair = (
        f"pip uninstall -y {' '.join(wheels or ['opencv-python-headless'])}; "
        "pip install opencv-python-headless"
    )
    version, problem = _try_import()
    if len(wheels) > 1:
        state = "cv2 does not even import" if problem else "cv2 may break at any time"
        yield "error", f"{' and '.join(wheels)} share one cv2 folder: {state}", repair
    elif problem:
        yield "error", f"cv2 cannot be imported: {problem}", repair
    else:
        yield "ok", f"OpenCV {version}", ""


def _installed_wheels() -> list[str]:
    names = {
        (distribution.metadata["Name"] or "").lower().replace("_", "-")
        for distribution in importlib.metadata.distributions()
    }
    return sorted(names & _WHEELS)


def _try_import() -> tuple[str, str]:
    """OpenCV's version and what is wrong with it, one of them empty.

    In a process of its own: a broken library can end the process that loads it.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", "import cv2; print(cv2.__version__)"],
            capture_output=True,
            text=True,
            timeout=_IMPORT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "", f"it takes more than {_IMPORT_SECONDS} seconds"
    if done.returncode == 0:
        return done.stdout.strip(), ""
    last_line = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return "", last_line
