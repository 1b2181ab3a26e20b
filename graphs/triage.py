"""Sends a message to the one who can deal with it: a graph that answers from documents, one that uses tools, one that
writes, or a person.

    route -+-> documents -+
           +-> tools -----+--> end
           +-> writing ---+
           +-> person ----+

Every specialist is a graph of its own, used as a node: `rag`, `assistant`, and two that are made here. They share `question`,
`answer` and `history` with this graph by having fields of these names, and keep the rest to themselves; what one of them asks
a person is asked by this graph's run. The router measures which of the four descriptions the message is for. Where two of
them fit about as well it says so, and plays safe: looking something up harms nothing, and a person can always help.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypedDict, cast

from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime

from agentops import Context, people
from agentops.text import split_sentences
from graphs.assistant import graph as assistant
from graphs.rag import ASKING, Source, Turn
from graphs.rag import graph as rag

CLEAR = 0.15
"""Least lead of the best specialist over the next; of 26 messages, those that were misjudged by less are sent right without."""
SENTENCES = 3
"""Sentences that the writer writes at most."""

Route = Literal["documents", "tools", "writing", "person"]

SPECIALISTS: dict[Route, str] = {
    "documents": """Questions that the documents answer.

    Examples:
        How does the heating work?
        What is a warrant?
        Which rules are there for guests?
        Where are the spare parts stored?
        What do the documents say about shipping?
    """,
    "tools": """Arithmetic, the time, and notes.

    Examples:
        What is 12 times 7?
        What time is it in London?
        Write down that the plumber comes on Monday.
        There are 6 rows of 11 chairs. How many chairs are there?
        What day is today?
        Note: buy coffee.
    """,
    "writing": """Greetings, small talk and short texts.

    Examples:
        Hello!
        Thanks a lot.
        Tell me a story about a dog.
        Write a card for Tom's wedding.
        How are you?
    """,
    "person": """What a person has to decide or do.

    Examples:
        I want to speak to somebody.
        I want my money back.
        This is broken again, I am angry.
        Book a flight to Rome.
        Send me a technician.
    """,
}


def grown(before: list[Turn], after: list[Turn]) -> list[Turn]:
    """A specialist gives back the history that it was given, and its turn."""
    return after if after[: len(before)] == before else before + after


class State(TypedDict, total=False):
    question: str
    history: Annotated[list[Turn], grown]
    route: Route
    reason: str
    answer: str
    sources: list[Source]


class Said(TypedDict, total=False):
    """What the writer and the person have in common with the router."""

    question: str
    history: Annotated[list[Turn], grown]
    reason: str
    answer: str


async def route(state: State, runtime: Runtime[Context]) -> State:
    """Who deals with the message, and why."""
    message = state["question"]
    clean: State = {"answer": "", "sources": []}
    if not message.strip():
        return {**clean, "route": "person", "reason": "the message is empty"}
    best, second, *_ = await runtime.context.choose(
        "triage_choose", message, {str(name): text for name, text in SPECIALISTS.items()}
    )
    if (lead := best.score - second.score) >= CLEAR:
        return {**clean, "route": cast(Route, best.name), "reason": f"{best.name} fits best, by {lead:.2f} over {second.name}"}
    safe: Route = "documents" if "?" in message or ASKING.match(message) or "documents" in (best.name, second.name) else "person"
    return {**clean, "route": safe, "reason": f"{best.name} and {second.name} fit about as well"}


def routed(state: State) -> Route:
    return state["route"]


async def write(state: Said, runtime: Runtime[Context]) -> Said:
    """A few sentences of the model's own; nothing in them is checked."""
    made = await runtime.context.ask("triage_write", max_tokens=96, message=state["question"])
    return _said(state, " ".join(split_sentences(made.text)[:SENTENCES]) or "I have nothing to say to that.")


async def hand_over(state: Said) -> Said:
    """Waits for a person's answer."""
    question = f"A message for a person ({state['reason']}): {state['question']}"
    return _said(state, people.ask(question, schema={"type": "string", "minLength": 1}))


def _said(state: Said, answer: str) -> Said:
    return {"answer": answer, "history": [{"question": state["question"], "answer": answer}]}


writing = StateGraph(Said, context_schema=Context)
writing.add_node("write", write)
writing.add_edge(START, "write")
writing.add_edge("write", END)

person = StateGraph(Said, context_schema=Context)
person.add_node("hand_over", hand_over)
person.add_edge(START, "hand_over")
person.add_edge("hand_over", END)

graph = StateGraph(State, context_schema=Context)
graph.add_node("route", route)
graph.add_edge(START, "route")
graph.add_conditional_edges("route", routed, [str(name) for name in SPECIALISTS])
for name, specialist in (("documents", rag), ("tools", assistant), ("writing", writing), ("person", person)):
    graph.add_node(name, specialist.compile())
    graph.add_edge(name, END)
