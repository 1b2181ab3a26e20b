"""The toolbox of a graph: offers tools, has arguments written for them, and runs calls, whatever comes of them.

A call never raises for what a tool does wrong; it does for what ends a run (a full disk, a spent budget) or makes it wait.
Which tool to call is not decided here.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, get_args

from langchain_core.tools import BaseTool
from langgraph.errors import GraphBubbleUp
from pydantic import BaseModel, ValidationError

from agentops import people
from agentops.errors import BudgetSpent, JournalFull, ToolError
from agentops.records import Effect, Policy, ToolCall, ToolResult, ToolStatus, content_hash
from agentops.schema import violation
from agentops.settings import ToolSettings
from agentops.tools import arguments
from agentops.tools.declare import effect_of, refuse_unfillable, schema_of, tool
from agentops.tools.running import run, said
from agentops.tracer import locate, span

_BY_EFFECT: dict[Effect, Policy] = {"none": "allow", "read": "allow", "write": "ask"}


class Toolbox:
    """Tools by name: functions, what `tool` made of them, or any LangChain tool. `policy` overrules what follows from a
    tool's effect (write: ask, else allow).

    Raises:
        ToolError: two tools of one name, one whose arguments cannot be given, or a policy for a tool that is not there.
    """

    def __init__(
        self, tools: Iterable[BaseTool | Callable[..., Any]] = (), *, policy: Mapping[str, Policy] | None = None
    ) -> None:
        self._tools: dict[str, BaseTool] = {}
        for given in tools:
            one = given if isinstance(given, BaseTool) else tool(given)
            if one.name in self._tools:
                raise ToolError(f"two tools are called '{one.name}'", hint="name one otherwise: @tool(name=...)")
            refuse_unfillable(one)
            self._tools[one.name] = one
        self._policy = dict(policy or {})
        for name, word in self._policy.items():
            if name not in self._tools:
                raise ToolError(f"there is a policy for '{name}', which is no tool here", hint=self._known())
            if word not in get_args(Policy):
                raise ToolError(f"'{word}' is no policy for '{name}'", hint="allow, ask or deny")
        self._schemas: dict[str, dict[str, Any]] = {}

    def __iter__(self) -> Iterator[BaseTool]:
        return iter(self._tools.values())

    def __len__(self) -> int:
        return len(self._tools)

    def __contains__(self, name: object) -> bool:
        return name in self._tools

    def joined(self, others: Iterable[BaseTool | Callable[..., Any]]) -> Toolbox:
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
            ToolError: no such tool, or one whose arguments have no schema.
        """
        if name not in self._tools:
            raise ToolError(f"there is no tool '{name}'", hint=self._known())
        if name not in self._schemas:
            self._schemas[name] = schema_of(self._tools[name])
        return self._schemas[name]

    def parameters(self, name: str) -> str:
        """A tool's arguments for a model to read, one a line: name, type, whether it may be left out, what it is.

        Raises:
            ToolError: no such tool.
        """
        return arguments.described(self.schema(name))

    async def write(self, name: str, ask: arguments.Ask, *, max_tokens: int = 256) -> dict[str, Any]:
        """Arguments for a tool, as a model writes them that `ask` asks under the schema it is given. They fit.

        Raises:
            ToolError: no such tool, no grammar can hold a model to its schema, or not within so many tokens; or the model
                is not held to the grammar, and wrote what does not fit twice.
        """
        return await arguments.write(name, self.schema(name), max_tokens, ask, lambda made: self.misfit(name, made))

    def misfit(self, name: str, given: Any) -> str:
        """What keeps arguments from fitting a tool, in one line; nothing where they fit."""
        if wrong := violation(self.schema(name), given):
            return wrong
        model = self._tools[name].tool_call_schema
        if isinstance(model, type) and issubclass(model, BaseModel):
            try:
                model.model_validate(deepcopy(given))
            except ValidationError as error:
                first = error.errors()[0]
                place = ".".join(str(part) for part in first["loc"])
                return f"{place}: {first['msg']}" if place else str(first["msg"])
        return ""

    def policy(self, name: str, settings: ToolSettings | None = None) -> Policy:
        """What happens when the tool is called: the operator's word (`tools.deny`, else `.ask`, else `.allow`), else the
        graph's, else what follows from its effect. A graph's own "deny" stands whatever the operator allows.

        Raises:
            ToolError: no such tool.
        """
        if name not in self._tools:
            raise ToolError(f"there is no tool '{name}'", hint=self._known())
        own = self._policy.get(name) or _BY_EFFECT[effect_of(self._tools[name])]
        if settings is None or own == "deny":
            return own
        words: tuple[Policy, ...] = ("deny", "ask", "allow")
        return next((word for word in words if name in getattr(settings, word)), own)

    async def perform(self, call: ToolCall, settings: ToolSettings | None = None) -> ToolResult:
        """Runs a call under the policy and says what came of it; the record has one span of it. Call it from a node; where a
        person has to be asked, the run waits, and the node runs again from its beginning when there is an answer. Calls
        that may have to wait are performed one after another, or answers would reach the wrong one."""
        limits = settings or ToolSettings()
        if call.name not in self._tools:
            return _left(call, "failed", f"there is no tool '{call.name}'; {self._known()}")
        one = self._tools[call.name]
        about: dict[str, Any] = {"effect": effect_of(one), "policy": (policy := self.policy(call.name, settings))}
        if policy == "deny":
            return _left(call, "denied", f"{call.name} may not be used", **about)
        if wrong := self.misfit(call.name, call.arguments):
            return _left(call, "failed", f"the arguments of {call.name} are off: {wrong}", **about)
        if policy == "ask":
            decision = people.approve(f"run the tool {call.name}?", call.arguments, schema=self.schema(call.name))
            about["decision"] = decision.kind
            if decision.kind == "reject":
                because = f": {decision.reason}" if decision.reason else ""
                return _left(call, "refused", f"a person refused to run {call.name}{because}", **about)
            if decision.kind == "edit":
                call = replace(call, arguments=decision.content)
                if wrong := self.misfit(call.name, call.arguments):
                    return _left(call, "failed", f"the arguments of {call.name}, as edited, are off: {wrong}", **about)
        raised: list[Exception] = []

        async def happen() -> ToolResult:
            try:
                return ToolResult(call, "ok", await run(one, call, limits))
            except (GraphBubbleUp, JournalFull, BudgetSpent):
                raise
            except Exception as error:
                raised.append(error)
                why = str(error) if isinstance(error, ToolError) else said(error)
                return ToolResult(call, "failed", f"{call.name} failed: {why}")

        result: ToolResult | None = None
        try:
            with span("tool", call.name, call.arguments) as handle:
                handle.set(call=call.id, code=_code(one), **about)
                result = await (at[0].effects.tool(call, happen) if (at := locate()) else happen())
                handle.set(status=result.status)
                if result.status == "failed":
                    handle.set(result=result.content)
                    raise raised[0] if raised else ToolError(result.content)
                handle.output = result.content
        except JournalFull:
            raise
        except Exception:
            if result is None:
                raise
        assert result is not None
        return result

    def _known(self) -> str:
        return f"there are: {', '.join(self._tools)}" if self._tools else "there are none"


def _code(declared: BaseTool) -> str:
    """The hash of a tool's schema and, where it can be read, its source: a replay says where another one stands in its place."""
    given = getattr(declared, "func", None) or getattr(declared, "coroutine", None)
    functions: tuple[Any, ...] = (given,) if given else (type(declared)._run, type(declared)._arun)
    if isinstance(declared.args_schema, dict):
        functions = ()  # of a server, whose source is elsewhere
    source = "".join(map(_source, functions))
    return content_hash(
        json.dumps([declared.name, declared.description, schema_of(declared), source], sort_keys=True, default=repr)
    )


def _source(function: Any) -> str:
    try:
        return inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        return ""


def no_such_tool(where: str, name: str, whose: str, known: Iterable[str]) -> ToolError:
    """What is said where a policy names a tool that is not there: passed over, a tool meant to be denied would run."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1)
    return ToolError(
        f"{where} names '{name}', which is no tool of {whose}",
        hint=(f"did you mean {near[0]}? " if near else "") + f"there are: {', '.join(names) or 'none'}",
    )


def _left(call: ToolCall, status: ToolStatus, why: str, **about: Any) -> ToolResult:
    """A call that was not run is on record too; where that is a failure, its span says so."""
    try:
        with span("tool", call.name, call.arguments) as handle:
            handle.set(call=call.id, status=status, **about)
            if status == "failed":
                raise ToolError(why)
            handle.output = why
    except ToolError:
        pass
    return ToolResult(call, status, why)
