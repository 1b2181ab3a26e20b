"""The settings that a run is made with: chosen when it begins, kept on record with it, and found again when it is taken up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_type_hints

from agentops.errors import SettingsError, UsageError
from agentops.graph import LoadedGraph
from agentops.records import Budget, Labels, NodeBudget
from agentops.settings import Settings
from agentops.tools import no_such_tool


def chosen(settings: Settings, recorded: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run by their names: given now, or set by the user, or as they were before, or default."""
    found = {}
    for key in ("model.name", "retrieval.retriever", "retrieval.collection", "retrieval.k", "run.seed", "run.trim"):
        own = settings.get(key) if settings.source(key) != "default" else recorded.get(key)
        found[key] = given.get(key) or (own if own is not None else settings.get(key))
    if labels := given.get("labels"):
        found["labels"] = _sound_labels(labels)
    elif "labels" in recorded:
        found["labels"] = recorded["labels"]
    tools = settings.tools
    # What was forbidden when a run began is not allowed by taking it up again elsewhere.
    for word in ("deny", "ask"):
        found[f"tools.{word}"] = sorted({*getattr(tools, word), *recorded.get(f"tools.{word}", ())})
    found["tools.allow"] = list(tools.allow or recorded.get("tools.allow", ()))
    mcp = tools.mcp or recorded.get("tools.mcp")
    found["tools.mcp"] = str(mcp) if mcp else None
    return found


def check_tools(settings: Settings, graph: LoadedGraph, made_with: Mapping[str, Any]) -> None:
    """Says that a file of servers cannot be used, or that the command line allows or denies a tool that is not there, before
    anything is loaded for nothing. The tools of servers are looked at when these have started.

    Raises:
        ToolError
    """
    servers: list[str] = []
    if made_with["tools.mcp"] and graph.uses_context:
        from agentops.tools.mcp import server_names

        servers = server_names(Path(made_with["tools.mcp"]))
    for word in ("allow", "ask", "deny"):
        for name in settings.flags.get(f"tools.{word}", ()):
            if name not in graph.tools and not name.startswith(tuple(f"{server}_" for server in servers)):
                raise no_such_tool(f"--{word}", name, f"graph '{graph.name}'", graph.tools)


def sound(budget: Budget) -> Budget:
    """
    Raises:
        UsageError: it lets nothing run.
    """
    for name in ("steps", "model_calls", "tokens", "seconds"):
        if not (value := getattr(budget, name)) > 0:
            raise UsageError(f"a budget of {value} {name} lets nothing run", hint="give more than 0")
    return budget


def budget_of(settings: Settings) -> Budget:
    """
    Raises:
        SettingsError: a limit of a node is none.
    """
    own, nodes = settings.budget, dict[str, NodeBudget]()
    for line in own.nodes:
        place, _, number = line.partition("=")
        node, _, what = place.strip().rpartition(".")
        try:
            if not node or what not in get_type_hints(NodeBudget) or not float(number) > 0:
                raise ValueError
            kind = get_type_hints(NodeBudget)[what]
            nodes[node] = replace(nodes.get(node, NodeBudget()), **{what: kind(number)})
        except ValueError:
            words = ", ".join(get_type_hints(NodeBudget))
            raise SettingsError(
                f"{settings.source('budget.nodes')}: {line!r} is no limit of a node",
                hint=f"NODE.WHAT=NUMBER, with one of {words}",
            ) from None
    return Budget(own.steps, own.model_calls, own.tokens, own.seconds, own.money, nodes)


def _sound_labels(labels: Labels) -> dict[str, Any]:
    for name, value in labels.metadata.items():
        if not isinstance(value, str | int | float | bool) or name in ("user", "run_id", "thread_id"):
            hint = "words, numbers and truth values, under names of your own"
            raise UsageError(f"a run cannot keep '{name}' as metadata", hint=hint)
    return asdict(labels)
