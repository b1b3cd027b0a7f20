"""`--jsonl`: a line of JSON for each picture, as soon as it and all before it are done."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from segtrain.errors import ResourceError
from segtrain.prediction.jobs import STDOUT
from segtrain.prediction.pipeline import Outcome

Record = Callable[[Outcome], None]


def record_of(outcome: Outcome) -> dict[str, Any]:
    """What is written of a picture.

    image, and for one that could not be used `error`; else width and height in pixels, seconds of
    work, note where the file holds more than the picture, outputs as kind → path ("-" for standard
    output), and the facts of `segtrain.prediction.description.describe`.
    """
    if outcome.facts is None:
        return {"image": outcome.job.name, "error": outcome.problem}
    height, width = outcome.size or (0, 0)
    return {
        "image": outcome.job.name,
        "width": width,
        "height": height,
        "seconds": round(outcome.seconds, 4),
        **({"note": outcome.note} if outcome.note else {}),
        "outputs": {kind: str(path or STDOUT) for kind, path in outcome.job.outputs.items()},
        **outcome.facts,
    }


@contextmanager
def recording(path: Path | None) -> Iterator[Record]:
    """Within, outcomes can be recorded in a file, on standard output ("-"), or nowhere (None).

    Every line is on its way to the disk when the call returns: whoever stops has whole lines.

    Raises:
        ResourceError: the file cannot be written.
    """
    if path is None:
        yield lambda outcome: None
    elif path == STDOUT:
        yield lambda outcome: print(json.dumps(record_of(outcome)), flush=True)
    else:
        with _told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("w", encoding="utf-8")
        with file:
            yield partial(_write_line, file, path)


def _write_line(file: TextIO, path: Path, outcome: Outcome) -> None:
    with _told(path):
        print(json.dumps(record_of(outcome)), file=file, flush=True)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"cannot write {path}: {error.strerror}; free some space or choose another file"
        ) from error
