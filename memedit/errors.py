"""One family of errors. Each class knows the exit code that the command line returns for it.

Knows nothing of files, models or terminals.
"""

from __future__ import annotations


class MemeditError(Exception):
    """Base of every error that memedit raises on purpose; exit code 1: it failed while running."""

    exit_code = 1


class InputError(MemeditError):
    """The input or the settings are wrong; nothing was written (exit code 2).

    Args:
        message: What is wrong, and what would be right.
        source: The file or object it was found in.
        row: 1-based row (for JSON lines: the line) inside `source`.
        field: The field of the row, setting or index that is wrong.
    """

    exit_code = 2

    def __init__(
        self,
        message: str,
        *,
        source: object | None = None,
        row: int | None = None,
        field: str | None = None,
    ) -> None:
        self.message, self.source, self.row, self.field = message, source, row, field
        super().__init__(message)

    def __str__(self) -> str:
        place = "" if self.source is None else str(self.source)
        if self.row is not None:
            place += f":{self.row}" if place else f"row {self.row}"
        if self.field is not None:
            place += f" [{self.field}]" if place else f"[{self.field}]"
        return f"{place}: {self.message}" if place else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling, which Ray uses.
        return (_rebuild_input_error, (type(self), self.message, self.source, self.row, self.field))


def _rebuild_input_error(
    kind: type[InputError], message: str, source: object, row: int | None, field: str | None
) -> InputError:
    return kind(message, source=source, row=row, field=field)


class UnsupportedModelError(InputError):
    """The model's family cannot be edited, with the reason (exit code 2)."""


class GateError(MemeditError):
    """A quality gate was not met; nothing was published (exit code 3)."""

    exit_code = 3


class LockError(MemeditError):
    """Another run holds the lock (exit code 4)."""

    exit_code = 4


class NumericalError(MemeditError):
    """A NaN, an infinity or a singular system where the method cannot go on."""
