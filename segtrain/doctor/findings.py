"""Findings of the checks, and the exit code that follows from them."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from segtrain.errors import DataError, ResourceError, UserError

Level = Literal["ok", "note", "warning", "error"]
LEVELS: tuple[Level, ...] = ("ok", "note", "warning", "error")

WARNINGS_EXIT_CODE = 10

CheckResult = tuple[Level, str, str]
"""Level, message, and remedy; the remedy may be ""."""

Subject = TypeVar("Subject")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of the diagnosis.

    check: a short key that stays the same from version to version.
    message, remedy: one line each; the remedy is "" where nothing needs to be done.
    """

    level: Level
    check: str
    message: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All findings.

    environment: versions, GPUs, disks, ...; plain types by name.
    data: by split, what was opened and scanned; plain types.
    images: paths of the written images.
    """

    environment: Mapping[str, Any]
    data: Mapping[str, Any]
    environment_findings: list[Finding]
    data_findings: list[Finding]
    images: list[str]

    @property
    def findings(self) -> list[Finding]:
        return [*self.environment_findings, *self.data_findings]

    @property
    def counts(self) -> dict[Level, int]:
        """Number of findings per level."""
        counter = Counter(finding.level for finding in self.findings)
        return {level: counter[level] for level in LEVELS}

    @property
    def exit_code(self) -> int:
        """0 without warnings and errors; with errors, that of the error `raise_error` raises."""
        if _errors(self.environment_findings):
            return ResourceError.exit_code
        if _errors(self.data_findings):
            return DataError.exit_code
        return WARNINGS_EXIT_CODE if self.counts["warning"] else 0

    def raise_error(self) -> None:
        """Raise ResourceError for the first environment error, else DataError for a data error."""
        for findings, error in (
            (self.environment_findings, ResourceError),
            (self.data_findings, DataError),
        ):
            if errors := _errors(findings):
                more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
                raise error(f"{errors[0].message}{more}", errors[0].remedy)


def run_checks(
    checks: Mapping[str, Callable[[Subject], Iterable[CheckResult]]], subject: Subject
) -> Iterator[Finding]:
    """Yield the results of every check, with the check's name."""
    for name, check in checks.items():
        for level, message, remedy in check(subject):
            yield Finding(level=level, check=name, message=message, remedy=remedy)


def finding_from_error(check: str, error: UserError) -> Finding:
    """Convert an exception to a finding; its hint becomes the remedy."""
    message, _, remedy = str(error).partition("; ")
    return Finding(level="error", check=check, message=message, remedy=remedy)


def _errors(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level == "error"]
