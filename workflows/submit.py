"""Runs on a Ray cluster: submitted as they would be started here, watched, followed, stopped.

The job is checked here, by the code that checks every job, and sent as one command line; nothing of
this machine is needed there but what is asked for. Paths mean the cluster's file system. Keys and
tokens are never sent: the cluster has its own.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from memedit.errors import InputError, MemeditError
from memedit.progress import Progress
from workflows.arguments import arguments_of, command_of
from workflows.jobfile import RESERVED
from workflows.settings import Job, SpreadJob, new_run_id
from workflows.submit_settings import LogsJob, StatusJob, StopJob, SubmitJob

if TYPE_CHECKING:
    from cluster.ray_jobs import JobState, RayJobs

STOP_WAIT_S = 120
"""What a run has to end cleanly before Ray kills it; Ray's own 3 s are less than one step."""
_BEGIN_S = 10.0
_PLACES_IN = {"source": ("path", "catalog", "templates"), "lineage": ("file",)}
"""Fields of the nested sections of an ingestion that name a place, where they are texts."""
LARGEST_UPLOAD_BYTES = 100 << 20
"""Ray keeps uploads in the memory of the cluster's head."""


def submitted_defaults(kind: type[Job]) -> dict[str, object]:
    """What a job of `kind` is by default when it is submitted (for `load_job`)."""
    return {"executor": "ray", "address": "auto"} if issubclass(kind, SpreadJob) else {}


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A run on a cluster.

    `submitted` says whether this call started it; if not, it was there already, and `same_job`
    whether it is the same job. `paths` are those of the job, on the cluster's file system.
    """

    run_id: str
    jobs: RayJobs
    submitted: bool = False
    same_job: bool = True
    entrypoint: str = ""
    paths: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def status(self) -> JobState:
        """What the run is doing."""
        return self.jobs.state(self.run_id)

    def logs(self) -> str:
        """All that the run has written so far."""
        return self.jobs.logs(self.run_id)

    def follow(self) -> Iterator[str]:
        """What the run writes, from its first line on, until it has ended."""
        return self.jobs.follow(self.run_id)

    def wait(self, *, timeout_s: float | None = None) -> JobState:
        """The state once the run has ended, or when the time is over."""
        return self.jobs.wait(self.run_id, timeout_s=timeout_s)

    def stop(self, *, timeout_s: float = STOP_WAIT_S + 30) -> JobState:
        """End the run cleanly and wait until it has ended; one that has ended stays as it is.

        One that has not begun (PENDING) Ray ends only when it begins; that is not waited for.
        """
        if not self.jobs.stop(self.run_id):
            return self.status()
        state = self.wait(timeout_s=min(timeout_s, _BEGIN_S))
        return state if state.state == "PENDING" else self.wait(timeout_s=timeout_s)

    def result(self) -> dict[str, Any] | None:
        """The object that the run has printed as its result or its error, once it has ended."""
        for line in reversed(self.jobs.logs(self.run_id, patient=True).splitlines()):
            try:
                told = json.loads(line)
            except ValueError:
                continue
            if isinstance(told, dict) and "event" not in told:
                return told
        return None

    @property
    def dashboard(self) -> str:
        """The run's page on Ray's dashboard."""
        return f"{self.jobs.address}/#/jobs/{self.run_id}"


def submit(
    job: Job,
    *,
    address: str | None = None,
    token: str | None = None,
    runtime_env: Mapping[str, Any] | None = None,
    upload: bool = False,
    driver_cpus: float = 0.0,
    driver_gpus: float = 0.0,
) -> Submission:
    """Run a job on a Ray cluster. Its run id names it there: a second call finds the first's run.

    Args:
        job: As `load_job` gives it, with `submitted_defaults` to spread it over the cluster.
        address: The cluster's dashboard, http://HOST:PORT; None takes the environment's.
        token: The cluster's token; None takes the environment's, as Ray does.
        runtime_env: Ray's runtime environment, passed on.
        upload: Send the fact table along.
        driver_cpus: CPUs to reserve for the run's own process.
        driver_gpus: GPUs to reserve for it.

    Raises:
        InputError: The job cannot be submitted, or the cluster cannot be used; nothing was started.
        MemeditError: The cluster does not take it, or does not say whether it has; then the error
            names the run id, under which a second call starts it once only.
    """
    if not hasattr(job, "run_id"):
        raise InputError(f"{command_of(job)} is not run on a cluster; run it here")
    named: Any = job
    run_id = named.run_id or new_run_id()
    job = dataclasses.replace(named, run_id=run_id)
    environment = _environment(runtime_env or {})
    with ExitStack() as stack:
        facts = named.facts if upload and hasattr(named, "facts") else None
        if upload:
            job, folder = stack.enter_context(_packed(job))
            if "working_dir" in environment:
                raise InputError(
                    "has a working_dir, so nothing else can be uploaded", field="runtime_env"
                )
            environment["working_dir"] = str(folder)
        job, paths = on_cluster(job, uploaded=("facts",) if upload else ())
        entrypoint = entrypoint_of(job)
        digest = _digest(entrypoint, runtime_env or {}, Path(facts) if facts else None)
        jobs = _jobs(address, token)
        jobs.check_versions()
        started = jobs.submit(
            run_id,
            entrypoint,
            command=command_of(job),
            digest=digest,
            runtime_env=environment,
            cpus=driver_cpus,
            gpus=driver_gpus,
        )
    return Submission(
        run_id=run_id,
        jobs=jobs,
        submitted=started,
        same_job=started or jobs.state(run_id).digest == digest,
        entrypoint=entrypoint,
        paths=paths,
    )


def find(run_id: str, *, address: str | None = None, token: str | None = None) -> Submission:
    """A run that was submitted before.

    Raises:
        InputError: The cluster cannot be used, or knows no such run.
    """
    found = Submission(run_id=run_id, jobs=_jobs(address, token))
    found.status()
    return found


def entrypoint_of(job: Job) -> str:
    """The line for the cluster's shell. The run speaks JSON, for whoever reads its log."""
    log_format = "json" if job.log_format == "auto" else job.log_format
    # exec: a signal reaches the run itself, and its exit code is the shell's.
    told = dataclasses.replace(job, json=True, log_format=log_format)
    return f"exec memedit {shlex.join(arguments_of(told))}"


def on_cluster(job: Job, *, uploaded: tuple[str, ...] = ()) -> tuple[Job, dict[str, str]]:
    """The job with absolute paths, and these paths by field; other locations stay as they are."""
    paths: dict[str, str] = {}
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(job):
        value, kind = getattr(job, field.name), field.metadata["location"]
        if value is None or value == field.default or field.name in uploaded:
            continue
        if not isinstance(value, Path) and not (kind and _is_path(value, sure=kind == "path")):
            continue
        paths[field.name] = os.path.abspath(value)
        changes[field.name] = type(value)(paths[field.name])
    for section, name, value in places_in(job):
        paths[f"{section}.{name}"] = path = os.path.abspath(value)
        changes[section] = {**changes.get(section, getattr(job, section)), name: path}
    return dataclasses.replace(job, **changes), paths


def places_in(job: Job) -> Iterator[tuple[str, str, str]]:
    """Section, field and value of each path in the nested sections of an ingestion."""
    for section, names in _PLACES_IN.items():
        values = getattr(job, section, {})
        for name in names:
            value = values.get(name)
            if not isinstance(value, str) or "://" in value:
                continue
            if name != "catalog" or "/" in value or "." in value:  # and not the name of one
                yield section, name, value


def _is_path(value: str, *, sure: bool) -> bool:
    """Whether it is one; a text that may be a name, too, is a path where a file is found here."""
    if "://" in value or value in RESERVED:
        return False
    if sure or value.startswith(("/", "./", "../")):
        return True
    return Path(value).exists() or bool(glob.glob(value, recursive=True))


@contextmanager
def _packed(job: Job) -> Iterator[tuple[Job, Path]]:
    """The job with its fact table in a folder to upload, from which the run will start."""
    facts = getattr(job, "facts", None)
    if facts is None:
        raise InputError(f"{command_of(job)} reads no fact table", field="upload")
    if "://" in facts:
        raise InputError(
            f"{facts} need not be uploaded; the cluster reads it where it lies", field="upload"
        )
    path = Path(facts)
    try:
        size_bytes = path.stat().st_size
        if not path.is_file():
            raise InputError(f"{facts} is not a file", field="facts")
        if size_bytes > LARGEST_UPLOAD_BYTES:
            raise InputError(
                f"{facts} is too large to upload ({size_bytes >> 20} MiB of at most "
                f"{LARGEST_UPLOAD_BYTES >> 20}); put it where the cluster can read it",
                field="facts",
            )
        with tempfile.TemporaryDirectory() as folder:
            shutil.copyfile(path, Path(folder) / path.name)
            there: Any = job
            yield dataclasses.replace(there, facts=path.name), Path(folder)
    except OSError as error:
        raise InputError(f"cannot read the fact table: {error}", field="facts") from error


def _digest(entrypoint: str, runtime_env: Mapping[str, Any], facts: Path | None) -> str:
    """Identity of what is run: the command, where it runs, and what is sent along."""
    content = b"" if facts is None else facts.read_bytes()
    told = json.dumps([entrypoint, runtime_env], sort_keys=True, default=str).encode()
    return hashlib.sha256(told + b"\0" + content).hexdigest()


def _environment(runtime_env: Mapping[str, Any]) -> dict[str, Any]:
    """The runtime environment, with enough time for a clean end unless it says how much."""
    variables = runtime_env.get("env_vars") or {}
    if not isinstance(variables, Mapping):
        raise InputError("env_vars must be a mapping of names to texts", field="runtime_env")
    return {
        **runtime_env,
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **variables},
    }


def _read_environment(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", field="runtime_env") from error
    except yaml.YAMLError as error:
        raise InputError(
            f"not YAML: {' '.join(str(error).split())}", source=str(file), field="runtime_env"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise InputError(
            "a runtime environment is a mapping, such as {pip: [memedit]}",
            source=str(file),
            field="runtime_env",
        )
    return content


def _jobs(address: str | None, token: str | None = None) -> RayJobs:
    try:
        from cluster.ray_jobs import RayJobs
    except ImportError as error:
        raise InputError(
            f"Ray's client cannot be imported ({error}); pip install 'ray[default]'"
        ) from error
    return RayJobs(address, token=token)


# What stands behind the commands.


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """What `memedit submit` has done; `ended` if it waited."""

    submission: Submission
    state: JobState
    result: Mapping[str, Any] | None = None
    waited: bool = False

    @property
    def exit_code(self) -> int:
        """The run's own; 1 where it was stopped, killed or never began."""
        if self.state.state == "SUCCEEDED":
            return 0
        return code if (code := self.state.exit_code or 0) > 0 else 1

    def summary(self) -> dict[str, Any]:
        """The JSON object that `submit --json` prints."""
        told = {
            **self.state.summary(),
            "submitted": self.submission.submitted,
            "same_job": self.submission.same_job,
            "address": self.submission.jobs.address,
            "dashboard": self.submission.dashboard,
            "entrypoint": self.submission.entrypoint,
            "paths": dict(self.submission.paths),
        }
        if self.waited:
            ok = self.state.state == "SUCCEEDED"
            told |= {"ok": ok, "exit_code": self.exit_code, "result": self.result}
        return told


def run_submit(options: SubmitJob, progress: Progress) -> Submitted:
    """Submit a job, and wait for its end if that is asked for."""
    submission = submit(
        options.job,
        address=options.address,
        runtime_env=_read_environment(options.runtime_env),
        upload=options.upload,
        driver_cpus=options.driver_cpus,
        driver_gpus=options.driver_gpus,
    )
    run_id = submission.run_id
    if submission.paths:
        told = ", ".join(f"{name} {path}" for name, path in submission.paths.items())
        progress.message(f"on the cluster's file system: {told}")
    if not submission.same_job:
        progress.message(
            f"the cluster has a run {run_id} with other settings, and it is left as it is; give "
            "another --run-id to run this one"
        )
    if not options.wait:
        return Submitted(submission=submission, state=submission.status())
    with _not_the_run(run_id):
        _tell_of_waiting(submission, progress)
        for text in submission.follow():
            sys.stderr.write(text)
            sys.stderr.flush()
        state = submission.wait()
    return Submitted(submission=submission, state=state, result=submission.result(), waited=True)


def _tell_of_waiting(submission: Submission, progress: Progress) -> None:
    """A run without room waits until the cluster has grown, or Ray gives it up."""
    until = time.monotonic() + _BEGIN_S
    while (state := submission.wait(timeout_s=0)).state == "PENDING":
        if time.monotonic() > until:
            progress.message(
                f"{state.run_id} is still PENDING ({state.message}); if the cluster never has room "
                f"for it, stop it (memedit stop {state.run_id}) and ask for fewer --driver-cpus "
                "and --driver-gpus"
            )
            return
        time.sleep(1)


def run_status(job: StatusJob, progress: Progress) -> dict[str, Any]:
    """One run, or all of memedit."""
    jobs = _jobs(job.address)
    if job.name is not None:
        return {"address": jobs.address, **jobs.state(job.name).summary()}
    return {"address": jobs.address, "runs": [state.summary() for state in jobs.all()]}


@dataclass(frozen=True, kw_only=True)
class Log:
    """A run's log, told as it comes; read in full first where one object is asked for."""

    submission: Submission
    follow: bool
    text: str | None = None

    def write(self, stream: TextIO) -> None:
        """Write it, up to now or to its end."""
        with _not_the_run(self.submission.run_id):
            for text in self.submission.follow() if self.follow else [self.submission.logs()]:
                stream.write(text)
                stream.flush()

    def summary(self) -> dict[str, Any]:
        """The JSON object that `logs --json` prints."""
        if self.text is None:
            return {}
        state = self.submission.status()
        return {"run_id": state.run_id, "state": state.state, "log": self.text}


def run_logs(job: LogsJob, progress: Progress) -> Log:
    """The log of a run."""
    submission = find(job.name, address=job.address)
    text = None
    if job.json:
        with _not_the_run(job.name):
            text = "".join(submission.follow()) if job.follow else submission.logs()
    return Log(submission=submission, follow=job.follow, text=text)


def run_stop(job: StopJob, progress: Progress) -> dict[str, Any]:
    """End a run; says what became of it."""
    submission = find(job.name, address=job.address)
    ended_before = submission.status().over
    state = submission.stop()
    if state.state == "PENDING":
        progress.message(f"{job.name} has not begun yet; it ends as soon as it does")
    elif not state.over:
        progress.message(f"{job.name} has not ended yet; `memedit status {job.name}` tells when")
    return {"stopped": state.over and not ended_before, **state.summary()}


@contextmanager
def _not_the_run(run_id: str) -> Iterator[None]:
    """Whoever stops watching has not stopped the run."""
    try:
        yield
    except KeyboardInterrupt:
        raise MemeditError(
            f"not watching any more; {run_id} goes on (memedit status, logs, stop {run_id})"
        ) from None
