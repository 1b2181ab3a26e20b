"""Answers a question from a collection of documents, with citations, or says what it does not know.

    rewrite -> retrieve -+-> write -> critic -+-> finish
                         |     ^              |     ^
                         |     +--- twice ----+     |
                         +---- nothing relevant ----+

The rewriter makes a follow-up question stand alone. The retriever finds passages and keeps the sentences that matter.
The writer answers from them. The critic checks every sentence and sends the draft back at most twice: the writer then
gets the best source alone, and after that has to quote it. A small model cannot be trusted to judge its own words, so
relevance and support are measured (agentops.grounding), not asked for.
"""

from __future__ import annotations

import operator
import re
from typing import Annotated, Literal, TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime

from agentops import Context
from agentops.grounding import coverage, numbers_missing, terms
from agentops.text import split_sentences

EVIDENCE = 4
"""Sentences that the writer is given at first."""
RELEVANT = 1.4
"""Least relevance of a sentence that can answer a question."""
SUPPORTED = 0.75
"""Least share of a sentence's content words that its source must have."""
KEPT = 0.5
"""Least share of what the best source adds to the question (its other content words) that an answer must keep."""
DISTINCT = 0.8
"""Least share of different words among the content words of a sentence that is not quoted."""
RETURNS = 2
"""How often the critic sends a draft back."""

ASKING = re.compile(
    r"\b(what|which|who|whose|when|where|why|how|is|are|was|were|do|does|did|can|could|will|would|should)\b", re.I
)
POINTING = re.compile(r"\b(it|its|they|them|their|this|these|those|he|him|his|she|her)\b", re.I)


class Evidence(TypedDict):
    """A sentence of a document. Sentences of one section share the number `n` by which they are cited."""

    n: int
    text: str
    source: str
    heading: str
    relevance: float


class Source(TypedDict):
    """What a citation `[n]` stands for."""

    n: int
    source: str
    heading: str


class Turn(TypedDict):
    question: str
    answer: str


class State(TypedDict, total=False):
    question: str
    history: Annotated[list[Turn], operator.add]
    query: str
    unsearched: str
    """Why the documents could not be searched; empty where they were."""
    evidence: list[Evidence]
    draft: str
    returns: int
    feedback: str
    verdict: Literal["supported", "unsupported", "unknown"]
    answer: str
    sources: list[Source]


async def rewrite(state: State, runtime: Runtime[Context]) -> State:
    """A follow-up that points back becomes a question that stands alone; other questions stay as they are."""
    question = query = state["question"]
    if (history := state.get("history")) and not stands_alone(question):
        before = history[-1]
        made = await runtime.context.ask("rag_rewrite", max_tokens=48, stop=["\n"], follow_up=question, **before)
        query = made.text.strip()
        talk = f"{before['question']} {before['answer']} {question}"
        kept, invented = coverage(question, query) >= SUPPORTED, coverage(query, talk) < 1
        if not (query.endswith("?") and kept and not invented and stands_alone(query)):
            query = f"{before['question']} {question}"
    return {"query": query, "evidence": [], "draft": "", "returns": 0, "feedback": "", "verdict": "unsupported"}


async def retrieve(state: State, runtime: Runtime[Context]) -> State:
    """The sentences of the retrieved passages that have most to do with the question, best first. Titles and questions
    say nothing by themselves and are left out."""
    retrieval = await runtime.context.search(state["query"])
    if retrieval.error:
        return {"evidence": [], "verdict": "unknown", "unsearched": retrieval.error}
    found = [(hit.document.metadata, sentence) for hit in retrieval.hits for sentence in split_sentences(hit.document.text)]
    places = [(about, sentence) for about, sentence in found if "?" not in sentence and sentence != about.get("title")]
    titled = [f"{about.get('heading') or about.get('title', '')}: {sentence}" for about, sentence in places]
    ranked = await runtime.context.relevance(state["query"], titled, "rag_relevance")
    numbers: dict[tuple[str, str], int] = {}
    evidence: list[Evidence] = []
    for one in ranked[:EVIDENCE]:
        about, sentence = places[one.index]
        source, heading = str(about.get("source", "")), str(about.get("heading") or about.get("title", ""))
        n = numbers.setdefault((source, heading), len(numbers) + 1)
        evidence.append({"n": n, "text": sentence, "source": source, "heading": heading, "relevance": round(one.total, 3)})
    relevant = bool(evidence) and evidence[0]["relevance"] >= RELEVANT
    return {"evidence": evidence, "verdict": "unsupported" if relevant else "unknown", "unsearched": ""}


async def write(state: State, runtime: Runtime[Context]) -> State:
    """One sentence from the evidence; from the best source alone when the draft came back; its own words at last."""
    evidence, returns = state["evidence"], state["returns"]
    if returns == RETURNS:
        return {"draft": evidence[0]["text"]}
    text = "\n".join(one["text"] for one in (evidence[:1] if returns else evidence))
    made = await runtime.context.ask("rag_write", max_tokens=64, stop=["\n"], text=text, question=state["query"])
    return {"draft": " ".join(split_sentences(made.text.removeprefix("A: "))[:1])}


async def critic(state: State, runtime: Runtime[Context]) -> State:
    """Every sentence must be carried by a source, and the answer must say what the best source adds to the question."""
    evidence, draft, cited = state["evidence"], split_sentences(state["draft"]), []
    if not draft:
        return _back(state, "nothing was written")
    for sentence in draft:
        source = max(evidence, key=lambda one: (-len(numbers_missing(sentence, one["text"])), coverage(sentence, one["text"])))
        if wrong := numbers_missing(sentence, source["text"]):
            return _back(state, f"no source has the number {wrong[0]}: {sentence}")
        if coverage(sentence, source["text"]) < SUPPORTED:
            return _back(state, f"no source says this: {sentence}")
        if sentence not in source["text"] and len(set(terms(sentence))) < DISTINCT * len(terms(sentence)):
            return _back(state, f"this repeats itself: {sentence}")
        cited.append(source)
    if leaves_out(state["draft"], evidence[0]["text"], state["query"]):
        return _back(state, f"this leaves out what the best source says: {state['draft']}")
    answer = " ".join(f"{sentence} [{source['n']}]" for sentence, source in zip(draft, cited, strict=True))
    sources: dict[int, Source] = {one["n"]: {"n": one["n"], "source": one["source"], "heading": one["heading"]} for one in cited}
    return {"verdict": "supported", "answer": answer, "sources": list(sources.values()), "feedback": ""}


def stands_alone(question: str) -> bool:
    """Whether a question asks something and points at nothing that was said before."""
    return bool(ASKING.search(question)) and not POINTING.search(question)


def leaves_out(draft: str, source: str, question: str) -> bool:
    """Whether a draft says too little of what the source adds to the question: other words, and other numbers if it has some."""
    asked, added = set(terms(question)), numbers_missing(source, question)
    no_number = bool(added) and len(numbers_missing(" ".join(added), draft)) == len(added)
    return no_number or coverage(source, draft, lambda term: term not in asked) < KEPT


def _back(state: State, feedback: str) -> State:
    returns = state["returns"] + 1
    return {"verdict": "unsupported" if returns <= RETURNS else "unknown", "returns": returns, "feedback": feedback}


async def finish(state: State, runtime: Runtime[Context]) -> State:
    """The checked answer, or what is not known; either goes into the thread's history."""
    done: State = {}
    if state.get("unsearched"):
        done = {"answer": f"The documents could not be searched for “{state['query']}”: {state['unsearched']}", "sources": []}
    elif state["verdict"] != "supported":
        near = "; ".join(dict.fromkeys(one["heading"] or one["source"] for one in state["evidence"][:2]))
        hint = f" The nearest they have is about: {near}." if near else ""
        done = {"answer": f"I do not know: the documents do not answer “{state['query']}”.{hint}", "sources": []}
    return {**done, "history": [{"question": state["query"], "answer": done.get("answer") or state["answer"]}]}


def known(state: State) -> str:
    return "finish" if state["verdict"] == "unknown" else "write"


def checked(state: State) -> str:
    return "write" if state["verdict"] == "unsupported" else "finish"


graph = StateGraph(State, context_schema=Context)
for agent in (rewrite, retrieve, write, critic, finish):
    graph.add_node(agent.__name__, agent)
graph.add_edge(START, "rewrite")
graph.add_edge("rewrite", "retrieve")
graph.add_conditional_edges("retrieve", known, ["write", "finish"])
graph.add_edge("write", "critic")
graph.add_conditional_edges("critic", checked, ["write", "finish"])
graph.add_edge("finish", END)
