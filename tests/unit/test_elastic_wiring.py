"""`--retriever elasticsearch` in the verbs, in graphs, in the doctor and in the demo."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from encoders import make_tiny_encoder

from agentops import Document, Request, Runtime, ScriptedEngine, Settings
from agentops.cli import demo, house
from agentops.errors import RetrieverUnavailable
from agentops.records import ScoreRequest, content_hash
from agentops.retrieval.elastic import ElasticIndex
from agentops.retrieval.embed import HashEmbedder
from agentops.settings import load_settings
from agentops.store import open_store
from agentops.tracer import catch_up

TEXTS = {
    "tea.md": ("Brewing", "Green tea is brewed at 80 degrees. Black tea is brewed at 95 degrees. Tea came to Europe by ship."),
    "cups.md": ("Cups", "A cup holds 250 millilitres. Cups are washed by hand."),
}
DOCUMENTS = [
    Document(source, text, content_hash(text), {"source": source, "heading": heading})
    for source, (heading, text) in TEXTS.items()
]
QUESTION = "At how many degrees is green tea brewed?"


@pytest.fixture
def nowhere() -> str:
    """An address where nothing answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def likely(request: ScoreRequest) -> list[float]:
    return [-1.0 if "Green tea is brewed" in request.messages[-1].content else -4.0]


def answering(_: Request) -> str:
    return "Green tea is brewed at 80 degrees."


@pytest.fixture
def open_runtime() -> Iterator[Callable[[Settings], Runtime]]:
    opened: list[Runtime] = []

    def one(settings: Settings) -> Runtime:
        opened.append(Runtime(settings, engine=ScriptedEngine(answering, scores=likely), embedder=HashEmbedder()))
        return opened[-1]

    yield one
    for runtime in opened:
        runtime.close()


def on(settings: Settings, url: str, **more: Any) -> Settings:
    retrieval = replace(settings.retrieval, retriever="elasticsearch", **more)
    return replace(settings, retrieval=retrieval, elasticsearch=replace(settings.elasticsearch, url=url, timeout_s=2.0))


def retrievals(settings: Settings) -> list[tuple[str, str | None, str]]:
    catch_up(settings)
    with open_store(settings) as store:
        (run,) = store.runs()
        spans = [(span.status, span.error) for span in store.spans(run.id) if span.kind == "retrieval"]
        return [(status, error, run.status) for status, error in spans]


def test_a_graph_answers_from_the_server(elastic_settings: Settings, open_runtime: Callable[[Settings], Runtime]) -> None:
    runtime = open_runtime(elastic_settings)
    assert isinstance(runtime.index, ElasticIndex)
    runtime.index.upsert("tea", DOCUMENTS)
    result = runtime.run("rag", QUESTION, collection="tea")
    assert result.output["answer"] == "Green tea is brewed at 80 degrees. [1]"
    catch_up(elastic_settings)
    with open_store(elastic_settings) as store:
        assert store.run(result.run_id).settings["retrieval.retriever"] == "elasticsearch"


def test_without_a_server_a_run_fails_with_a_clear_error(
    settings: Settings, nowhere: str, open_runtime: Callable[[Settings], Runtime]
) -> None:
    wanted = on(settings, nowhere, collection="tea")
    with pytest.raises(RetrieverUnavailable, match="no Elasticsearch answers at"):
        open_runtime(wanted).run("rag", QUESTION, collection="tea")
    runtime = open_runtime(wanted)
    with pytest.raises(RetrieverUnavailable, match="no Elasticsearch answers at"):
        runtime.run("rag", QUESTION)
    runtime.close()
    ((status, error, run),) = retrievals(wanted)
    assert (status, run) == ("error", "failed")
    assert "no Elasticsearch answers" in str(error)


def test_without_a_server_a_run_may_go_on_and_says_so(
    settings: Settings, nowhere: str, open_runtime: Callable[[Settings], Runtime]
) -> None:
    wanted = on(settings, nowhere, on_error="empty")
    result = open_runtime(wanted).run("rag", QUESTION, collection="tea")
    assert result.status == "done"
    assert result.output["answer"].startswith(f"The documents could not be searched for “{QUESTION}”: no Elasticsearch answers")
    assert "I do not know" not in result.output["answer"]
    assert result.output["sources"] == []
    ((status, error, run),) = retrievals(wanted)
    assert (status, run) == ("error", "done")
    assert "no Elasticsearch answers" in str(error)


def test_a_run_that_found_no_server_is_resumed_on_it(
    elastic_settings: Settings, nowhere: str, open_runtime: Callable[[Settings], Runtime]
) -> None:
    elastic_settings = replace(elastic_settings, retrieval=replace(elastic_settings.retrieval, collection="tea"))
    away = replace(elastic_settings, elasticsearch=replace(elastic_settings.elasticsearch, url=nowhere, timeout_s=2.0))
    first = open_runtime(away)
    with pytest.raises(RetrieverUnavailable):
        first.run("rag", QUESTION)
    first.close()
    unsaid = replace(elastic_settings, retrieval=replace(elastic_settings.retrieval, retriever="embedded"))
    runtime = open_runtime(elastic_settings)
    runtime.index.upsert("tea", DOCUMENTS)
    catch_up(elastic_settings)
    with open_store(elastic_settings) as store:
        (run,) = store.runs()
    # Where the user says nothing now, documents are looked for where the run began to.
    assert open_runtime(unsaid).resume(run.id).output["answer"] == "Green tea is brewed at 80 degrees. [1]"


def test_the_doctor_looks_at_the_server(elastic_settings: Settings, settings: Settings, nowhere: str) -> None:
    (found,) = house._index(elastic_settings)
    assert found.verdict == "ok"
    assert elastic_settings.elasticsearch.url in found.detail
    (fault,) = house._index(on(settings, nowhere))
    assert fault.verdict == "broken"
    assert "no Elasticsearch answers" in fault.detail
    assert fault.mend
    elsewhere = replace(elastic_settings.elasticsearch, user="me", password="word")
    elsewhere = replace(elsewhere, url=elsewhere.url.replace("127.0.0.1", "localhost"))
    assert [one.verdict for one in house._index(replace(elastic_settings, elasticsearch=elsewhere))] == ["ok"]


def test_the_demo_uses_a_server_that_answers_and_says_so(
    elastic_settings: Settings, nowhere: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AGENTOPS_ELASTICSEARCH_URL", nowhere)
    assert demo._retriever() == "embedded"
    assert f"embedded index; no Elasticsearch answers at {nowhere}" in capsys.readouterr().err
    monkeypatch.setenv("AGENTOPS_ELASTICSEARCH_URL", elastic_settings.elasticsearch.url)
    assert demo._retriever() == "elasticsearch"
    assert f"on the Elasticsearch server at {elastic_settings.elasticsearch.url}" in capsys.readouterr().err
    monkeypatch.setenv("AGENTOPS_RETRIEVAL_RETRIEVER", "embedded")
    assert demo._retriever() == "embedded"


def test_the_verbs_of_documents(
    elastic_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from agentops.cli import main

    monkeypatch.setenv("AGENTOPS_PATHS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AGENTOPS_RETRIEVAL_EMBEDDER", str(make_tiny_encoder(tmp_path / "tiny")))
    monkeypatch.setenv("AGENTOPS_ELASTICSEARCH_PREFIX", elastic_settings.elasticsearch.prefix)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wing.md").write_text("# Wings\n\nLift and drag of a wing.")

    def call(*arguments: str) -> tuple[int, str, str]:
        server = ("--retriever", "elasticsearch", "--es-url", elastic_settings.elasticsearch.url)
        monkeypatch.setattr(sys, "argv", ["agentops", *arguments, *server])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    assert call("ingest", "wing.md", "-c", "wings") == (0, "wings: 1 file, 1 piece (1 added)\n", "")
    assert call("ingest", "wing.md", "-c", "wings")[1] == "wings: 1 file, 1 piece (0 added, 1 unchanged)\n"
    code, out, _ = call("search", "drag of a wing", "-c", "wings", "--json")
    assert (code, [hit["metadata"]["source"] for hit in json.loads(out)["hits"]]) == (0, ["wing.md"])
    assert "wings" in call("collections")[1]
    assert call("collections", "--drop", "wings", "--yes")[0] == 0
    assert "no collections yet" in call("collections")[1]
    assert not (tmp_path / "home" / "index").exists()
    assert load_settings().retrieval.retriever == "embedded"
