"""`agentops doctor` and `agentops config`: what this installation is, and what is in force.

Each check of the doctor gives findings, and each fault names its mend. The doctor changes nothing: it prepares no model,
makes no store and downloads nothing. It reads versions from the installed packages' metadata, so it loads no library
only to ask it for its version.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Never

import typer

from agentops.errors import AgentOpsError, RetrievalError, SettingsError

if TYPE_CHECKING:
    from agentops.settings import Settings

DISTRIBUTION = "agentops-runtime"
PACKAGES = ("agentops", "graphs", "evals", "tui")
SHOWN = ("torch", "langgraph", "langchain-core", "numpy", "tokenizers", "llguidance", "sqlmodel", "tantivy", "numkong")
SQLITE_WAL_RESET_BUG = (3, 7, 0), (3, 51, 2)
LOW_DISK_BYTES, NO_DISK_BYTES = 2 << 30, 200 << 20

Verdict = Literal["ok", "warning", "broken"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one look found. `mend` says what to do, and is empty where nothing is to be done."""

    check: str
    verdict: Verdict
    detail: str
    mend: str = ""


def register(app: typer.Typer) -> None:
    app.callback()(_app)
    app.command("doctor")(doctor)
    app.command("config")(config)


def _version(asked: bool) -> None:
    if asked:
        print(f"agentops {metadata.version(DISTRIBUTION)}")
        raise typer.Exit


def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def config(
    key: Annotated[str | None, typer.Argument(help="One setting (model.name) or one section (model).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show every setting: its value, its source, its meaning."""
    from agentops.cli.render import clean
    from agentops.settings import Settings, describe, is_secret, load_settings, variable

    settings, builtin = load_settings(), Settings()
    chosen = {name: about for name, about in describe().items() if key is None or name == key or name.startswith(f"{key}.")}
    if not chosen:
        near = get_close_matches(str(key), describe(), n=1)
        hint = f"did you mean {near[0]}?" if near else "see every setting with: agentops config"
        raise SettingsError(f"no setting is called '{key}'", hint=hint)

    def value(name: str) -> Any:
        held = settings.get(name)
        return "***" if held and is_secret(name) else _plain(held)

    if as_json:
        rows = {
            name: {
                "value": value(name),
                "source": settings.source(name),
                "default": _plain(builtin.get(name)),
                "variable": variable(name),
                "about": about,
            }
            for name, about in chosen.items()
        }
        print(json.dumps(rows, indent=2))
        return
    table = [(name, clean(_shown(value(name))), clean(settings.source(name)), about) for name, about in chosen.items()]
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    for row in table:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else "" if value is None else str(value)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Check the installation and name the mend for each fault. Exit code 1 when something is broken."""
    from agentops.settings import Settings, load_settings

    findings: list[Finding] = []
    try:
        settings = load_settings()
        findings += _settings(settings)
    except SettingsError as error:
        settings = Settings()
        findings.append(Finding("settings", "broken", str(error), error.hint))
    checks: list[Callable[[Settings], Iterator[Finding]]] = [_packages, _names, _device, _folders, _models, _store, _index]
    for check in checks:
        findings += check(settings)
    broken = any(finding.verdict == "broken" for finding in findings)
    if as_json:
        report = {"version": _installed(DISTRIBUTION), "ok": not broken, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(report, indent=2))
    else:
        _show(findings)
    if broken:
        raise typer.Exit(1)


def _show(findings: list[Finding]) -> None:
    from agentops.cli.render import clean

    colour = {"ok": typer.colors.GREEN, "warning": typer.colors.YELLOW, "broken": typer.colors.RED}
    for finding in findings:
        typer.echo(
            typer.style(f"{finding.verdict:8}", fg=colour[finding.verdict]) + f" {finding.check:10} {clean(finding.detail)}"
        )
        if finding.mend:
            typer.echo(f"{'':20}-> {clean(finding.mend)}")
    count = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in colour}
    typer.echo(f"\n{count['ok']} ok, {count['warning']} warnings, {count['broken']} broken")


# -- the checks, in the order in which they are shown


def _settings(settings: Settings) -> Iterator[Finding]:
    from agentops.settings import describe, variable

    given = [f"{key} from {source}" for key, source in settings.sources.items()]
    yield Finding("settings", "ok", ", ".join(given) or "all at their defaults")
    known = {variable(key): key for key in describe()} | {"AGENTOPS_CONFIG": ""}
    for name in sorted(os.environ):
        if name.startswith("AGENTOPS_") and name not in known and name != "AGENTOPS_SHARED_DATA":
            near = get_close_matches(name, known, n=1)
            mend = f"did you mean {near[0]}?" if near else "see every setting with: agentops config"
            yield Finding("settings", "warning", f"the environment variable {name} is no setting and does nothing", mend)


def _packages(_: Settings) -> Iterator[Finding]:
    from packaging.requirements import Requirement

    python = platform.python_version()
    yield Finding("python", "ok", f"{python} on {platform.system()} {platform.machine()}, {sys.executable}")
    yield Finding("runtime", "ok", f"{DISTRIBUTION} {_installed(DISTRIBUTION)} in {_home_of('agentops')}")
    off = []
    for line in metadata.requires(DISTRIBUTION) or []:
        wanted = Requirement(line)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        version = _installed(wanted.name)
        if version is None:
            off.append(f"{wanted.name} is missing")
        elif not wanted.specifier.contains(version, prereleases=True):
            off.append(f"{wanted.name} {version} is not {wanted.specifier}")
    shown = ", ".join(f"{name} {_installed(name)}" for name in SHOWN if _installed(name))
    if off:
        mend = f'install again: make setup, or pip install "{DISTRIBUTION}"'
        yield Finding("packages", "broken", "; ".join(off), mend)
    else:
        yield Finding("packages", "ok", shown)


def _names(_: Settings) -> Iterator[Finding]:
    """Import names that something else provides too: `agentops` and `evals` on PyPI are other projects."""
    ours = Path(_home_of("agentops")).parent
    clashes = False
    providers = metadata.packages_distributions()
    for name in PACKAGES:
        others = sorted({other for other in providers.get(name, []) if other.lower().replace("_", "-") != DISTRIBUTION})
        found = _home_of(name)
        if others:
            clashes = True
            detail = f"the import package '{name}' is also installed by the distribution {', '.join(others)}"
            mend = f"pip uninstall {' '.join(others)}, then install {DISTRIBUTION} again; or keep the two in environments apart"
            yield Finding("names", "broken", detail, mend)
        elif Path(found).parent != ours:
            clashes = True
            detail = f"'import {name}' finds {found}, not ours in {ours}"
            yield Finding(
                "names", "broken", detail, f"rename that folder, or take it out of PYTHONPATH: {os.environ.get('PYTHONPATH', '')}"
            )
    if not clashes:
        yield Finding("names", "ok", f"{', '.join(PACKAGES)} are ours")


def _device(settings: Settings) -> Iterator[Finding]:
    flags, model = _processor()
    fast = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp") if name in flags]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("processor", "ok", f"{model}, {cores} cores, {' '.join(fast) or 'no vector extension that we know'}")
    wants = settings.engine.device
    if not (Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi")):
        if wants == "cuda":
            yield Finding("gpu", "broken", "engine.device is cuda and there is no NVIDIA GPU", "set engine.device to auto or cpu")
        else:
            yield Finding("gpu", "ok", "none; the model runs on the processor")
        return
    name = _ask_torch_for_gpu()
    if name:
        yield Finding("gpu", "ok", name)
    else:
        mend = "check the driver with nvidia-smi; torch needs one that serves its CUDA version"
        yield Finding("gpu", "broken" if wants == "cuda" else "warning", "there is an NVIDIA GPU that torch cannot use", mend)


def _folders(settings: Settings) -> Iterator[Finding]:
    for name, folder, key in (("home", settings.paths.home, "paths.home"), ("cache", settings.paths.cache, "paths.cache")):
        standing = next(path for path in (folder, *folder.parents) if path.exists())
        if not standing.is_dir():
            yield Finding(name, "broken", f"{standing} is a file, not a folder", f"move it away, or set {key} to another folder")
            continue
        try:
            with tempfile.TemporaryFile(dir=standing):
                pass
        except OSError as error:
            yield Finding(name, "broken", f"{standing} cannot be written: {error.strerror}", f"set {key} to a folder of yours")
            continue
        free = shutil.disk_usage(standing).free
        detail = f"{folder}, {free / 1e9:.1f} GB free"
        if free < NO_DISK_BYTES:
            yield Finding(name, "broken", detail, f"make room, or set {key} to a folder on another disk")
        elif free < LOW_DISK_BYTES:
            yield Finding(name, "warning", detail, f"make room soon, or set {key} to a folder on another disk")
        else:
            yield Finding(name, "ok", detail)


def _models(settings: Settings) -> Iterator[Finding]:
    from agentops.engine.checkpoint import open_checkpoint
    from agentops.engine.models import describe, validate_embedder

    for check, key, validate in (
        ("model", "model.name", open_checkpoint),
        ("embedder", "retrieval.embedder", validate_embedder),
    ):
        name = settings.get(key)
        try:
            card = describe(name, settings)
            if card.folder:
                validate(card.folder)
        except AgentOpsError as error:
            yield Finding(check, "broken", str(error), error.hint or f"set {key} to a model's name or folder")
            continue
        if card.folder:
            kind = "" if card.quantization == "none" else f"{card.quantization}, "
            yield Finding(check, "ok", f"{name}, {kind}{card.size_bytes / 1e6:.0f} MB in {card.folder}")
        elif name.startswith((".", "~", os.sep)):
            yield Finding(check, "broken", f"there is no model folder {name}", f"set {key} to a model's name or folder")
        else:
            mend = f"prepare it with: agentops models prepare {name}; or let the first use do so"
            yield Finding(check, "warning", f"{name} is not prepared", mend)


def _store(settings: Settings) -> Iterator[Finding]:
    import sqlite3

    from agentops.store.opening import HEAD, open_database

    low, high = SQLITE_WAL_RESET_BUG
    linked = f"SQLite {sqlite3.sqlite_version}"
    if low <= sqlite3.sqlite_version_info <= high:
        # https://sqlite.org/wal.html, "the WAL-reset bug"
        linked += (
            f" is in the range {'.'.join(map(str, low))} to {'.'.join(map(str, high))}, which can damage a file when two"
            " connections write at once; here it cannot, because writers of the record take turns behind a file lock"
        )
    yield Finding("sqlite", "ok", linked)
    try:
        database = open_database(settings)
        with database.translated():
            schema = database.version(settings.record.lock_timeout_s) if database.exists() else None
            about = database.about() if schema or settings.record.url else ""
    except AgentOpsError as error:
        yield Finding("store", "broken", str(error), error.hint)
        return
    waiting = len(list((settings.paths.home / "journal").glob("*.seg")))
    if schema is None:
        yield Finding("store", "ok", f"{about}: nothing is recorded yet" if about else "nothing is recorded yet")
        return
    note = "" if schema == HEAD else f", will be upgraded to {HEAD}"
    yield Finding("store", "ok", f"{about}, schema {schema}{note}, {waiting} journal segments")


def _index(settings: Settings) -> Iterator[Finding]:
    from agentops.parts import open_index
    from agentops.retrieval.cluster import readable_by_others

    def none() -> Never:
        raise RetrievalError("listing collections needs no embedder")

    elastic = settings.retrieval.retriever == "elasticsearch"
    empty = "no collection yet; make one with: agentops ingest PATH --collection NAME"
    if not elastic and not (settings.paths.home / "index").exists():
        yield Finding("index", "ok", empty)
        return
    try:
        index = open_index(settings, none)
        try:
            found = index.collections()
        finally:
            index.close()
    except AgentOpsError as error:
        yield Finding("index", "broken", str(error), error.hint)
        return
    named = ", ".join(f"{entry.name} ({entry.documents} pieces, {entry.embedder})" for entry in found)
    where = f"Elasticsearch at {settings.elasticsearch.url}: " if elastic else ""
    yield Finding("index", "ok", where + (named or empty))
    secret = settings.elasticsearch.password or settings.elasticsearch.api_key
    if elastic and secret and readable_by_others(settings.elasticsearch.url):
        mend = "use an https:// address"
        yield Finding("index", "warning", f"the password or key goes to {settings.elasticsearch.url} unencrypted", mend)


# -- what the checks look at


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _home_of(package: str) -> str:
    """The folder that `import package` would find, found without importing it."""
    spec = util.find_spec(package)
    places = list(spec.submodule_search_locations or []) if spec else []
    return places[0] if places else "nothing"


def _processor() -> tuple[set[str], str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set(), platform.processor() or platform.machine()
    first = text.replace("\t", "").split("\n\n")[0]
    fields = dict(line.split(":", 1) for line in first.splitlines() if ":" in line)
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return set(flags), fields.get("model name", platform.machine()).strip()


def _ask_torch_for_gpu() -> str:
    """The GPU's name as torch gives it, empty when torch sees none. In a process of its own: torch costs seconds to load."""
    import subprocess

    typer.echo("asking torch for the GPU, a few seconds ...", err=True)
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip()
