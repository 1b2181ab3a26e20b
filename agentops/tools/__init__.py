"""Tools: plain typed Python functions that a model may call, under a policy that a person sets.

`tool` declares one; a `Toolbox` holds those of a graph and runs calls: what the policy denies is not run, what it wants asked
waits for a person, and whatever goes wrong comes back as text for the model. Which tool to call is not decided here.
"""

from __future__ import annotations

from agentops.tools.box import Toolbox, no_such_tool
from agentops.tools.declare import effect_of, schema_of, tool, with_effect

__all__ = ["Toolbox", "effect_of", "no_such_tool", "schema_of", "tool", "with_effect"]
