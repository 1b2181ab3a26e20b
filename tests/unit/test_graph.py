from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TypedDict

import pytest

from agentops.checkpoints import schema_types
from agentops.errors import GraphBroken, GraphNotFound, UsageError
from agentops.graph import adopt_graph, load_graph

GOOD = """
from typing import TypedDict
from langgraph.graph import START, END, StateGraph
from neighbour import shout

class State(TypedDict):
    text: str

def loud(state: State) -> State:
    return {"text": shout(state["text"])}

graph = StateGraph(State).add_node(loud).add_edge(START, "loud").add_edge("loud", END)
made = graph.compile()
def factory():
    return graph
number = 7
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("def shout(text):\n    return text.upper()\n")
    (tmp_path / "mine.py").write_text(GOOD)
    return tmp_path / "mine.py"


@pytest.mark.parametrize("attribute", ["", ":graph", ":made", ":factory"])
def test_a_graph_is_loaded_from_a_file(file: Path, attribute: str) -> None:
    loaded = load_graph(f"{file}{attribute}")
    assert loaded.compiled.invoke({"text": "hi"}) == {"text": "HI"}
    assert loaded.reference.startswith(f"{file}:")
    assert not loaded.uses_context


def test_a_loaded_file_has_one_module_name_in_every_process(file: Path) -> None:
    one, two = load_graph(str(file)), load_graph(str(file))
    name = one.compiled.builder.state_schema.__module__
    assert name == two.compiled.builder.state_schema.__module__
    assert name.startswith("agentops_graph_")


def test_own_graphs_are_found_by_name() -> None:
    rag = load_graph("rag")
    assert rag.uses_context
    assert {"rag_write", "rag_rewrite", "rag_relevance"} <= set(rag.prompts.names())


def test_unknown_graphs_are_told_what_there_is(file: Path) -> None:
    with pytest.raises(GraphNotFound, match="no graph is called 'rga'") as unknown:
        load_graph("rga")
    assert "rag" in unknown.value.hint
    with pytest.raises(GraphNotFound, match="no file"):
        load_graph("./nowhere.py:graph")
    with pytest.raises(GraphNotFound, match="has no 'grph'") as attribute:
        load_graph(f"{file}:grph")
    assert "graph" in attribute.value.hint
    with pytest.raises(GraphNotFound, match="is a int"):
        load_graph(f"{file}:number")
    with pytest.raises(GraphNotFound, match="not a LangGraph graph"):
        adopt_graph(object())


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("x = 1\ndef broken(:\n    pass\n", 2, "SyntaxError"),
        ("x = 1\ny = 2\nz = undefined_name\n", 3, "NameError"),
        ("import a_module_that_is_not_there\n", 1, "ModuleNotFoundError"),
        ("def deep():\n    raise ValueError('bad value')\ndeep()\n", 2, "bad value"),
    ],
)
def test_an_error_in_a_file_shows_its_line(tmp_path: Path, text: str, line: int, said: str) -> None:
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(GraphBroken, match=said) as broken:
        load_graph(str(tmp_path / "broken.py"))
    assert broken.value.line == line
    assert text.splitlines()[line - 1].strip() in str(broken.value)


def test_text_becomes_the_input_that_a_graph_takes(file: Path) -> None:
    loaded = load_graph(str(file))
    assert loaded.as_input("hello") == {"text": "hello"}
    assert loaded.as_input('{"text": "x"}') == {"text": "x"}
    assert load_graph("rag").as_input("why?") == {"question": "why?"}
    with pytest.raises(UsageError, match="JSON"):
        loaded.as_input("{not json")
    with pytest.raises(UsageError, match="no field 'txt'") as refused:
        loaded.as_input('{"txt": "x"}')
    assert "text" in refused.value.hint


TOOLED = """
from typing import TypedDict
from agentops.tools import Toolbox, tool
from langgraph.graph import START, END, StateGraph
import inner

class State(TypedDict):
    text: str

@tool(effect="none")
def alone(text: str) -> str:
    "Stands by itself."

def boxed(text: str) -> str:
    "Stands in a box."

box = Toolbox([boxed])

def make():
    @tool
    def enclosed(text: str) -> str:
        "Stands in a function."
    held = [enclosed]
    def work(state: State) -> State:
        return {"text": str(held and box and alone)}
    graph = StateGraph(State).add_node(work).add_node("deep", inner.graph)
    return graph.add_edge(START, "work").add_edge("work", "deep").add_edge("deep", END)
"""


def test_the_tools_of_a_graph_are_those_that_its_nodes_and_subgraphs_see(tmp_path: Path) -> None:
    within = (
        TOOLED.replace("import inner", "").replace('.add_node("deep", inner.graph)', "").replace('.add_edge("work", "deep")', "")
    )
    (tmp_path / "inner.py").write_text(
        within.replace('"deep"', '"work"').replace("boxed", "nested") + "graph = make().compile()\n"
    )
    (tmp_path / "outer.py").write_text(TOOLED)
    assert load_graph(f"{tmp_path / 'outer.py'}:make").tools == {"alone", "boxed", "enclosed", "nested"}
    assert load_graph("rag").tools == frozenset()
    assert load_graph("triage").tools == load_graph("assistant").tools == {"calculator", "clock", "search", "append_note"}


def test_a_graph_without_a_text_field_says_which_fields_it_has(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(
        GOOD.replace("from neighbour import shout", "shout = str").replace("text: str", "text: str\n    tone: str")
    )
    with pytest.raises(UsageError, match="takes no plain text") as refused:
        load_graph(str(tmp_path / "two.py")).as_input("hi")
    assert "text, tone" in refused.value.hint


def test_types_of_a_schema_are_found_inside_containers() -> None:
    class Colour(Enum):
        RED = 1

    @dataclass
    class Inner:
        colour: int

    class Outer(TypedDict):
        inner: list[Inner | None]
        by_name: dict[str, Colour]

    Outer.__annotations__ = {"inner": list[Inner | None], "by_name": dict[str, Colour]}
    assert schema_types(Outer) == {Inner, Colour}


def test_every_type_of_a_schema_is_found_however_many_hints_there_are() -> None:
    inner = [dataclasses.make_dataclass(f"Inner{n}", [("value", int)]) for n in range(50)]
    outer = [dataclasses.make_dataclass(f"Outer{n}", [("parts", "tuple[given, ...]")]) for n in range(50)]
    with pytest.MonkeyPatch.context() as patch:
        for one, kind in zip(outer, inner, strict=True):
            patch.setitem(one.__annotations__, "parts", f"tuple[{kind.__name__}, ...]")
            patch.setitem(globals(), kind.__name__, kind)
            one.__module__ = __name__
        assert schema_types(*outer) == {*outer, *inner}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('.add_edge(START, "loud")', ""), "entrypoint"),
        (("    return graph", "    raise RuntimeError('no luck')"), "no luck"),
    ],
)
def test_a_graph_that_does_not_compile_is_told_without_our_traceback(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    (tmp_path / "neighbour.py").write_text("def shout(text):\n    return text.upper()\n")
    text = GOOD.replace("made = graph.compile()\n", "").replace(*change)
    (tmp_path / "odd.py").write_text(text)
    with pytest.raises(GraphBroken, match=said):
        load_graph(f"{tmp_path / 'odd.py'}:factory")


def test_deeply_nested_input_is_refused(file: Path) -> None:
    with pytest.raises(UsageError, match="JSON"):
        load_graph(str(file)).as_input('{"a":' * 100_000)
