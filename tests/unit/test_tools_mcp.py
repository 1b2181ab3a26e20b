"""Tools of MCP servers, of a real one from PyPI and of one with bad manners, under policies and beyond their deaths."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import pytest
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime as NodeRuntime

from agentops import Context, Runtime, ScriptedEngine, Settings
from agentops.errors import ToolError
from agentops.records import Decision, ToolCall, ToolResult
from agentops.replay import replay
from agentops.settings import ToolSettings
from agentops.tools import Toolbox, effect_of
from agentops.tools.mcp import open_servers
from tests.unit.test_tools import call, graph, tool_spans

SERVER = Path(__file__).with_name("mcp_server.py")
TIME = {"command": sys.executable, "args": ["-m", "mcp_server_time", "--local-timezone", "UTC"]}


def mannered(manner: str = "", **more: Any) -> dict[str, Any]:
    return {"command": sys.executable, "args": [str(SERVER), manner], **more}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "mcp.json"


def write(file: Path, **servers: Any) -> Path:
    file.write_text(json.dumps({"mcpServers": servers}))
    return file


@asynccontextmanager
async def boxed(file: Path, timeout_s: float = 20.0, **servers: Any) -> AsyncIterator[Toolbox]:
    async with open_servers(write(file, **servers), timeout_s, environment={"KEY": "secret"}) as tools:
        yield Toolbox(tools)


async def perform(box: Toolbox, name: str, timeout_s: float = 20.0, **arguments: Any) -> ToolResult:
    return await box.perform(ToolCall(name, arguments, "c1"), ToolSettings(allow=(name,), timeout_s=timeout_s))


def alive(pid: int) -> bool:
    """Whether there is a process of that number; one that ended and was not waited for is one too."""
    return Path(f"/proc/{pid}").exists()


async def ended(pid: int) -> bool:
    for _ in range(100):
        if not alive(pid):
            return True
        await asyncio.sleep(0.02)
    return False


# A real server


async def test_a_real_server_tells_the_time(file: Path) -> None:
    async with boxed(file, time=TIME) as box:
        assert set(box.descriptions()) == {"time_get_current_time", "time_convert_time"}
        assert box.schema("time_get_current_time")["required"] == ["timezone"]
        told = await perform(box, "time_get_current_time", timezone="Asia/Tokyo")
        assert told.status == "ok"
        assert json.loads(told.content)["timezone"] == "Asia/Tokyo"
        wrong = await perform(box, "time_get_current_time", timezone="Mars/Olympus")
        assert wrong.status == "failed"
        assert "Invalid timezone" in wrong.content
        unfit = await perform(box, "time_get_current_time", timezone="UTC", more=1)
        assert "Additional properties" in unfit.content


@pytest.mark.parametrize("word", ["ask", "allow", "deny"])
async def test_a_real_servers_tools_are_under_the_policy(file: Path, settings: Settings, word: str) -> None:
    part: Any = object()
    async with open_servers(write(file, time=TIME), 20) as tools:
        box = Toolbox(policy={}).joined(tools)
        assert box.policy("time_get_current_time") == "ask"
        made = graph(Toolbox(tools, policy={"time_get_current_time": word}))  # type: ignore[dict-item]
        async with Runtime(settings, engine=ScriptedEngine(), index=part, embedder=part) as runtime:
            done = await runtime.arun(made, {"calls": [call("time_get_current_time", timezone="UTC")]})
            if word == "ask":
                assert done.status == "waiting"
                assert done.interrupts[0].content == {"timezone": "UTC"}
                edited = Decision("edit", {"timezone": "Europe/Paris"})
                done = await runtime.aresume(done.run_id, answer=edited, graph=made)
    (result,) = done.output["results"]
    assert result.status == ("denied" if word == "deny" else "ok")
    assert ("Europe/Paris" in result.content) == (word == "ask")
    (span,) = tool_spans(settings, done.run_id)
    assert (span.name, span.attributes["effect"], span.attributes["policy"]) == ("time_get_current_time", "write", word)


async def test_a_real_server_that_is_killed_fails_its_calls_and_the_run_goes_on(file: Path, settings: Settings) -> None:
    part: Any = object()
    names = ToolSettings(allow=("time_get_current_time",))
    async with open_servers(write(file, time=TIME), 20) as tools:
        box = Toolbox(tools)
        assert (await box.perform(call("time_get_current_time", timezone="UTC"), names)).status == "ok"
        (pid,) = [int(found.name) for found in Path("/proc").glob("[0-9]*") if b"mcp_server_time" in _command(found)]
        os.kill(pid, signal.SIGKILL)
        begun = time.monotonic()
        made = graph(Toolbox(tools, policy={"time_get_current_time": "allow"}))
        async with Runtime(settings, engine=ScriptedEngine(), index=part, embedder=part) as runtime:
            done = await runtime.arun(made, {"calls": [call("time_get_current_time", timezone="UTC")] * 2})
        assert done.status == "done"
        assert [result.status for result in done.output["results"]] == ["failed", "failed"]
        assert "the MCP server 'time' is gone" in done.output["results"][0].content
        assert time.monotonic() - begun < 10
        assert await ended(pid)
    assert [span.status for span in tool_spans(settings, done.run_id)] == ["error", "error"]


def _command(process: Path) -> bytes:
    try:
        parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        return (process / "cmdline").read_bytes() if parent == os.getpid() else b""
    except OSError:
        return b""


# Servers with bad manners


async def test_what_a_server_says_of_itself_is_cleaned_cut_and_not_believed(file: Path) -> None:
    async with boxed(file, t=mannered()) as box:
        for one in box:
            assert effect_of(one) == "write"
            assert box.policy(one.name) == "ask"
            assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", one.name)
        said = box.descriptions()["t_odd_name_"]
        assert len(said) == 1_000
        for text in (said, box.parameters("t_taken")):
            assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\U000e0041]", text)
        assert json.loads((await perform(box, "t_odd_name_", text="x")).content) == {"text": "x"}


async def test_results_come_back_whatever_they_are(file: Path) -> None:
    async with boxed(file, t=mannered()) as box:
        assert (await perform(box, "t_echo", text="é\n")).content == '{"text": "\\u00e9\\n"}'
        failed = await perform(box, "t_fail", text="x")
        assert (failed.status, failed.content) == ("failed", "t_fail failed: no x here")
        assert (await perform(box, "t_picture", text="x")).content == "look:\n[image image/png: not shown]"
        for name in ("t_broken", "t_elsewhere"):
            broken = await perform(box, name, text="x")
            assert "the schema itself is broken" in broken.content
        many = await asyncio.gather(*(perform(box, "t_echo", text=str(n)) for n in range(20)))
        assert [json.loads(one.content)["text"] for one in many] == [str(n) for n in range(20)]


async def test_arguments_whose_names_langchain_keeps_reach_the_server(file: Path) -> None:
    async with boxed(file, t=mannered()) as box:
        assert list(box.schema("t_taken")["properties"]) == ["config_", "runtime_"]
        result = await perform(box, "t_taken", config_="c", runtime_=3, more=[1])
        assert json.loads(result.content) == {"config": "c", "runtime": 3, "more": [1]}


async def test_nonsense_between_messages_is_passed_over(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async with boxed(file, t=mannered()) as box:
        for _ in range(3):
            assert (await perform(box, "t_chatter", text="x")).status == "ok"
    assert capfd.readouterr() == ("", "")


async def test_a_server_gets_of_the_environment_what_its_entry_gives(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("A_SECRET_OF_OURS", "x")
    (tmp_path / "here").mkdir()
    async with boxed(file, t=mannered(env={"MINE": "1", "TOKEN": "Bearer ${KEY}"}, cwd="here")) as box:
        seen = json.loads((await perform(box, "t_environment", text="")).content)
    assert (seen["MINE"], seen["TOKEN"]) == ("1", "Bearer secret")
    assert seen["cwd"] == str(tmp_path / "here")
    assert set(seen) <= {"MINE", "TOKEN", "cwd", "HOME", "LOGNAME", "PATH", "SHELL", "TERM", "USER", "LC_CTYPE", "PWD"}


async def test_a_server_that_dies_fails_its_call_at_once_and_every_later_one(file: Path) -> None:
    async with boxed(file, t=mannered(), other=mannered()) as box:
        pid = int((await perform(box, "t_pid", text="")).content)
        begun = time.monotonic()
        for name in ("t_die", "t_echo"):
            result = await perform(box, name, text="x")
            assert result.status == "failed"
            assert "the MCP server 't' is gone" in result.content
            assert "a last word" in result.content
        assert time.monotonic() - begun < 3
        assert (await perform(box, "other_echo", text="x")).status == "ok"
        assert await ended(pid)


async def test_a_server_that_hangs_is_given_up_in_time(file: Path) -> None:
    async with boxed(file, t=mannered()) as box:
        pid = int((await perform(box, "t_pid", text="")).content)
        result = await perform(box, "t_hang", timeout_s=0.3, text="x")
        assert result.content == "t_hang failed: it took longer than 0.3 s and was given up"
    assert not alive(pid)


async def test_a_result_beyond_all_bounds_fails_and_the_server_goes_on(file: Path) -> None:
    async with boxed(file, t=mannered()) as box:
        result = await perform(box, "t_huge", text="x")
        assert result.status == "failed"
        assert "answered with more than 16,000,000 bytes at once" in result.content
        assert (await perform(box, "t_echo", text="x")).status == "ok"


HTTP = """
import sys
from mcp.server.fastmcp import Context, FastMCP
server = FastMCP("web", host="127.0.0.1", port=int(sys.argv[1]), log_level="ERROR")
@server.tool()
def add(a: int, b: int, ctx: Context) -> dict[str, object]:
    "Adds."
    return {"sum": a + b, "key": ctx.request_context.request.headers.get("x-key")}
server.run(sys.argv[2])
"""


@pytest.mark.parametrize("kind", ["http", "sse"])
async def test_a_server_behind_an_address_is_reached_and_its_end_is_noticed(file: Path, kind: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    transport, path = ("streamable-http", "mcp") if kind == "http" else ("sse", "sse")
    server = await asyncio.create_subprocess_exec(sys.executable, "-c", HTTP, str(port), transport)
    try:
        for _ in range(500):
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                await writer.wait_closed()
                break
            await asyncio.sleep(0.05)
        entry = {"url": f"http://127.0.0.1:{port}/{path}", "type": kind, "headers": {"X-Key": "${KEY}"}}
        async with boxed(file, web=entry) as box:
            assert box.parameters("web_add").splitlines() == ["- a (integer)", "- b (integer)"]
            added = await perform(box, "web_add", a=1, b=2)
            assert (added.status, json.loads(added.content)) == ("ok", {"sum": 3, "key": "secret"})
            server.kill()
            await server.wait()
            begun = time.monotonic()
            assert (await perform(box, "web_add", timeout_s=3, a=1, b=2)).status == "failed"
            assert time.monotonic() - begun < 5
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.kill()
        await server.wait()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (mannered("silent"), "did not answer within 1.5 s; it says: I never answer"),
        (mannered("garbage"), "did not answer within 1.5 s; what it prints is no MCP; it says: it prints what is no message"),
        (mannered("exits"), "did not start: Connection closed; it says: there is no database here"),
        (mannered("many"), "has 200 tools, 128 are possible"),
        (mannered("twice"), "have two tools called 't_a_b'"),
        (mannered(cwd="nowhere"), "there is no such folder"),
        ({"command": "no-such-command"}, "cannot be started"),
        ({"command": "./no-such-file"}, "cannot be started"),
        ({"url": "http://127.0.0.1:9/mcp"}, "did not start"),
        ({"url": "http://127.0.0.1:9/sse", "type": "sse"}, "did not start"),
        ({"command": "x", "url": "http://x"}, "valid under each of"),
        ({"url": "ftp://x"}, "does not match"),
        ({"command": 3}, "is not of type 'string'"),
        ({"command": "x", "env": {"A": "${NOT_THERE}"}}, r"asks for \$\{NOT_THERE\}"),
    ],
)
async def test_a_server_that_does_not_start_is_named_with_its_last_words(file: Path, entry: Any, said: str) -> None:
    secret = {"args": [*entry.get("args", ()), "sk-1"]} if "command" in entry else {"url": f"{entry['url']}?key=sk-1"}
    with pytest.raises(ToolError, match=said) as refused:
        async with boxed(file, 1.5, t={**entry, **secret}, good=mannered()):
            pytest.fail("it started")
    assert "sk-1" not in refused.value.hint
    assert refused.value.hint
    assert not re.search("[\x00-\x08\x1b\u202e]", str(refused.value))
    assert not [found for found in Path("/proc").glob("[0-9]*") if SERVER.name.encode() in _command(found)]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"mcpServers": []}', '{"mcpServers": {"a b": {"command": "x"}}}'])
async def test_a_file_that_is_no_mcp_json_is_refused(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(ToolError, match=re.escape(str(file))):
        async with open_servers(file, 1):
            pytest.fail("it started")
    with pytest.raises(ToolError, match="cannot be read"):
        async with open_servers(file.with_name("nowhere.json"), 1):
            pytest.fail("it started")


async def test_a_disabled_server_is_left_out(file: Path) -> None:
    async with boxed(file, off={"command": "no-such-command", "disabled": True}) as box:
        assert len(box) == 0


@pytest.mark.parametrize("manner", ["", "immortal", "parent", "noisy"])
async def test_leaving_ends_the_server_and_what_it_started(file: Path, manner: str) -> None:
    async with boxed(file, t=mannered(manner)) as box:
        pid = int((await perform(box, "t_pid", text="")).content)
        children = [pid, *_children(pid)]
        assert len(children) == (2 if manner == "parent" else 1)
        begun = time.monotonic()
    assert time.monotonic() - begun < (6 if manner == "immortal" else 2)
    for one in children:
        assert await ended(one)


def _children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def test_a_cancelled_run_leaves_no_server_behind(file: Path) -> None:
    pids: list[int] = []

    async def run() -> None:
        async with boxed(file, t=mannered()) as box:
            pids.append(int((await perform(box, "t_pid", text="")).content))
            await perform(box, "t_hang", text="x")

    work = asyncio.create_task(run())
    while not pids:
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.1)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert await ended(pids[0])


@pytest.fixture
def without_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def importing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in ("mcp", "langchain_mcp_adapters"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)


@pytest.mark.usefixtures("without_extra")
async def test_without_the_extra_the_command_that_installs_it_is_told(file: Path) -> None:
    with pytest.raises(ToolError, match="not installed") as refused:
        async with boxed(file, t=mannered()):
            pytest.fail("it started")
    assert "pip install 'agentops-runtime[mcp]'" in refused.value.hint


# In runs, as the settings say


class Asked(TypedDict, total=False):
    results: list[ToolResult]


def tick() -> Any:
    async def act(state: Asked, runtime: NodeRuntime[Context]) -> Asked:
        box = Toolbox().joined(runtime.context.tools)
        return {"results": [await runtime.context.perform(box, call("time_get_current_time", timezone="UTC"))]}

    made = StateGraph(Asked, context_schema=Context)
    made.add_node("act", act)
    made.add_edge(START, "act")
    made.add_edge("act", END)
    return made.compile()


def serving() -> list[int]:
    return [int(found.name) for found in Path("/proc").glob("[0-9]*") if b"mcp_server_time" in _command(found)]


@pytest.mark.parametrize("allow", [(), ("time_get_current_time",)])
def test_a_run_is_given_the_tools_that_the_settings_name(file: Path, settings: Settings, allow: tuple[str, ...]) -> None:
    part: Any = object()
    tools = replace(settings.tools, mcp=write(file, time=TIME), allow=allow)
    made = tick()
    with Runtime(replace(settings, tools=tools), engine=ScriptedEngine(), index=part, embedder=part) as runtime:
        done = runtime.run(made, {})
        assert serving() == []
        if not allow:
            assert done.status == "waiting"
            done = runtime.resume(done.run_id, answer=Decision("approve"), graph=made)
    assert [result.status for result in done.output["results"]] == ["ok"]
    assert serving() == []
    file.unlink()
    (again,) = replay(settings, run=done.run_id, graph=made)
    assert (again.same, again.difference, again.answered["tool"]) == (True, None, 1)


@pytest.mark.parametrize("word", ["allow", "ask", "deny"])
def test_a_policy_for_a_tool_that_no_server_offers_is_an_error_before_anything_runs(
    file: Path, settings: Settings, word: str
) -> None:
    part: Any = object()
    tools = replace(settings.tools, mcp=write(file, time=TIME), **{word: ("time_get_time", "other")})
    with (
        Runtime(replace(settings, tools=tools), engine=ScriptedEngine(), index=part, embedder=part) as runtime,
        pytest.raises(ToolError, match=rf"tools\.{word} names 'time_get_time', which is no tool of server 'time'") as refused,
    ):
        runtime.run(tick(), {})
    assert "time_get_current_time" in refused.value.hint


def test_a_run_whose_server_does_not_start_ends_before_it_begins(file: Path, settings: Settings) -> None:
    part: Any = object()
    tools = replace(settings.tools, mcp=write(file, t=mannered("exits")))
    with (
        Runtime(replace(settings, tools=tools), engine=ScriptedEngine(), index=part, embedder=part) as runtime,
        pytest.raises(ToolError, match="there is no database here"),
    ):
        runtime.run(tick(), {})
