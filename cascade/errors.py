"""Errors as part of the interface: what failed, on which value, where, and the way out."""

from __future__ import annotations

from collections.abc import Callable

LONGEST_VALUE = 2000


class CascadeError(Exception):
    """The work failed. Subclasses decide the exit code and whether a retry can help.

    what: one sentence. value: the offending value as the user wrote it. where: the file, field or
    place it came from. remedy: what the user does next. None of the four may contain a credential.
    """

    exit_code = 1
    retryable = False

    def __init__(self, what: str, *, value: object = None, where: str, remedy: str) -> None:
        super().__init__(what)
        self.what = what
        self.value = None if value is None else shortened(str(value))
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        lines = [self.what]
        if self.value is not None:
            lines.append(f"  value: {self.value}")
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.remedy:
            lines.append(f"  way out: {self.remedy}")
        return printable("\n".join(lines))

    def record(self) -> dict[str, object]:
        """The error as plain JSON, so that it can cross a process boundary."""
        return {
            "type": type(self).__name__,
            "what": self.what,
            "value": self.value,
            "where": self.where,
            "remedy": self.remedy,
        }

    def __reduce__(self) -> tuple[Callable[..., CascadeError], tuple[dict[str, object]]]:
        """Pickled by whoever keeps the state of a run."""
        return from_record, (self.record(),)


class InputError(CascadeError):
    """The input is wrong (exit code 2): running it again cannot help."""

    exit_code = 2


class IntegrityError(InputError):
    """Stored bytes do not match their manifest; names the file and both hashes."""


class NewerVersion(IntegrityError):
    """What is stored was written by a newer version of cascade, and is not damaged for all we know."""


class BelowGate(CascadeError):
    """A family is whole and stored, but its children do not keep the limits of its recipe."""


class StorageFault(CascadeError):
    """The store failed while working, as networks do; a retry may help."""

    retryable = True


class MachineFault(CascadeError):
    """The process was killed or ran out of memory; a retry may help."""

    retryable = True


class Interrupted(CascadeError):
    """The work was asked to stop and kept what it had (exit code 75): run it again and it goes on."""

    exit_code = 75
    retryable = True


def shortened(text: str) -> str:
    """The text, or its two ends: a value may be a whole file."""
    half = LONGEST_VALUE // 2
    return text if len(text) <= LONGEST_VALUE else f"{text[:half]} ... {text[-half:]}"


def printable(text: str) -> str:
    """The text with escapes for what would steer a terminal or has no encoding: values come from files."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else letter.encode("unicode_escape").decode()
        for letter in text
    )


ERROR_TYPES: dict[str, type[CascadeError]] = {
    kind.__name__: kind
    for kind in (
        CascadeError,
        InputError,
        IntegrityError,
        NewerVersion,
        BelowGate,
        StorageFault,
        MachineFault,
        Interrupted,
    )
}


def from_record(record: dict[str, object]) -> CascadeError:
    """Rebuild an error that another process reported with `CascadeError.record`."""
    kind = ERROR_TYPES.get(str(record.get("type")), CascadeError)
    return kind(
        str(record.get("what")),
        value=record.get("value"),
        where=str(record.get("where") or ""),
        remedy=str(record.get("remedy") or ""),
    )
