from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memedit.config import EditSettings, ProtectSettings, TargetSettings
from memedit.errors import InputError
from workflows.fields import ABOVE, AT_LEAST, AT_MOST, LARGEST_SEED, SECTIONS, parse_layers
from workflows.gates import parse_gate
from workflows.ingestion.settings import IngestJob
from workflows.jobfile import JOBS, load_job
from workflows.settings import (
    DoctorJob,
    EditJob,
    EvaluateJob,
    PlanJob,
    PublishJob,
    StatsJob,
)
from workflows.study_settings import TraceJob
from workflows.version_settings import ApplyJob

LEAST = {"facts": "facts.jsonl", "out": "out"}


def job_file(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_later_sources_win(tmp_path: Path) -> None:
    config = job_file(
        tmp_path, "facts: f.jsonl\nout: o\nseed: 1\nexecutor: ray\ntargets: {steps: 5, lr: 0.1}\n"
    )
    job = load_job(
        EditJob,
        config=config,
        flags={"seed": 2, "layers": "5-7"},
        assignments=["seed=3", "targets.lr=1e-2", "targets.clamp_norm_factor=4"],
    )
    assert (job.seed, job.executor, job.layers, job.device) == (3, "ray", (5, 6, 7), "auto")
    assert job.targets == {"steps": 5, "lr": 0.01, "clamp_norm_factor": 4.0}


def test_only_what_was_set_replaces_the_defaults_of_the_family() -> None:
    family = EditSettings(layers=(3, 4), targets=TargetSettings(steps=25, lr=0.1))
    job = load_job(EditJob, flags=LEAST, assignments=["targets.steps=20"])
    assert job.overrides() == {"method": "memedit", "targets": {"steps": 20}}
    settings = job.settings(family)
    assert settings == dataclasses.replace(
        family, method="memedit", targets=TargetSettings(steps=20, lr=0.1)
    )


def test_what_tells_one_edit_from_another_is_what_its_method_looks_at() -> None:
    def told(**more: Any) -> dict[str, object]:
        return EditSettings(layers=(1,), **more).of_method()

    other = ProtectSettings(prompts=7)
    assert told(method="memit") == told(method="memit", protect=other)
    assert told(method="memedit") != told(method="memedit", protect=other)
    # Versions of before the rules changed keep their names to themselves.
    assert told(method="memedit")["rules"] == 2 and "rules" not in told(method="memit")


def test_the_seed_reaches_every_section_that_sets_none() -> None:
    job = load_job(EditJob, flags={**LEAST, "seed": 7}, assignments=["moments.seed=1"])
    settings = job.settings(EditSettings())
    assert (settings.contexts.seed, settings.moments.seed) == (7, 1)


def test_the_largest_seed() -> None:
    assert load_job(EditJob, flags={**LEAST, "seed": LARGEST_SEED}).seed == LARGEST_SEED
    with pytest.raises(InputError, match=r"--seed \[seed\].*at most"):
        load_job(EditJob, flags={**LEAST, "seed": LARGEST_SEED + 1})


def test_locations_are_relative_to_the_job_file(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("text")
    (tmp_path / "smollm2").mkdir()
    config = job_file(tmp_path, "facts: f.jsonl\nout: /abs\ncorpus: corpus.txt\nmodel: smollm2\n")
    job = load_job(EditJob, config=config)
    assert (job.facts, job.out) == (str(tmp_path / "f.jsonl"), "/abs")
    assert (job.corpus, job.model) == (str(tmp_path / "corpus.txt"), "smollm2")


def test_flags_are_relative_to_the_working_directory(tmp_path: Path) -> None:
    config = job_file(tmp_path, "facts: f.jsonl\nout: o\n")
    assert load_job(EditJob, config=config, flags={"out": "o"}).out == "o"


PLACES = ("facts", "out", "registry", "stats", "artifacts", "delta", "version", "canary")
SOURCE = "source: {path: drop}\n"


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (command, field.name)
        for command, kind in JOBS.items()
        for field in dataclasses.fields(kind)
        if field.metadata["location"] == "path"
    ],
)
def test_a_place_is_a_path_or_lies_in_object_storage(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the job: made absolute from a file, as it is from a flag, s3:// always as it is."""
    assert name in PLACES
    monkeypatch.setenv("HOME", "/home/someone")
    kind = JOBS[command]
    least = {f.name: "x" for f in dataclasses.fields(kind) if f.metadata["required"]}
    if issubclass(kind, PublishJob) and name != "registry":
        least["out"] = "x"
    more = SOURCE if kind is IngestJob else ""
    for text, from_file, from_flag in (
        ("data/x", str(tmp_path / "data/x"), "data/x"),
        ("/abs/x", "/abs/x", "/abs/x"),
        ("~/x", "/home/someone/x", "/home/someone/x"),
        ("s3://bucket/a//b", "s3://bucket/a//b", "s3://bucket/a//b"),
    ):
        config = job_file(tmp_path, f"{name}: {text}\n{more}")
        others = {key: value for key, value in least.items() if key != name}
        assert getattr(load_job(kind, config=config, flags=others), name) == from_file
        config = job_file(tmp_path, more)
        flags = {**others, name: text}
        assert getattr(load_job(kind, config=config, flags=flags), name) == from_flag
    with pytest.raises(InputError, match=r"must be a path or s3://bucket/prefix.*gs://b/x") as no:
        load_job(kind, flags={**least, name: "gs://b/x"})
    assert no.value.field == name


def test_a_hugging_face_id_is_no_file(tmp_path: Path) -> None:
    config = job_file(tmp_path, "facts: f.jsonl\nout: o\nmodel: org/model\n")
    assert load_job(EditJob, config=config).model == "org/model"


def test_one_job_file_serves_several_commands(tmp_path: Path) -> None:
    config = job_file(tmp_path, "facts: f.jsonl\nout: o\ngate: [score>=80]\nsolve: {lam: 400}\n")
    assert load_job(EditJob, config=config).gates == (parse_gate("score>=80"),)
    assert load_job(PlanJob, config=config).solve == {"lam": 400.0}
    assert load_job(StatsJob, config=config).overrides() == {}
    assert load_job(EvaluateJob, config=config).facts == str(tmp_path / "f.jsonl")


def test_an_unknown_family_is_described_by_free_names() -> None:
    job = load_job(EditJob, flags=LEAST, assignments=["architecture.blocks=model.layers"])
    assert job.architecture == {"blocks": "model.layers"}


@pytest.mark.parametrize(
    ("text", "field", "hint"),
    [
        ("modle: x", "modle", "did you mean 'model'"),
        ("targets: {step: 3}", "targets.step", "did you mean 'steps'"),
        ("targets: {steps: many}", "targets.steps", "integer"),
        ("targets: {steps: true}", "targets.steps", "integer"),
        ("targets: {steps: 0}", "targets.steps", "at least 2"),
        ("targets: {lr: .nan}", "targets.lr", "finite"),
        ("targets: {lr: 0}", "targets.lr", "above 0"),
        ("targets: 3", "targets", "section"),
        ("contexts: {kind: sample}", "contexts.kind", "did you mean 'sampled'"),
        ("executor: rey", "executor", "did you mean 'ray'"),
        ("layers: [5, x]", "layers", "5-9"),
        ("layers: 9-5", "layers", "5-9"),
        ("gate: quality>=3", "gate", "Allowed: attribute, consistency, drift_kl"),
        ("workers: 0", "workers", "at least 1"),
        ("out: gs://bucket/x", "out", "must be a path or s3://bucket/prefix"),
        ("registry: https://host/x", "registry", "must be a path or s3://bucket/prefix"),
        ("cache: s3://bucket/x", "cache", "local path"),
        ("out: ''", "out", "empty"),
        ("stats: ' '", "stats", "empty"),
        ("format: zip", "format", "Allowed: delta, full, lora"),
        ("lora_rank: 0", "lora_rank", "at least 1"),
        ("storage: {server_side_encryption: kms}", "storage.server_side_encryption", "'aws:kms'"),
        ("storage: {acl: private}", "storage.acl", "no such field"),
        ("run_id: ../x", "run_id", "letters"),
        ("seed: -1", "seed", "at least 0"),
        ("seed: 4294967296", "seed", "at most 4294967295"),
        (f"seed: {10**400}", "seed", "at most 4294967295"),
        ("contexts: {seed: 100000000000000000}", "contexts.seed", "at most 4294967295"),
        ("moments: {seed: 100000000000000000}", "moments.seed", "at most 4294967295"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(
    tmp_path: Path, text: str, field: str, hint: str
) -> None:
    config = job_file(tmp_path, text + "\n")
    with pytest.raises(InputError) as caught:
        load_job(EditJob, config=config, flags={"facts": "f"})
    assert (caught.value.source, caught.value.field) == (str(config), field)
    assert hint in caught.value.message


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "just text", "a: b: c"])
def test_a_job_file_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"job\.yaml"):
        load_job(EditJob, config=job_file(tmp_path, text))


def test_a_job_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the job file"):
        load_job(EditJob, config=tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "text", ["targets.steps", "a.b.c=1", "=1", "targets.=1", "seed.x=1", "nothing=1", "targets=1"]
)
def test_a_wrong_assignment_is_named(text: str) -> None:
    with pytest.raises(InputError, match="--set"):
        load_job(EditJob, flags=LEAST, assignments=[text])


def test_a_required_field_that_is_missing_is_named() -> None:
    with pytest.raises(InputError, match=r"\[facts\].*--facts"):
        load_job(EditJob, flags={"out": "o"})


@pytest.mark.parametrize("kind", [EditJob, ApplyJob])
def test_a_version_goes_to_one_place(kind: type[PublishJob], tmp_path: Path) -> None:
    flags = {"facts": "f"} if kind is EditJob else {"delta": "d"}
    with pytest.raises(InputError, match=r"\[out\].*--out or --registry"):
        load_job(kind, flags=flags)
    with pytest.raises(InputError, match=r"\[registry\]: give this or out, not both"):
        load_job(kind, config=job_file(tmp_path, "out: o\nregistry: r\n"), flags=flags)
    for name in ("out", "registry"):
        job = load_job(kind, flags={**flags, name: "p"})
        assert {job.out, job.registry} == {"p", None} and getattr(job, name) == "p"


def test_objects_are_stored_as_the_section_says(tmp_path: Path) -> None:
    text = "storage: {storage_class: STANDARD_IA, server_side_encryption: aws:kms}\n"
    job = load_job(
        StatsJob,
        config=job_file(tmp_path, text),
        flags={"out": "o"},
        assignments=["storage.kms_key_id=k"],
    )
    assert job.storage_settings.arguments == {
        "ServerSideEncryption": "aws:kms",
        "SSEKMSKeyId": "k",
        "StorageClass": "STANDARD_IA",
    }
    assert load_job(StatsJob, flags={"out": "o"}).storage_settings.arguments == {}


def test_a_doctor_needs_nothing() -> None:
    assert load_job(DoctorJob) == DoctorJob()


def test_the_bounds_name_fields_that_exist() -> None:
    for path in [*AT_LEAST, *ABOVE, *AT_MOST]:
        section, name = path.split(".")
        assert name in {f.name for f in dataclasses.fields(SECTIONS[section])}


def test_the_defaults_pass_their_own_check() -> None:
    """What `--help` shows as a default can be written into a job file."""
    for name, kind in SECTIONS.items():
        of = EditJob if hasattr(EditJob(**LEAST), name) else TraceJob
        for field in dataclasses.fields(kind):
            value = getattr(kind(), field.name)
            if value is not None and not isinstance(value, tuple):
                job = load_job(of, flags=LEAST, assignments=[f"{name}.{field.name}={value}"])
                assert getattr(job, name) == {field.name: value}


def test_every_job_field_has_a_help_text() -> None:
    for kind in JOBS.values():
        for field in dataclasses.fields(kind):
            assert field.metadata["help"], field.name


@given(st.sets(st.integers(0, 200), min_size=1))
def test_layers_are_sorted_and_unique_however_written(layers: set[int]) -> None:
    wanted = tuple(sorted(layers))
    assert parse_layers(",".join(map(str, reversed(wanted)))) == wanted
    assert parse_layers(list(wanted) * 2) == wanted
    assert parse_layers(f"{wanted[0]}-{wanted[-1]}") == tuple(range(wanted[0], wanted[-1] + 1))


def test_the_cache_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEMEDIT_CACHE", str(tmp_path))
    assert load_job(DoctorJob).cache_folder == tmp_path
    assert load_job(DoctorJob, flags={"cache": "/x"}).cache_folder == Path("/x")


@pytest.mark.parametrize(
    ("text", "value", "met"),
    [
        ("score>=80", 80.0, True),
        ("score >= 80.5", 80.0, False),
        ("score>80", 80.0, False),
        ("drift_kl<0.2", 0.1, True),
        ("perplexity<=20", 20.1, False),
    ],
)
def test_gates_compare(text: str, value: float, met: bool) -> None:
    gate = parse_gate(text)
    assert (gate.check({gate.metric: value}) is None) is met


@pytest.mark.parametrize(
    ("text", "metrics", "models", "met"),
    [
        ("all.efficacy>=95", {"all.efficacy": 95.0, "efficacy": 1.0}, {}, True),
        ("new.efficacy>=95", {"new.efficacy": 94.0, "efficacy": 99.0}, {}, False),
        ("perplexity<=base*1.1", {"perplexity": 10.9}, {"base": {"perplexity": 10.0}}, True),
        ("perplexity<=base*1.1", {"perplexity": 11.1}, {"base": {"perplexity": 10.0}}, False),
        ("score>=previous", {"score": 80.0}, {"previous": {"score": 80.0}}, True),
        ("score>previous", {"score": 80.0}, {"previous": {"score": 80.0}}, False),
        ("score>=previous-2", {"score": 78.0}, {"previous": {"score": 80.0}}, True),
        ("score >= base + 5", {"score": 84.0}, {"base": {"score": 80.0}}, False),
        (
            "all.score>=previous-2",
            {"all.score": 79.0},
            {"previous": {"score": 99.0, "all.score": 80.0}},
            True,
        ),
        ("score>=previous-2", {"score": 1.0}, {"base": {"score": 80.0}}, True),
        ("score>=previous-2", {"score": 1.0}, None, True),
    ],
)
def test_gates_compare_groups_and_models(
    text: str,
    metrics: dict[str, float],
    models: dict[str, dict[str, float]] | None,
    met: bool,
) -> None:
    gate = parse_gate(text)
    assert (gate.check(metrics, models) is None) is met
    assert parse_gate(str(gate)) == gate


def test_a_gate_that_is_missed_says_what_was_wanted() -> None:
    gate = parse_gate("all.score>=previous-2")
    reason = gate.check({"all.score": 70.0}, {"previous": {"all.score": 80.0}})
    assert reason == ("gate all.score>=previous-2 is not met: all.score is 70, and must be >=78")
    assert gate.check({"score": 90.0}, {"previous": {"all.score": 80.0}}) == (
        "gate all.score>=previous-2: all.score was not measured"
    )
    for other in ({}, {"all.score": None}, {"all.score": float("nan")}):
        assert gate.check({"all.score": 70.0}, {"previous": other}) == (
            "gate all.score>=previous-2: all.score of previous was not measured"
        )


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_metric_that_was_not_measured_meets_no_gate(value: float | None) -> None:
    assert "not measured" in (parse_gate("score>=0").check({"score": value}) or "")
    assert "not measured" in (parse_gate("score>=0").check({}) or "")


@pytest.mark.parametrize(
    "text",
    [
        *("score", "score=80", "score>=x", "score>=nan", ">=80", "scor>=80", "score>=inf"),
        *("old.score>=80", ".score>=80", "all.>=80", "all.scor>=80", "a.b.score>=80"),
        *("score>=bas", "score>=base/2", "score>=base*", "score>=base-x", "score>=base*nan"),
        *("score>=base previous", "score>=2*base", "score>=base.score", "score>=Base", ""),
    ],
)
def test_a_wrong_gate_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_gate(text)


def test_a_flag_for_the_place_wins_over_the_other_one_in_the_job_file(tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    config.write_text("out: there")
    job = load_job(EditJob, config=config, flags={"facts": "f", "registry": "s3://models/r"})
    assert (job.out, job.registry) == (None, "s3://models/r")
    config.write_text("registry: there")
    job = load_job(EditJob, config=config, flags={"facts": "f"}, assignments=["out=here"])
    assert (job.out, job.registry) == ("here", None)
    for wrong in ({"out": "a", "registry": "b"},):
        with pytest.raises(InputError, match=r"\[registry\].*not both"):
            load_job(EditJob, flags={"facts": "f", **wrong})
