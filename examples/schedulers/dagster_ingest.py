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

NAME = "memedit-ingest"
SCHEDULE = "0 2 * * *"
TIME_ZONE = "Etc/UTC"
COMMAND = [
    "memedit",
    "ingest",
    "--json",
    "--log-format=json",
    "--seed=0",
    "--executor=ray",
    "--address=auto",
    "--registry=s3://models/capitals",
    "--gate=score>=60",
    "--gate=score>=previous-5",
    "--gate=perplexity<=base*1.2",
    '--set=source.kind="files"',
    '--set=source.path="s3://facts/inbox/*.jsonl"',
    '--set=source.name="inbox"',
    "--set=source.complete=false",
    '--set=source.after="keep"',
]
STOP_WAIT_S = 120
FINAL = (2, 3)
"""Exit codes of memedit that another attempt would not change: bad input, a gate not met."""
SKIPPED = 4
"""Its exit code where another run works on the registry: the next run makes up for this one."""
PATIENCE_S = 600.0
"""For how long the cluster may be away while a run goes on."""
TIMEOUT_S = (10.0, 45.0)
"""To connect and to be answered; Ray's client waits for ever."""


class RunFailedError(RuntimeError):
    """A run did not end well; `final` says that another attempt would not either.

    `skipped` says that it had nothing to do, because another run was at work.
    """

    def __init__(self, message: str, exit_code: int | None) -> None:
        super().__init__(message)
        self.final = exit_code in FINAL
        self.skipped = exit_code == SKIPPED


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
        run_id: Its name in Ray, the submission's id; memedit calls what it makes after the facts.
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
    line = entrypoint or f"exec {shlex.join(COMMAND)}"

    def begin(name: str) -> bool:
        """Whether it was begun; if not, there is one of this name."""
        try:
            client.submit_job(
                entrypoint=line,
                submission_id=name,
                runtime_env={"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}},
                metadata={"memedit": "ingest"},
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


class IngestConfig(Config):
    """What a run is told by the schedule."""

    run_id: str


@op(retry_policy=RetryPolicy(max_retries=2, delay=300))
def ingest(context: OpExecutionContext, config: IngestConfig) -> None:
    """The ingestion."""
    try:
        run(config.run_id, tell=context.log.info)
    except RunFailedError as error:
        if error.skipped:
            context.log.warning(f"skipped: {error}")
            context.add_output_metadata({"skipped": str(error)})
            return
        raise Failure(str(error), allow_retries=not error.final) from error


@job(name="memedit_ingest")
def memedit_ingest() -> None:
    """One op."""
    ingest()


@schedule(
    name="memedit_ingest_schedule",
    cron_schedule=SCHEDULE,
    execution_timezone=TIME_ZONE,
    job=memedit_ingest,
)
def memedit_ingest_schedule(context: ScheduleEvaluationContext) -> RunRequest:
    """A run for each moment of the schedule, and none twice."""
    run_id = run_id_of(context.scheduled_execution_time)
    return RunRequest(
        run_key=run_id,
        run_config={"ops": {"ingest": {"config": {"run_id": run_id}}}},
    )


definitions = Definitions(jobs=[memedit_ingest], schedules=[memedit_ingest_schedule])
