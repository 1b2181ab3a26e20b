"""Runs that wait for people: several interrupts at once, answers that do not fit, other processes, kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TypedDict

import pytest
from langgraph.graph import END, START, StateGraph
from langgraph.types import interrupt

from agentops import Runtime, Settings
from agentops.errors import AnswerUnfit, NodeFailed, UsageError
from agentops.people import approve, ask
from agentops.records import Decision
from agentops.store import RunRow, open_store
from agentops.tracer import catch_up

LETTERS = """
import operator, os, time
from pathlib import Path
from typing import Annotated, TypedDict
from langgraph.graph import START, END, StateGraph
from langgraph.types import Send
from agentops.people import approve, ask

class State(TypedDict, total=False):
    to: str
    names: list[str]
    sent: Annotated[list[str], operator.add]
    signed: str

def send(state):
    decision = approve(f"send to {state['to']}?", f"Dear {state['to']}")
    if decision.kind == "reject":
        return {"sent": [f"{state['to']}: refused, {decision.reason}"]}
    with open("sent.txt", "a") as file:
        file.write(decision.content + "\\n")
    if os.environ.get("STOP") == state["to"]:
        Path("stopped").touch()
        time.sleep(60)
    return {"sent": [f"{state['to']}: {decision.content}"]}

def sign(state):
    return {"signed": ask("your name?", schema={"type": "string", "minLength": 2})}

graph = StateGraph(State).add_node(send).add_node(sign)
graph.add_conditional_edges(START, lambda state: [Send("send", {"to": name}) for name in state["names"]], ["send"])
graph.add_edge("send", "sign").add_edge("sign", END)
"""


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    (tmp_path / "letters.py").write_text(LETTERS)
    return tmp_path


class Console:
    """The command line in a process of its own, in `folder`."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment

    def start(self, *arguments: str, **more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "agentops", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment | more, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )

    def __call__(self, *arguments: str, fails: int = 0, stdin: str = "") -> str:
        process = self.start(*arguments)
        out, errors = process.communicate(stdin, timeout=60)
        assert process.returncode == fails, errors
        assert "Traceback" not in errors
        return errors if fails else out

    def json(self, *arguments: str) -> Any:
        return json.loads(self(*arguments, "--json"))


@pytest.fixture
def console(letters: Path, environment: dict[str, str]) -> Console:
    return Console(letters, environment)


def test_each_of_several_interrupts_is_answered_by_its_id_in_other_processes(console: Console, letters: Path) -> None:
    waiting = console.json("run", "letters.py", '{"names": ["Ada", "Bob", "Eve"]}')
    assert waiting["status"] == "waiting"
    run, ids = waiting["run_id"], {one["question"]: one["id"] for one in waiting["interrupts"]}
    assert set(ids) == {"send to Ada?", "send to Bob?", "send to Eve?"}
    (listed,) = console.json("inbox")
    assert listed["run"] == run
    assert {one["id"] for one in listed["interrupts"]} == set(ids.values())
    assert listed["interrupts"][0]["content"] == "Dear Ada"
    shown = console("inbox", run)
    assert "    Dear Ada\n" in shown
    answer = f"agentops resume {run} --id {ids['send to Bob?'][:8]} --approve | --edit FILE | --reject"
    assert answer in shown
    assert answer in console("show", run)

    said = console("resume", run, "--approve", fails=2)
    assert "waits for 3 answers" in said
    assert ids["send to Eve?"] in said
    assert console.json("resume", run, "--id", ids["send to Ada?"][:8], "--approve")["status"] == "waiting"
    assert len(console.json("inbox")[0]["interrupts"]) == 2
    assert "answered already" in console("resume", run, "--id", ids["send to Ada?"], "--reject", fails=2)
    (letters / "answers.json").write_text(
        json.dumps(
            {
                ids["send to Bob?"]: {"kind": "reject", "reason": "not now"},
                ids["send to Eve?"]: {"kind": "edit", "content": "Hi Eve"},
            }
        )
    )
    assert console.json("resume", run, "--answers", "answers.json")["interrupts"][0]["question"] == "your name?"
    assert "is too short" in console("resume", run, "--answer", "X", fails=2)
    assert console.json("inbox")[0]["run"] == run, "a refused answer leaves it waiting"
    done = console.json("resume", run, "--answer", "Ann")
    assert done["status"] == "done"
    assert done["output"]["sent"] == ["Ada: Dear Ada", "Bob: refused, not now", "Eve: Hi Eve"]
    assert done["output"]["signed"] == "Ann"
    assert (letters / "sent.txt").read_text() == "Dear Ada\nHi Eve\n"
    assert "is done" in console("resume", run, "--answer", "Ann", fails=2)
    assert console.json("inbox") == []
    assert "no run waits" in console("inbox")
    assert "is done; it waits for nobody" in console("inbox", run)
    shown = console("show", run)
    assert "error" not in shown
    assert "⏸" in shown


def test_an_edit_comes_from_a_file_or_standard_input_and_a_wrong_one_changes_nothing(console: Console, letters: Path) -> None:
    run = console.json("run", "letters.py", '{"names": ["Ada"]}')["run_id"]
    (letters / "empty").write_text("")
    assert "is empty" in console("resume", run, "--edit", "empty", fails=2)
    assert "cannot be read from missing" in console("resume", run, "--edit", "missing", fails=2)
    assert "give one of" in console("resume", run, "--approve", "--reject", fails=2)
    assert "no answer is given" in console("resume", run, "--id", "abc", fails=2)
    assert "waits for an answer" in console("resume", run, fails=2)
    assert "nothing waits under 'zzz'" in console("resume", run, "--id", "zzz", "--approve", fails=2)
    (letters / "list.json").write_text("[1]")
    assert "holds no JSON object" in console("resume", run, "--answers", "list.json", fails=2)
    assert not (letters / "sent.txt").exists()
    out = console("resume", run, "--edit", "-", "--quiet", stdin="Liebe Ada\n")
    assert "your name?" in out
    assert (letters / "sent.txt").read_text() == "Liebe Ada\n"


def test_a_process_killed_after_an_answer_does_not_ask_again(console: Console, letters: Path) -> None:
    run = console.json("run", "letters.py", '{"names": ["Ada", "Bob"]}')["run_id"]
    ids = {one["question"]: one["id"] for one in console.json("inbox")[0]["interrupts"]}
    answers = {ids["send to Ada?"]: True, ids["send to Bob?"]: True}
    (letters / "answers.json").write_text(json.dumps(answers))
    process = console.start("resume", run, "--answers", "answers.json", STOP="Bob")
    deadline = time.monotonic() + 60
    while not (letters / "stopped").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert console.json("runs")[0]["status"] == "crashed"
    again = console.json("resume", run)
    assert [one["question"] for one in again["interrupts"]] == ["your name?"], "both answers were kept"
    sent = (letters / "sent.txt").read_text().splitlines()
    assert sent.count("Dear Ada") == 1, "what was finished is not done twice"
    assert sent.count("Dear Bob") == 2, "what was under way is done again: at least once"


class State(TypedDict, total=False):
    text: str


def row(settings: Settings, run_id: str) -> RunRow:
    catch_up(settings)
    with open_store(settings) as store:
        return store.run(run_id)


def single(*nodes: Any, **compile_options: Any) -> Any:
    graph = StateGraph(State)
    before = START
    for node in nodes:
        graph.add_node(node.__name__, node)
        graph.add_edge(before, node.__name__)
        before = node.__name__
    graph.add_edge(before, END)
    return graph.compile(**compile_options) if compile_options else graph


def test_two_interrupts_of_one_node_are_answered_one_after_the_other(settings: Settings) -> None:
    def both(state: State) -> State:
        return {"text": f"{ask('first?')} {ask('second?')}"}

    graph = single(both)
    with Runtime(settings) as runtime:
        run = runtime.run(graph, {"text": ""})
        assert [one.question for one in run.interrupts] == ["first?"]
        run = runtime.resume(run.run_id, answer="a", graph=graph)
        assert [one.question for one in run.interrupts] == ["second?"]
        run = runtime.resume(run.run_id, answer="b", graph=graph)
    assert run.output == {"text": "a b"}


def test_an_interrupt_in_a_subgraph_says_where_it_is(settings: Settings) -> None:
    def inner(state: State) -> State:
        return {"text": approve("fine?", {"n": 1}).kind}

    outer = StateGraph(State).add_node("sub", single(inner).compile())
    outer.add_edge(START, "sub").add_edge("sub", END)
    with Runtime(settings) as runtime:
        run = runtime.run(outer, {"text": ""})
        (asked,) = run.interrupts
        assert (asked.kind, asked.node, asked.content) == ("approval", "sub / inner", {"n": 1})
        with open_store(settings) as store:
            assert store.pending(row(settings, run.run_id)) == run.interrupts
        with pytest.raises(AnswerUnfit, match="another kind"):
            runtime.resume(run.run_id, answer=Decision("edit", [1]), graph=outer)
        assert row(settings, run.run_id).status == "waiting"
        assert runtime.resume(run.run_id, answer=Decision("reject"), graph=outer).output == {"text": "reject"}
    done = row(settings, run.run_id)
    assert (done.status, done.pending_hash) == ("done", None)


def test_a_graph_that_stops_before_a_node_waits_and_goes_on_when_approved(settings: Settings) -> None:
    def draft(state: State) -> State:
        return {"text": "draft"}

    def send(state: State) -> State:
        return {"text": state["text"] + " sent"}

    graph = single(draft, send, interrupt_before=["send"])
    with Runtime(settings) as runtime:
        run = runtime.run(graph, {"text": ""})
        assert run.status == "waiting"
        assert [(one.kind, one.node) for one in run.interrupts] == [("pause", "send")]
        with pytest.raises(AnswerUnfit, match="nothing is asked"):
            runtime.resume(run.run_id, answer="text", graph=graph)
        run = runtime.resume(run.run_id, answer=True, graph=graph)
    assert (run.status, run.output) == ("done", {"text": "draft sent"})


def test_a_value_that_only_langgraph_knows_how_to_ask_is_answered_too(settings: Settings) -> None:
    from pydantic import BaseModel

    class Choice(BaseModel):
        colour: str
        count: int

    def pick(state: State) -> State:
        chosen = interrupt({"message": "which?"}, response_schema=Choice)
        return {"text": f"{chosen.count} {chosen.colour}"}

    graph = single(pick)
    with Runtime(settings) as runtime:
        run = runtime.run(graph, {"text": ""})
        assert run.interrupts[0].question == "which?"
        with pytest.raises(AnswerUnfit, match="count"):
            runtime.resume(run.run_id, answer={"colour": "red", "count": "many"}, graph=graph)
        run = runtime.resume(run.run_id, answer='{"colour": "red", "count": 2}', graph=graph)
    assert run.output == {"text": "2 red"}


def test_an_answer_to_a_run_that_waits_for_none_is_refused(settings: Settings) -> None:
    def fail(state: State) -> State:
        raise ValueError("no")

    graph = single(fail)
    with Runtime(settings) as runtime:
        with pytest.raises(NodeFailed, match="no"):
            runtime.run(graph, {"text": ""})
        with pytest.raises(UsageError, match="waits for no answer"):
            runtime.resume("last", answer="x", graph=graph)


def test_a_node_that_fails_after_its_answer_does_not_ask_again(settings: Settings) -> None:
    broken = True

    def send(state: State) -> State:
        decision = approve("send?", "text")
        if broken:
            raise OSError("no network")
        return {"text": decision.content}

    graph = single(send)
    with Runtime(settings) as runtime:
        run = runtime.run(graph, {"text": ""})
        with pytest.raises(NodeFailed, match="no network"):
            runtime.resume(run.run_id, answer=Decision("edit", "edited"), graph=graph)
        with pytest.raises(NodeFailed, match="no network"):
            runtime.resume(run.run_id, graph=graph)
        broken = False
        run = runtime.resume(run.run_id, graph=graph)
    assert run.output == {"text": "edited"}


def test_two_people_answering_at_once_get_one_answer_through(settings: Settings) -> None:
    import threading

    written: list[str] = []

    def send(state: State) -> State:
        decision = approve("send?", "text")
        time.sleep(0.2)
        written.append(decision.kind)
        return {"text": "sent"}

    graph = single(send)
    with Runtime(settings) as runtime, Runtime(settings) as other:
        run = runtime.run(graph, {"text": ""})
        ends: list[str] = []

        def answer(by: Runtime) -> None:
            try:
                ends.append(by.resume(run.run_id, answer=True, graph=graph).status)
            except Exception as error:
                ends.append(type(error).__name__)

        people = [threading.Thread(target=answer, args=(by,)) for by in (runtime, other)]
        for person in people:
            person.start()
        for person in people:
            person.join(30)
    assert written == ["approve"]
    assert sorted(ends)[1] == "done"
    assert sorted(ends)[0] in ("ThreadBusy", "UsageError")


def test_the_folder_one_is_in_does_not_matter(console: Console, letters: Path) -> None:
    run = console.json("run", "letters.py", '{"names": []}')
    assert run["status"] in ("done", "waiting")
    run = console.json("run", "letters.py", '{"names": ["Ada"]}')["run_id"]
    elsewhere = Console(Path(os.sep), console.environment)
    assert elsewhere.json("resume", run, "--reject", "--reason", "no")["interrupts"][0]["question"] == "your name?"


def test_an_answer_that_was_acted_upon_is_not_taken_for_the_next_question(settings: Settings) -> None:
    done: list[str] = []
    broken = True

    def work(state: State) -> State:
        if approve("pay?", {"to": "bob"}).kind == "approve":
            done.append("paid")
        if broken:
            raise OSError("no network")
        if approve("pay?", {"to": "bob"}).kind == "approve":
            done.append("paid again")
        if ask("delete everything?") is True:
            done.append("deleted")
        return {"text": "done"}

    graph = single(work)
    with Runtime(settings) as runtime:
        run = runtime.run(graph, {"text": ""})
        with pytest.raises(NodeFailed, match="no network"):
            runtime.resume(run.run_id, answer=True, graph=graph)
        with pytest.raises(AnswerUnfit, match="waits for no answer"):
            runtime.resume(run.run_id, answer=Decision("reject"), graph=graph)
        broken = False
        run = runtime.resume(run.run_id, graph=graph)
        assert [one.question for one in run.interrupts] == ["pay?"], "the second one is asked for itself"
        run = runtime.resume(run.run_id, answer=Decision("reject"), graph=graph)
        assert [one.question for one in run.interrupts] == ["delete everything?"]
        run = runtime.resume(run.run_id, answer=False, graph=graph)
    assert run.status == "done"
    assert set(done) == {"paid"}


def test_an_approval_holds_for_what_was_shown_and_for_nothing_else(settings: Settings) -> None:
    proposals, sent = ["to bob", "to eve", "to eve"], []

    def send(state: State) -> State:
        decision = approve("send?", proposals.pop(0))
        sent.append(decision.content)
        return {"text": decision.content}

    graph = single(send)
    with Runtime(settings) as runtime:
        run = runtime.run(graph, {"text": ""})
        assert run.interrupts[0].content == "to bob"
        run = runtime.resume(run.run_id, answer=True, graph=graph)
        assert (run.status, run.interrupts[0].content, sent) == ("waiting", "to eve", [])
        run = runtime.resume(run.run_id, answer=True, graph=graph)
    assert (run.status, sent) == ("done", ["to eve"])


def test_values_that_json_does_not_know_are_shown(letters: Path, console: Console) -> None:
    (letters / "odd.py").write_text(
        "import datetime\n"
        "from typing import TypedDict\n"
        "from langgraph.graph import START, StateGraph\n"
        "from langgraph.types import interrupt\n"
        "class State(TypedDict):\n    n: int\n"
        "def work(state):\n"
        "    asked = {'question': 'when?', 'at': datetime.datetime(2026, 1, 2)}\n"
        "    return {'n': interrupt(asked, response_schema={'type': 'integer'})}\n"
        "graph = StateGraph(State).add_node(work).add_edge(START, 'work')\n"
    )
    shown = console("run", "odd.py", '{"n": 0}')
    assert "2026-01-02" in shown
    assert 'the answer must fit: {"type": "integer"}' in shown
