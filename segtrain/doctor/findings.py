"""What the doctor found, and the error that a script should end with."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from segtrain.errors import DataError, ResourceError

Level = Literal["ok", "note", "warning", "error"]
LEVELS: tuple[Level, ...] = ("ok", "note", "warning", "error")

WARNINGS_EXIT_CODE = 10

# What a check says: how bad it is, what was found, and the repair or "".
Verdict = tuple[Level, str, str]

Examined = TypeVar("Examined")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the diagnosis.

    check: a short key that stays the same from version to version.
    message, remedy: one line each; the remedy is "" where nothing needs to be done.
    """

    level: Level
    check: str
    message: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All that was found.

    facts: versions, GPUs, disks, ...; plain types by name.
    data: of each split what was opened and looked at; plain types.
    pictures: paths of the pictures that were written.
    """

    facts: Mapping[str, Any]
    data: Mapping[str, Any]
    environment_findings: list[Finding]
    data_findings: list[Finding]
    pictures: list[str]

    @property
    def findings(self) -> list[Finding]:
        return [*self.environment_findings, *self.data_findings]

    @property
    def counts(self) -> dict[Level, int]:
        """How many findings there are of each level."""
        found = Counter(finding.level for finding in self.findings)
        return {level: found[level] for level in LEVELS}

    @property
    def exit_code(self) -> int:
        """0 where all is well; for errors that of the error raised by `raise_error`."""
        if _errors(self.environment_findings):
            return ResourceError.exit_code
        if _errors(self.data_findings):
            return DataError.exit_code
        return WARNINGS_EXIT_CODE if self.counts["warning"] else 0

    def raise_error(self) -> None:
        """Raises ResourceError for the first error of the environment, else DataError for data."""
        for findings, error in (
            (self.environment_findings, ResourceError),
            (self.data_findings, DataError),
        ):
            if errors := _errors(findings):
                more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
                remedy = f"; {errors[0].remedy}" if errors[0].remedy else ""
                raise error(f"{errors[0].message}{more}{remedy}")


def run_checks(
    checks: Mapping[str, Callable[[Examined], Iterable[Verdict]]], examined: Examined
) -> Iterator[Finding]:
    """The verdicts of every check under its name; a check with nothing to say gives none."""
    for name, check in checks.items():
        for level, message, remedy in check(examined):
            yield Finding(level=level, check=name, message=message, remedy=remedy)


def _errors(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level == "error"]
