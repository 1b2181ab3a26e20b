"""The toolbox of a graph: offers tools and runs calls, whatever comes of them.

A call never raises for what a tool does wrong; it does for what ends a run (a full disk, a spent budget) or makes it wait.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from langchain_core.tools import BaseTool
from langgraph.errors import GraphBubbleUp
from pydantic import BaseModel

from agentops import people
from agentops.errors import BudgetSpent, JournalFull, ToolError
from agentops.records import Effect, Policy, ToolCall, ToolResult, ToolStatus
from agentops.schema import violation
from agentops.settings import ToolSettings
from agentops.tools.declare import effect_of, tool
from agentops.tracer import span

_BY_EFFECT: dict[Effect, Policy] = {"none": "allow", "read": "allow", "write": "ask"}


class Toolbox:
    """Tools by name. `policy` overrules what follows from a tool's effect (write: ask, else allow).

    Raises:
        ToolError: two tools of one name, or a policy for a tool that is not there.
    """

    def __init__(
        self, tools: Iterable[BaseTool | Callable[..., Any]] = (), *, policy: Mapping[str, Policy] | None = None
    ) -> None:
        self._tools: dict[str, BaseTool] = {}
        for given in tools:
            one = given if isinstance(given, BaseTool) else tool(given)
            if one.name in self._tools:
                raise ToolError(f"two tools are called '{one.name}'", hint="name one otherwise: @tool(name=...)")
            self._tools[one.name] = one
        self._policy = dict(policy or {})
        if unknown := sorted(set(self._policy) - set(self._tools)):
            raise ToolError(f"there is a policy for '{unknown[0]}', which is no tool here", hint=self._known())

    def __iter__(self) -> Iterator[BaseTool]:
        return iter(self._tools.values())

    def __len__(self) -> int:
        return len(self._tools)

    def __contains__(self, name: object) -> bool:
        return name in self._tools

    def joined(self, others: Iterable[BaseTool]) -> Toolbox:
        """This box with other tools beside.

        Raises:
            ToolError: one of them has a name that is taken.
        """
        return Toolbox([*self, *others], policy=self._policy)

    def descriptions(self) -> dict[str, str]:
        """What each tool does, by its name."""
        return {one.name: one.description for one in self}

    def schema(self, name: str) -> dict[str, Any]:
        """JSON schema of a tool's arguments; those that are put in for the model are not among them.

        Raises:
            ToolError: no such tool.
        """
        if name not in self._tools:
            raise ToolError(f"there is no tool '{name}'", hint=self._known())
        given = self._tools[name].tool_call_schema
        made = given if isinstance(given, dict) else given.model_json_schema() if issubclass(given, BaseModel) else given.schema()
        about = {key: value for key, value in made.items() if key not in ("title", "description")}
        return {"additionalProperties": False, **about, "type": "object"}

    def policy(self, name: str, settings: ToolSettings | None = None) -> Policy:
        """What happens when the tool is called: the operator's word (`tools.deny`, `.ask`, `.allow`), else the graph's, else
        what follows from its effect. A graph's own "deny" stands whatever the operator allows."""
        own = self._policy.get(name) or _BY_EFFECT[effect_of(self._tools[name])]
        if settings is None or own == "deny":
            return own
        said = [word for word in ("deny", "ask", "allow") if name in getattr(settings, word)]
        return said[0] if said else own  # type: ignore[return-value]

    async def perform(self, call: ToolCall, settings: ToolSettings | None = None) -> ToolResult:
        """Runs a call under the policy and says what came of it. Call it from a node; where a person has to be asked, the run
        waits, and the node runs again when there is an answer."""
        limits = settings or ToolSettings()
        if call.name not in self._tools:
            return _left(call, "failed", f"there is no tool '{call.name}'; {self._known()}")
        if wrong := violation(self.schema(call.name), call.arguments):
            return _left(call, "failed", f"the arguments of {call.name} are off: {wrong}")
        policy, decided = self.policy(call.name, settings), ""
        if policy == "deny":
            return _left(call, "denied", f"{call.name} may not be used")
        if policy == "ask":
            decision = people.approve(f"run the tool {call.name}?", call.arguments, schema=self.schema(call.name))
            decided = decision.kind
            if decision.kind == "reject":
                because = f": {decision.reason}" if decision.reason else ""
                return _left(call, "refused", f"a person refused to run {call.name}{because}")
            call = replace(call, arguments=decision.content)
        try:
            with span("tool", call.name, call.arguments) as handle:
                handle.set(call=call.id, effect=effect_of(self._tools[call.name]), policy=policy)
                if decided:
                    handle.set(decision=decided)
                text = await self._run(call, limits)
                handle.output = text
        except (GraphBubbleUp, JournalFull, BudgetSpent):
            raise
        except TimeoutError:
            return ToolResult(call, "failed", f"{call.name} took longer than {limits.timeout_s:g} s and was given up")
        except (Exception, SystemExit) as error:
            return ToolResult(call, "failed", f"{call.name} failed: {type(error).__name__}: {_cut(str(error), 1000)}")
        return ToolResult(call, "ok", text)

    async def _run(self, call: ToolCall, limits: ToolSettings) -> str:
        asked = {"name": call.name, "args": call.arguments, "id": call.id, "type": "tool_call"}
        async with asyncio.timeout(limits.timeout_s):
            # The span around this is the tool's; the tracer opens none of its own for calls that carry the mark.
            message = await self._tools[call.name].ainvoke(asked, {"metadata": {"agentops_tool": call.id}})
        return _cut(_as_text(getattr(message, "content", message)), limits.result_bytes)

    def _known(self) -> str:
        return f"there are: {', '.join(self._tools)}" if self._tools else "there are none"


def _left(call: ToolCall, status: ToolStatus, said: str) -> ToolResult:
    """A call that was not run is on record too."""
    with span("tool", call.name, call.arguments) as handle:
        handle.set(call=call.id, status=status)
        handle.output = said
    return ToolResult(call, status, said)


def _as_text(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _cut(text: str, limit_bytes: int) -> str:
    raw = text.encode(errors="replace")
    if len(raw) <= limit_bytes:
        return text
    return raw[:limit_bytes].decode(errors="ignore") + f" [... {len(raw) - limit_bytes:,} more bytes were left out]"
