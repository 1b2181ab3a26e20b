"""What recorded runs of the five graphs give as samples, and what is said of runs that the record has not whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from tea import likely, open_runtime

from agentops import Runtime, Settings
from agentops.records import Decision, Message, ScoreRequest
from agentops.store import open_store
from agentops.tracer import catch_up
from evals.experiment import score_runs
from evals.metrics.native import native_metrics
from evals.reading import answer_in, question_in, read_sample
from evals.samples import Reference, Sample

DRAFT = "Green tea is brewed at 80 degrees."


def sample_of(settings: Settings, run_id: str) -> Sample:
    catch_up(settings)
    with open_store(settings) as store:
        return read_sample(store, store.run(run_id))


@pytest.fixture
def opened(settings: Settings) -> Iterator[Callable[..., Runtime]]:
    runtimes: list[Runtime] = []

    def make(*answers: str, **options: Any) -> Runtime:
        played = options.pop("by", None) or list(answers)
        runtimes.append(open_runtime(options.pop("settings", settings), played, **options))
        return runtimes[-1]

    yield make
    for runtime in runtimes:
        runtime.close()


async def test_an_answer_from_documents(opened: Callable[..., Runtime], settings: Settings) -> None:
    runtime = opened(DRAFT, "A cup holds 250 millilitres.")
    first = runtime.run("rag", "How hot is green tea brewed?", thread="talk", collection="tea")
    sample = sample_of(settings, first.run_id)
    assert (sample.question, sample.answer) == ("How hot is green tea brewed?", f"{DRAFT} [1]")
    assert sample.contexts[0].source == "tea.md"
    assert len({context.id for context in sample.contexts}) == len(sample.contexts) == 2
    assert sample.contexts[sample.cited["1"]].text.startswith(DRAFT)
    assert [message.role for message in sample.messages] == ["user", "assistant"]
    assert sample.usage == first.usage
    assert sample.spent == {runtime.engine.info.name: first.usage}
    assert 0 < sample.latency_ms == pytest.approx(first.duration_ms, rel=0.5, abs=50)
    assert (sample.run_id, sample.thread_id, sample.truncated) == (first.run_id, "talk", frozenset())
    metrics = native_metrics()
    assert (await metrics["citations_resolve"].score(sample)).value == 1
    assert (await metrics["citations_support"].score(sample)).value == 1
    wanted = replace(sample, reference=Reference(contexts=(sample.contexts[0].id,)))
    assert (await metrics["mrr"].score(wanted)).value == 1

    second = runtime.run("rag", "How much does a cup hold?", thread="talk", collection="tea")
    told = sample_of(settings, second.run_id)
    assert [message.content for message in told.messages] == [
        "How hot is green tea brewed?",
        f"{DRAFT} [1]",
        "How much does a cup hold?",
        told.answer,
    ]


def test_the_documents_of_several_searches_come_once_each_the_best_of_each_first(
    opened: Callable[..., Runtime], settings: Settings
) -> None:
    # Which of the two questions is asked first is for nobody to say: they are looked into side by side.
    plan = "How hot is green tea brewed?\nHow much does a cup hold?"
    cup = "A cup holds 250 millilitres."
    runtime = opened(by={"brewed, and how": plan, "Question: How hot": DRAFT, "Question: How much": cup, "": "x"})
    done = runtime.run("research", "How hot is green tea brewed, and how much does a cup hold?", collection="tea")
    sample = sample_of(settings, done.run_id)
    assert sorted(context.source for context in sample.contexts) == ["cups.md", "tea.md"]
    assert len(sample.cited) == len(done.output["sources"]) == 2
    for number, place in sample.cited.items():
        source = next(one for one in done.output["sources"] if str(one["n"]) == number)
        assert sample.contexts[place].source == source["source"]


def test_a_run_that_waited_is_as_long_as_its_sittings(opened: Callable[..., Runtime], settings: Settings) -> None:
    import time

    runtime = opened(DRAFT)
    waiting = runtime.run("review", "How hot is green tea brewed?", collection="tea")
    draft = sample_of(settings, waiting.run_id)
    assert draft.answer == f"{DRAFT} [1]"
    time.sleep(0.5)
    done = runtime.resume(waiting.run_id, answer=Decision("edit", f"Green tea likes 80 degrees. {DRAFT} [1]"))
    sample = sample_of(settings, waiting.run_id)
    assert sample.answer == f"Green tea likes 80 degrees. {DRAFT} [1]"
    assert sample.latency_ms == pytest.approx(waiting.duration_ms + done.duration_ms, rel=0.3, abs=100)
    with open_store(settings) as store:
        assert sample.latency_ms + 450 < (store.run(waiting.run_id).duration_ns or 0) / 1e6


def calculates(request: ScoreRequest) -> list[float]:
    said, asked = request.messages[-1].content, request.choices[0]
    if not said.startswith("Tool: "):
        return likely(request)
    fits = said.startswith("Tool: calculator:")
    return [-1.0 if fits else -9.0 * len(asked.split())]


def test_the_calls_of_an_assistant_with_what_came_of_them(opened: Callable[..., Runtime], settings: Settings) -> None:
    runtime = opened('{"expression": "37 * 48"}', scores=calculates)
    done = runtime.run("assistant", "What is 37 times 48?", collection="tea")
    sample = sample_of(settings, done.run_id)
    assert [(call.name, call.arguments) for call in sample.tool_calls] == [("calculator", {"expression": "37 * 48"})]
    assert [message.role for message in sample.messages] == ["user", "tool", "assistant"]
    assert "1776" in sample.messages[1].content
    assert sample.answer == done.output["answer"]
    assert sample.contexts == ()


def test_a_message_that_was_sent_to_a_specialist(opened: Callable[..., Runtime], settings: Settings) -> None:
    def sends(request: ScoreRequest) -> list[float]:
        said, asked = request.messages[-1].content, request.choices[0]
        if not said.startswith("Tool: "):
            return likely(request)
        return [(-1.0 if said.startswith("Tool: documents:") else -9.0) * len(asked.split())]

    runtime = opened(DRAFT, scores=sends)
    done = runtime.run("triage", "How hot is green tea brewed?", collection="tea")
    sample = sample_of(settings, done.run_id)
    assert (sample.question, sample.answer) == ("How hot is green tea brewed?", done.output.get("answer", ""))
    assert sample.messages[0] == Message("user", "How hot is green tea brewed?")
    assert {context.source for context in sample.contexts} == {"tea.md", "cups.md"}
    assert sample.contexts[sample.cited["1"]].source == "tea.md"


async def test_what_the_record_has_cut_is_not_scored(opened: Callable[..., Runtime], settings: Settings) -> None:
    small = replace(settings, record=replace(settings.record, payload_bytes=1_000))
    runtime = opened("x", "x", settings=small)
    question = "How hot is green tea brewed? " + "tea " * 2_000
    done = runtime.run("rag", question, collection="tea")
    sample = sample_of(small, done.run_id)
    assert "question" in sample.truncated
    metrics = native_metrics()
    from agentops.clock import SystemClock, UlidSource
    from agentops.tracer import open_tracer

    clock = SystemClock()
    tracer = open_tracer(small, clock=clock, ids=UlidSource(clock))
    tally = await score_runs(runtime, tracer, [done.run_id], [metrics["latency_ms"], metrics["citations_resolve"]])
    tracer.close()
    assert (tally.asked, tally.scored, tally.unscored) == (2, 1, 1)
    with open_store(small) as store:
        (unscored,) = store.scores(run=done.run_id, name="citations_resolve")
    assert unscored.score.reason.startswith("truncated: answer")


@pytest.mark.parametrize(
    ("given", "question"),
    [
        ("a?", "a?"),
        ({"question": "a?", "other": "b"}, "a?"),
        ({"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}, "a?"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a?"}]}]}, "a?"),
        ({"topic": "a?", "n": 3}, "a?"),
        ({"x": 1}, '{"x": 1}'),
        (None, ""),
        ([1], ""),
    ],
)
def test_questions_of_graphs_of_all_forms(given: Any, question: str) -> None:
    assert question_in(given) == question


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ({"answer": "a", "draft": "b"}, "a"),
        ({"messages": [{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}]}, "a"),
        ({"result": "a"}, "a"),
        ("a", "a"),
        ({"x": "a", "y": "b"}, ""),
        (None, ""),
    ],
)
def test_answers_of_graphs_of_all_forms(output: Any, answer: str) -> None:
    assert answer_in(output) == answer
