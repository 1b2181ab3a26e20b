"""What there is to draw: nodes and edges, their order from start to end, and which edges can share a line."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Edge:
    """`choice`: it may be taken, or another. `label` says when, where that is known."""

    source: str
    target: str
    choice: bool = False
    label: str = ""


@dataclass(frozen=True, slots=True)
class Shape:
    """A graph to draw: its nodes in order, with their labels; where it starts and ends; and what its subgraphs are."""

    nodes: dict[str, str]
    edges: tuple[Edge, ...]
    start: str = "__start__"
    end: str = "__end__"
    inner: dict[str, Shape] = field(default_factory=dict)


def backward(names: list[str], edges: list[Edge], start: str) -> set[Edge]:
    """The edges that lead to a node on the way from the start to them."""
    order = {name: number for number, name in enumerate(names)}
    leaving: dict[str, list[Edge]] = {name: [] for name in names}
    for edge in sorted(edges, key=lambda edge: order[edge.target]):
        leaving[edge.source].append(edge)
    found: set[Edge] = set()
    done: set[str] = set()
    for first in sorted(names, key=lambda name: name != start):
        path: list[tuple[str, int]] = [(first, 0)] if first not in done else []
        while path:
            name, taken = path[-1]
            if taken == len(leaving[name]):
                done.add(name)
                path.pop()
                continue
            path[-1] = name, taken + 1
            edge = leaving[name][taken]
            if any(edge.target == passed for passed, _ in path):
                found.add(edge)
            elif edge.target not in done:
                path.append((edge.target, 0))
    return found


def layers_of(names: list[str], edges: list[Edge]) -> list[list[str]]:
    """Every node one layer below the lowest that leads to it; in a layer, nodes stand below those that lead to them."""
    depth = dict.fromkeys(names, 0)
    for _ in names:
        for edge in edges:
            depth[edge.target] = max(depth[edge.target], depth[edge.source] + 1)
    layers: list[list[str]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    place: dict[str, float] = {}
    for name in names:
        layers[depth[name]].append(name)
    for layer in layers:
        leading = {name: [place[edge.source] for edge in edges if edge.target == name] for name in layer}
        layer.sort(key=lambda name: sum(leading[name]) / len(leading[name]) if leading[name] else 0.5)
        for number, name in enumerate(layer):
            place[name] = (number + 0.5) / len(layer)
    return layers


def bundles(edges: list[Edge]) -> list[list[Edge]]:
    """Edges that can be drawn as one line without saying more than they do: from each of its sources to each of its targets."""
    goals: dict[str, list[str]] = {}
    for edge in edges:
        goals.setdefault(edge.source, []).append(edge.target)
    groups: dict[tuple[str, ...], list[Edge]] = {}
    for edge in edges:
        groups.setdefault(tuple(sorted(goals[edge.source])), []).append(edge)
    return list(groups.values())
