"""Tools of MCP servers: started and connected to as an `mcp.json` says, for as long as a block lasts.

A server is not trusted: its tools are taken to write whatever it says of them, what it says is cleaned and cut, it gets no
more of the environment than its entry gives it, and one that dies, hangs or prints nonsense fails its own calls and nothing
else. This module sets no policies and offers a server no model, no files and no questions to people.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from langchain_core.tools import BaseTool

from agentops.errors import ToolError
from agentops.schema import violation
from agentops.tools.declare import with_effect
from agentops.tools.process import LINE_BYTES, LineProcess, open_process

_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_TRANSPORTS = ["stdio", "http", "streamable-http", "streamable_http", "sse"]
_FILE: dict[str, Any] = {
    "type": "object",
    "required": ["mcpServers"],
    "properties": {
        "mcpServers": {
            "type": "object",
            "propertyNames": {"pattern": "^[A-Za-z0-9_-]{1,40}$"},
            "additionalProperties": {
                "type": "object",
                "properties": {
                    "command": {"type": "string", "minLength": 1},
                    "args": {"type": "array", "items": {"type": "string"}},
                    "env": _TEXTS,
                    "cwd": {"type": "string"},
                    "url": {"type": "string", "pattern": "^https?://"},
                    "headers": _TEXTS,
                    "type": {"enum": _TRANSPORTS},
                    "transport": {"enum": _TRANSPORTS},
                    "disabled": {"type": "boolean"},
                },
                "oneOf": [{"required": ["command"]}, {"required": ["url"]}],
            },
        }
    },
}
_EXAMPLE = 'one looks like {"mcpServers": {"time": {"command": "python", "args": ["-m", "mcp_server_time"]}}}'

_CLOSING_S = 8.0
_SILENCE_S = 300
_TOOLS, _SCHEMA_BYTES, _ABOUT, _ABOUT_ARGUMENT = 128, 65_536, 1_000, 300
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
"""Controls, and what is not seen but read: marks of direction, and letters without a shape."""
_TAKEN = frozenset({"config", "run_manager", "callbacks", "runtime", "self", "args", "kwargs"})
"""Names that LangChain does not pass on to a tool."""


@asynccontextmanager
async def open_servers(
    file: Path, timeout_s: float, *, environment: Mapping[str, str] | None = None
) -> AsyncIterator[tuple[BaseTool, ...]]:
    """The tools of all servers that the file names, called `SERVER_TOOL`; the servers live as long as the block.

    A server has `timeout_s` to start and to list its tools. `${NAME}` in its `env` and `headers` is taken from `environment`
    (the process's own, where none is given). A relative `command` or `cwd` is relative to the file; a server without a `cwd`
    runs in the file's folder. Leaving the block ends the servers' processes, and those that they started.

    Raises:
        ToolError: the file cannot be read or is no `mcp.json`, a server does not start in time, offers what cannot be a
            tool, or two tools have one name; or the extra `mcp` is not installed.
    """
    _check_installed()
    servers = [
        _Server(name, entry, file.absolute().parent)
        for name, entry in _read(file, os.environ if environment is None else environment)
    ]
    try:
        started = await asyncio.gather(*(server.start(timeout_s) for server in servers), return_exceptions=True)
        for outcome in started:
            if isinstance(outcome, BaseException):
                raise outcome
        tools = [tool for tools in cast("list[list[BaseTool]]", started) for tool in tools]
        names = [tool.name for tool in tools]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ToolError(f"the servers of {file} have two tools called '{twice}'", hint="name the servers otherwise")
        yield tuple(tools)
    finally:
        await asyncio.gather(*(server.stop() for server in servers))


@dataclass(eq=False)
class _Server:
    """One server and the task that its connection lives in: what goes wrong with it ends that task and not the run."""

    name: str
    entry: Mapping[str, Any]
    folder: Path
    _task: asyncio.Task[None] | None = None
    _ready: asyncio.Event = field(default_factory=asyncio.Event)
    _leave: asyncio.Event = field(default_factory=asyncio.Event)
    _gone: asyncio.Event = field(default_factory=asyncio.Event)
    _tools: list[BaseTool] = field(default_factory=list)
    _dropped: asyncio.Event = field(default_factory=asyncio.Event)
    _child: LineProcess | None = None
    _nonsense: bool = False
    _renamed: dict[str, dict[str, str]] = field(default_factory=dict)
    """Of some tools, arguments that LangChain would keep to itself and that have another name here."""

    async def start(self, timeout_s: float) -> list[BaseTool]:
        self._task = asyncio.create_task(self._live(), name=f"mcp server {self.name}")
        await _first(self._task, self._ready.wait(), timeout_s=timeout_s)
        if self._ready.is_set():
            return self._tools
        if not self._task.done():
            raise self._broken(f"did not answer within {timeout_s:g} s")
        error = None if self._task.cancelled() else _innermost(self._task.exception())
        if isinstance(error, ToolError):
            raise error
        if isinstance(error, FileNotFoundError | PermissionError):
            raise self._broken(f"cannot be started: {error}") from error
        raise self._broken(f"did not start: {error}" if error is not None and str(error) else "did not start") from error

    async def stop(self) -> None:
        self._leave.set()
        if (task := self._task) is None:
            return
        if not self._ready.is_set():
            task.cancel()
        await asyncio.wait({task}, timeout=_CLOSING_S)
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=1.0)
        if task.done() and not task.cancelled():
            task.exception()  # how it ended was told where it mattered

    async def _live(self) -> None:
        from langchain_mcp_adapters.tools import load_mcp_tools
        from mcp import ClientSession

        try:
            async with AsyncExitStack() as stack:
                read, write = await self._connect(stack)
                session = await stack.enter_async_context(ClientSession(cast(Any, _Heard(read, self)), write))
                await session.initialize()
                offered = await load_mcp_tools(
                    session, server_name=self.name, tool_name_prefix=True, tool_interceptors=[self._call]
                )
                if len(offered) > _TOOLS:
                    raise self._broken(f"has {len(offered)} tools, {_TOOLS} are possible")
                self._tools = [self._tool(tool) for tool in offered]
                self._ready.set()
                await _first(self._leave.wait(), self._gone.wait())
        finally:
            self._gone.set()

    async def _connect(self, stack: AsyncExitStack) -> tuple[Any, Any]:
        headers = dict(self.entry.get("headers") or {})
        if (url := self.entry.get("url")) is None:
            return await self._spawn(stack)
        if "sse" in (self.entry.get("type"), self.entry.get("transport")):
            from mcp.client.sse import sse_client

            return await stack.enter_async_context(sse_client(url, headers))
        import httpx
        from mcp.client.streamable_http import streamable_http_client

        # Redirects are not followed: the headers, which may hold a secret, are for this server.
        client = await stack.enter_async_context(httpx.AsyncClient(headers=headers, timeout=httpx.Timeout(30, read=_SILENCE_S)))
        read, write, _ = await stack.enter_async_context(streamable_http_client(url, http_client=client))
        return read, write

    async def _spawn(self, stack: AsyncExitStack) -> tuple[Any, Any]:
        import anyio
        from mcp.client.stdio import get_default_environment
        from mcp.shared.message import SessionMessage
        from mcp.types import JSONRPCMessage

        folder = self.folder / self.entry.get("cwd", "")
        if not folder.is_dir():
            raise self._broken(f"cannot be started in {folder}: there is no such folder")
        command = str(self.entry["command"])
        if "/" in command:
            command = str(self.folder / Path(command).expanduser())
        environment = {**get_default_environment(), **self.entry["env"]}
        child = await stack.enter_async_context(
            open_process(command, self.entry.get("args") or (), environment=environment, folder=folder)
        )
        self._child = child
        inlet, heard = anyio.create_memory_object_stream[SessionMessage](0)
        told, outlet = anyio.create_memory_object_stream[SessionMessage](0)

        async def hear() -> None:
            async with inlet:
                async for line in child.lines():
                    if line is None:
                        self._dropped.set()
                        self._dropped = asyncio.Event()
                        continue
                    try:
                        message = SessionMessage(JSONRPCMessage.model_validate_json(line))
                    except ValueError:
                        self._nonsense = True
                        continue
                    await inlet.send(message)

        async def tell() -> None:
            async with outlet:
                async for message in outlet:
                    await child.send(message.message.model_dump_json(by_alias=True, exclude_none=True))

        work = [asyncio.create_task(hear()), asyncio.create_task(tell())]

        async def end() -> None:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
            for stream in (inlet, heard, told, outlet):
                await stream.aclose()

        stack.push_async_callback(end)
        return heard, told

    def hears(self, message: Any) -> bool:
        """Whether the session is to be told a message. Of a server's news and wishes it only makes noise."""
        if isinstance(message, Exception):
            self._nonsense = True
            return False
        root = message.message.root
        answers = (hasattr(root, "result") or hasattr(root, "error")) and str(root.id).isdigit()
        return answers or (hasattr(root, "id") and getattr(root, "method", "") == "ping")

    def leave(self) -> None:
        """The server says nothing any more."""
        self._gone.set()

    async def _call(self, request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
        dropped = self._dropped
        if not self._gone.is_set():
            renamed = self._renamed.get(request.name, {})
            request = request.override(args={renamed.get(key, key): value for key, value in request.args.items()})
            work = asyncio.ensure_future(handler(request))
            try:
                await _first(work, self._gone.wait(), dropped.wait())
                if work.done() and (work.exception() is None or not self._gone.is_set()):
                    return work.result()
            finally:
                work.cancel()
                work.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        if dropped.is_set():
            raise self._broken(f"answered with more than {LINE_BYTES:,} bytes at once")
        # What it wrote last may not have been read yet.
        await asyncio.sleep(0.05)
        raise self._broken("is gone; the next run starts it anew")

    def _tool(self, offered: BaseTool) -> BaseTool:
        schema = offered.args_schema
        if not isinstance(schema, dict) or len(json.dumps(schema)) > _SCHEMA_BYTES:
            raise self._broken(f"offers '{_shown(offered.name, 80)}' with a schema that is none, or too big")
        schema = _readable(schema)
        if taken := _TAKEN & set(schema.get("properties") or {}):
            self._renamed[offered.name.removeprefix(f"{self.name}_")] = {f"{name}_": name for name in taken}
            schema = _renamed(schema, {name: f"{name}_" for name in taken})
        return with_effect(
            offered,
            "write",
            name=re.sub(r"[^A-Za-z0-9_-]", "_", offered.name)[:64],
            description=_shown(offered.description, _ABOUT) or offered.name.replace("_", " "),
            args_schema=schema,
        )

    def _broken(self, what: str) -> ToolError:
        said = self._child.last_words if self._child else ""
        lines = [line.strip() for line in _shown(said, len(said)).splitlines() if line.strip()]
        words = f"; it says: {' / '.join(line[:300] for line in lines[-3:])}" if lines else ""
        nonsense = "; what it prints is no MCP" if self._nonsense and not self._ready.is_set() else ""
        # Without arguments and queries: people keep keys there.
        where = urlsplit(str(self.entry.get("url", "")))
        place = f"{where.scheme}://{where.hostname}{where.path}" if where.hostname else f"{self.entry.get('command')} ..."
        hint = f"try by hand what its entry says: {place[:200]}"
        return ToolError(f"the MCP server '{self.name}' {what}{nonsense}{words}", hint=hint)


class _Heard:
    """What a server says, as far as it is to be heard: the reading end that a session is given."""

    def __init__(self, stream: Any, server: _Server) -> None:
        self._stream, self._server = stream, server

    async def __aenter__(self) -> _Heard:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stream.aclose()

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            async for message in self._stream:
                if self._server.hears(message):
                    yield message
        finally:
            self._server.leave()


async def _first(*waited: Any, timeout_s: float | None = None) -> None:
    """Until one of them is done, or the time is over. Coroutines are then given up, tasks are not."""
    tasks = {one if isinstance(one, asyncio.Future) else asyncio.ensure_future(one) for one in waited}
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks - set(waited):
            task.cancel()


def _check_installed() -> None:
    try:
        import langchain_mcp_adapters  # noqa: F401
        import mcp  # noqa: F401
    except ImportError as error:
        raise ToolError(
            "MCP servers need an extra that is not installed", hint="install it: pip install 'agentops-runtime[mcp]'"
        ) from error
    # It logs what a server prints, stack and all, to a terminal that is not the server's.
    logger = logging.getLogger("mcp")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())


def server_names(file: Path) -> list[str]:
    """The servers that a file names, which are neither started nor looked for.

    Raises:
        ToolError: the file cannot be read, is no `mcp.json`, or asks for an environment variable that is not set.
    """
    return [name for name, _ in _read(file, os.environ)]


def _read(file: Path, environment: Mapping[str, str]) -> list[tuple[str, dict[str, Any]]]:
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ToolError(f"the file of MCP servers cannot be read: {error}", hint="set tools.mcp to an mcp.json") from error
    except (ValueError, RecursionError) as error:
        raise ToolError(f"{file} is no JSON: {error}", hint=_EXAMPLE) from error
    if wrong := violation(_FILE, described):
        raise ToolError(f"{file}: {wrong}", hint=_EXAMPLE)
    found = []
    for name, entry in described["mcpServers"].items():
        if entry.get("disabled"):
            continue
        for part in ("env", "headers"):
            entry[part] = {key: _filled(text, environment, file) for key, text in (entry.get(part) or {}).items()}
        found.append((name, entry))
    return found


def _filled(text: str, environment: Mapping[str, str], file: Path) -> str:
    def value(hole: re.Match[str]) -> str:
        if hole[1] not in environment:
            raise ToolError(f"{file} asks for ${{{hole[1]}}}, which is not in the environment", hint=f"export {hole[1]}=...")
        return environment[hole[1]]

    return re.sub(r"\$\{(\w+)\}", value, text)


def _innermost(error: BaseException | None) -> BaseException | None:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _shown(text: Any, limit: int) -> str:
    cleaned = _UNSAFE.sub("", str(text))
    return cleaned if len(cleaned) <= limit else cleaned[: limit - 1] + "…"


def _readable(node: Any) -> Any:
    """A schema whose texts may be read by a model and shown to a person; what is sent back is left as it is."""
    if isinstance(node, list):
        return [_readable(one) for one in node]
    if not isinstance(node, dict):
        return node
    texts = {key: _shown(node[key], _ABOUT_ARGUMENT) for key in ("description", "title") if isinstance(node.get(key), str)}
    return {key: texts.get(key, _readable(value)) for key, value in node.items()}


def _renamed(schema: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    named = {names.get(name, name): node for name, node in schema["properties"].items()}
    needed = [names.get(name, name) for name in schema.get("required") or ()]
    return {**schema, "properties": named, "required": needed}
