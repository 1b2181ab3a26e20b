"""Files an answer as a document, after a person has approved or edited it.

    draft -> decide -+-- approved or edited --> file
               ^     |
               |     +-- rejected ---> revise
               |                         |
               +------- twice -----------+

The draft is the graph `rag`'s. The run waits at `decide` for a person, for as long as it takes: nothing is written before.
A rejection's reason is searched for with the question, so that it decides which sentence is used next; what was rejected is
not offered again. When nothing else is left, or a person rejects the third draft, nothing is filed.

Filing is safe to repeat: the file's name and its content follow from the run, so that a process that dies right after
writing writes the same file over when the run is resumed.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Literal, TypedDict

from langgraph.config import get_config
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime

from agentops import Context
from agentops.grounding import coverage
from agentops.people import approve
from agentops.records import content_hash
from agentops.text import split_sentences
from graphs.rag import RETURNS, Evidence, Source, critic, retrieve
from graphs.rag import graph as rag

REVISIONS = 2
"""How often a rejected draft is written anew."""
FOLDER = "reviews"
"""Where in the folder for files reviewed answers are put."""
NOT_FILED = "Nothing was filed: every draft was rejected."
HOW = {"approved": "A person approved this answer as it was drafted.", "edited": "A person wrote this answer over the draft."}

answer_one = rag.compile()


class Rejected(TypedDict):
    """A draft that a person did not want, and why."""

    answer: str
    reason: str


class State(TypedDict, total=False):
    question: str
    answer: str
    sources: list[Source]
    rejected: list[Rejected]
    outcome: Literal["drafted", "approved", "edited", "rejected"]
    file: str


async def draft(state: State) -> State:
    """The answer of the graph `rag`; if that knows none, the person may."""
    done = await answer_one.ainvoke({"question": state["question"]})
    return {"answer": done["answer"], "sources": done["sources"], "rejected": [], "outcome": "drafted", "file": ""}


async def decide(state: State) -> State:
    """Waits for a person."""
    places = "; ".join(f"[{one['n']}] {one['source']}: {one['heading']}" for one in state["sources"])
    question = f"File this answer to “{state['question']}”?" + (f" It is from {places}" if places else " It has no source.")
    decision = approve(question, state["answer"])
    if decision.kind == "reject":
        gone = Rejected(answer=state["answer"], reason=decision.reason)
        return {"rejected": [*state["rejected"], gone], "answer": NOT_FILED, "sources": [], "outcome": "rejected"}
    cited = [source for source in state["sources"] if f"[{source['n']}]" in decision.content]
    return {"answer": decision.content, "sources": cited, "outcome": "edited" if decision.kind == "edit" else "approved"}


def decided(state: State) -> str:
    if state["outcome"] != "rejected":
        return "file"
    return "revise" if len(state["rejected"]) <= REVISIONS else END


async def revise(state: State, runtime: Runtime[Context]) -> State:
    """Another draft from the sentence that has most to do with the question and the reason, and was not offered yet; that
    sentence itself, where the model's words are not carried by it."""
    question, rejected = state["question"], state["rejected"]
    wanted = f"{question} {rejected[-1]['reason']}".strip()
    found = await retrieve({"query": wanted}, runtime)
    fresh: list[Evidence] = [{**one, "n": 1} for one in found["evidence"] if not offered(one["text"], rejected)]
    if found["verdict"] == "unknown" or not fresh:
        return {"outcome": "rejected"}
    best, last = fresh[0]["text"], rejected[-1]
    made = await runtime.context.ask("review_revise", max_tokens=64, stop=["\n"], text=best, question=question, **last)
    for text in (" ".join(split_sentences(made.text)[:1]), best):
        checked = await critic({"evidence": fresh[:1], "draft": text, "query": question, "returns": RETURNS}, runtime)
        if checked["verdict"] == "supported" and not offered(text, rejected):
            return {"answer": checked["answer"], "sources": checked["sources"], "outcome": "drafted"}
    return {"outcome": "rejected"}


def offered(text: str, rejected: list[Rejected]) -> bool:
    """Whether a rejected draft says all that the text says."""
    return any(coverage(text, one["answer"]) == 1 for one in rejected)


def revised(state: State) -> str:
    return "decide" if state["outcome"] == "drafted" else END


async def file(state: State, runtime: Runtime[Context]) -> State:
    """Writes the document, whole or not at all."""
    run = content_hash(str(get_config()["metadata"]["run_id"])).removeprefix("b2:")[:8]
    name = "-".join(re.findall(r"[a-z0-9]+", state["question"].lower()))[:60].strip("-")
    path = runtime.context.files / FOLDER / f"{name or 'answer'}-{run}.md"
    await asyncio.to_thread(put, path, document(state))
    return {"file": f"{FOLDER}/{path.name}"}


def document(state: State) -> str:
    """Markdown: the question, the answer, its sources, and how it was decided."""
    lines = [f"# {' '.join(state['question'].split())}", "", state["answer"], ""]
    if state["sources"]:
        places = [f"{source['n']}. {source['source']}: {source['heading']}" for source in state["sources"]]
        lines += ["## Sources", "", *places, ""]
    lines += ["## Decision", "", HOW[state["outcome"]], ""]
    for one in state["rejected"]:
        lines += [f"Rejected before: {one['answer']}", *([f"Reason: {one['reason']}"] if one["reason"] else []), ""]
    return "\n".join(lines)


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.half")
    half.write_text(text, encoding="utf-8")
    half.replace(path)


graph = StateGraph(State, context_schema=Context)
graph.add_node("draft", draft)
graph.add_node("decide", decide)
graph.add_node("revise", revise)
graph.add_node("file", file)
graph.add_edge(START, "draft")
graph.add_edge("draft", "decide")
graph.add_conditional_edges("decide", decided, ["file", "revise", END])
graph.add_conditional_edges("revise", revised, ["decide", END])
graph.add_edge("file", END)
