"""A graph as Mermaid, which pages show as a picture. Names of nodes are only ever labels, so that none is read as syntax."""

from __future__ import annotations

import re
from collections.abc import Iterator

from agentops.drawing.shape import Shape

_RESERVED = {"end", "graph", "flowchart", "subgraph", "style", "class", "click", "linkstyle", "default", "direction"}


def mermaid(shape: Shape) -> str:
    return "\n".join(("flowchart TD", *_lines(shape, "", 1)))


def _lines(shape: Shape, prefix: str, depth: int) -> Iterator[str]:
    indent = "    " * depth
    ids: dict[str, str] = {}
    for number, (name, label) in enumerate(shape.nodes.items()):
        plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) and name.lower() not in _RESERVED
        ids[name] = f"{prefix}{name if plain else f'node{number}'}"
        if name in (shape.start, shape.end):
            yield f"{indent}{ids[name]}(({_quoted('start' if name == shape.start else 'end')}))"
        elif name in shape.inner:
            yield f"{indent}subgraph {ids[name]} [{_quoted(label)}]"
            yield from _lines(shape.inner[name], f"{ids[name]}__", depth + 1)
            yield f"{indent}end"
        else:
            yield f"{indent}{ids[name]}({_quoted(label)})"
    for edge in shape.edges:
        if edge.source in ids and edge.target in ids:
            arrow = ("-.->" if edge.choice else "-->") + (f"|{_quoted(edge.label)}|" if edge.label else "")
            yield f"{indent}{ids[edge.source]} {arrow} {ids[edge.target]}"


def _quoted(text: str) -> str:
    safe = " ".join(text.split()).replace("&", "#amp;").replace('"', "#quot;").replace("<", "#lt;").replace(">", "#gt;")
    return f'"{safe}"'
