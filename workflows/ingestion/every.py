"""Runs by the clock of this machine: what `--every "0 2 * * *"` does, where no scheduler is.

Knows cron lines, time zones, and clocks that are set; does not know what a run does. What changes
with the seasons is as in Debian's cron: a time that is skipped comes right after the gap, a time
that is doubled comes once, and `*` and `*/n` go on by the real minutes and hours. So is the rule
for a line with both days: one that begins with `*` narrows the other, otherwise either is enough.
"""

from __future__ import annotations

import difflib
import time
import zoneinfo
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo

from memedit.errors import InputError
from memedit.progress import Progress
from workflows.cron import check_cron
from workflows.wording import without_keys

_MACROS = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_LAST = ("59", "23", "31", "12", "6")
"""The last value of each field of a cron line."""
_NAP = 30.0
"""Seconds after which the clock is looked at again: it may be set, and the machine may sleep."""
_LATE = timedelta(minutes=1)
"""A run that begins later than this is told to be late."""
_REMEMBERED = 10_000
"""How many minutes with a run are remembered, in case the clock goes back."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When a cron line fires."""

    line: str
    """Five fields, as cronsim reads them."""
    zone: tzinfo
    zone_name: str

    @classmethod
    def of(cls, line: str, zone: str) -> Schedule:
        """The schedule of a cron line or a macro such as `@daily`.

        Raises:
            InputError: The line is none or never fires, or there is no such time zone.
        """
        from cronsim import CronSim, CronSimError

        try:
            checked = check_cron(line)
        except InputError as error:
            raise InputError(error.message, field="every") from None
        schedule = cls(line=_for_cronsim(checked), zone=_zone(zone), zone_name=zone)
        try:
            next(CronSim(schedule.line, datetime.now(UTC)))
        except (CronSimError, StopIteration):
            raise InputError(f"{line!r} never fires", field="every") from None
        return schedule

    def after(self, moment: datetime, *, besides: Collection[datetime] = ()) -> datetime:
        """The first time to fire after `moment` that is not one of `besides`, all of them UTC."""
        from cronsim import CronSim

        for time_there in CronSim(self.line, moment.astimezone(self.zone)):
            due = time_there.astimezone(UTC)
            # In the second of two equal hours cronsim may name a minute of the first.
            if due > moment and due not in besides:
                return due
        raise InputError(f"{self.line!r} never fires again", field="every")

    def show(self, due: datetime) -> str:
        """A time of the schedule as its own clock has it: `2026-10-25 02:30 CEST (…/Berlin)`."""
        where = "" if self.zone is UTC else f" ({self.zone_name})"
        return f"{due.astimezone(self.zone):%Y-%m-%d %H:%M %Z}{where}"


def repeat(
    line: str,
    zone: str,
    run: Callable[[], None],
    *,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    sleep: Callable[[float], None] = time.sleep,
    progress: Progress,
) -> None:
    """Call `run` whenever a cron line fires, until somebody stops it.

    A run that fails is told and does not end the schedule. Runs that were due while another one
    was going, or while the machine slept, are made up for by a single one. A minute that had its
    run gets no second one when the clock is set back.

    Args:
        line: Five fields, or a macro such as `@daily`.
        zone: The time zone that the line is meant in, such as `Europe/Berlin`.
        run: One run; what it raises is told.
        now: The clock on the wall, with its time zone.
        sleep: Waits for some seconds; never asked for more than 30.
        progress: Is told when the next run is, and what became of a failed one.

    Returns:
        When it is interrupted between two runs.

    Raises:
        InputError: The line is none or never fires, or there is no such time zone.
        KeyboardInterrupt: A run was interrupted.
    """
    schedule = Schedule.of(line, zone)
    had: deque[datetime] = deque(maxlen=_REMEMBERED)
    since = now().astimezone(UTC)
    while True:
        try:
            due, started = _wait(schedule, since, had, now=now, sleep=sleep, progress=progress)
        except KeyboardInterrupt:
            progress.message("the schedule was stopped; no run was going", warning=False)
            return
        had += [due, started.replace(second=0, microsecond=0)]
        try:
            run()
        except Exception as error:  # whatever it is, the next run may go well
            what = without_keys(str(error)).strip() or type(error).__name__
            progress.message(f"the run failed, and the schedule goes on: {what}")
        since = started


def _wait(
    schedule: Schedule,
    since: datetime,
    had: Collection[datetime],
    *,
    now: Callable[[], datetime],
    sleep: Callable[[float], None],
    progress: Progress,
) -> tuple[datetime, datetime]:
    """Wait for the first time to fire after `since`; gives that time, and what time it then is."""
    due: datetime | None = None
    while True:
        moment = now().astimezone(UTC)
        if moment < since or due is None:
            # Also when the clock went back: what was the next time may now be years away.
            since = min(since, moment)
            before, due = due, schedule.after(since, besides=had)
            if due != before and moment < due:
                progress.message(f"the next run is at {schedule.show(due)}", warning=False)
        left = due - moment
        if left > timedelta(0):
            sleep(min(_NAP, left.total_seconds()))
            continue
        if -left >= _LATE:
            progress.message(
                f"the run of {schedule.show(due)} is late; this one makes up for all that were"
                " missed since"
            )
        return due, moment


def _for_cronsim(line: str) -> str:
    """A line that `check_cron` has let through, in the words of cronsim."""
    if line in _MACROS:
        return _MACROS[line]
    return " ".join(
        ",".join(_part_for_cronsim(part, last) for part in field.split(","))
        for field, last in zip(line.split(), _LAST, strict=True)
    )


def _part_for_cronsim(part: str, last: str) -> str:
    part = part.replace("?", "*")
    values, slash, step = part.partition("/")
    if not slash or values == "*":
        return part
    first, dash, end = values.partition("-")
    if not dash:
        # For cronsim a week has a seventh day, so that 5/2 would include a Sunday.
        end = last
    # One value with a step would be for cronsim what 5/10 is.
    return first if first == end else f"{first}-{end}/{step}"


def _zone(name: str) -> tzinfo:
    if name == "UTC":
        return UTC  # also on a machine that has no time zones
    try:
        return zoneinfo.ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        known = zoneinfo.available_timezones()
    if not known:
        raise InputError(
            f"{name!r} cannot be looked up, because this machine has no list of time zones;"
            " pip install tzdata",
            field="time_zone",
        )
    names = {known_name.lower(): known_name for known_name in known}
    near = names.get(name.lower()) or next(
        iter(difflib.get_close_matches(name, sorted(known), n=1)), None
    )
    hint = f"did you mean {near!r}?" if near else "write UTC, or one such as Europe/Berlin"
    raise InputError(f"no time zone {name!r}; {hint}", field="time_zone")
