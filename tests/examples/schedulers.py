"""The examples for Airflow and Dagster, imported where neither is installed.

Small modules stand for the two: they keep what is declared, so that a test can look at it and run
it. That the real ones take it was not tried.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "examples" / "schedulers"


class FailError(Exception):
    """Airflow's and Dagster's way to say that a task has failed; with its arguments."""

    def __init__(self, message: str, **more: Any) -> None:
        super().__init__(message)
        self.more = more


class SkipError(Exception):
    """Airflow's way to say that a task was skipped."""


def _keeping(kept: list[tuple[str, Any, dict[str, Any]]], name: str) -> Callable[..., Any]:
    """A decorator that keeps the function and what it was declared with."""

    def decorator(function: Any = None, **declared: Any) -> Any:
        def keep(inner: Any) -> Any:
            kept.append((name, inner, declared))
            return inner

        return keep if function is None else keep(function)

    return decorator


def _module(name: str, **content: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    for key, value in content.items():
        setattr(module, key, value)
    return module


def _airflow(kept: list[Any], *, version: int) -> list[types.ModuleType]:
    def task(**declared: Any) -> Any:
        def keep(function: Any) -> Any:
            # Called in the DAG, a task is declared and does not run.
            return lambda: kept.append(("task", function, declared))

        return keep

    class CronTriggerTimetable:
        """As in Airflow 2.4 and later: a run's logical date is the moment of its cron line."""

        def __init__(self, cron: str, *, timezone: str) -> None:
            self.cron, self.timezone = cron, timezone

    where = "airflow.sdk" if version == 3 else "airflow.decorators"
    return [
        _module("airflow"),
        _module(
            "airflow.exceptions", AirflowFailException=FailError, AirflowSkipException=SkipError
        ),
        _module("airflow.timetables.trigger", CronTriggerTimetable=CronTriggerTimetable),
        _module(where, dag=_keeping(kept, "dag"), task=task),
    ]


def _dagster(kept: list[Any]) -> list[types.ModuleType]:
    class Record:
        def __init__(self, **fields: Any) -> None:
            self.__dict__.update(fields)

    def op(**declared: Any) -> Any:
        def keep(function: Any) -> Any:
            kept.append(("op", function, declared))
            return lambda: kept.append(("called", function, {}))

        return keep

    return [
        _module(
            "dagster",
            Config=Record,
            Definitions=Record,
            Failure=FailError,
            OpExecutionContext=object,
            RetryPolicy=Record,
            RunRequest=Record,
            ScheduleEvaluationContext=object,
            job=_keeping(kept, "job"),
            op=op,
            schedule=_keeping(kept, "schedule"),
        )
    ]


@contextmanager
def imported(
    scheduler: str, *, version: int = 3, of: str = "memedit"
) -> Iterator[tuple[types.ModuleType, list[tuple[str, Any, dict[str, Any]]]]]:
    """The example as a module, and what it declares: kind, function, arguments.

    `of` is the second half of its name.
    """
    kept: list[tuple[str, Any, dict[str, Any]]] = []
    modules = _airflow(kept, version=version) if scheduler == "airflow" else _dagster(kept)
    before = {name: module for name, module in sys.modules.items() if name in dict(_names(modules))}
    sys.modules.update(_names(modules))
    try:
        path = FOLDER / f"{scheduler}_{of}.py"
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module, kept
    finally:
        for name, _ in _names(modules):
            sys.modules.pop(name, None)
        sys.modules.update(before)


def _names(modules: list[types.ModuleType]) -> list[tuple[str, types.ModuleType]]:
    return [(module.__name__, module) for module in modules]
