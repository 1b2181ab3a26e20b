"""Drawing: a graph as boxes and lines of characters for a terminal, or as Mermaid for a page.

In a terminal a graph runs from its start down to its end. Edges between neighbouring layers run straight down; those that
skip a layer run along the right side, those that lead back along the left side, upwards. A dashed line is one that may be
taken. A subgraph is a box with its own drawing inside. Nothing here knows LangGraph, colours or terminals.
"""

from __future__ import annotations

from agentops.drawing.canvas import Style, plain
from agentops.drawing.layout import draw
from agentops.drawing.mermaid import mermaid
from agentops.drawing.shape import Edge, Shape

__all__ = ["Edge", "Shape", "Style", "draw", "mermaid", "plain"]
