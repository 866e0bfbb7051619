"""memedit on a schedule: a Dagster job, made by `memedit render dagster`.

Needs Dagster and Ray's client, `ray[default]` in the cluster's version; memedit itself is on the
cluster. Set RAY_API_SERVER_ADDRESS (http://HOST:8265), RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or
RAY_AUTH_TOKEN_PATH where Dagster runs jobs.
"""

import os
import shlex
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import count

from dagster import (
    Config,
    Definitions,
    Failure,
    OpExecutionContext,
    RetryPolicy,
    RunRequest,
    ScheduleEvaluationContext,
    job,
    op,
    schedule,
)

NAME = "memedit-nightly"
SCHEDULE = "0 2 * * *"
TIME_ZONE = "Etc/UTC"
COMMAND = [
    "memedit",
    "edit",
    "--json",
    "--log-format=json",
    "--registry=s3://models/capitals",
    "--model=s3://models/pythia-1.4b",
    "--executor=ray",
    "--address=auto",
    "--corpus=s3://text/wikipedia/*.parquet",
    "--facts=s3://facts/today.parquet",
    "--gate=score>=80",
    '--set=storage.server_side_encryption="AES256"',
    '--set=storage.storage_class="STANDARD_IA"',
]
STOP_WAIT_S = 120
FINAL = (2, 3)
"""Exit codes of memedit that another attempt would not change: bad input, a gate not met."""
PATIENCE_S = 600.0
"""For how long the cluster may be away while a run goes on."""
TIMEOUT_S = (10.0, 45.0)
"""To connect and to be answered; Ray's client waits for ever."""


class RunFailedError(RuntimeError):
    """A run did not end well; `final` says that another attempt would not either."""

    def __init__(self, message: str, exit_code: int | None) -> None:
        super().__init__(message)
        self.final = exit_code in FINAL


def run_id_of(moment: datetime) -> str:
    """The name of the run of a scheduled moment, the same at each attempt."""
    return f"{NAME}-{moment.astimezone(UTC):%Y%m%dT%H%M%SZ}"


def run(
    run_id: str,
    *,
    address: str | None = None,
    entrypoint: str | None = None,
    poll_s: float = 10.0,
    tell: Callable[[str], object] = print,
) -> str:
    """Run memedit on a Ray cluster and wait for the end; the run's log.

    A run that is going on is joined, one that has succeeded is not run again, one that has failed
    is: whatever it had finished is kept.

    Args:
        run_id: Its name, in Ray (as the submission's id) and in memedit.
        address: The cluster's dashboard; None takes RAY_API_SERVER_ADDRESS.
        entrypoint: What to run; None for COMMAND.
        poll_s: Seconds between two looks.
        tell: Told what happens, and the log as it is written.

    Raises:
        RunFailedError: The run failed or was stopped.
    """
    # Here, so that a scheduler that only reads this file need not import Ray.
    from ray.job_submission import JobStatus, JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **more: object) -> object:
            return super()._do_request(method, endpoint, **{"timeout": TIMEOUT_S, **more})

    client = Client(address or os.environ["RAY_API_SERVER_ADDRESS"])
    # exec: a signal reaches memedit itself.
    line = entrypoint or f"exec {shlex.join([*COMMAND, f'--run-id={run_id}'])}"

    def begin(name: str) -> bool:
        """Whether it was begun; if not, there is one of this name."""
        try:
            client.submit_job(
                entrypoint=line,
                submission_id=name,
                runtime_env={"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}},
                metadata={"memedit": "edit"},
            )
        except RuntimeError:
            if name not in {job.submission_id for job in client.list_jobs()}:
                raise
            return False
        return True

    # Ray gives a name once only, so that a second attempt is called RUN_ID-2.
    for attempt in count(1):
        name = run_id if attempt == 1 else f"{run_id}-{attempt}"
        begun = begin(name)
        if begun or client.get_job_status(name) not in (JobStatus.FAILED, JobStatus.STOPPED):
            break
    tell(f"{name}: {'submitted' if begun else 'was submitted before'}")
    told, heard = 0, time.monotonic()
    while True:
        try:
            job = client.get_job_info(name)
            log = "" if job.status == JobStatus.PENDING else client.get_job_logs(name)
        except (OSError, RuntimeError):
            if time.monotonic() - heard > PATIENCE_S:
                raise
        else:
            heard = time.monotonic()
            over = job.status.is_terminal()
            until = len(log) if over else log.rfind("\n") + 1
            if until > told:
                tell(log[told:until].rstrip("\n"))
                told = until
            if over:
                break
        time.sleep(poll_s)
    if job.status != JobStatus.SUCCEEDED:
        raise RunFailedError(f"{name}: {job.status}: {job.message}", job.driver_exit_code)
    return log


class EditConfig(Config):
    """What a run is told by the schedule."""

    run_id: str


@op(retry_policy=RetryPolicy(max_retries=2, delay=300))
def edit(context: OpExecutionContext, config: EditConfig) -> None:
    """The edit."""
    try:
        run(config.run_id, tell=context.log.info)
    except RunFailedError as error:
        raise Failure(str(error), allow_retries=not error.final) from error


@job(name="memedit_nightly")
def memedit_nightly() -> None:
    """One op."""
    edit()


@schedule(
    name="memedit_nightly_schedule",
    cron_schedule=SCHEDULE,
    execution_timezone=TIME_ZONE,
    job=memedit_nightly,
)
def memedit_nightly_schedule(context: ScheduleEvaluationContext) -> RunRequest:
    """A run for each moment of the schedule, and none twice."""
    run_id = run_id_of(context.scheduled_execution_time)
    return RunRequest(
        run_key=run_id,
        run_config={"ops": {"edit": {"config": {"run_id": run_id}}}},
    )


definitions = Definitions(jobs=[memedit_nightly], schedules=[memedit_nightly_schedule])
