"""What tools and callers do wrong. A call that goes wrong comes back as text for the model; the run goes on."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pytest
from langchain_core.tools import BaseTool, ToolException
from langchain_core.tools import tool as langchain_tool
from langgraph.types import Command
from pydantic import AfterValidator

from agentops import Runtime, ScriptedEngine, Settings
from agentops.errors import BudgetSpent, RetrievalError
from agentops.records import ToolCall, ToolResult
from agentops.settings import ToolSettings
from agentops.store import open_store
from agentops.tools import Toolbox, tool
from agentops.tracer import catch_up
from tests.unit.test_tools import call, graph, tool_spans

QUICK = ToolSettings(timeout_s=0.2, result_bytes=1_000)
PATIENT = replace(QUICK, timeout_s=60.0)
"""Where it is not the time that is looked at."""


@pytest.fixture
def runtime(settings: Settings) -> Iterator[Runtime]:
    part: Any = object()
    with Runtime(settings, engine=ScriptedEngine(), index=part, embedder=part) as opened:
        yield opened


def cyclic() -> list[Any]:
    ring: list[Any] = []
    ring.append(ring)
    return ring


def deep() -> list[Any]:
    made: list[Any] = []
    for _ in range(100_000):
        made = [made]
    return made


def both(body: Any) -> list[Any]:
    """The same body as a plain and as an asynchronous tool."""

    def act() -> Any:
        """Acts."""
        return body()

    async def later() -> Any:
        """Acts."""
        return body()

    return [tool(effect="none", name="act")(act), tool(effect="none", name="act")(later)]


def throw(error: BaseException) -> Any:
    def body() -> Any:
        raise error

    return body


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (throw(ValueError("no luck")), "act failed: ValueError: no luck"),
        (throw(ValueError("x" * 5_000)), "more bytes were left out"),
        (throw(Unspeakable()), "act failed: Unspeakable"),
        (throw(ToolException("in words")), "act failed: ToolException: in words"),
        (throw(RetrievalError("the index is gone")), "act failed: RetrievalError: the index is gone"),
        (throw(StopIteration()), "act failed: RuntimeError"),
        (throw(TimeoutError("its own")), "act failed: TimeoutError: its own"),
        (throw(asyncio.CancelledError()), "act failed"),
        (throw(SystemExit(3)), "it called sys.exit(3)"),
        (lambda: sys.exit("bye"), "it called sys.exit('bye')"),
        (lambda: object(), "act failed: it returned a object, which is neither text nor JSON"),
        (lambda: b"\xff\xfe", "it returned a bytes, which is neither text nor JSON"),
        (cyclic, "it returned a list, which is neither text nor JSON: Circular reference"),
        (deep, "it returned a list, which is neither text nor JSON"),
        (itertools.count, "it returned a count, which is neither text nor JSON"),
        (lambda: [{"a": itertools.count()}], "it returned a list, which is neither text nor JSON"),
        (lambda: (number for number in itertools.count()), "it returned a generator"),
        (lambda: {("a", 1): 2}, "it returned a dict, which is neither text nor JSON"),
        (lambda: asyncio.sleep(1), "it returned a coroutine"),
        (threading.Lock, "it returned a lock, which is neither text nor JSON"),
        (lambda: Command(goto="elsewhere"), "act failed: it returned a Command"),
    ],
)
async def test_what_a_tool_does_wrong_is_told_to_the_model(body: Any, said: str) -> None:
    for one in both(body):
        result = await Toolbox([one]).perform(call("act"), PATIENT)
        assert result.status == "failed"
        assert said in result.content
        assert len(result.content) < 1_500


def test_a_failure_is_an_error_on_record_with_the_tools_own_stack(runtime: Runtime, settings: Settings) -> None:
    @tool(effect="none")
    def divide(a: int, b: int) -> float:
        """Divides."""
        return a / b

    box = Toolbox([divide])
    done = runtime.run(graph(box), {"calls": [call("divide", a=1, b=0), call("divide", a=1, b=2)]})
    assert [result.status for result in done.output["results"]] == ["failed", "ok"]
    failed, fine = tool_spans(settings, done.run_id)
    assert (failed.status, failed.error) == ("error", "ZeroDivisionError: division by zero")
    assert failed.attributes["status"] == "failed"
    assert "return a / b" in failed.attributes["stack"]
    assert fine.status == "ok"


def test_a_call_of_a_tool_that_is_not_there_is_on_record(runtime: Runtime, settings: Settings) -> None:
    box = Toolbox(both(lambda: "x")[:1])
    done = runtime.run(graph(box), {"calls": [call("acct", text="x"), call("act")]})
    unknown, fine = done.output["results"]
    assert (unknown.status, unknown.content) == ("failed", "there is no tool 'acct'; there are: act")
    assert fine.status == "ok"
    span = tool_spans(settings, done.run_id)[0]
    assert (span.name, span.status, span.attributes["status"]) == ("acct", "error", "failed")
    assert "there is no tool" in (span.error or "")


async def test_an_empty_box_says_so() -> None:
    assert (await Toolbox().perform(call("any"))).content == "there is no tool 'any'; there are none"


def even(value: int) -> int:
    if value % 2:
        raise ValueError("must be even")
    return value


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "'count' is a required property"),
        ({"count": "many"}, "count: 'many' is not of type 'integer'"),
        ({"count": 2, "more": 1}, "Additional properties are not allowed"),
        ({"count": None}, "count: None is not of type 'integer'"),
        ({"count": 3}, "must be even"),
        ([], "[] is not of type 'object'"),
        ("count", "'count' is not of type 'object'"),
        (None, "None is not of type 'object'"),
        ({"count": "x" * 100_000}, "count: "),
    ],
)
async def test_arguments_that_do_not_fit_are_not_run(arguments: Any, said: str) -> None:
    ran: list[int] = []

    @tool(effect="write")
    def take(count: Annotated[int, AfterValidator(even)]) -> int:
        """Takes some."""
        ran.append(count)
        return count

    # A person is not asked about what would not run.
    result = await Toolbox([take]).perform(ToolCall("take", arguments, "c"))
    assert result.status == "failed"
    assert said in result.content
    assert len(result.content) < 500
    assert not ran


@pytest.mark.parametrize("size", [50_000_000, 3_000])
async def test_of_a_huge_result_the_model_reads_the_beginning(size: int) -> None:
    for body in (lambda: "é" * (size // 2), lambda: ["x" * 1_000] * (size // 1_000)):
        for one in both(body):
            result = await Toolbox([one]).perform(call("act"), ToolSettings(result_bytes=1_000))
            assert result.status == "ok"
            assert len(result.content.encode()) < 1_100
            assert "more bytes were left out]" in result.content


def test_a_huge_result_is_cut_on_record_too(runtime: Runtime, settings: Settings) -> None:
    done = runtime.run(graph(Toolbox(both(lambda: "x" * 50_000_000)[:1])), {"calls": [call("act")]})
    assert done.status == "done"
    (span,) = tool_spans(settings, done.run_id)
    with open_store(settings) as store:
        assert len(str(store.payload(span.output_hash or ""))) < 30_000


async def test_a_tool_that_hangs_is_given_up_in_time() -> None:
    @tool(effect="none", name="act")
    def plain() -> None:
        """Hangs."""
        time.sleep(60)

    @tool(effect="none", name="act")
    async def waiting() -> None:
        """Hangs."""
        await asyncio.sleep(60)

    @tool(effect="none", name="act")
    async def stubborn() -> None:
        """Hangs, and is not to be cancelled once."""
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(60)

    @langchain_tool("act")
    def foreign() -> None:
        """Hangs."""
        time.sleep(60)

    class Act(BaseTool):
        name: str = "act"
        description: str = "Hangs."

        def _run(self) -> None:
            time.sleep(60)

    for one in (plain, waiting, stubborn, foreign, Act()):
        begun = time.monotonic()
        result = await Toolbox([one], policy={"act": "allow"}).perform(call("act"), QUICK)
        assert result.content == "act failed: it took longer than 0.2 s and was given up"
        assert time.monotonic() - begun < 3


async def test_a_run_that_is_cancelled_does_not_wait_for_its_tool() -> None:
    @tool(effect="none")
    def act() -> None:
        """Hangs."""
        time.sleep(60)

    work = asyncio.create_task(Toolbox([act]).perform(call("act")))
    await asyncio.sleep(0.1)
    work.cancel()
    begun = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert time.monotonic() - begun < 1


HANGING = '''
import asyncio, sys, time
from agentops import Runtime, ScriptedEngine, load_settings
from agentops.records import ToolCall
from agentops.tools import Toolbox, tool
from tests.unit.test_tools import call, graph

@tool(effect="none")
def plain() -> None:
    """Hangs."""
    time.sleep(600)

@tool(effect="none")
async def waiting() -> None:
    """Hangs."""
    await asyncio.sleep(600)

@tool(effect="none")
def leave() -> None:
    """Leaves."""
    sys.exit(9)

@tool(effect="none")
async def leave_later() -> None:
    """Leaves."""
    sys.exit(9)

box = Toolbox([plain, waiting, leave, leave_later])
calls = [call(one.name) for one in box]
settings = load_settings({"tools.timeout_s": 0.2})
with Runtime(settings, engine=ScriptedEngine(), index=object(), embedder=object()) as runtime:
    done = runtime.run(graph(box), {"calls": calls})
    print(done.status, [result.status for result in done.output["results"]])
async def own_loop():
    async with Runtime(settings, engine=ScriptedEngine(), index=object(), embedder=object()) as runtime:
        return await runtime.arun(graph(box), {"calls": calls})
print(asyncio.run(own_loop()).status)
'''


def test_a_process_ends_at_once_whatever_its_tools_still_do(environment: dict[str, str]) -> None:
    root = str(Path(__file__).resolve().parents[2])
    begun = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=120, env={**environment, "PYTHONPATH": root}
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split("\n") == ["done ['failed', 'failed', 'failed', 'failed']", "done", ""]
    assert time.monotonic() - begun < 60


async def test_what_ends_a_run_is_not_taken_for_a_failure_of_the_tool() -> None:
    for one in both(throw(BudgetSpent("spent", budget="tokens"))):
        with pytest.raises(BudgetSpent):
            await Toolbox([one]).perform(call("act"), QUICK)


async def test_arguments_are_not_changed_by_the_tool_that_gets_them() -> None:
    @tool(effect="none")
    def spoil(numbers: list[int]) -> str:
        """Spoils what it is given."""
        numbers.clear()
        return "done"

    asked = call("spoil", numbers=[1, 2])
    result = await Toolbox([spoil]).perform(asked)
    assert result == ToolResult(call("spoil", numbers=[1, 2]), "ok", "done")


def test_the_record_balances_after_all_of_it(runtime: Runtime, settings: Settings) -> None:
    box = Toolbox([*both(throw(ValueError("x")))[:1]])
    done = runtime.run(graph(box), {"calls": [call("act"), call("gone"), call("act", more=1)]})
    assert [result.status for result in done.output["results"]] == ["failed"] * 3
    catch_up(settings)
    with open_store(settings) as store:
        spans = store.spans(done.run_id)
    root = spans[0]
    assert root.attributes["faults"] == 0
    assert root.attributes["emitted"] == len(spans)
    assert [span.kind for span in spans] == ["workflow", "node", "tool", "tool", "tool"]
