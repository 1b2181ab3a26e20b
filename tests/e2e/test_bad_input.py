"""What a user sees when the input is bad: one line that says what is wrong, one that says how to mend it, nothing lost."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Agentops = Callable[..., subprocess.CompletedProcess[str]]

ASK = """
from typing import TypedDict
from langgraph.graph import START, END, StateGraph
from langgraph.runtime import Runtime
from agentops import Context

class State(TypedDict, total=False):
    question: str
    answer: str

async def answer(state: State, runtime: Runtime[Context]) -> State:
    made = await runtime.context.ask("ask", max_tokens=8, question=state["question"])
    return {"answer": made.text}

graph = StateGraph(State, context_schema=Context).add_node(answer).add_edge(START, "answer").add_edge("answer", END)
"""


@pytest.fixture
def agentops(tmp_path: Path, environment: dict[str, str]) -> Agentops:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "ask.md").write_text("## user\n{question}\n")
    (tmp_path / "ask.py").write_text(ASK)

    def call(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "agentops", *arguments], cwd=tmp_path, env=environment | more, capture_output=True, text=True
        )

    return call


def refused(done: subprocess.CompletedProcess[str], *said: str, code: int = 1) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "error: " in done.stderr
    assert " hint: " in done.stderr
    for part in said:
        assert part in done.stderr


def test_an_unknown_graph(agentops: Agentops) -> None:
    refused(agentops("run", "rga", "hi"), "no graph is called 'rga'", "rag")
    refused(agentops("run", "./nowhere.py:graph", "hi"), "there is no file ./nowhere.py")


def test_a_syntax_error_in_a_graph_shows_its_line(agentops: Agentops, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("x = 1\ngraph = StateGraph(\ny = 2\n")
    refused(agentops("run", "broken.py:graph", "hi"), "broken.py, line 2", "2 | graph = StateGraph(")


def test_an_input_that_is_neither_given_nor_readable(agentops: Agentops) -> None:
    refused(agentops("run", "rag"), "give the input", code=2)
    refused(agentops("run", "rag", "--input", "nowhere.txt"), "nowhere.txt", code=2)
    refused(agentops("run", "ask.py", "{not json"), "JSON", code=2)


def test_a_setting_out_of_its_range_names_its_source(agentops: Agentops) -> None:
    refused(agentops("run", "rag", "hi", AGENTOPS_ENGINE_QUEUE="-1"), "$AGENTOPS_ENGINE_QUEUE", code=2)


def test_a_model_that_is_not_there(agentops: Agentops, tmp_path: Path) -> None:
    refused(agentops("run", "ask.py", "hi", "--model", "./no-such-model"), "no-such-model")
    (tmp_path / "empty").mkdir()
    refused(agentops("run", "ask.py", "hi", "--model", "./empty"), "config.json")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(agentops("run", "ask.py", "hi", "--model", "./pickled"), "pytorch_model.bin")


@pytest.mark.model
def test_a_model_whose_checksum_is_wrong(agentops: Agentops, tmp_path: Path, model_folder: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in model_folder.iterdir():
        if file.name == "tokenizer_config.json":
            (copy / file.name).write_bytes(file.read_bytes() + b" ")
        else:
            (copy / file.name).symlink_to(file)
    refused(agentops("run", "ask.py", "hi", "--model", str(copy)), "tokenizer_config.json", "checksum")


@pytest.mark.model
def test_a_ten_megabyte_prompt(agentops: Agentops, tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "big.txt").write_text("word " * 2_000_000)
    refused(agentops("run", "rag", "--input", "big.txt"), "10,000,000 bytes", "4,000,000")
    (tmp_path / "big.json").write_text(json.dumps({"question": "word " * 2_000_000}))
    refused(agentops("run", "ask.py", "--input", "big.json"), "4,000,000")


@pytest.mark.model
def test_a_prompt_longer_than_the_context(agentops: Agentops, tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "long.txt").write_text("An old sentence about nothing. " * 2_000 + "What is two plus two?")
    refused(agentops("run", "ask.py", "--input", "long.txt"), "8,192", "--trim")
    # A small pool makes a small context: computing 8,000 tokens takes half a minute.
    trimmed = agentops("run", "ask.py", "--input", "long.txt", "--trim", "--json", AGENTOPS_ENGINE_KV_TOKENS="1024")
    assert trimmed.returncode == 0, trimmed.stderr
    result = json.loads(trimmed.stdout)
    assert result["usage"]["trimmed_tokens"] > 1_000
    assert 500 < result["usage"]["input_tokens"] <= 1_024
    shown = json.loads(agentops("show", "last", "--json").stdout)
    assert any(span["usage"]["trimmed_tokens"] > 1_000 for span in shown["spans"] if span["kind"] == "generation")


@pytest.mark.model
def test_a_collection_that_is_not_there(agentops: Agentops, model_folder: Path, embedder_folder: Path) -> None:
    refused(agentops("run", "rag", "hi", "--collection", "nowhere"), "nowhere")


ODD = """
from typing import Any, TypedDict
from langgraph.graph import START, END, StateGraph

class State(TypedDict, total=False):
    text: str
    answer: str
    sources: Any

def odd(state: State) -> State:
    return {"answer": "an \\x1b]0;title\\x07answer", "sources": ["a.md", {"source": "b.md"}]}

graph = StateGraph(State).add_node(odd).add_edge(START, "odd").add_edge("odd", END)
"""


def test_a_graph_with_sources_of_another_shape_is_shown_and_cannot_steer_the_terminal(agentops: Agentops, tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(ODD)
    done = agentops("run", "odd.py", '{"text": "hi"}')
    assert done.returncode == 0, done.stderr
    assert "[1] a.md\n[2] b.md" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert "\x07" not in done.stdout
    lone = agentops("run", "odd.py", '{"text": "\\ud800"}', "--json")
    assert lone.returncode == 0, lone.stderr
    assert json.loads(lone.stdout)["status"] == "done"
