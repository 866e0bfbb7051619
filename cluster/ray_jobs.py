"""The job server of a Ray cluster: submit, look, follow, stop.

One of the modules that import Ray. Knows Ray's Jobs API; does not know what a
job of memedit is (`workflows.submit`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import aiohttp
import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient, JobType

from cluster.ray_addresses import dashboard_address, no_other_address
from cluster.ray_tokens import authorization, refused
from memedit.errors import InputError, MemeditError

T = TypeVar("T")

_CONNECT_S, _ANSWER_S = 10.0, 45.0
"""Ray's client waits for ever, whoever it talks to."""
_SILENCE_S = 60.0
"""After as much silence in a log it is asked whether the job is still there."""
_PATIENCE_S = 300.0
"""For how long a cluster that has answered before may be away while a job is waited for."""
_POLL_S = 1.0
_MARK = "memedit"
_TALKATIVE = (
    "dashboard.modules.job.sdk",
    "dashboard.modules.dashboard_sdk",
    "_private.runtime_env.packaging",
)
"""Modules of Ray's client that tell of every connection and upload."""
_TAKEN = "already exists"
_PASSING = re.compile(r"Request failed with status code (429|5\d\d): ")
"""What a head that starts again, or a proxy before it, answers for a while."""
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True, kw_only=True)
class JobState:
    """What the cluster says of a job. Times are UTC, in ISO 8601; None where there is none yet."""

    run_id: str
    command: str | None
    """The command of memedit that it runs."""
    state: str
    """As Ray has it: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    started: str | None
    ended: str | None
    message: str
    exit_code: int | None
    """Of the job's own process; None before its end, and if it was stopped or never began."""
    digest: str | None
    """What the submitter gave to tell this job from others."""

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in _ENDED

    def summary(self) -> dict[str, Any]:
        """The fields for people and scripts."""
        return {name: value for name, value in asdict(self).items() if name != "digest"}


class RayJobs:
    """The jobs of one cluster.

    Args:
        address: Of the cluster's dashboard, http://HOST:PORT; None takes `RAY_API_SERVER_ADDRESS`,
            or `RAY_ADDRESS` where that is such an address.
        token: Of the cluster; None takes the environment's, as Ray does.

    Raises:
        InputError: Nothing is there, it is not Ray's dashboard, or it does not accept the token.
    """

    def __init__(self, address: str | None, *, token: str | None = None) -> None:
        self.address = dashboard_address(address)
        headers = authorization(token)
        with no_other_address():
            try:
                self._client = _Client(self.address, headers=headers)
            except AuthenticationError as error:
                raise self._refused(error) from error
            except (ConnectionError, requests.ConnectionError, requests.Timeout) as error:
                if "Connection aborted" in str(error.__context__):  # it speaks, but not HTTP
                    raise self._something_else() from error
                raise InputError(self._unreachable(error), field="address") from error
            except Exception as error:  # whatever Ray's client makes of an answer that is not Ray's
                raise self._something_else() from error
        for name in _TALKATIVE:
            logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)

    def check_versions(self) -> None:
        """Refuse a cluster whose Ray or Python is not the one here, by their first two numbers.

        Raises:
            InputError: Says which versions are where.
        """
        theirs = self._ask(self._client.ray_version)
        if _minor(theirs) != _minor(ray.__version__):
            raise InputError(
                f"the cluster at {self.address} has Ray {theirs}, and here is Ray "
                f"{ray.__version__}; submit from an environment with "
                f"'ray[default]=={theirs}', or to a cluster with {ray.__version__}",
                field="address",
            )
        python = self._ask(self._client.python_version)
        here = ".".join(map(str, sys.version_info[:3]))
        if python is not None and _minor(python) != _minor(here):
            raise InputError(
                f"the cluster at {self.address} has Python {python}, and here is Python {here}; "
                f"submit from an environment with Python {_minor(python)}",
                field="address",
            )

    def submit(
        self,
        run_id: str,
        entrypoint: str,
        *,
        command: str,
        digest: str,
        runtime_env: Mapping[str, Any],
        cpus: float = 0.0,
        gpus: float = 0.0,
    ) -> bool:
        """Start a job, unless there is one of this name; whether it was started.

        Where the answer is lost, the cluster is asked whether it has the job.

        Raises:
            InputError: The runtime environment is wrong.
            MemeditError: The cluster takes no job, or does not say whether it has taken it.
        """
        try:
            self._ask(
                lambda: self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=run_id,
                    runtime_env=dict(runtime_env),
                    metadata={_MARK: command, "digest": digest},
                    entrypoint_num_cpus=cpus or None,
                    entrypoint_num_gpus=gpus or None,
                )
            )
        except (TypeError, ValueError, OSError) as error:
            raise InputError(_last_line(error), field="runtime_env") from error
        except AwayError as error:
            return self._was_taken(run_id, digest, error)
        except RuntimeError as error:
            if _TAKEN in str(error):
                return False
            if "status code 400" in str(error):
                raise InputError(_last_line(error), field="runtime_env") from error
            raise MemeditError(
                f"the cluster at {self.address} does not take the job: {_last_line(error)}"
            ) from error
        return True

    def _was_taken(self, run_id: str, digest: str, lost: AwayError) -> bool:
        try:
            return self._patiently(run_id, lambda: self.state(run_id)).digest == digest
        except MemeditError as error:
            raise MemeditError(
                f"it is not known whether the run {run_id} was submitted ({lost}); submit again "
                f"with --run-id {run_id}, which starts it once only"
            ) from error

    def state(self, run_id: str) -> JobState:
        """What a job is doing.

        Raises:
            InputError: The cluster knows no such job.
        """
        try:
            return _state_of(self._ask(lambda: self._client.get_job_info(run_id)))
        except RuntimeError as error:
            raise self._no_job(run_id, error) from error

    def all(self) -> list[JobState]:
        """The jobs of memedit, the newest first."""
        try:
            found = self._ask(self._client.list_jobs)
        except RuntimeError as error:
            raise MemeditError(
                f"the cluster at {self.address} does not list its jobs: {_last_line(error)}"
            ) from error
        ours = [job for job in found if job.type is JobType.SUBMISSION and _MARK in _metadata(job)]
        ours.sort(key=lambda job: job.start_time or 0, reverse=True)
        return [_state_of(job) for job in ours]

    def logs(self, run_id: str, *, patient: bool = False) -> str:
        """All that a job has written so far; `patient` waits for a cluster that is away.

        Raises:
            InputError: The cluster knows no such job.
            MemeditError: It is away, or was for too long.
        """

        def ask() -> str:
            return self._ask(lambda: self._client.get_job_logs(run_id))

        try:
            return self._patiently(run_id, ask) if patient else ask()
        except RuntimeError as error:
            raise self._no_job(run_id, error) from error

    def stop(self, run_id: str) -> bool:
        """Ask a job to end; whether there was anything to end.

        Raises:
            InputError: The cluster knows no such job.
        """
        try:
            return self._ask(lambda: self._client.stop_job(run_id))
        except RuntimeError as error:
            raise self._no_job(run_id, error) from error

    def follow(self, run_id: str) -> Iterator[str]:
        """What a job writes, from its first line on, until it has ended.

        Outlives a connection that breaks: what was told already is passed over.

        Raises:
            InputError: The cluster knows no such job.
            MemeditError: The cluster was away for too long.
        """
        told = 0
        over = False
        while not over:
            # Asked before the log is read, so that what is written until the end is read too.
            over = self.wait(run_id, timeout_s=0).over
            read = 0
            for text in [self.logs(run_id, patient=True)] if over else self._tail(run_id):
                read += len(text)
                if read > told:
                    yield text[told - read :]
                    told = read
            if not over:
                time.sleep(_POLL_S)

    def wait(self, run_id: str, *, timeout_s: float | None = None) -> JobState:
        """The state of a job once it has ended, or when the time is over.

        Raises:
            InputError: The cluster knows no such job.
            MemeditError: The cluster was away for too long.
        """
        until = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        while True:
            state = self._patiently(run_id, lambda: self.state(run_id))
            if state.over or time.monotonic() >= until:
                return state
            time.sleep(_POLL_S)

    def _patiently(self, run_id: str, ask: Callable[[], T]) -> T:
        """Ask until there is an answer, or the cluster was away for too long."""
        asked = time.monotonic()
        while True:
            try:
                return ask()
            except AwayError as error:
                if time.monotonic() - asked > _PATIENCE_S:
                    raise MemeditError(
                        f"the cluster at {self.address} has been away for {_PATIENCE_S:g} s; the "
                        f"job {run_id} may go on without being watched"
                    ) from error
            time.sleep(_POLL_S)

    def _tail(self, run_id: str) -> Iterator[str]:
        """The log from its beginning, as far as one connection goes.

        What ends it, if not the job, the caller learns by asking for the state.
        """
        if _in_a_loop():
            yield self.logs(run_id, patient=True)
            return
        texts: AsyncIterator[str] = self._client.tail_job_logs(run_id)

        async def more() -> str | None:
            return await asyncio.wait_for(anext(texts, None), _SILENCE_S)

        with asyncio.Runner() as runner:
            while True:
                try:
                    text = runner.run(more())
                except (TimeoutError, RuntimeError, OSError, aiohttp.ClientError):
                    return
                if text is None:
                    return
                yield text

    def _ask(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except AuthenticationError as error:
            raise self._refused(error) from error
        except requests.RequestException as error:
            raise AwayError(self._unreachable(error)) from error
        except RuntimeError as error:
            if (code := _PASSING.match(str(error))) is None or _TAKEN in str(error):
                raise
            raise AwayError(
                f"the cluster at {self.address} cannot answer at present (HTTP {code[1]}, "
                f"{_last_line(str(error)[code.end() :])})"
            ) from error

    def _refused(self, error: AuthenticationError) -> InputError:
        return refused(self.address, given="Authentication failed" in str(error))

    def _unreachable(self, error: Exception) -> str:
        return (
            f"no Ray dashboard was reached at {self.address} ({_reason(error)}); check that the "
            "cluster runs, that this is the address of its dashboard (port 8265 unless it was "
            "set), and that the port is open from here"
        )

    def _something_else(self) -> InputError:
        return InputError(
            f"what answers at {self.address} is not Ray's dashboard; give the address of the "
            "dashboard of the cluster's head (its port is 8265 unless it was set)",
            field="address",
        )

    def _no_job(self, run_id: str, error: RuntimeError) -> MemeditError:
        if "status code 404" in str(error):
            return InputError(
                f"the cluster at {self.address} knows no run {run_id!r}; `memedit status` lists "
                "those that it knows",
                field="run_id",
            )
        return MemeditError(
            f"the cluster at {self.address} cannot tell of {run_id}: {_last_line(error)}"
        )


class AwayError(MemeditError):
    """The cluster was reached and now does not answer, which may pass."""


class _Client(JobSubmissionClient):
    """Ray's client, with a limit on how long an answer may take."""

    def _do_request(self, method: str, endpoint: str, **more: Any) -> Any:
        more.setdefault("timeout", (_CONNECT_S, _ANSWER_S))
        return super()._do_request(method, endpoint, **more)

    def ray_version(self) -> str:
        """Ray's version on the cluster."""
        return str(self._do_request("GET", "/api/version").json()["ray_version"])

    def python_version(self) -> str | None:
        """Python's version on the cluster, where the dashboard tells it."""
        answer = self._do_request("GET", "/api/v0/cluster_metadata")
        try:
            found = answer.json()["data"]["pythonVersion"]
        except (KeyError, TypeError, ValueError):
            return None
        return str(found)


def _in_a_loop() -> bool:
    """Whether this thread runs an event loop already, as a notebook does."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _state_of(job: JobDetails) -> JobState:
    metadata = _metadata(job)
    return JobState(
        run_id=job.submission_id or job.job_id or "",
        command=metadata.get(_MARK),
        state=job.status.value,
        started=_time(job.start_time),
        ended=_time(job.end_time),
        message=_message(job.message or "", job.driver_exit_code),
        exit_code=job.driver_exit_code,
        digest=metadata.get("digest"),
    )


def _metadata(job: JobDetails) -> dict[str, str]:
    return job.metadata or {}


def _time(unix_ms: int | None) -> str | None:
    if not unix_ms:
        return None
    return datetime.fromtimestamp(unix_ms / 1000, UTC).isoformat(timespec="seconds")


def _message(message: str, exit_code: int | None) -> str:
    """Why a job failed: what it says itself, without the log lines and tracebacks Ray repeats."""
    if exit_code in (126, 127):
        return (
            f"failed with exit code {exit_code}: there is no command memedit on the cluster; "
            "install it in the cluster's image or name it in --runtime-env"
        )
    for line in reversed(message.splitlines() if exit_code else ()):
        try:
            told = json.loads(line)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            continue
        return f"failed with exit code {exit_code}: {told}"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if any(line.startswith("Traceback") for line in lines):
        return f"{lines[0]} {lines[-1]}"
    return message.strip()


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _reason(error: BaseException) -> str:
    """The innermost reason of a connection that failed."""
    inner = error.__context__ if isinstance(error, ConnectionError) else error
    if isinstance(inner, requests.Timeout):
        return "no answer"
    text = str(inner or error).rstrip("')\"")
    return text.rpartition(": ")[2].strip("'\"()") or "no answer"


def _last_line(error: Exception | str) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" .")]
    return lines[-1] if lines else "no reason given"
