"""Prefix blocks that outlive their engine: found again by who may have them, checked, bounded, and never wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from safetensors.numpy import load_file, save_file
from tiny_model import write_tiny_model

from agentops.engine import generate
from agentops.engine.local import LocalEngine, open_engine
from agentops.records import Generation, Request, ScoreRequest
from agentops.settings import load_settings

LONG = "the quick brown fox jumps over the lazy dog and one two three yes no maybe " * 55
Open = Callable[..., LocalEngine]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", bits=4, max_position_embeddings=4096)


@pytest_asyncio.fixture
async def opened(folder: Path, tmp_path: Path) -> AsyncIterator[Open]:
    """Opens engines that keep their prefixes in the same home."""
    engines: list[LocalEngine] = []

    def make(model: Path = folder, **settings: Any) -> LocalEngine:
        wanted = {"kv_tokens": 4096, "threads": 1, "kernel": "int4", "keep_bytes": 100_000_000, **settings}
        flags = {"paths.home": tmp_path / "home", **{f"engine.{name}": value for name, value in wanted.items()}}
        engines.append(open_engine(model, load_settings(flags, environment={}), "tiny"))
        return engines[-1]

    yield make
    for engine in engines:
        await engine.close()


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "home" / "prefixes").glob("*"))


async def once(engine: LocalEngine, text: str = LONG, **how: Any) -> Generation:
    """One answer; the engine is closed then."""
    done = await generate(engine, Request(text=text, max_tokens=6, **how))
    await engine.close()
    return done


async def test_the_next_engine_begins_warm_with_the_same_numbers(opened: Open) -> None:
    cold = await once(opened())
    assert cold.usage.input_tokens > 1_000
    warm = await once(opened(), LONG)
    assert warm.usage.cached_tokens >= 0.95 * warm.usage.input_tokens
    assert (warm.tokens, warm.logprobs) == (cold.tokens, cold.logprobs)
    longer = await once(opened(), LONG + "and what then?")
    fresh = await once(opened(keep_bytes=0), LONG + "and what then?")
    assert longer.usage.cached_tokens >= 0.95 * cold.usage.input_tokens
    assert fresh.usage.cached_tokens == 0
    assert (longer.tokens, longer.logprobs) == (fresh.tokens, fresh.logprobs)


async def test_scores_begin_warm_too(opened: Open) -> None:
    await once(opened())
    engine = opened()
    scores = await engine.score(ScoreRequest((" yes", " no"), text=LONG))
    assert scores.usage.cached_tokens >= 0.95 * scores.usage.input_tokens


async def test_nothing_is_kept_unless_it_is_asked_for(opened: Open, tmp_path: Path) -> None:
    await once(opened(keep_bytes=0))
    assert files(tmp_path) == []


async def test_another_tenant_another_model_and_another_kernel_find_nothing(opened: Open, tmp_path: Path) -> None:
    await once(opened(), tenant="one")
    other = write_tiny_model(tmp_path / "other", bits=8, max_position_embeddings=4096)
    assert (await once(opened(), tenant="two")).usage.cached_tokens == 0
    assert (await once(opened(other), tenant="one")).usage.cached_tokens == 0
    assert (await once(opened(kernel="float32"), tenant="one")).usage.cached_tokens == 0
    assert (await once(opened(), tenant="one")).usage.cached_tokens > 1_000
    assert all(file.stat().st_mode & 0o077 == 0 for file in files(tmp_path))


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def of_other_tokens(file: Path) -> None:
    from safetensors import safe_open

    with safe_open(file, framework="np") as opened_:
        about = opened_.metadata()
    parts = load_file(file)
    save_file({**parts, "tokens": parts["tokens"] + 1}, file, about)


DAMAGES = {
    "flipped": flipped,
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "tokens": of_other_tokens,
}


@pytest.mark.parametrize("how", DAMAGES)
async def test_a_damaged_block_is_computed_anew(opened: Open, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    cold = await once(opened())
    before = files(tmp_path)
    DAMAGES[how](before[0])
    again = await once(opened())
    assert again.usage.cached_tokens < 16 * len(before)
    assert (again.tokens, again.logprobs) == (cold.tokens, cold.logprobs)
    assert "damaged and was removed" in caplog.text
    assert files(tmp_path) == before
    whole = await once(opened())
    assert whole.usage.cached_tokens >= 0.95 * whole.usage.input_tokens


async def test_what_was_used_last_stays_within_the_limit(opened: Open, tmp_path: Path) -> None:
    await once(opened())
    one = max(file.stat().st_size for file in files(tmp_path))
    room = 30 * one
    for word in ("alpha", "beta", "gamma"):
        await once(opened(keep_bytes=room), f"{word} " * 60)
        assert sum(file.stat().st_size for file in files(tmp_path)) <= room
    assert (await once(opened(keep_bytes=room), "gamma " * 60)).usage.cached_tokens > 0
    assert (await once(opened(keep_bytes=room), LONG)).usage.cached_tokens < 1_000


async def test_a_folder_that_cannot_be_written_harms_no_answer(
    opened: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "prefixes").write_text("in the way")
    assert (await once(opened())).text
    assert "could not be kept" in caplog.text


FORKED = """
import sys
from typing import TypedDict
from langgraph.graph import START, StateGraph
from langgraph.runtime import Runtime as Node
from agentops import Context, Runtime, load_settings
from agentops.engine import generate
from agentops.records import Message, Request

class State(TypedDict, total=False):
    asked: str
    said: str

async def ask(state: State, runtime: Node[Context]) -> State:
    rules = "Answer with one word. " + "A leaf in hot water is called tea. " * 160
    told = (Message("system", rules), Message("user", state["asked"]))
    return {"said": (await generate(runtime.context.engine, Request(told, max_tokens=4))).text}

graph = StateGraph(State, context_schema=Context).add_node("ask", ask).add_edge(START, "ask").compile()
with Runtime(load_settings()) as runtime:
    if len(sys.argv) == 1:
        print(runtime.run(graph, {"asked": "What is tea?"}).run_id)
    else:
        print(runtime.fork(sys.argv[1], step=-1, changes={"asked": "Is tea hot?"}, graph=graph).run_id)
"""


@pytest.mark.model
def test_a_fork_in_a_new_process_begins_warm_and_its_span_says_so(
    model_folder: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    del model_folder  # it is ready then
    script = tmp_path / "forked.py"
    script.write_text(textwrap.dedent(FORKED))

    def told(*command: str) -> str:
        given = environment | {"AGENTOPS_ENGINE_KEEP_BYTES": "200000000"}
        return subprocess.run(command, capture_output=True, text=True, env=given, check=True).stdout

    run = told(sys.executable, str(script)).strip()
    fork = told(sys.executable, str(script), run).strip()
    found = []
    for name in (run, fork):
        spans = json.loads(told("agentops", "show", name, "--json"))["spans"]
        (call,) = [span["usage"] for span in spans if span["kind"] == "generation"]
        found.append(call)
    first, second = found
    assert first["cached_tokens"] == 0
    assert first["input_tokens"] > 1_000
    assert second["cached_tokens"] >= 0.95 * 1_000
    assert second["cached_tokens"] >= 0.95 * (first["input_tokens"] - 20)
