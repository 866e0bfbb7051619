"""The line of a schedule: five fields, as Kubernetes reads them.

Checks only; when it is time is decided by whoever keeps the schedule (Kubernetes, Airflow,
Dagster). What one of them would not take, or would never fire, is refused here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from memedit.errors import InputError

MACROS = ("@hourly", "@daily", "@midnight", "@weekly", "@monthly", "@yearly", "@annually")
_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_DAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")
_LONGEST_MONTH = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_PART = re.compile(r"(\*|\?|\w+)(?:-(\w+))?(?:/(\w+))?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class _Field:
    name: str
    first: int
    last: int
    names: tuple[str, ...] = ()

    def values(self, text: str) -> frozenset[int]:
        """The numbers that a field stands for."""
        found: set[int] = set()
        for part in text.split(","):
            found.update(self._part(part))
        return frozenset(found)

    def _part(self, part: str) -> range:
        match = _PART.fullmatch(part)
        if match is None or (match[1] in "*?" and match[2]):
            raise self._wrong(part, "write a number, a-b, *, */n or several with commas between")
        if match[1] in "*?":
            first, last = self.first, self.last
        else:
            first = self._number(match[1], part)
            # As in Kubernetes, 5/10 means from 5 on.
            last = self._number(match[2], part) if match[2] else self.last if match[3] else first
        if last < first:
            raise self._wrong(part, "the range ends before it begins")
        if match[3] is not None and (not match[3].isdecimal() or int(match[3]) < 1):
            raise self._wrong(part, "the step after / is a number from 1 on")
        return range(first, last + 1, int(match[3] or 1))

    def _number(self, text: str, part: str) -> int:
        if text.upper() in self.names:
            return self.first + self.names.index(text.upper())
        if not text.isdecimal():
            known = f" or {self.names[0]} to {self.names[-1]}" if self.names else ""
            raise self._wrong(part, f"{text!r} is no number{known}")
        if not self.first <= int(text) <= self.last:
            sunday = "; Sunday is 0" if self.names == _DAYS and text == "7" else ""
            raise self._wrong(part, f"{self.first} to {self.last} are allowed{sunday}")
        return int(text)

    def _wrong(self, part: str, hint: str) -> InputError:
        return InputError(f"{part!r} is no {self.name}: {hint}", field="schedule")


_FIELDS = (
    _Field(name="minute", first=0, last=59),
    _Field(name="hour", first=0, last=23),
    _Field(name="day of the month", first=1, last=31),
    _Field(name="month", first=1, last=12, names=_MONTHS),
    _Field(name="day of the week", first=0, last=6, names=_DAYS),
)


def check_cron(line: str) -> str:
    """A cron line without needless spaces.

    Raises:
        InputError: It is none, or its day never comes.
    """
    if line.strip().startswith("@"):
        if line.strip() not in MACROS:
            raise InputError(
                f"{line.strip()!r} is not known; write {', '.join(MACROS)}, or five fields",
                field="schedule",
            )
        return line.strip()
    if "TZ=" in line:
        raise InputError("a time zone in the line; give it as --time-zone", field="schedule")
    parts = line.split()
    if len(parts) != len(_FIELDS):
        raise InputError(
            f"{line!r} has {len(parts)} fields, and a cron line has five: minute, hour, day of the"
            " month, month, day of the week; '0 2 * * *' is every night at two",
            field="schedule",
        )
    _, _, days, months, _ = (f.values(p) for f, p in zip(_FIELDS, parts, strict=True))
    any_weekday = parts[4][0] in "*?"
    if any_weekday and min(days) > max(_LONGEST_MONTH[month - 1] for month in months):
        raise InputError(f"{line!r}: this day never comes", field="schedule")
    return " ".join(parts)
