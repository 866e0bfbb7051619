"""The plan against what a run really writes, on folders without weights, and on bad input."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from memedit.architecture import architecture_of
from memedit.checkpoint import Checkpoint
from memedit.cost import shape_of
from memedit.errors import InputError
from memedit.files import LocalFiles, file_of
from memedit.patching import LocalSink, write_patched
from memedit.progress import Silent
from memedit.shards import read_header
from tests.patches import each_row
from tests.tiny import HIDDEN, INNER, save_tiny, tiny_config, tiny_tokenizer
from workflows.cli import run
from workflows.outline import index_without_weights, outline
from workflows.plan import run_plan
from workflows.rate import measured_rate
from workflows.results import show_plan
from workflows.settings import PlanJob

RATE = 1e11
FACTS: list[dict[str, Any]] = [
    {
        "id": "a",
        "subject": "Eiffel Tower",
        "prompt": "The {} is located in the city of",
        "target_new": "Rome",
        "target_true": "Paris",
        "paraphrases": ["Where is the Eiffel Tower? In"],
        "neighbourhood": [{"prompt": "Big Ben is located in the city of", "target": "London"}],
    },
    {"subject": "Steve Jobs", "prompt": "I think that {} founded", "target_new": "Microsoft"},
]
TEXTS = ("The Eiffel Tower is located in the city of", "I think that Steve Jobs founded")
# GPT-NeoX 20B: its published sizes.
NEOX: dict[str, Any] = {
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "vocab_size": 50432,
    "max_position_embeddings": 2048,
    "dtype": "float16",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model")


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    return write(tmp_path / "facts.jsonl", *FACTS)


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def plan(model: Path, facts: Path, **fields: Any) -> Any:
    cache = facts.parent / "cache"
    fields = {"device": "cpu", **fields, "cache": cache, "matrix_gflops": RATE / 1e9}
    job = PlanJob(model=str(model), facts=str(facts), **fields)
    return run_plan(job, Silent())


@pytest.mark.parametrize("layers", [(1,), (0, 1, 2)])
def test_the_bytes_are_those_that_a_run_writes(
    model: Path, facts: Path, layers: tuple[int, ...], tmp_path: Path
) -> None:
    told = plan(model, facts, layers=layers)
    base = Checkpoint.open(model)
    staging = tmp_path / "staging"
    staging.mkdir()
    written = write_patched(
        base, LocalSink(staging), {n: each_row(lambda w: w + 1) for n in told["weights"]["names"]}
    )
    assert tuple(told["shards"]["rewritten"]) == written.rewritten
    assert told["shards"]["of"] == len(base.shards) > len(written.rewritten)

    def tensor_bytes(name: str) -> int:
        return sum(info.size_bytes for info in read_header(file_of(staging / name)).values())

    rewritten = sum(map(tensor_bytes, written.rewritten))
    assert told["shards"]["bytes_rewritten"] == rewritten
    assert told["shards"]["bytes_linked"] == sum(map(tensor_bytes, base.shards)) - rewritten
    for name in base.shards:
        linked = (staging / name).stat().st_ino == (model / name).stat().st_ino
        assert linked == (name not in told["shards"]["rewritten"])
    assert told["weights"]["bytes"] == len(layers) * HIDDEN * INNER * 4


def test_protected_prompts_are_counted_where_there_are_some(model: Path, facts: Path) -> None:
    """Each as long as the facts' own are on average."""
    lengths = [len(tiny_tokenizer()(text)["input_ids"]) for text in TEXTS]
    some = {"prompts": 40}
    more: dict[str, Any] = {"executor": "ray", "workers": 2, "protect": some, "layers": (1, 2)}
    told = plan(model, facts, **more)
    tokens = 40 * round(sum(lengths) / len(lengths))
    assert told["stages"]["protection"]["arithmetic"].startswith(f"{tokens} tokens × ")
    assert told["schedule"]["protection"].split(": ")[1].startswith("1 unit over 2 workers")
    assert told["moved"]["moments"].split(" = ")[1].startswith("2 × ")
    given = {"stats": str(write(facts.parent / "stats.json")), "solve": {"lam": 1.0, "sweeps": 2}}
    some_given = plan(model, facts, **(more | given))
    assert "statistics" not in some_given["stages"]
    assert {"sampling", "protection"} <= some_given["stages"].keys()
    assert "worker_statistics" in some_given["memory"]
    assert some_given["moved"]["moments"].split(" = ")[1].startswith("1 × ")
    for stage in ("keys", "solve"):
        assert some_given["stages"][stage]["arithmetic"].startswith("3 solves × (2 sweeps × (")
    assert "12 times one after the other" in some_given["schedule"]["keys"]
    assert " + 2 weights × " in some_given["memory"]["worker_keys"]
    assert " weights × " not in told["memory"]["worker_keys"]
    for none in ({"method": "memit"}, {"protect": {"prompts": 0}}):
        told = plan(model, facts, **(more | none))
        assert "protection" not in told["stages"] and "protection" not in told["schedule"]
        assert told["moved"]["moments"].split(" = ")[1].startswith("1 × ")


def test_it_says_what_edit_would_do(model: Path, facts: Path) -> None:
    told = plan(model, facts, layers=(1, 2), targets={"steps": 7}, solve={"lam": 30.0})
    assert told["facts"]["read"] == told["facts"]["accepted"] == 2
    assert told["method"]["layers"] == [1, 2]
    assert (told["method"]["steps"], told["method"]["lam"]) == (7, 30.0)
    assert told["method"]["contexts"] == 6
    stages = told["stages"]
    assert list(stages) == [
        *("sampling", "statistics", "protection", "evaluation"),
        *("targets", "keys", "solve", "repair", "files"),
    ]
    assert stages["targets"]["arithmetic"].startswith("6 steps × (4 × 1 blocks above × ")
    assert told["time"]["seconds"] == pytest.approx(
        sum(stage["seconds"] for stage in stages.values()), rel=0.01
    )
    json.dumps(told, allow_nan=False)


def test_what_is_there_already_costs_nothing(model: Path, facts: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    # The second document cannot be read, and need not be.
    corpus.write_text('{"text": "The tower stands in Germany."}\nnot JSON\n')
    told = plan(model, facts, corpus=str(corpus))
    assert "sampling" not in told["stages"]
    assert told["statistics"]["bytes"] == corpus.stat().st_size
    told = plan(model, facts, stats=str(tmp_path / "stats"), method="memit")
    assert "statistics" not in told["stages"]
    assert "driver_moments" not in told["memory"]
    # Held-out text is sampled all the same.
    assert told["stages"]["sampling"]["arithmetic"].startswith("2,048 tokens")
    corpus.write_text('{"text": "The tower stands in Germany."}\n')
    told = plan(model, facts, corpus=str(corpus), stats=str(tmp_path / "stats"))
    assert not {"sampling", "statistics"} & told["stages"].keys()


def test_nothing_is_written(model: Path, facts: Path) -> None:
    before = sorted(p for p in model.parent.rglob("*") if "cache" not in p.parts)
    plan(model, facts)
    assert sorted(p for p in model.parent.rglob("*") if "cache" not in p.parts) == before


def test_sampled_contexts_count_at_their_length(model: Path, facts: Path) -> None:
    short = plan(model, facts, contexts={"kind": "sampled", "sampled_tokens": 2})
    long = plan(model, facts, contexts={"kind": "sampled", "sampled_tokens": 20})
    bare = plan(model, facts, contexts={"kind": "none"})
    works = [told["stages"]["keys"]["gflop"] for told in (bare, short, long)]
    assert works == sorted(works) and len(set(works)) == 3
    assert short["method"]["contexts"] == 6 and bare["method"]["contexts"] == 1


def test_workers_divide_time_and_keys(model: Path, facts: Path) -> None:
    alone = plan(model, facts, executor="ray", workers=1)
    four = plan(model, facts, executor="ray", workers=4)
    assert four["schedule"]["workers"] == 4
    assert four["schedule"]["solve"].endswith("the driver alone")
    assert {"each_worker_mb", "driver_mb"} <= four["memory"].keys()
    here = plan(model, facts)
    assert "process_mb" in here["memory"] and not {"schedule", "moved"} & here.keys()
    models = [told["moved"]["models"] for told in (alone, four)]
    assert "4 × 1 workers" in models[0] and "4 × 4 workers" in models[1]
    assert alone["moved"]["bytes"] < four["moved"]["bytes"]


def test_a_schedule_is_shorter_with_more_machines(model: Path, facts: Path) -> None:
    """Whose rate is that of one worker; workers of one machine share it."""
    far: dict[str, Any] = {"executor": "ray", "address": "head:6379", "matrix_gflops": 0.01}
    one, four = (plan(model, facts, workers=n, **far) for n in (1, 4))
    near = plan(model, facts, workers=4, executor="ray", matrix_gflops=0.01)
    assert one["time"]["seconds"] == four["time"]["seconds"] < near["time"]["seconds"]
    assert one["schedule"]["seconds"] == pytest.approx(one["time"]["seconds"], rel=0.01)
    assert four["schedule"]["seconds"] < one["schedule"]["seconds"]


def test_repair_is_part_of_the_plan(model: Path, facts: Path) -> None:
    one, two = (plan(model, facts, method="memedit", repair={"rounds": n}) for n in (1, 2))
    plain = plan(model, facts, method="memedit", repair={"rounds": 0})
    assert "repair" not in plain["stages"]
    gflop = {name: stage["gflop"] for name, stage in one["stages"].items() if name != "files"}
    assert gflop["repair"] == pytest.approx(0.2 * gflop["targets"], rel=0.01)
    for name in ("keys", "solve"):
        once = plain["stages"][name]["gflop"]
        assert gflop[name] == pytest.approx(2 * once, rel=0.01)
        assert two["stages"][name]["gflop"] == pytest.approx(3 * once, rel=0.01)
    files = [told["stages"]["files"]["bytes"] for told in (plain, one, two)]
    assert files[2] - files[1] == files[1] - files[0] == one["model"]["bytes"]
    assert "2 × " in two["memory"]["driver_updates"] != plain["memory"]["driver_updates"]
    many: dict[str, Any] = {"targets": {"tokens_per_batch": 1}}  # a unit for each fact
    spread = plan(model, facts, method="memedit", executor="ray", workers=2, **many)
    units = int(spread["schedule"]["targets"].split(": ")[1].split()[0])
    repaired = spread["schedule"]["repair"]
    assert f": {-(-units // 5)} unit" in repaired and "2 times one after the other" in repaired
    with pytest.raises(InputError, match="not planned"):
        plan(model, facts, method="rome")


def test_gpus_of_a_worker_share_the_weights(model: Path, facts: Path) -> None:
    spread: dict[str, Any] = {"executor": "ray", "device": "auto"}
    one = plan(model, facts, gpus_per_worker=1.0, **spread)["memory"]
    two = plan(model, facts, gpus_per_worker=2.0, **spread)["memory"]
    assert "each_gpu_mb" not in one
    assert two["each_gpu_mb"] < two["each_worker_mb"] == one["each_worker_mb"]
    assert "MB / 2 GPUs" in two["each_gpu_arithmetic"]


def neox_folder(folder: Path) -> Path:
    """A 20B model as a hub page shows it: config, index, tokenizer; weights elsewhere."""
    folder.mkdir()
    config = AutoConfig.for_model("gpt_neox", **NEOX)
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        names = list(_neox_names(config))
    total = 20_554_567_680 * 2  # its parameters in float16
    weight_map = {n: f"model-{1 + i * 46 // len(names):05d}-of-00046.safetensors"
                  for i, n in enumerate(names)}  # fmt: skip
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _neox_names(config: Any) -> list[str]:
    from memedit.architecture import skeleton

    names = []
    for name in skeleton(config).state_dict():
        if ".layers.0." in name:
            names += [name.replace(".0.", f".{layer}.", 1) for layer in range(44)]
        else:
            # The head has another name in checkpoints of this family.
            names.append("embed_out.weight" if name == "lm_head.weight" else name)
    return sorted(names)


def test_a_model_of_20_billion_is_planned_without_its_weights(tmp_path: Path, facts: Path) -> None:
    folder = neox_folder(tmp_path / "neox")
    told = plan(folder, facts, dtype="bfloat16")
    assert told["model"]["parameters"] == 20_554_567_680
    assert told["model"]["sizes_from"].startswith("config.json and the index")
    assert told["model"]["bytes"] == 2 * told["model"]["parameters"]
    assert told["method"]["layers"] == [6, 7, 8, 9, 10]
    assert told["weights"]["shape"] == "6144 × 24576"
    assert told["weights"]["bytes"] == 5 * 6144 * 24576 * 2
    assert told["weights"]["dtype"] == "float16"
    shards = told["shards"]
    assert shards["of"] == 46 and 1 <= len(shards["rewritten"]) <= 5
    assert shards["bytes_rewritten"] + shards["bytes_linked"] == told["model"]["bytes"]
    # One second moment of 24,576² numbers of eight bytes at a time.
    assert told["memory"]["driver_moments"].startswith("4,832 MB = ")
    assert told["memory"]["worker_model"].startswith("41,110 MB = ")


def test_an_outline_is_the_checkpoint_without_its_bytes(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "gpt2")
    whole = Checkpoint.open(folder)
    assert index_without_weights(LocalFiles(folder)) is None
    for shard in whole.shards:
        (folder / shard).unlink()
    index = index_without_weights(LocalFiles(folder))
    assert index is not None
    config = tiny_config("gpt2", dtype=torch.float32)
    drawn = outline(LocalFiles(folder), config, index)
    assert drawn.shards == whole.shards
    for name in whole.names:
        theirs, ours = whole.info(name), drawn.info(name)
        assert (ours.shape, ours.dtype, ours.shard) == (theirs.shape, theirs.dtype, theirs.shard)
        assert ours.size_bytes == theirs.size_bytes
    shape = shape_of(config, architecture_of(config))
    assert drawn.size_bytes == 4 * shape.parameters


def refused(*arguments: object) -> str:
    with pytest.raises(InputError) as caught:
        plan(*arguments)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_bad_input_is_refused_as_edit_refuses_it(model: Path, facts: Path, tmp_path: Path) -> None:
    assert "no such file" in refused(model, tmp_path / "none.jsonl")
    assert "no such folder" in refused(tmp_path / "nowhere" / "at all", facts)
    first = write(
        tmp_path / "first.jsonl", {"subject": "a", "prompt": "{} is", "target_new": "Rome"}
    )
    assert f"{first}:1 [subject]" in refused(model, first)
    with pytest.raises(InputError, match="outside the model"):
        plan(model, facts, layers=(99,))
    with pytest.raises(InputError, match="no such file"):
        plan(model, facts, corpus=str(tmp_path / "none.txt"))
    with pytest.raises(InputError, match="too few for the statistics"):
        plan(model, facts, moments={"tokens": 10, "window": 8})
    # One shard of several is missing: a broken download, not a folder without weights.
    shards = Checkpoint.open(model).shards
    (model / shards[0]).rename(tmp_path / "away")
    assert "is missing" in refused(model, facts)
    (model / shards[0]).write_bytes((tmp_path / "away").read_bytes()[:-8])
    assert "truncated" in refused(model, facts)


def test_nan_in_an_edited_weight_is_found(model: Path, facts: Path) -> None:
    name = plan(model, facts, layers=(1,))["weights"]["names"][0]
    info = Checkpoint.open(model).info(name)
    with (model / info.shard).open("r+b") as file:
        file.seek(info.offset)
        file.write(b"\xff\xff\xff\xff")
    with pytest.raises(InputError, match="NaN"):
        plan(model, facts, layers=(1,))


def test_skipped_rows_are_told_with_their_reasons(model: Path, tmp_path: Path) -> None:
    facts = write(
        tmp_path / "mixed.jsonl",
        *FACTS,
        {"subject": "a", "prompt": "{} is", "target_new": "Rome"},
        {"subject": "Ben", "prompt": "Big {} is", "target_new": "  "},
    )
    told = plan(model, facts, on_bad_row="skip")["facts"]
    assert (told["read"], told["accepted"], told["rejected"]) == (4, 2, 2)
    assert [reason.split(":")[0] for reason in told["reasons"]] == ["row 3", "row 4"]


def test_the_command_prints_one_object(
    model: Path, facts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", "--model", str(model), "--facts", str(facts), "--device", "cpu"]
    assert run([*arguments, "--json", "--cache", str(facts.parent / "cache")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["time"]["matrix_gflop_per_s"] > 0
    assert told["weights"]["shape"] == f"{HIDDEN} × {INNER}"
    assert run([*arguments, "--layers", "77"]) == 2


def test_the_table_fits_80_columns(
    model: Path, facts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    told = plan(model, facts)
    stream = io.StringIO()
    show_plan(told, stream)
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    shown = " ".join(" ".join(lines).split())
    for text in ("facts accepted", "shards bytes rewritten", "stages targets arithmetic"):
        assert text in shown
    assert told["stages"]["solve"]["arithmetic"].split(" = ")[0] in shown


def test_the_rate_is_of_the_device() -> None:
    assert measured_rate("cpu", torch.float32, seconds=0.01) > 1e8
    with pytest.raises(InputError, match="cannot compute on"):
        measured_rate("cuda:99", torch.float32, seconds=0.01)
