"""`memedit edit --format lora`, loaded by PEFT itself; and what is said of a truncated adapter."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from memedit.checkpoint import Checkpoint
from memedit.lora import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from memedit.manifest import MANIFEST_NAME, Manifest, read_manifest
from tests.s3.objects import Objects
from tests.s3.server import SeaweedServer
from tests.tiny import save_tiny
from tests.workflows.runs import (
    FACTS,
    PLAIN,
    Ran,
    contents,
    measured,
    memedit,
    quick,
    setting,
    without_plots,
    write_rows,
)

# The warning is of PEFT's own making, about an attribute of transformers.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]
SETTINGS = setting("targets.steps=6", "evaluation.drift_prompts=20")
EXPORTS = {
    "full": ("--format", "full"),
    "lora": ("--format", "lora"),
    "thin": ("--format", "lora", "--lora-rank", "1"),
}


@dataclass(frozen=True, kw_only=True)
class Exports:
    """One edit as a checkpoint, as an exact adapter (`lora`) and as one of rank 1 (`thin`)."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    def edit(self, out: object, *more: object, model: object = None) -> list[object]:
        flags = quick(str(model or self.base), self.folder / "cache")
        facts = ("--facts", self.folder / "facts.jsonl")
        return ["edit", *PLAIN, *flags, *SETTINGS, *facts, "--out", out, *more]

    def manifest(self, kind: str) -> Manifest:
        return read_manifest(self.folder / kind)

    def result(self, kind: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / f"{kind}.json").read_text())
        return found


def make(folder: Path, family: str) -> Exports:
    torch.set_num_threads(1)
    save_tiny(folder / "base", family)
    write_rows(folder / "facts.jsonl")
    exports = Exports(folder=folder)
    with pytest.MonkeyPatch.context() as patch:
        without_plots(patch)
        for kind, flags in EXPORTS.items():
            ran = memedit(*exports.edit(folder / kind, *flags))
            assert ran.code == 0, ran.stderr
            (folder / f"{kind}.json").write_text(ran.stdout)
    return exports


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return make(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return make(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.fixture(params=["llama", "gpt2"])
def exports(request: pytest.FixtureRequest) -> Exports:
    found: Exports = request.getfixturevalue(request.param)
    return found


def logits(model: Any, folder: Path) -> list[Tensor]:
    """What a model says to the prompts of the facts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [row["prompt"].format(row["subject"]) for row in FACTS]
    with torch.no_grad():
        return [
            model(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]).logits.double()
            for text in prompts
        ]


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def with_adapter(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(load(base), adapter).eval()


def largest(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def test_peft_gives_what_the_checkpoint_gives(exports: Exports) -> None:
    base, full, lora, thin = (
        logits(model, exports.base)
        for model in (
            load(exports.base),
            load(exports.folder / "full"),
            with_adapter(exports.base, exports.folder / "lora"),
            with_adapter(exports.base, exports.folder / "thin"),
        )
    )
    moved = largest(base, full)
    assert moved > 0.1
    assert largest(lora, full) < 1e-4 * moved
    # One that is truncated is another model.
    assert largest(thin, full) > 1e-2 * moved


def test_the_adapter_that_peft_merges_is_what_was_judged(exports: Exports, tmp_path: Path) -> None:
    """The metrics of a truncated adapter are those of its own merged weights."""
    merged = with_adapter(exports.base, exports.folder / "thin").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(exports.base).save_pretrained(tmp_path / "merged")
    manifest, full = exports.manifest("thin"), exports.manifest("full")
    was, mine = Checkpoint.open(exports.base), Checkpoint.open(tmp_path / "merged")
    for name, record in manifest.tensors.items():
        before, after = was.read(name).double(), mine.read(name).double()
        assert float((after - before).norm()) == pytest.approx(record.delta_norm, rel=1e-5)
        # What the truncation took: ‖Δ‖² is what is left and what is lost, at a right angle.
        lost, whole = manifest.ranks[name].truncation_error, full.tensors[name].delta_norm
        assert record.delta_norm == pytest.approx(whole * (1 - lost**2) ** 0.5, rel=1e-5)
        assert record.delta_norm < 0.999 * whole

    ran = memedit(
        *("evaluate", "--model", tmp_path / "merged", "--base", exports.base, "--json"),
        *("--facts", exports.folder / "facts.jsonl", "--cache", tmp_path / "cache"),
        *setting("evaluation.drift_prompts=20", "evaluation.fluency_tokens=4"),
    )
    judged = ran.result["metrics"]
    metrics = {k: v for k, v in measured(manifest.metrics["after"]).items() if k != "perplexity"}
    assert {name: judged[name] for name in metrics} == pytest.approx(metrics, rel=1e-3)
    assert manifest.metrics["after"]["drift_kl"] != pytest.approx(
        full.metrics["after"]["drift_kl"], rel=1e-2
    )


def test_an_adapter_that_is_exact(exports: Exports) -> None:
    lora, full = exports.manifest("lora"), exports.manifest("full")
    assert (lora.format, exports.result("lora")["format"]) == ("lora", "lora")
    after = measured(full.metrics["after"])
    assert measured(lora.metrics["after"]) == pytest.approx(after, rel=1e-3)
    assert lora.metrics["before"] == full.metrics["before"]
    for name, record in lora.ranks.items():
        assert record.rank == len(FACTS) and 0 < record.truncation_error < 1e-6
        assert lora.tensors[name].delta_norm == pytest.approx(full.tensors[name].delta_norm)
    assert lora.ranks.keys() == lora.tensors.keys() == full.tensors.keys()
    assert full.ranks == {}


def test_what_is_in_the_folder(exports: Exports) -> None:
    folder = exports.folder / "lora"
    own = [MANIFEST_NAME, "facts.jsonl", "facts.parquet", "report.html"]
    assert sorted(contents(folder)) == sorted([ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, *own])
    config = json.loads((folder / ADAPTER_CONFIG_NAME).read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", len(FACTS))
    assert config["base_model_name_or_path"] == str(exports.base)
    tensors = load_file(folder / ADAPTER_WEIGHTS_NAME)
    assert len(tensors) == 4 and all(t.dtype == torch.float32 for t in tensors.values())
    assert memedit("verify", folder, "--json").result["format"] == "lora"
    assert memedit("verify", folder, "--quick", "--json").result["ok"]


def test_a_changed_adapter_is_found(llama: Exports, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in contents(llama.folder / "lora").items():
        changed = content[:-1] + bytes([content[-1] ^ 1])
        (copy / name).write_bytes(changed if name == ADAPTER_WEIGHTS_NAME else content)
    ran = memedit("verify", copy, "--json")
    assert ran.code == 1
    (problem,) = json.loads(ran.stdout)["problems"]
    assert (problem["file"], problem["kind"]) == (ADAPTER_WEIGHTS_NAME, "checksum")


def test_an_adapter_is_no_model(llama: Exports, tmp_path: Path) -> None:
    adapter = llama.folder / "lora"
    facts = ("--facts", llama.folder / "facts.jsonl")
    for command in (("evaluate", *facts), ("generate", "Rome is")):
        ran = memedit(*command, "--model", adapter, "--cache", tmp_path, "--json")
        assert (ran.code, ran.error["source"]) == (2, str(adapter)), ran.stderr
        assert "LoRA adapter" in ran.error["message"]
    ran = memedit("apply", adapter, "--out", tmp_path / "out", "--cache", tmp_path, "--json")
    assert (ran.code, ran.error["field"]) == (2, "delta")
    assert "has the format lora" in ran.error["message"] and not (tmp_path / "out").exists()


def test_a_rank_that_does_not_suffice_is_told(llama: Exports, tmp_path: Path) -> None:
    """In the manifest, in the report and on the terminal."""
    arguments = llama.edit(tmp_path / "out", *EXPORTS["thin"])
    arguments.remove("--json")
    ran = memedit(*arguments)
    assert ran.code == 0, ran.stderr
    ranks = read_manifest(tmp_path / "out").ranks
    assert ranks == llama.manifest("thin").ranks
    errors = [record.truncation_error for record in ranks.values()]
    assert len(errors) == 2 and all(record.rank == 1 for record in ranks.values())
    assert all(0.01 < error < 1 for error in errors)
    told = f"rank 1; {100 * max(errors):.2g} % of an update lost at most"
    assert told in " ".join(ran.stdout.split())
    report = (tmp_path / "out" / "report.html").read_text()
    assert "Lost by it" in report and "Adapter's rank" in report
    for error in errors:
        assert f'<td class="n">1</td><td class="n">{100 * error:.2g}%</td>' in report

    # Nothing of this where the whole update is published.
    ran = memedit(*(flag for flag in llama.edit(tmp_path / "full") if flag != "--json"))
    assert ran.code == 0 and "lost at most" not in ran.stdout
    assert "Lost by it" not in (tmp_path / "full" / "report.html").read_text()


def test_from_and_to_s3(
    llama: Exports,
    s3: str,
    s3_server: SeaweedServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_plots(monkeypatch)
    objects = Objects(s3_server)
    base = objects.put_folder(llama.base, f"{s3}/base")
    ran: Ran = memedit(*llama.edit(f"{s3}/lora", *EXPORTS["lora"], model=base))
    assert ran.result["out"] == f"{s3}/lora", ran.stderr
    folder = objects.fetch(f"{s3}/lora", tmp_path / "lora")
    mine, here = ((f / ADAPTER_WEIGHTS_NAME).read_bytes() for f in (folder, llama.folder / "lora"))
    assert mine == here
    assert json.loads((folder / ADAPTER_CONFIG_NAME).read_text())["base_model_name_or_path"] == base
    assert largest(
        logits(with_adapter(llama.base, folder), llama.base),
        logits(with_adapter(llama.base, llama.folder / "lora"), llama.base),
    ) == 0  # fmt: skip
    assert memedit("verify", f"{s3}/lora", "--json").result["ok"]
