"""Bad input to `memedit edit`: exit code 2, a message that names the place, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import (
    BOS_ID,
    EOS_ID,
    HEADS,
    HIDDEN,
    INNER,
    LAYERS,
    POSITIONS,
    VOCAB,
    save_tiny,
    tiny_tokenizer,
)
from tests.workflows.runs import (
    FACTS,
    Ran,
    contents,
    edit,
    memedit,
    quick,
    without_plots,
    write_rows,
)
from workflows.fields import LARGEST_SEED

EDITED = "model.layers.1.mlp.down_proj.weight"
UNEDITED = "model.layers.3.self_attn.o_proj.weight"


@dataclass(kw_only=True)
class World:
    """A job that would go well; a case of bad input changes one thing in it."""

    folder: Path
    base: Path
    facts: Path
    out: Path
    cache: Path
    more: list[object] = field(default_factory=list)

    def run(self) -> Ran:
        return edit(self.base, self.facts, self.out, self.cache, *self.more)

    def rows(self, *rows: Mapping[str, Any] | str) -> None:
        write_rows(self.facts, rows)

    def row(self, **changes: Any) -> None:
        """The second of three rows is changed; a value of None takes the field out."""
        row = {k: v for k, v in (FACTS[1] | changes).items() if v is not None}
        self.rows(FACTS[0], row, FACTS[2])

    def look(self, command: str) -> Ran:
        """A command that publishes nothing, over the same model and facts."""
        arguments = ["--model", self.base, "--cache", self.cache, "--json"]
        if command == "generate":
            return memedit(command, *arguments, "Rome is", *self.more)
        layers = ["--layers", "1-2", "--matrix-gflops", "100"] if command == "plan" else []
        return memedit(command, *arguments, *layers, "--facts", self.facts, *self.more)

    def set_weight(self, name: str, value: float) -> None:
        index = json.loads((self.base / "model.safetensors.index.json").read_text())
        shard = self.base / index["weight_map"][name]
        tensors = load_file(shard)
        tensors[name][3, 5] = value
        save_file(tensors, shard, metadata={"format": "pt"})

    def index(self, change: Callable[[dict[str, str]], None]) -> None:
        path = self.base / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def world(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    without_plots(monkeypatch)
    base = tmp_path / "base"
    shutil.copytree(saved, base)
    facts = write_rows(tmp_path / "facts.jsonl")
    return World(
        folder=tmp_path, base=base, facts=facts, out=tmp_path / "out", cache=tmp_path / "cache"
    )


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is wrong, and what the error must say."""

    change: Callable[[World], object]
    says: str
    """Part of the message."""
    source: str = ""
    """The end of the source's path."""
    row: int | None = None
    field: str | None = None


FACT_CASES = {
    "no such file": Case(
        change=lambda w: w.facts.unlink(), says="no such file", source="facts.jsonl"
    ),
    "column missing": Case(
        change=lambda w: w.row(target_new=None), says="target_new", source="facts.jsonl", row=2
    ),
    "not JSON": Case(
        change=lambda w: w.rows(FACTS[0], "", "{not json"),
        says="not JSON",
        source="facts.jsonl",
        row=3,
    ),
    "no {} and no subject": Case(
        change=lambda w: w.row(prompt="It is in"), says="neither {}", row=2, field="prompt"
    ),
    "empty target": Case(
        change=lambda w: w.row(target_new=""), says="is empty", row=2, field="target_new"
    ),
    "whitespace target": Case(
        change=lambda w: w.row(target_new=" \t "), says="whitespace", row=2, field="target_new"
    ),
    "two targets": Case(
        change=lambda w: w.rows(*FACTS, FACTS[1] | {"target_new": "Spanish"}),
        says="Spanish",
        source="facts.jsonl",
        row=2,
        field="target_new",
    ),
    "no row": Case(change=lambda w: w.rows(), says="no row", source="facts.jsonl"),
    "unknown suffix": Case(
        change=lambda w: setattr(w, "facts", w.facts.rename(w.base / "facts.xls")),
        says="one of .jsonl",
        source="facts.xls",
    ),
}


def _truncate(world: World) -> None:
    shard = next(world.base.glob("model-00002*"))
    shard.write_bytes(shard.read_bytes()[:-100])


def _corrupt(world: World) -> None:
    shard = next(world.base.glob("model-00002*"))
    shard.write_bytes(b"\xff" * 40 + shard.read_bytes()[40:])


def _pickle_only(world: World) -> None:
    for file in world.base.glob("model*"):
        file.unlink()
    (world.base / "pytorch_model.bin").write_bytes(b"pickled")


def _fill_out(world: World) -> None:
    world.out.mkdir()
    (world.out / "mine.txt").write_text("keep me")


def _unlocatable_subject(world: World) -> None:
    path = world.base / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "Zyx"}, "content": ""}
    path.write_text(json.dumps(tokenizer))
    world.row(subject="Zyx", prompt="{} is in", paraphrases=None)


def _small_corpus(world: World) -> None:
    corpus = write_rows(world.folder / "corpus.jsonl", [{"text": "Paris is in France."}] * 4)
    world.more += ["--corpus", corpus]


def _more(*flags: str) -> Callable[[World], object]:
    return lambda world: world.more.extend(flags)


OTHER_CASES = {
    "layer outside": Case(change=_more("--layers", "3-7"), says="0 to 3", field="layers"),
    "out not empty": Case(change=_fill_out, says="not empty", source="out", field="out"),
    "out is a file": Case(
        change=lambda w: w.out.write_text("x"), says="is a file", source="out", field="out"
    ),
    "no model": Case(
        change=lambda w: setattr(w, "base", w.folder / "nowhere"), says="", source="nowhere"
    ),
    "no safetensors": Case(change=_pickle_only, says="safetensors only", source="base"),
    "truncated shard": Case(change=_truncate, says="", source="model-00002-of-00006.safetensors"),
    "corrupt shard": Case(change=_corrupt, says="", source="model-00002-of-00006.safetensors"),
    "index leads outside": Case(
        change=lambda w: w.index(lambda m: m.update({EDITED: "../../x"})),
        says="../../x",
        source="model.safetensors.index.json",
        field=EDITED,
    ),
    "index leads to a file outside": Case(
        change=lambda w: w.index(lambda m: m.update({EDITED: "../x.safetensors"})),
        says="../x.safetensors",
        source="model.safetensors.index.json",
        field=EDITED,
    ),
    "NaN in an edited weight": Case(
        change=lambda w: w.set_weight(EDITED, float("nan")), says="NaN", field=EDITED
    ),
    "NaN in another weight": Case(
        change=lambda w: w.set_weight(UNEDITED, float("nan")), says="NaN", field=UNEDITED
    ),
    "infinity in another weight": Case(
        change=lambda w: w.set_weight(UNEDITED, float("inf")), says="infinity", field=UNEDITED
    ),
    "unlocatable subject": Case(
        change=_unlocatable_subject, says="Zyx", source="facts.jsonl", row=2, field="subject"
    ),
    "corpus too small": Case(
        change=_small_corpus, says="too small", source="corpus.jsonl", field="corpus"
    ),
    "no such corpus": Case(change=_more("--corpus", "none.parquet"), says="", source="parquet"),
    "no such setting": Case(change=_more("--set", "targets.stepz=3"), says="stepz"),
    "impossible setting": Case(change=_more("--set", "targets.steps=0"), says="steps"),
    "no such gate": Case(change=_more("--gate", "beauty>3"), says="beauty"),
    "sampled contexts that no model reads": Case(
        change=_more("--set", "contexts.kind=sampled", "--set", "contexts.sampled_tokens=99999"),
        says="99999",
        field="contexts.sampled_tokens",
    ),
    "gate on what is not measured": Case(
        change=_more("--gate", "drift_top1>=90", "--set", "evaluation.drift_prompts=0"),
        says="drift_top1>=90 can never be met",
        field="gate",
    ),
    "context without {}": Case(
        change=_more("--set", "contexts.templates=[Hello]"),
        says="{}",
        field="contexts.templates",
    ),
    "no such architecture setting": Case(
        change=_more("--set", "architecture.rewrit=mlp"), says="rewrit"
    ),
    "no such stats": Case(change=_more("--stats", "none"), says="no such folder", source="none"),
    "two places": Case(change=_more("--registry", "r"), says="not both", field="registry"),
    "no place that can be read": Case(
        change=_more("--stats", "gs://bucket/x"), says="s3://bucket/prefix", field="stats"
    ),
    "no such device": Case(change=_more("--device", "gpu"), says="gpu", field="device"),
    "seed too large": Case(
        change=_more("--seed", "100000000000000000"), says="at most 4294967295", field="seed"
    ),
    "run id with a slash": Case(change=_more("--run-id", "../x"), says="../x", field="run_id"),
}

CASES = FACT_CASES | OTHER_CASES


@pytest.mark.parametrize("name", CASES)
def test_bad_input(world: World, name: str) -> None:
    case = CASES[name]
    case.change(world)
    before = contents(world.folder)
    ran = world.run()
    assert ran.code == 2, ran.stderr
    error = ran.error
    assert case.says in error["message"]
    assert (error.get("source") or "").endswith(case.source)
    if case.row is not None:
        assert error["row"] == case.row
    if case.field is not None:
        assert error["field"] == case.field
    # People read the same place, and no traceback.
    assert error["message"].splitlines()[0] in ran.stderr and "Traceback" not in ran.stderr
    for part in (case.source, case.field):
        assert (part or "") in ran.stderr
    check_nothing_written(world, before)


def check_nothing_written(world: World, before: dict[str, bytes]) -> None:
    """No file is new but what was kept for later runs, and no folder or lock beside `out`."""
    after = contents(world.folder)
    assert {n: b for n, b in after.items() if not n.startswith("cache/")} == before
    assert not [n for n in after if n.endswith(".partial")]
    beside = {p.name for p in world.folder.iterdir()} - {"cache", "out"}
    assert beside <= {"base", "facts.jsonl", "corpus.jsonl"}
    assert world.out.exists() == any(n.split("/")[0] == "out" for n in before)


def test_nothing_is_written_even_where_out_is_deep(world: World) -> None:
    world.out = world.folder / "a" / "b" / "out"
    world.row(target_new="")
    assert world.run().code == 2
    assert not (world.folder / "a").exists()


def test_out_is_only_looked_at(world: World) -> None:
    """A link to a folder with something in it is not followed and emptied."""
    (world.folder / "theirs").mkdir()
    (world.folder / "theirs" / "file").write_text("keep me")
    world.out.symlink_to(world.folder / "theirs")
    assert world.run().code == 2
    assert (world.folder / "theirs" / "file").read_text() == "keep me"


def test_all_bad_rows_are_named_at_once(world: World) -> None:
    world.rows(FACTS[0], "{", FACTS[1] | {"subject": " "}, FACTS[2] | {"target_new": 3})
    message = world.run().error["message"]
    assert "2 more bad rows" in message and "row 3" in message and "row 4" in message


def test_skipping_leaves_the_rest(world: World) -> None:
    """Rows that only the tokenizer can refuse go to the rejects, too."""
    _unlocatable_subject(world)
    world.more += ["--on-bad-row", "skip"]
    ran = world.run()
    assert ran.result["facts"]["accepted"] == 2
    (reject,) = (world.out / "rejects.jsonl").read_text().splitlines()
    assert json.loads(reject)["row"] == 2 and json.loads(reject)["raw"]["subject"] == "Zyx"


def test_skipping_everything_is_an_error(world: World) -> None:
    world.rows("{", "[]")
    world.more += ["--on-bad-row", "skip"]
    before = contents(world.folder)
    ran = world.run()
    assert (ran.code, ran.error["row"]) == (2, 1)
    assert "none of 2 rows" in ran.error["message"]
    check_nothing_written(world, before)


# --- Every command that reads facts or weights -------------------------------------------------


LONG = "Much was written of it in the year " + "7" * POSITIONS + " and the answer was"
LONG_ROWS: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": f"{LONG} {{}} is"},
    "paraphrases": {"paraphrases": ["Danielle Darrieux speaks", LONG]},
    "neighbourhood": {"neighbourhood": [{"prompt": LONG, "target": "English"}]},
}


@pytest.mark.parametrize("command", ["edit", "plan", "evaluate"])
@pytest.mark.parametrize("field", LONG_ROWS)
def test_texts_that_are_too_long_for_the_model(world: World, command: str, field: str) -> None:
    shutil.rmtree(world.base)
    save_tiny(world.base, "gpt2")
    world.row(**LONG_ROWS[field])
    before = contents(world.folder)
    ran = world.run() if command == "edit" else world.look(command)
    assert ran.code == 2, ran.stderr
    assert (ran.error["row"], ran.error["field"]) == (2, field)
    assert f"the model reads {POSITIONS}" in ran.error["message"]
    check_nothing_written(world, before)


def test_what_only_the_evaluation_asks_is_left_out_where_it_is_too_long(world: World) -> None:
    shutil.rmtree(world.base)
    save_tiny(world.base, "gpt2")
    short = {"prompt": "Danielle Darrieux lives in", "target": "France"}
    world.row(portability=[{"prompt": LONG, "target": "English"}, short], attributes=[LONG])
    ran = world.look("evaluate")
    assert ran.code == 0, ran.stderr
    judged = [fact for fact in ran.result["per_fact"] if fact["portability"]]
    assert [len(fact["portability"]) for fact in judged] == [1]
    assert not any(fact["attribute"] for fact in ran.result["per_fact"])
    assert world.look("plan").code == 0


def test_a_subject_too_long_for_the_text_that_must_not_move(world: World) -> None:
    """Alone it fits with its target; "{} is a" does not."""
    shutil.rmtree(world.base)
    save_tiny(world.base, "gpt2")
    encode = tiny_tokenizer().encode
    subject = "In " + "7" * (POSITIONS - len(encode("In ")) - len(encode(" Rome")))
    world.row(subject=subject, prompt="{}", target_new="Rome", target_true=None, paraphrases=None)
    assert world.look("evaluate").code == 0
    world.more += ["--set", "contexts.kind=none"]
    ran = world.run()
    assert (ran.code, ran.error["row"]) == (2, 2)
    assert f"the model reads {POSITIONS}" in ran.error["message"]


@pytest.mark.parametrize("command", ["plan", "evaluate", "generate"])
@pytest.mark.parametrize("name", [EDITED, UNEDITED])
def test_nan_is_found_outside_of_edits_too(world: World, command: str, name: str) -> None:
    world.set_weight(name, float("nan"))
    ran = world.look(command)
    assert (ran.code, ran.error["field"]) == (2, name), ran.stderr
    assert "NaN" in ran.error["message"] and ran.error["source"].endswith(".safetensors")


def test_nan_in_the_base_of_an_evaluation(world: World, saved: Path) -> None:
    world.set_weight(UNEDITED, float("nan"))
    world.more += ["--model", saved, "--base", world.base]
    ran = world.look("evaluate")
    assert (ran.code, ran.error["field"]) == (2, UNEDITED)
    assert ran.error["source"].startswith(str(world.base))


# --- Families -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"), [("gemma2", "norm"), ("opt_post_norm", "norm"), ("mixtral", "expert")]
)
def test_families_that_cannot_be_edited(world: World, name: str, reason: str) -> None:
    shutil.rmtree(world.base)
    save_tiny(world.base, name)
    before = contents(world.folder)
    ran = world.run()
    assert ran.code == 2
    assert ran.error["kind"] == "UnsupportedModelError"
    assert reason in ran.error["message"] and "cannot be edited" in ran.error["message"]
    check_nothing_written(world, before)


def test_an_unknown_family_can_be_named(world: World) -> None:
    """The error says what to set; set as it says, the edit runs."""
    shutil.rmtree(world.base)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
    ids = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": EOS_ID}
    config = AutoConfig.for_model(
        "olmo", vocab_size=VOCAB, num_attention_heads=HEADS, **sizes, **ids
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(world.base, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(world.base)

    before = contents(world.folder)
    ran = world.run()
    assert (ran.code, ran.error["field"]) == (2, "architecture")
    message = ran.error["message"]
    assert "'olmo'" in message
    check_nothing_written(world, before)

    words = message.split()
    world.more += [w for i, w in enumerate(words) if "--set" in (w, words[i - 1])]
    assert len(world.more) == 4
    ran = world.run()
    assert ran.code == 0, ran.stderr
    assert (world.out / "memedit.json").exists()


def test_a_wrong_name_is_refused(world: World) -> None:
    """One that does not exist, and one whose output is not what is wanted."""
    for rewrite in ("mlp.nothing", "mlp.up_proj"):
        world.more = ["--set", f"architecture.rewrite={rewrite}"]
        ran = world.run()
        assert (ran.code, ran.error["field"]) == (2, "architecture.rewrite"), ran.stderr
        assert rewrite in ran.error["message"]
        assert not world.out.exists()


def test_the_flags_of_a_good_run_are_good(world: World) -> None:
    """Each case above changes one thing in a job that runs; this is the job."""
    assert "--json" in quick(world.base, world.cache)
    world.more += ["--seed", LARGEST_SEED]
    assert world.run().code == 0
    world.more.clear()
    for command in ("plan", "evaluate", "generate"):
        assert world.look(command).code == 0
