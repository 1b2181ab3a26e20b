"""Every branch of the graph triage on a scripted engine: the router, the four specialists, and what they share with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tea import TEXTS, likely

from agentops import Document, RunResult, Runtime, ScriptedEngine, Settings
from agentops.errors import AnswerUnfit
from agentops.records import Decision, ScoreRequest, content_hash
from agentops.retrieval.embed import HashEmbedder
from agentops.store import open_store
from agentops.tracer import catch_up
from graphs.triage import SPECIALISTS, grown

HEADS = {f"Tool: {name}:": name for name in SPECIALISTS}


def sends(to: dict[str, str], second: str = "") -> Callable[[ScoreRequest], list[float]]:
    """An engine that finds a message likely for the specialist that `to` names for a piece of it, and for `second` as well;
    inside the assistant, for the tool of that name."""

    def scores(request: ScoreRequest) -> list[float]:
        said, asked = request.messages[-1].content, request.choices[0]
        if not said.startswith("Tool: "):
            return likely(request)
        specialist = any(said.startswith(head) for head in HEADS)
        wanted = [name for piece, name in to.items() if piece in asked and (name in SPECIALISTS) is specialist]
        fits = any(said.startswith(f"Tool: {name.replace('_', ' ')}:") for name in (*wanted, second) if name)
        # Enough for the words that a message and an example happen to share to make no difference.
        return [(-1.0 if fits else -9.0 if said.startswith("Tool: \n") else -99.0) * len(asked.split())]

    return scores


@pytest.fixture
def opened(settings: Settings) -> Iterator[Callable[..., Runtime]]:
    runtimes: list[Runtime] = []

    def make(answers: Any, to: dict[str, str], second: str = "") -> Runtime:
        runtime = Runtime(settings, engine=ScriptedEngine(answers, scores=sends(to, second)), embedder=Same())
        runtimes.append(runtime)
        documents = [
            Document(source, text, content_hash(text), {"source": source, "heading": heading})
            for source, (heading, text) in TEXTS.items()
        ]
        runtime.index.upsert("tea", documents)
        return runtime

    yield make
    for runtime in runtimes:
        runtime.close()


class Same(HashEmbedder):
    """Only likelihood decides: to this embedder everything that is no document is equally near."""

    def embed(self, texts: Any) -> Any:
        return super().embed([text if ". " in text or "degrees" in text else "same" for text in texts])


def ask(runtime: Runtime, message: str, thread: str | None = None) -> RunResult:
    return runtime.run("triage", message, collection="tea", thread=thread)


QUESTION = "At how many degrees is green tea brewed?"
TEA = "Green tea is brewed at 80 degrees."


def test_a_question_goes_to_the_documents(opened: Callable[..., Runtime]) -> None:
    done = ask(opened([TEA], {"tea": "documents"}), QUESTION)
    assert (done.output["route"], done.output["answer"]) == ("documents", f"{TEA} [1]")
    assert done.output["sources"] == [{"n": 1, "source": "tea.md", "heading": "Brewing"}]
    assert done.output["reason"].startswith("documents fits best, by ")


def test_a_sum_goes_to_the_tools(opened: Callable[..., Runtime]) -> None:
    runtime = opened(['{"expression": "37 * 48"}'], {"37": "tools", "times": "calculator"})
    assert ask(runtime, "What is 37 times 48?").output["answer"] == "37 * 48 = 1776"


@pytest.mark.parametrize(
    ("made", "answer"), [("Hi! Nice. To. See. You.", "Hi! Nice. To."), ("", "I have nothing to say to that.")]
)
def test_a_greeting_goes_to_the_writer(opened: Callable[..., Runtime], made: str, answer: str) -> None:
    done = ask(opened([made], {"Hello": "writing"}), "Hello!")
    assert (done.output["route"], done.output["answer"]) == ("writing", answer)


def test_a_complaint_waits_for_a_person(opened: Callable[..., Runtime]) -> None:
    runtime = opened([], {"refund": "person"})
    waiting = ask(runtime, "I want a refund!")
    (asked,) = waiting.interrupts
    assert (waiting.status, asked.kind, asked.node) == ("waiting", "question", "person / hand_over")
    assert asked.question.startswith("A message for a person (person fits best, by ")
    assert asked.question.endswith("I want a refund!")
    with pytest.raises(AnswerUnfit):
        runtime.resume(waiting.run_id, answer="")
    done = runtime.resume(waiting.run_id, answer="You will have it by Friday.")
    assert done.output["answer"] == "You will have it by Friday."
    assert done.output["history"] == [{"question": "I want a refund!", "answer": "You will have it by Friday."}]


@pytest.mark.parametrize(
    ("message", "to", "second", "route"),
    [
        (QUESTION, "tools", "writing", "documents"),
        ("Brew now.", "tools", "writing", "person"),
        ("Brew it.", "tools", "documents", "documents"),
    ],
)
def test_what_two_could_deal_with_is_looked_up_or_handed_over(
    opened: Callable[..., Runtime], message: str, to: str, second: str, route: str
) -> None:
    done = ask(opened(lambda _: TEA, {"": to}, second), message)
    assert done.output["route"] == route
    assert done.output["reason"] in (f"{to} and {second} fit about as well", f"{second} and {to} fit about as well")


def test_an_empty_message_goes_to_a_person(opened: Callable[..., Runtime]) -> None:
    waiting = opened([], {}).run("triage", {"question": " "}, collection="tea")
    assert "the message is empty" in waiting.interrupts[0].question


def test_a_call_inside_a_specialist_waits_for_a_person_and_the_trace_is_one(
    opened: Callable[..., Runtime], settings: Settings
) -> None:
    runtime = opened(['{"text": "buy tea"}'], {"Note": "tools", "buy": "append_note"})
    waiting = ask(runtime, "Note: buy tea")
    (asked,) = waiting.interrupts
    assert (asked.kind, asked.node) == ("approval", "tools / act")
    assert not (settings.files / "notes.md").exists()
    done = runtime.resume(waiting.run_id, answer=Decision("approve"))
    assert (done.status, done.output["route"]) == ("done", "tools")
    assert done.output["answer"].startswith("Noted: ")
    assert (settings.files / "notes.md").read_text().count("buy tea") == 1
    catch_up(settings)
    with open_store(settings) as store:
        assert store.balance(done.run_id).balanced
        spans = store.spans(done.run_id)
    kinds = {span.id: (span.kind, span.name) for span in spans}
    inside = [span for span in spans if span.kind == "node" and span.name in ("read", "choose", "fill", "act", "answer")]
    assert {span.name for span in inside} == {"read", "choose", "fill", "act", "answer"}
    assert {kinds[str(span.parent_id)][1] for span in inside} == {"tools"}
    assert [span.name for span in spans if span.kind == "tool"] == ["append_note"]


def test_a_refusal_inside_a_specialist_writes_nothing(opened: Callable[..., Runtime], settings: Settings) -> None:
    runtime = opened(['{"text": "buy tea"}'], {"Note": "tools", "buy": "append_note"})
    done = runtime.resume(ask(runtime, "Note: buy tea").run_id, answer=Decision("reject"))
    assert done.output["answer"] == "A person refused to run append_note."
    assert not (settings.files / "notes.md").exists()


def test_a_conversation_goes_through_several_specialists(opened: Callable[..., Runtime]) -> None:
    answers = ["Hello! What can I do?", TEA, '{"expression": "80 * 2"}']
    runtime = opened(answers, {"Hello": "writing", "tea": "documents", "times": "tools", "80": "calculator"})
    for message in ("Hello!", QUESTION, "What is 80 times 2?"):
        done = ask(runtime, message, "t")
    assert [turn["question"] for turn in done.output["history"]] == ["Hello!", QUESTION, "What is 80 times 2?"]
    assert done.output["answer"] == "80 * 2 = 160"
    assert done.output["sources"] == []


def test_a_history_grows_by_what_is_new() -> None:
    one, two = {"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}
    assert grown([one], [one, two]) == [one, two]  # type: ignore[list-item]
    assert grown([one], [two]) == [one, two]  # type: ignore[list-item]
    assert grown([], [one]) == [one]  # type: ignore[list-item]
    assert grown([one], [one, one]) == [one, one]  # type: ignore[list-item]
