"""What all tests share: an isolated home, the real models, the real data. Nothing here is a mock.

The user's home folder and configuration are never touched: before any test is imported, the environment is pointed at a
temporary folder. Only the model cache is the user's own, because models are big, read-only and checked by their hashes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
import postgres_server as postgres_server_
import pytest
from elasticsearch_server import Server, ServerError, distribution, find_java, shared

from agentops.settings import Settings, load_settings

if TYPE_CHECKING:
    from agentops.engine.local import LocalEngine
    from agentops.engine.scripted import ScriptedEngine

ROOT = Path(__file__).resolve().parents[1]
REAL_CACHE = Path(os.environ.get("AGENTOPS_PATHS_CACHE") or platformdirs.user_cache_dir("agentops-runtime")).absolute()
NO_DATA = "no real data sets here: name their folder in AGENTOPS_SHARED_DATA"
NO_ELASTICSEARCH = "no Elasticsearch can be started here"
NO_POSTGRES = "no Postgres can be started here"
NO_PROGRAMS = (("no chromium here", "a browser"), ("no tmux here", "tmux"))


def pytest_configure(config: pytest.Config) -> None:
    sandbox = Path(tempfile.mkdtemp(prefix="agentops-tests-"))
    config.add_cleanup(lambda: shutil.rmtree(sandbox, ignore_errors=True))
    for name in [name for name in os.environ if name.startswith("AGENTOPS_") and name != "AGENTOPS_SHARED_DATA"]:
        del os.environ[name]
    os.environ.update(
        AGENTOPS_PATHS_CACHE=str(REAL_CACHE),
        AGENTOPS_PATHS_HOME=str(sandbox / "home"),
        AGENTOPS_CONFIG=str(sandbox / "config"),
        XDG_DATA_HOME=str(sandbox / "data"),
        XDG_CONFIG_HOME=str(sandbox / "config"),
        NO_COLOR="1",
        COLUMNS="130",
    )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    servers = ((NO_ELASTICSEARCH, "an Elasticsearch server"), (NO_POSTGRES, "a Postgres server"))
    for wanted, what in ((NO_DATA, "real data"), *servers, *NO_PROGRAMS):
        skipped = [report for report in terminalreporter.stats.get("skipped", []) if wanted in str(report.longrepr)]
        if skipped:
            terminalreporter.section(f"tests that did not run for want of {what}")
            terminalreporter.write_line(str(skipped[0].longrepr[2]).removeprefix("Skipped: "))
            for report in skipped:
                terminalreporter.write_line(f"  {report.nodeid}")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings with a fresh home and the user's model cache."""
    return load_settings({"paths.home": tmp_path / "home", "paths.cache": REAL_CACHE, "engine.threads": 2})


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Environment for a subprocess: as `settings`, with the console scripts of this interpreter first in PATH."""
    return os.environ | {
        "AGENTOPS_PATHS_HOME": str(tmp_path / "home"),
        "AGENTOPS_ENGINE_THREADS": "2",
        "PATH": f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }


@pytest.fixture
def shared_data() -> Path:
    """Folder of the real data sets. Where there is none the test is skipped, and named at the end of the run."""
    named = os.environ.get("AGENTOPS_SHARED_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(NO_DATA)
    return folder


@pytest.fixture(scope="session")
def session_settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """As `settings`, for what lives as long as the test session."""
    return load_settings(
        {"paths.home": tmp_path_factory.mktemp("session") / "home", "paths.cache": REAL_CACHE, "engine.threads": 2}
    )


@pytest.fixture(scope="session")
def elasticsearch_server() -> Iterator[Server]:
    """A real server, shared by all processes of the test run. Where none can be started the test is skipped, and named at the
    end of the run."""
    try:
        find_java()
        distribution()
    except ServerError as why:
        pytest.skip(f"{NO_ELASTICSEARCH}: {why}")
    with shared(os.environ.get("PYTEST_XDIST_TESTRUNUID") or f"run-{os.getpid()}") as server:
        yield server


@pytest.fixture
def elastic_settings(elasticsearch_server: Server, settings: Settings) -> Settings:
    """As `settings`, for the index on the server, which looks empty to every test."""
    wanted = replace(settings.elasticsearch, url=elasticsearch_server.url, prefix=f"test-{uuid.uuid4().hex}", timeout_s=60.0)
    return replace(settings, retrieval=replace(settings.retrieval, retriever="elasticsearch"), elasticsearch=wanted)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres_server_.Postgres]:
    """A real server of this process's own. Where none can be started the test is skipped, and named at the end of the run."""
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(postgres_server_.cluster())
        except postgres_server_.ServerError as why:
            pytest.skip(f"{NO_POSTGRES}: {why}")
        yield server


@pytest.fixture
def postgres_settings(postgres_server: postgres_server_.Postgres, settings: Settings) -> Settings:
    """As `settings`, with the record and the checkpoints in a new, empty database of the server."""
    return replace(settings, record=replace(settings.record, url=postgres_server.database()))


@pytest.fixture(params=["sqlite", "postgres"])
def either_settings(request: pytest.FixtureRequest, settings: Settings) -> Settings:
    """As `settings`, once with the record and the checkpoints in files and once in Postgres."""
    if request.param == "sqlite":
        return settings
    found: Settings = request.getfixturevalue("postgres_settings")
    return found


@pytest.fixture(scope="session")
def model_folder(session_settings: Settings) -> Path:
    """The default model, quantized; prepared on first use, which takes minutes."""
    from agentops.engine.models import prepare

    return prepare(session_settings.model.name, session_settings)


@pytest.fixture(scope="session")
def embedder_folder(session_settings: Settings) -> Path:
    """The default embedding model."""
    from agentops.engine.models import prepare

    return prepare(session_settings.retrieval.embedder, session_settings)


@pytest.fixture(scope="session")
def engine(model_folder: Path, session_settings: Settings) -> Iterator[LocalEngine]:
    """The real engine with the default model, shared by the session: its KV cache is warm from earlier tests."""
    from agentops.engine.local import open_engine
    from agentops.sync import run_sync

    opened = open_engine(model_folder, session_settings)
    yield opened
    run_sync(opened.close())


@pytest.fixture
def scripted() -> Callable[..., ScriptedEngine]:
    """Makes an engine that plays the answers it is given."""
    from agentops.engine.scripted import ScriptedEngine

    return ScriptedEngine
