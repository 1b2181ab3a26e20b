"""Drawings: what they look like, and that their lines say what the graph's edges are, no more and no less."""

from __future__ import annotations

import random
import subprocess
import textwrap
from pathlib import Path

import pytest

from agentops.cli.graph import shape_of
from agentops.drawing import Edge, Shape, draw, mermaid, plain
from agentops.drawing.canvas import cells_of
from agentops.drawing.layout import Drawing
from agentops.graph import load_graph
from agentops.project import package_graphs

ROOT = Path(__file__).resolve().parents[2]


def chain(*names: str) -> dict[str, str]:
    return {name: name for name in ("__start__", *names, "__end__")}


RAG = Shape(
    chain("rewrite", "retrieve", "write", "critic", "finish"),
    (
        Edge("__start__", "rewrite"),
        Edge("critic", "finish", choice=True),
        Edge("critic", "write", choice=True),
        Edge("retrieve", "finish", choice=True),
        Edge("retrieve", "write", choice=True),
        Edge("rewrite", "retrieve"),
        Edge("write", "critic"),
        Edge("finish", "__end__"),
    ),
)

DRAWN = """\
          ●
          │
          ▼
     ╭─────────╮
     │ rewrite │
     ╰────┬────╯
          │
          ▼
    ╭──────────╮
    │ retrieve ├╌╌╌╮
    ╰─────┬────╯   ╎
          ╎        ╎
          ▼        ╎
      ╭───────╮    ╎
 ╭╌╌╌►│ write │    ╎
 ╎    ╰───┬───╯    ╎
 ╎        │        ╎
 ▲        ▼        ╎
 ╎   ╭────────╮    ╎
 ╰╌╌╌┤ critic │    ╎
     ╰────┬───╯    ╎
          ╎        ╎
          ▼        ╎
     ╭────────╮    ╎
     │ finish │◄╌╌╌╯
     ╰────┬───╯
          │
          ▼
          ◉"""


def test_a_graph_with_a_loop_and_a_choice_is_drawn() -> None:
    assert plain(draw(RAG)) == textwrap.dedent(DRAWN)


def test_a_subgraph_is_a_box_with_its_own_drawing() -> None:
    shape = Shape(
        chain("plan", "work"),
        (Edge("__start__", "plan"), Edge("plan", "work", choice=True), Edge("work", "__end__")),
        inner={"work": RAG},
    )
    rows = plain(draw(shape)).splitlines()
    assert sum("┌ work ─" in row for row in rows) == 1
    assert sum("◉" in row for row in rows) == 2
    border = next(row.index("┌") for row in rows if "┌ work" in row)
    inside = [row for row in rows if "critic" in row]
    assert len(inside) == 1
    assert inside[0][border] == "│"


def test_a_drawing_keeps_to_its_width_by_breaking_layers() -> None:
    parts = [f"specialist {number}" for number in range(8)]
    edges = [Edge("__start__", part, choice=True) for part in parts] + [Edge(part, "__end__") for part in parts]
    shape = Shape(chain(*parts), tuple(edges))
    for width in (200, 100, 60):
        rows = plain(draw(shape, width)).splitlines()
        assert max(map(len, rows)) <= width
        assert all(any(part in row for row in rows) for part in parts)
    assert len(plain(draw(shape, 60)).splitlines()) > len(plain(draw(shape, 200)).splitlines())


def test_labels_of_edges_stand_beside_them() -> None:
    shape = Shape(
        chain("ask", "act", "say"),
        (
            Edge("__start__", "ask"),
            Edge("ask", "act", choice=True, label="tool"),
            Edge("ask", "say", choice=True, label="nothing to do"),
            Edge("act", "ask"),
            Edge("say", "__end__"),
        ),
    )
    drawn = plain(draw(shape))
    assert "╎ tool" in drawn
    assert "╎ nothing to do" in drawn
    assert "╌ over ╌╮" in plain(
        draw(
            Shape(
                chain("a", "b"),
                (Edge("__start__", "a"), Edge("a", "b"), Edge("a", "__end__", choice=True, label="over"), Edge("b", "__end__")),
            )
        )
    )


def test_wide_and_long_names_keep_their_boxes_closed() -> None:
    shape = Shape(
        {"__start__": "", "質問": "質問する", "long": "x" * 90, "__end__": ""},
        (Edge("__start__", "質問"), Edge("質問", "long"), Edge("long", "__end__")),
    )
    rows = plain(draw(shape)).splitlines()
    wide = next(row for row in rows if "質問する" in row)
    above = rows[rows.index(wide) - 1]
    assert cells_of(wide) == cells_of(above)
    assert any("x" * 39 + "…" in row for row in rows)


def test_mermaid_takes_no_name_as_syntax() -> None:
    shape = Shape(
        {"__start__": "", 'end"]; click x': 'end"]; click x', "end": "end", "ok": "<b>&", "__end__": ""},
        (Edge("__start__", "end"), Edge("end", 'end"]; click x', choice=True, label='say "no"'), Edge("ok", "__end__")),
        inner={"ok": Shape({"__start__": "", "a": "a", "__end__": ""}, (Edge("__start__", "a"),))},
    )
    text = mermaid(shape)
    assert text.splitlines()[0] == "flowchart TD"
    assert 'node1("end#quot;]; click x")' in text
    assert 'node2 -.->|"say #quot;no#quot;"| node1' in text
    assert 'subgraph ok ["#lt;b#gt;#amp;"]' in text
    assert "ok____start__ --> ok__a" in text
    assert [line.strip() for line in text.splitlines()].count("end") == 1


_WAYS = {
    **dict(zip("╵╶╰╷│╭├╴╯─┴╮┤┬┼", range(1, 16), strict=True)),
    "╎": 5,
    "╌": 10,
    "▲": 5,
    **dict(zip("└┌┘┐", (3, 6, 9, 12), strict=True)),
}
_STEPS = {1: (0, -1), 2: (1, 0), 4: (0, 1), 8: (-1, 0)}
_OPPOSITE = {1: 4, 2: 8, 4: 1, 8: 2}
_ARROWS = {"▼": 4, "►": 2, "◄": 8}


def traced(shape: Shape, limit: int) -> set[tuple[str, str]]:
    """The edges that somebody sees who follows every line with a finger."""
    drawing = Drawing(shape, {}, limit)
    canvas, _ = drawing.drawn()
    rows = ["".join(text for text, _ in canvas.runs(row)) for row in range(canvas.height)]
    grid = {(x, y): character for y, row in enumerate(rows) for x, character in enumerate(row)}
    owner = {
        (x, y): name
        for name, block in drawing.blocks.items()
        for x in range(block.x, block.x + block.width)
        for y in range(block.y, block.y + block.height)
    }
    found = set()
    for place, name in owner.items():
        for way, (right, down) in _STEPS.items():
            beside = place[0] + right, place[1] + down
            bare = drawing.blocks[name].bare and _WAYS.get(grid.get(beside, " "), 0) & _OPPOSITE[way]
            if beside in owner or not (bare or _WAYS.get(grid[place], 0) & way):
                continue
            walks, seen = [(beside, way)], set()
            while walks:
                walk = walks.pop()
                if walk in seen:
                    continue
                seen.add(walk)
                (x, y), heading = walk
                character = grid.get((x, y), " ")
                if character in _ARROWS:
                    assert _ARROWS[character] == heading
                    found.add((name, owner[x + _STEPS[heading][0], y + _STEPS[heading][1]]))
                    continue
                if (x, y) in owner:
                    continue
                ways = _WAYS[character]
                if heading in (2, 8) and ways == 5:
                    ways = 10  # beneath an upright line
                assert ways & _OPPOSITE[heading], f"a line ends at {x}, {y}:\n" + "\n".join(rows)
                for turn, (east, south) in _STEPS.items():
                    if ways & turn and turn != _OPPOSITE[heading]:
                        walks.append(((x + east, y + south), turn))
    return found


@pytest.mark.parametrize("seed", range(80))
def test_every_line_leads_from_its_source_to_its_target(seed: int) -> None:
    chance = random.Random(seed)
    names = [f"node{number}" + "x" * chance.randint(0, 7) for number in range(chance.randint(1, 9))]
    nodes = chain(*names)
    edges = {Edge("__start__", chance.choice(names), choice=chance.random() < 0.3)}
    for _ in range(chance.randint(0, 2 * len(names))):
        edge = Edge(chance.choice(["__start__", *names]), chance.choice([*names, "__end__"]), choice=chance.random() < 0.5)
        if not any((one.source, one.target) == (edge.source, edge.target) for one in edges):
            edges.add(edge)
    shape = Shape(nodes, tuple(sorted(edges, key=lambda edge: (edge.source, edge.target))))
    for limit in (100, 30, 0):
        assert traced(shape, limit) == {(edge.source, edge.target) for edge in edges}


GRAPH = """
from typing import TypedDict
from langgraph.graph import START, END, StateGraph

class State(TypedDict):
    text: str

def loud(state: State) -> State:
    return {"text": state["text"].upper()}

inner = StateGraph(State).add_node(loud).add_edge(START, "loud").add_edge("loud", END).compile()

async def calls(state: State) -> State:
    return await inner.ainvoke(state)

graph = StateGraph(State)
graph.add_node("calls", calls)
graph.add_node("is\\x1b]0;owned\\x07 one", inner)
graph.add_edge(START, "calls")
graph.add_conditional_edges("calls", lambda state: "again", {"again": "calls", "go on": "is\\x1b]0;owned\\x07 one"})
graph.add_edge("is\\x1b]0;owned\\x07 one", END)
"""


def test_a_compiled_graph_is_drawn_with_the_subgraphs_that_its_nodes_are_or_call(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(GRAPH)
    shape = shape_of(load_graph(str(tmp_path / "mine.py")).compiled)
    assert list(shape.nodes.values()) == ["__start__", "calls", "is one", "__end__"]
    assert [list(inner.nodes) for inner in shape.inner.values()] == [["__start__", "loud", "__end__"]] * 2
    assert {(edge.target, edge.label) for edge in shape.edges if edge.choice} == {
        ("calls", "again"),
        ("is\x1b]0;owned\x07 one", "go on"),
    }
    assert "\x1b" not in plain(draw(shape)) + mermaid(shape)


def test_a_picture_is_printed_and_written(tmp_path: Path, environment: dict[str, str]) -> None:
    def agentops(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["agentops", *words], cwd=tmp_path, env=environment, capture_output=True, text=True)

    shown = agentops("graph", "draw", "rag", "--width", "80")
    assert shown.stdout.startswith(plain(draw(shape_of(load_graph("rag").compiled), 80)))
    assert "╌ one of these" in shown.stdout
    (tmp_path / "page.md").write_text("# Mine\n<!-- picture of rag -->\nold\n<!-- end of picture -->\nmore\n")
    assert agentops("graph", "draw", "rag", "-o", "page.md").returncode == 0
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("# Mine\n<!-- picture of rag -->\n```mermaid\nflowchart TD\n")
    assert page.endswith("```\n<!-- end of picture -->\nmore\n")
    assert "old" not in page
    for words, said in (
        (("rag", "-o", "rag.png"), ".mmd"),
        (("rag", "-o", "no/where.mmd"), "cannot be written"),
        (("research", "-o", "page.md"), "<!-- picture of research -->"),
        (("rga",), "no graph is called 'rga'"),
    ):
        refused = agentops("graph", "draw", *words)
        assert refused.returncode in (1, 2)
        assert said in refused.stderr
        assert " hint: " in refused.stderr


@pytest.mark.parametrize("name", sorted(package_graphs()))
def test_the_documentation_has_the_picture_of_every_graph(name: str) -> None:
    page = (ROOT / "docs" / "graphs.md").read_text(encoding="utf-8")
    begin, end = f"<!-- picture of {name} -->", "<!-- end of picture -->"
    assert begin in page, f"write '{begin}' and '{end}' into docs/graphs.md, each on a line, and run: make pictures"
    shown = page.partition(begin)[2].partition(end)[0].strip()
    fresh = f"```mermaid\n{mermaid(shape_of(load_graph(name).compiled))}\n```"
    assert shown == fresh, "the picture in docs/graphs.md is stale; run: make pictures"
