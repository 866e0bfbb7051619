"""The manifest of an ingestion that one pod does: a Job of Kubernetes, or a CronJob; no Ray."""

from __future__ import annotations

from workflows.render_checks import check_pods
from workflows.render_pods import (
    JOB_FOLDER,
    Manifest,
    job_volume,
    kept_by_kubernetes,
    labels_of,
    object_of,
    run_container,
    run_pod,
)
from workflows.render_settings import RenderKubernetesJob

_FINAL = [2, 3]
"""Exit codes that another attempt would not change: bad input, a gate not met."""


def one_pod(options: RenderKubernetesJob, *, name: str, run_id: str | None) -> Manifest:
    """What runs the job file of the ConfigMap `name`, once or on a schedule.

    Raises:
        InputError: A name or a size is none.
    """
    check_pods(options)
    job = _job(options, name=name, run_id=run_id)
    if options.schedule is None:
        run = object_of("batch/v1", "Job", name, options, queue=options.queue)
        return run | {"spec": job}
    schedule = object_of("batch/v1", "CronJob", name, options)
    template = {"metadata": {"labels": labels_of(name, queue=options.queue)}, "spec": job}
    schedule["spec"] = kept_by_kubernetes(options, template)
    return schedule


def _job(options: RenderKubernetesJob, *, name: str, run_id: str | None) -> Manifest:
    container = run_container(
        options,
        name="ingest",
        mounts=[{"name": "job", "mountPath": JOB_FOLDER, "readOnly": True}],
        cpus=options.head_cpus,
        memory=options.head_memory,
        gpus=options.head_gpus,
    )
    # There, that another run holds the lock (exit code 4) is no failure.
    container["command"] = ["python", "-m", "workflows.render_entry"]
    container["args"] = ["ingest", "--config", f"{JOB_FOLDER}/job.yaml"]
    container["args"] += ["--log-format", "json", "--json"]
    if run_id is not None:
        container["args"] += ["--run-id", run_id]
    template = run_pod(
        options, container, volumes=[job_volume(name, "job.yaml")], gpus=options.head_gpus
    )
    template["spec"]["restartPolicy"] = "Never"
    job: Manifest = {
        "backoffLimit": options.retries,
        "podFailurePolicy": {
            "rules": [
                # A pod that had to make room for another has not failed.
                {
                    "action": "Ignore",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": "ingest",
                        "operator": "In",
                        "values": list(_FINAL),
                    },
                },
            ]
        },
        "template": template,
    }
    if options.ends_after_s is not None:
        # Kubernetes counts from the creation of the Job on; a pod may wait for its node.
        job["activeDeadlineSeconds"] = options.start_within_s + options.ends_after_s
    return job
