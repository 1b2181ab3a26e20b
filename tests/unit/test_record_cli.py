"""`agentops runs` and `agentops show`, as a user calls them, on a record that a real run left."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import pytest
from langgraph.graph import START, StateGraph

from agentops.cli import main
from agentops.clock import CountingIds, SystemClock
from agentops.engine import generate
from agentops.engine.scripted import ScriptedEngine
from agentops.records import Document, Hit, Leg, Message, PromptVersion, Query, Request, Retrieval, content_hash
from agentops.settings import Settings
from agentops.tracer import TracedEngine, TracedRetriever, open_tracer, tagged

Cli = Callable[..., "Done"]


class State(TypedDict, total=False):
    question: str
    answer: str


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def cli(settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs the console script's own function."""
    monkeypatch.setenv("AGENTOPS_PATHS_HOME", str(settings.paths.home))
    monkeypatch.setenv("COLUMNS", "140")

    def call(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["agentops", *arguments])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as left:
            code = int(left.code or 0)
        return Done(code, *capsys.readouterr())

    return call


@pytest.fixture
async def recorded(settings: Settings, tmp_path: Path) -> None:
    """Two runs: one that answers from a document, one that fails; both with text that a terminal must not obey."""
    tracer = open_tracer(settings, clock=SystemClock(), ids=CountingIds())
    engine = TracedEngine(ScriptedEngine({"": "It is \x1b[31mgreen\x1b[0m [1]"}))
    document = Document("d1", "Grass is green.\x1b]0;owned\x07", content_hash("x"), {"source": "grass.md"})

    class Shelf:
        async def search(self, query: Query) -> Retrieval:
            return Retrieval(query, (Hit(document, 0.75, vector=Leg(1, 0.8), lexical=Leg(2, 3.5)),), generation=1)

    shelf = TracedRetriever(Shelf())

    async def retrieve(state: State) -> State:
        await shelf.search(Query(state["question"], "docs"))
        return {}

    async def write(state: State) -> State:
        with tagged(prompt=PromptVersion("answer", content_hash("T"), "T")):
            found = await generate(engine, Request(messages=(Message("system", "be brief"), Message("user", state["question"]))))
        return {"answer": found.text}

    def fail(state: State) -> State:
        raise LookupError("nothing \x9b2Jthere")

    async def run(run_id: str, graph: str, **nodes: Any) -> None:
        builder = StateGraph(State)
        before = START
        for name, node in nodes.items():
            builder.add_node(name, node)
            builder.add_edge(before, name)
            before = name
        given = {"question": "what colour is grass"}
        trace = tracer.start_run(run_id=run_id, thread_id="th_1", graph=graph, input=given)
        try:
            trace.end("done", await builder.compile().ainvoke(given, {"callbacks": [trace.handler]}))
        except LookupError as error:
            trace.end("failed", error=error)

    await run("run_1", "rag", retrieve=retrieve, write=write)
    await run("run_2", f"{tmp_path}/mine.py:graph", retrieve=retrieve, fail=fail)
    tracer.close()


def obeyed(text: str) -> list[str]:
    return re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)


def test_an_empty_record_says_how_to_begin(cli: Cli) -> None:
    done = cli("runs")
    assert (done.returncode, done.stderr) == (0, "")
    assert "agentops run rag" in done.stdout
    assert json.loads(cli("runs", "--json").stdout) == []
    done = cli("show", "last")
    assert done.returncode == 1
    assert "nothing has been recorded yet" in done.stderr


@pytest.mark.usefixtures("recorded")
def test_runs_are_listed_and_filtered(cli: Cli) -> None:
    lines = cli("runs").stdout.splitlines()
    assert lines[0].split() == ["run", "status", "started", "time", "in/cached/out", "graph", "asked"]
    assert [line.split()[:2] for line in lines[1:]] == [["run_2", "failed"], ["run_1", "done"]]
    for arguments, expected in (
        (["--status", "failed"], ["run_2"]),
        (["--graph", "rag"], ["run_1"]),
        (["--thread", "th_9"], []),
        (["--since", "1h", "--limit", "1"], ["run_2"]),
        (["--since", "2100-01-01"], []),
    ):
        rows = json.loads(cli("runs", "--json", *arguments).stdout)
        assert [row["id"] for row in rows] == expected
    (row,) = json.loads(cli("runs", "--json", "--graph", "rag").stdout)
    assert row["usage"]["cached_tokens"] + row["usage"]["computed_tokens"] == row["usage"]["input_tokens"] > 0
    assert "and more" in cli("runs", "--limit", "1").stdout


@pytest.mark.usefixtures("recorded")
def test_a_graph_of_a_file_is_found_as_it_was_named_to_run(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for named in ("./mine.py:graph", "mine.py:graph", "mine.py", "~/mine.py", f"{tmp_path}/mine.py:graph"):
        assert [row["id"] for row in json.loads(cli("runs", "--json", "--graph", named).stdout)] == ["run_2"], named
    for named in ("mine.py:other", "sub/mine.py", "mine", "python:mine.py"):
        assert json.loads(cli("runs", "--json", "--graph", named).stdout) == [], named


def test_what_only_looks_like_documents_is_shown_too(cli: Cli, settings: Settings) -> None:
    tracer = open_tracer(settings, clock=SystemClock(), ids=CountingIds())
    run = tracer.start_run(run_id="run_1", thread_id="th_1", graph="g")
    legs: list[Any] = [[0.1, 0.2], None, {"rank": 1}, {"rank": 1, "score": "high"}, 7, {"rank": 2, "score": 1}]
    run.end("done", [{"text": f"text {place}", "source": "s", "vector": leg} for place, leg in enumerate(legs)])
    tracer.close()
    done = cli("show", "run_1", "--span", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"\[\d\] .*", done.stdout) == [*(f"[{place}] s  -" for place in range(1, 6)), "[6] s  -  vector #2 (1.000)"]


def test_json_is_ascii_whatever_the_record_holds(cli: Cli, settings: Settings) -> None:
    hostile = "a\udc80b \x9b2J \u202e \x1b]0;x\x07"
    tracer = open_tracer(settings, clock=SystemClock(), ids=CountingIds())
    run = tracer.start_run(run_id="run_1", thread_id="th_1", graph=hostile, input={"question": hostile})
    run.end("done", hostile)
    tracer.close()
    for words in (("runs", "--json"), ("show", "run_1", "--json")):
        done = cli(*words)
        assert done.returncode == 0
        assert done.stdout.isascii()
        assert not obeyed(done.stdout)
    assert json.loads(done.stdout)["run"]["output"] == hostile


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs", "--status", "sleeping"], "no run can be 'sleeping'"),
        (["runs", "--since", "yesterday-ish"], "is no time"),
        (["runs", "--since", "99999-01-01"], "is no time"),
        (["runs", "--limit", "0"], "limit"),
        (["show", "run_7"], "no run is called 'run_7'"),
        (["show", "run_"], "more than one run"),
        (["show", "run_1", "--span", "99"], "no span is meant by '99'"),
        (["show", "run_1", "--span", "sp_"], "spans are meant by"),
    ],
)
def test_calls_that_cannot_be_right_are_told_without_a_traceback(cli: Cli, arguments: list[str], message: str) -> None:
    done = cli(*arguments)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.usefixtures("recorded")
def test_a_run_is_shown_as_a_tree_with_its_balance(cli: Cli) -> None:
    done = cli("show", "run_1")
    assert done.stderr == ""
    text = done.stdout
    assert not obeyed(text)
    for piece in (
        "graph    rag",
        "thread   th_1",
        " computed + ",
        "balance  5 spans emitted, 5 stored, 0 payloads truncated: balanced",
    ):
        assert piece in text
    tree = [line for line in text.splitlines() if "━" in line]
    assert [re.sub(r"(?<=[a-z])  .*", "", line).strip() for line in tree] == [
        "1 rag workflow",
        "2 ├─ retrieve",
        "3 │  └─ search retrieval",
        "4 └─ write",
        "5    └─ generate generation",
    ]
    assert "1 hits" in text
    assert "generate generation  answer" in text
    failed = cli("show", "last").stdout
    assert "LookupError: nothing there" in failed
    assert not obeyed(failed)


@pytest.mark.usefixtures("recorded")
def test_messages_and_documents_on_demand(cli: Cli) -> None:
    text = cli("show", "run_1", "--messages", "--documents").stdout
    assert not obeyed(text)
    for piece in (
        "system:\n    be brief",
        "user:\n    what colour is grass",
        "It is green [1]",
        "[1] grass.md  0.7500  vector #1 (0.800) lexical #2",
    ):
        assert piece in text
    assert "Grass is green.\n" in text
    assert "prompt       answer  b2:" in text


@pytest.mark.usefixtures("recorded")
def test_one_span_in_full(cli: Cli) -> None:
    by_name = cli("show", "run_2", "--span", "fail").stdout
    assert "error" in by_name
    assert "in fail" in by_name, "the stack is shown"
    assert "balance" not in by_name
    assert not obeyed(by_name)
    number = re.search(r"── (\d+) ·", by_name)
    assert number is not None
    assert cli("show", "run_2", "--span", number[1]).stdout == by_name
    span = re.search(r"span +(sp_\S+)", by_name)
    assert span is not None
    assert cli("show", "run_2", "--span", span[1]).stdout == by_name


@pytest.mark.usefixtures("recorded")
def test_json_holds_everything_that_was_asked_for(cli: Cli) -> None:
    shown = json.loads(cli("show", "run_1", "--json", "--messages").stdout)
    assert shown["run"]["output"]["answer"] == "It is \x1b[31mgreen\x1b[0m [1]"
    assert shown["balance"]["balanced"] is True
    assert [span["kind"] for span in shown["spans"]] == ["workflow", "node", "retrieval", "node", "generation"]
    assert shown["spans"][4]["input"]["messages"][1]["content"] == "what colour is grass"
    assert "input" not in shown["spans"][2]


@pytest.mark.usefixtures("recorded")
def test_reading_the_record_loads_no_model_and_no_graph(settings: Settings) -> None:
    program = (
        "import sys, agentops.cli; sys.argv = ['agentops', 'show', 'last']\n"
        "try:\n    agentops.cli.main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'langgraph', 'langchain_core', 'numpy', 'ragas', 'textual'} & set(sys.modules)), file=sys.stderr)"
    )
    environment = os.environ | {"AGENTOPS_PATHS_HOME": str(settings.paths.home)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stderr.strip() == "[]"
    assert "run_2" in done.stdout


def test_a_damaged_record_is_told_with_a_mend(cli: Cli, settings: Settings) -> None:
    home: Path = settings.paths.home
    home.mkdir(parents=True)
    (home / "record.db").write_bytes(b"not a database" * 100)
    done = cli("runs")
    assert done.returncode == 1
    assert "hint: move the file away" in done.stderr
    assert "Traceback" not in done.stderr
