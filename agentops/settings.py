"""One frozen tree of settings, and for each of them where its value came from.

Later sources win (of `tools.deny` and `tools.ask` all count): built-in default, `config.toml` in the user's configuration
folder, `agentops.toml` in the current folder, environment variables, command-line flags. `model.name` is `name = "..."`
under `[model]` in a file and `AGENTOPS_MODEL_NAME` in the environment. Nothing else in the package reads a settings file.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import platformdirs

from agentops.errors import SettingsError


def _about(text: str, default: Any = None, **limits: Any) -> Any:
    return field(default=default, metadata={"about": text, **limits})


@dataclass(frozen=True, slots=True)
class PathSettings:
    home: Path = field(
        default_factory=lambda: Path(platformdirs.user_data_dir("agentops-runtime")),
        metadata={"about": "folder of the record, the checkpoints and the embedded index"},
    )
    cache: Path = field(
        default_factory=lambda: Path(platformdirs.user_cache_dir("agentops-runtime")),
        metadata={"about": "folder of prepared models and downloads"},
    )
    files: Path | None = _about("the only folder that tools and graphs write files in; `files` in the home when not set")


@dataclass(frozen=True, slots=True)
class ModelSettings:
    name: str = _about("catalogue name, local folder or hub id of the model", "smollm2-135m-instruct")
    offline: bool = _about("never look for a model on the network", False)
    hub_timeout_s: float = _about("give up on an unreachable hub after this long", 5.0, low=0.1, high=600)


@dataclass(frozen=True, slots=True)
class EngineSettings:
    device: Literal["auto", "cpu", "cuda"] = _about("where the model runs; auto takes a GPU when there is one", "auto")
    kernel: Literal["auto", "int4", "float32"] = _about("auto is int4 for quantized layers; float32 is the reference", "auto")
    threads: int = _about("processor threads for the model; 0 is one a core", 0, low=0, high=1024)
    kv_tokens: int = _about("size of the KV cache pool in tokens", 32_768, low=256, high=100_000_000)
    max_batch: int = _about("sequences decoded together", 16, low=1, high=4096)
    prefill_tokens: int = _about("prompt tokens computed in one step at most", 1024, low=16, high=1_000_000)
    queue: int = _about("requests that may wait; more are refused", 256, low=1, high=1_000_000)
    keep_bytes: int = _about(
        "how much of the KV cache is kept on disk when an engine closes, for the next one; 0 keeps nothing", 0, low=0, high=10**13
    )
    input_bytes: int = _about("inputs above this size are refused unread", 4_000_000, low=1_000, high=1_000_000_000)


@dataclass(frozen=True, slots=True)
class RetrievalSettings:
    retriever: Literal["embedded", "elasticsearch"] = _about("where documents are kept and searched", "embedded")
    on_error: Literal["fail", "empty"] = _about("when nothing can be searched, end the run or go on without documents", "fail")
    collection: str = _about("collection that graphs search when none is named", "default")
    embedder: str = _about("catalogue name or local folder of the embedding model", "all-minilm-l6-v2")
    k: int = _about("documents retrieved for a question", 8, low=1, high=1000)
    chunk_tokens: int = _about("size of an ingested piece in the embedder's tokens", 160, low=16, high=8192)
    overlap_tokens: int = _about("tokens that neighbouring pieces share", 24, low=0, high=4096)


@dataclass(frozen=True, slots=True)
class ElasticsearchSettings:
    url: str = _about("address of the server", "http://127.0.0.1:9200")
    user: str = _about("user name, where the server wants one", "")
    password: str = _about("password of the user", "", secret=True)
    api_key: str = _about("API key, instead of user and password", "", secret=True)
    ca_file: Path | None = _about("certificate authority of a server with one of its own")
    prefix: str = _about("beginning of the names of all indices made", "agentops")
    timeout_s: float = _about("give up on an answer after this long", 10.0, low=0.1, high=600)


@dataclass(frozen=True, slots=True)
class ToolSettings:
    allow: tuple[str, ...] = _about("tools that run without asking", ())
    ask: tuple[str, ...] = _about("tools that a person approves first, whatever their graph says", (), united=True)
    deny: tuple[str, ...] = _about("tools that never run", (), united=True)
    mcp: Path | None = _about("file with the MCP servers whose tools graphs are given (mcp.json)")
    timeout_s: float = _about("a tool that takes longer has failed", 30.0, low=0.01, high=86_400)
    result_bytes: int = _about("of a longer result the model reads the beginning", 20_000, low=100, high=10_000_000)


@dataclass(frozen=True, slots=True)
class BudgetSettings:
    steps: int = _about("supersteps after which a run is stopped", 60, low=1, high=1_000_000)
    model_calls: int = _about("model calls after which a run is stopped", 500, low=1, high=1_000_000_000)
    tokens: int = _about("computed and output tokens after which a run is stopped", 1_000_000, low=1, high=10**15)
    seconds: float = _about("time after which a run is stopped", 3_600.0, low=0.01, high=10_000_000)
    money: float = _about("cost after which a run is stopped, by cost.prices; 0 is no limit", 0.0, low=0, high=10**12)
    nodes: tuple[str, ...] = _about("limits of single nodes: write.tokens=500, or steps, model_calls, seconds, money", ())


@dataclass(frozen=True, slots=True)
class RecordSettings:
    url: str = _about(
        "address of a Postgres that keeps the record and the checkpoints (postgresql://...); files in paths.home when not set",
        "",
        secret=True,
    )
    payload_bytes: int = _about(
        "inputs and outputs above this size are cut, with a mark", 1_000_000, low=1_000, high=1_000_000_000
    )
    lock_timeout_s: float = _about("wait this long for a locked store", 10.0, low=0.0, high=3600)
    drain_ms: int = _about("how often the journal is drained into the store", 200, low=10, high=60_000)
    journal_bytes: int = _about(
        "what a process may have in its journal that the store has not taken; beyond that its runs stop, and can be resumed",
        1_000_000_000,
        low=100_000,
        high=10**13,
    )
    redact: tuple[str, ...] = _about(
        "taken out of every text before it is recorded: key, email, iban, card, ip, phone, presidio, module:callable, patterns",
        (),
        united=True,
    )
    keep_runs: int = _about("agentops prune keeps so many of the newest runs; 0 is no limit", 0, low=0, high=10**9)
    keep_days: float = _about(
        "agentops prune keeps runs that began in the last so many days; 0 is no limit", 0.0, low=0, high=36_500
    )
    sample: tuple[str, ...] = _about(
        "share of the runs that keep all their spans, of all (0.1) or of a graph's (GRAPH=0.1); what is not done stays whole", ()
    )
    types: tuple[str, ...] = _about("classes that checkpoints may keep beside those that a graph's state names: module.Class", ())


@dataclass(frozen=True, slots=True)
class RunSettings:
    trim: bool = _about("cut the oldest part of a prompt that does not fit", False)
    seed: int = _about("seed of sampling", 0, low=0, high=2**63 - 1)
    at_once: int = _about(
        "runs that a process works on at once, more wait; 0 is as many as its open files allow, with Postgres 32",
        0,
        low=0,
        high=100_000,
    )


@dataclass(frozen=True, slots=True)
class JudgeSettings:
    how: Literal["auto", "asked", "computed"] = _about(
        "how verdicts come about; auto asks a model of a billion parameters or more and computes what a smaller one finds likely",
        "auto",
    )
    url: str = _about("address of a server with the API of OpenAI whose model judges; without it, the engine's own does", "")
    model: str = _about("name of the judging model at that address", "")
    api_key: str = _about("key for that address", "", secret=True)
    timeout_s: float = _about("give up on a verdict after this long", 120.0, low=0.01, high=3_600)
    retries: int = _about("how often a question is repeated whose answer cannot be used", 2, low=0, high=10)
    max_tokens: int = _about("length of a judge's answer at most", 1024, low=16, high=100_000)


@dataclass(frozen=True, slots=True)
class CostSettings:
    prices: tuple[str, ...] = _about(
        "money per million input, cached and output tokens of a model: NAME=2.5/0.25/10; without one, cost is not known", ()
    )


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings. `sources` maps `model.name` and so on to `default`, a file's path, `$VARIABLE` or `--flag`."""

    paths: PathSettings = field(default_factory=PathSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    retrieval: RetrievalSettings = field(default_factory=RetrievalSettings)
    elasticsearch: ElasticsearchSettings = field(default_factory=ElasticsearchSettings)
    tools: ToolSettings = field(default_factory=ToolSettings)
    budget: BudgetSettings = field(default_factory=BudgetSettings)
    record: RecordSettings = field(default_factory=RecordSettings)
    run: RunSettings = field(default_factory=RunSettings)
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    cost: CostSettings = field(default_factory=CostSettings)
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    flags: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """What the command line gave, by key; for settings that unite what all sources say."""

    def source(self, key: str) -> str:
        return self.sources.get(key, "default")

    @property
    def files(self) -> Path:
        """The folder that tools and graphs write in."""
        return self.paths.files or self.paths.home / "files"

    def get(self, key: str) -> Any:
        section, _, name = key.partition(".")
        return getattr(getattr(self, section), name)


@cache
def describe() -> dict[str, str]:
    """Every key with its one-line meaning, in order."""
    return {key: spec.metadata["about"] for key, (_, spec, _) in _schema().items()}


def is_secret(key: str) -> bool:
    """Whether a value must not be shown."""
    return bool(_schema()[key][1].metadata.get("secret"))


@cache
def _schema() -> dict[str, tuple[str, Any, Any]]:
    found: dict[str, tuple[str, Any, Any]] = {}
    for section, kind in get_type_hints(Settings).items():
        if section in ("sources", "flags"):
            continue
        hints = get_type_hints(kind)
        for spec in fields(kind):
            found[f"{section}.{spec.name}"] = (section, spec, hints[spec.name])
    return found


def variable(key: str) -> str:
    """The environment variable of a key: `model.name` is `AGENTOPS_MODEL_NAME`."""
    return "AGENTOPS_" + key.replace(".", "_").upper()


# The command line's flag for a key where it is not the key's own last word.
_FLAGS = {
    "model.name": "--model",
    "elasticsearch.url": "--es-url",
    "judge.model": "--judge",
    "budget.steps": "--max-steps",
    "budget.model_calls": "--max-model-calls",
    "budget.tokens": "--max-tokens",
    "budget.seconds": "--max-seconds",
    "budget.money": "--max-money",
    "budget.nodes": "--max-of-node",
}


def load_settings(
    flags: Mapping[str, Any] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Settings:
    """Settings from all sources. `flags` maps keys to values, `None` values are passed over.

    Raises:
        SettingsError: an unknown name, or a value of the wrong type or out of range; the message names the source.
    """
    environment = os.environ if environment is None else environment
    found: dict[str, tuple[Any, str]] = {}
    united: dict[str, list[tuple[Any, str]]] = {}

    def give(key: str, value: Any, source: str) -> None:
        found[key] = value, source
        if key in _schema() and _schema()[key][1].metadata.get("united"):
            united.setdefault(key, []).append((value, source))

    config_home = environment.get("AGENTOPS_CONFIG") or platformdirs.user_config_dir("agentops-runtime")
    for file in (Path(config_home) / "config.toml", (folder or Path.cwd()) / "agentops.toml"):
        for key, value in _read_file(file).items():
            give(key, value, str(file))
    for key in _schema():
        if variable(key) in environment:
            give(key, environment[variable(key)], f"${variable(key)}")
    for key, value in (flags or {}).items():
        if value is not None:
            give(key, value, _FLAGS.get(key) or "--" + key.rpartition(".")[2].replace("_", "-"))
    settings, sources, flagged = Settings(), {}, {}
    for key, (raw, source) in found.items():
        section, spec, kind = _known(key, source)
        value = _convert(key, raw, kind, spec.metadata, source)
        if (flags or {}).get(key) is not None:
            flagged[key] = value
        for earlier, named in united.get(key, ())[:-1]:
            value = (*_convert(key, earlier, kind, spec.metadata, named), *value)
        settings = replace(settings, **{section: replace(getattr(settings, section), **{spec.name: value})})
        sources[key] = source
    return replace(settings, sources=sources, flags=flagged)


def _read_file(file: Path) -> dict[str, Any]:
    try:
        tree = tomllib.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{file}: {error}", hint="mend the file or move it away") from error
    flat: dict[str, Any] = {}
    for section, values in tree.items():
        if not isinstance(values, dict):
            raise SettingsError(f"{file}: '{section}' stands outside a section", hint="write it under [section], as in [model]")
        flat.update({f"{section}.{name}": value for name, value in values.items()})
    return flat


def _known(key: str, source: str) -> tuple[str, Any, Any]:
    try:
        return _schema()[key]
    except KeyError:
        near = get_close_matches(key, _schema(), n=1)
        hint = f"did you mean {near[0]}?" if near else "see every setting with: agentops config"
        raise SettingsError(f"{source}: no setting is called '{key}'", hint=hint) from None


def _convert(key: str, raw: Any, kind: Any, limits: Mapping[str, Any], source: str) -> Any:
    def wrong(expected: str) -> SettingsError:
        return SettingsError(f"{source}: {key} must be {expected}, not {raw!r}", hint=limits["about"])

    if get_origin(kind) is Literal:
        if raw not in get_args(kind):
            raise wrong("one of " + ", ".join(get_args(kind)))
        return raw
    if kind == tuple[str, ...]:
        names = raw.split(",") if isinstance(raw, str) else raw
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise wrong("a list of names")
        return tuple(name.strip() for name in names if name.strip())
    if kind is bool:
        word = str(raw).lower()
        if word not in ("true", "false", "1", "0", "yes", "no", "on", "off"):
            raise wrong("true or false")
        return word in ("true", "1", "yes", "on")
    if kind in (int, float):
        try:
            number = kind(str(raw))
        except ValueError:
            raise wrong("a whole number" if kind is int else "a number") from None
        if not limits.get("low", number) <= number <= limits.get("high", number):
            raise wrong(f"between {limits['low']:,} and {limits['high']:,}")
        return number
    is_path = kind is Path or Path in get_args(kind)
    if not isinstance(raw, str | Path) or not str(raw).strip():
        raise wrong("a path" if is_path else "a word")
    return Path(raw).expanduser().absolute() if is_path else str(raw)
