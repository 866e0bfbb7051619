"""Every command as data: the job it takes, the function behind it, what `--help` says of it.

Functions are named, not imported, so that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from workflows import (
    render_settings,
    settings,
    study_settings,
    submit_settings,
    tuning_settings,
    version_settings,
)
from workflows.ingestion import settings as ingestion_settings
from workflows.render_command import RENDER_EXAMPLES, RENDER_SUMMARY
from workflows.submit_command import EXAMPLES, SUMMARY


@dataclass(frozen=True, kw_only=True)
class Action:
    """What stands behind a command: `run` is called with the job and a progress receiver.

    It gives a mapping, or an object whose `summary()` is one; `show` draws it for people. A result
    that says `"ok": false` makes the exit code 1.
    """

    job: type[settings.Job]
    run: str
    """`module:function`."""
    show: str
    """Function of `workflows.results`."""
    summary: str
    examples: tuple[str, ...]


ACTIONS: dict[str, Action] = {
    "edit": Action(
        job=settings.EditJob,
        run="workflows.edit:run_edit",
        show="show_edit",
        summary="Write facts into a model: a patched checkpoint, its evaluation, a report.",
        examples=(
            "memedit edit --model smollm2 --facts examples/facts.jsonl --out runs/demo",
            "memedit edit --config job.yaml --set targets.steps=15 --gate 'score>=80' --json",
        ),
    ),
    "stats": Action(
        job=settings.StatsJob,
        run="workflows.stats:run_stats",
        show="show_plan",
        summary="Collect the second moments only, for later edits.",
        examples=(
            "memedit stats --corpus corpus.parquet --layers 5-9 --out stats",
            "memedit edit --stats stats --facts facts.jsonl --out runs/first",
        ),
    ),
    "evaluate": Action(
        job=settings.EvaluateJob,
        run="workflows.evaluate:run_evaluate",
        show="show_metrics",
        summary="The metrics of a checkpoint on a fact table.",
        examples=(
            "memedit evaluate --model runs/demo --facts examples/facts.jsonl",
            "memedit evaluate --model runs/demo --base smollm2 --facts facts.jsonl"
            " --out runs/judged",
        ),
    ),
    "compare": Action(
        job=study_settings.CompareJob,
        run="workflows.compare:run_compare",
        show="show_comparison",
        summary="Editing methods side by side, on the same facts with the same evaluation.",
        examples=(
            "memedit compare --facts facts.jsonl --methods memit,memedit,rome,ft --edits 1,10,100"
            " --out runs/compared",
        ),
    ),
    "tune": Action(
        job=tuning_settings.TuneJob,
        run="workflows.tune:run_tune",
        show="show_tuning",
        summary="Search settings that fit a model, on half of some facts; judge on the rest.",
        examples=(
            "memedit tune --model my/model --facts facts.jsonl --out runs/tuned",
            "memedit edit --config runs/tuned/settings.yaml --facts facts.jsonl --out runs/first",
        ),
    ),
    "trace": Action(
        job=study_settings.TraceJob,
        run="workflows.trace:run_trace",
        show="show_trace",
        summary="Causal tracing: where the model keeps its facts, and which layers to edit.",
        examples=(
            "memedit trace --model smollm2 --facts facts.jsonl --out runs/traced",
            "memedit trace --facts facts.jsonl --limit 20 --set trace.facts=all --out runs/traced",
        ),
    ),
    "generate": Action(
        job=settings.GenerateJob,
        run="workflows.generate:run_generate",
        show="show_continuations",
        summary="Greedy continuations, to try a model.",
        examples=('memedit generate --model runs/demo "The Eiffel Tower is located in"',),
    ),
    "plan": Action(
        job=settings.PlanJob,
        run="workflows.plan:run_plan",
        show="show_plan",
        summary="What `edit` would do: layers, shards, memory, operations, time; runs nothing.",
        examples=("memedit plan --facts facts.jsonl --layers 5-9",),
    ),
    "verify": Action(
        job=version_settings.VerifyJob,
        run="workflows.verify:run_verify",
        show="show_problems",
        summary="Check a published version against its manifest and its base; reads every byte.",
        examples=(
            "memedit verify runs/demo",
            "memedit verify s3://models/capitals/versions/20261125T040000Z-1a2b --quick",
        ),
    ),
    "apply": Action(
        job=version_settings.ApplyJob,
        run="workflows.apply:run_apply",
        show="show_plan",
        summary="Add a published delta to its base model: the full checkpoint.",
        examples=(
            "memedit edit --facts facts.jsonl --format delta --out runs/delta",
            "memedit apply runs/delta --out runs/full",
        ),
    ),
    "history": Action(
        job=version_settings.HistoryJob,
        run="workflows.registry:run_history",
        show="show_history",
        summary="The versions of a registry, and which of them is CURRENT.",
        examples=("memedit history --registry runs/registry",),
    ),
    "show": Action(
        job=version_settings.ShowJob,
        run="workflows.registry:run_show",
        show="show_version",
        summary="What a version is made of, and its metrics; CURRENT if none is named.",
        examples=(
            "memedit show runs/demo",
            "memedit show 20261125T04 --registry s3://models/capitals",
        ),
    ),
    "diff": Action(
        job=version_settings.DiffJob,
        run="workflows.registry:run_diff",
        show="show_diff",
        summary="What is new in one version against another: facts, updates, metrics, settings.",
        examples=(
            "memedit diff --registry runs/registry",
            "memedit diff previous current --registry runs/registry",
            "memedit diff runs/first runs/second --json",
        ),
    ),
    "rollback": Action(
        job=version_settings.RollbackJob,
        run="workflows.registry:run_rollback",
        show="show_rollback",
        summary="Use an earlier version: move CURRENT to it, if it is whole.",
        examples=(
            "memedit rollback --registry runs/registry",
            "memedit rollback --registry runs/registry --to 20261125T04",
        ),
    ),
    "pin": Action(
        job=version_settings.PinJob,
        run="workflows.registry:run_pin",
        show="show_pin",
        summary="Keep a version, whatever gc is told.",
        examples=("memedit pin current --registry runs/registry --why 'in the paper'",),
    ),
    "gc": Action(
        job=version_settings.GcJob,
        run="workflows.registry:run_gc",
        show="show_gc",
        summary="Remove old versions and what killed runs left; without --run only says so.",
        examples=(
            "memedit gc --registry runs/registry --keep 5 --keep-days 30",
            "memedit gc --registry runs/registry --run",
        ),
    ),
    "ingest": Action(
        job=ingestion_settings.IngestJob,
        run="workflows.ingest:run_ingest",
        show="show_ingest",
        summary="One scheduled run: make the model say what a table of facts says.",
        examples=(
            "memedit ingest --config ingest.yaml --dry-run",
            "memedit ingest --config ingest.yaml --json",
            "memedit ingest --config ingest.yaml --every '0 2 * * *' --time-zone Europe/Berlin",
        ),
    ),
    "compact": Action(
        job=ingestion_settings.CompactJob,
        run="workflows.compact:run_compact",
        show="show_plan",
        summary="Make the version in use a base of its own; its facts become part of the weights.",
        examples=("memedit compact --registry runs/registry --out bases/2026-11",),
    ),
    "status": Action(
        job=submit_settings.StatusJob,
        run="workflows.submit:run_status",
        show="show_status",
        summary="What the runs on a Ray cluster are doing: all of memedit, or one.",
        examples=(
            "memedit status --address http://head:8265",
            "memedit status night-1 --address http://head:8265 --json",
        ),
    ),
    "logs": Action(
        job=submit_settings.LogsJob,
        run="workflows.submit:run_logs",
        show="show_log",
        summary="What a run on a Ray cluster has written, on stdout.",
        examples=("memedit logs night-1 --follow --address http://head:8265",),
    ),
    "stop": Action(
        job=submit_settings.StopJob,
        run="workflows.submit:run_stop",
        show="show_stopped",
        summary="End a run on a Ray cluster cleanly; submitted again, it goes on.",
        examples=("memedit stop night-1 --address http://head:8265",),
    ),
    "doctor": Action(
        job=settings.DoctorJob,
        run="workflows.doctor:run_doctor",
        show="show_checks",
        summary="What is installed, reachable and missing, with the remedy.",
        examples=("memedit doctor", "memedit doctor --full"),
    ),
}

FACTS: dict[str, Action] = {
    "list": Action(
        job=ingestion_settings.FactsListJob,
        run="workflows.fact_commands:run_list",
        show="show_facts",
        summary="The facts of a registry, and the state of each.",
        examples=(
            "memedit facts list --registry runs/registry",
            "memedit facts list --registry runs/registry --state any --contains Eiffel --json",
        ),
    ),
    "add": Action(
        job=ingestion_settings.FactsAddJob,
        run="workflows.fact_commands:run_add",
        show="show_changed_facts",
        summary="Add facts by hand; the next ingestion publishes them.",
        examples=("memedit facts add --registry runs/registry fixes.jsonl",),
    ),
    "retract": Action(
        job=ingestion_settings.FactsChangeJob,
        run="workflows.fact_commands:run_retract",
        show="show_changed_facts",
        summary="Take facts out; with the next ingestion they disappear from the model.",
        examples=("memedit facts retract --registry runs/registry 17 42 --why 'wrong source'",),
    ),
    "restore": Action(
        job=ingestion_settings.FactsChangeJob,
        run="workflows.fact_commands:run_restore",
        show="show_changed_facts",
        summary="Let facts count again that were retracted by hand, or quarantined.",
        examples=("memedit facts restore --registry runs/registry 17",),
    ),
    "why": Action(
        job=ingestion_settings.FactsWhyJob,
        run="workflows.fact_commands:run_why",
        show="show_why",
        summary="Where a fact is from, what became of it, and which versions say it.",
        examples=(
            "memedit facts why --registry runs/registry 17",
            "memedit facts why --registry runs/registry 'Eiffel Tower'",
        ),
    ),
    "rejects": Action(
        job=ingestion_settings.FactsRejectsJob,
        run="workflows.fact_commands:run_rejects",
        show="show_rejects",
        summary="The rows that no fact was made of, and why.",
        examples=(
            "memedit facts rejects --registry runs/registry",
            "memedit facts rejects --registry runs/registry --out inbox/mended.jsonl",
        ),
    ),
}
SUBMIT = Action(
    job=submit_settings.SubmitJob,
    run="workflows.submit:run_submit",
    show="show_submitted",
    summary=SUMMARY,
    examples=EXAMPLES,
)
RENDER = Action(
    job=render_settings.RenderJob,
    run="workflows.render:run_render",
    show="show_rendered",
    summary=RENDER_SUMMARY,
    examples=RENDER_EXAMPLES,
)
