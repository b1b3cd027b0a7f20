"""`--jsonl`: one JSON object per image, in input order, each written as soon as it is due."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from segtrain.errors import ResourceError
from segtrain.prediction.jobs import STDOUT
from segtrain.prediction.pipeline import Outcome

WriteOutcome = Callable[[Outcome], None]


@contextmanager
def open_jsonl(path: Path | None) -> Iterator[WriteOutcome]:
    """Yield a function that writes an outcome to a file, standard output ("-") or nowhere (None).

    Each line is flushed before the call returns, so an interrupted run leaves only complete lines.

    Raises:
        ResourceError: the file cannot be written.
    """
    if path is None:
        yield lambda outcome: None
    elif path == STDOUT:
        yield lambda outcome: print(json.dumps(outcome_to_dict(outcome)), flush=True)
    else:
        with _convert_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("w", encoding="utf-8")
        with file:
            yield partial(_write_line, file, path)


def outcome_to_dict(outcome: Outcome) -> dict[str, Any]:
    """Return the JSON object of one image.

    For a failed image: `image` and `error`. Else: `image`; `width` and `height` in pixels;
    `seconds` of work; `note` if the file contains more than the image; `outputs`, from kind to
    path ("-" for standard output); and the statistics of `segtrain.prediction.describe.describe`.
    """
    if outcome.stats is None:
        return {"image": outcome.job.name, "error": outcome.error}
    height, width = outcome.size or (0, 0)
    return {
        "image": outcome.job.name,
        "width": width,
        "height": height,
        "seconds": round(outcome.seconds, 4),
        **({"note": outcome.note} if outcome.note else {}),
        "outputs": {kind: str(path or STDOUT) for kind, path in outcome.job.outputs.items()},
        **outcome.stats,
    }


def _write_line(file: TextIO, path: Path, outcome: Outcome) -> None:
    with _convert_os_errors(path):
        print(json.dumps(outcome_to_dict(outcome)), file=file, flush=True)


@contextmanager
def _convert_os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"cannot write {path}: {error.strerror}", "free some space or choose another file"
        ) from error
