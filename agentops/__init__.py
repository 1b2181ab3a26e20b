"""AgentOps Runtime: LangGraph agents on a GPTQ model in-process, with every step on record.

Names here are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentops.engine.chat import EngineChatModel
    from agentops.engine.local import LocalEngine
    from agentops.engine.scripted import ScriptedEngine
    from agentops.errors import AgentOpsError
    from agentops.graph import Context
    from agentops.records import Document, Generation, Message, Query, Request, RunResult
    from agentops.runtime import Runtime
    from agentops.settings import Settings, load_settings

# torch's threads meet after every operation and by default spin until the last one is there: with one other busy process
# on the cores a decoded token then takes 150 ms instead of 20. OpenMP reads this once, when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_HOMES = {
    "AgentOpsError": "errors",
    "Context": "graph",
    "Document": "records",
    "EngineChatModel": "engine.chat",
    "Generation": "records",
    "LocalEngine": "engine.local",
    "Message": "records",
    "Query": "records",
    "Request": "records",
    "RunResult": "records",
    "Runtime": "runtime",
    "ScriptedEngine": "engine.scripted",
    "Settings": "settings",
    "load_settings": "settings",
}

__all__ = [
    "AgentOpsError",
    "Context",
    "Document",
    "EngineChatModel",
    "Generation",
    "LocalEngine",
    "Message",
    "Query",
    "Request",
    "RunResult",
    "Runtime",
    "ScriptedEngine",
    "Settings",
    "load_settings",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"agentops.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'agentops' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
