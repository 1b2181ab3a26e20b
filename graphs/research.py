"""Answers a question that asks several things: each is looked up by itself, at the same time, and an editor puts the answers
together.

           +-> work -+
    plan --+-> work -+--> edit
           +-> work -+

The planner splits the question. The model may word the parts, and is believed only where they ask with the question's own
words and leave none of it out; else the question is split at its conjunctions, and one that cannot be split stays whole.
Every worker is the graph `rag` with one part to answer. The editor numbers all sources anew, says nothing twice, and says
for each part what is not known.
"""

from __future__ import annotations

import itertools
import operator
import re
from typing import Annotated, TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime
from langgraph.types import Overwrite, Send

from agentops import Context
from agentops.errors import RetrieverUnavailable
from agentops.grounding import coverage, terms
from graphs.rag import ASKING, Source, stands_alone
from graphs.rag import State as Asked
from graphs.rag import graph as rag

PARTS = 4
"""How many parts a question is split into at most."""

JOINED = re.compile(r"\b(?:and|or|but)\b|[;,]|\?\s", re.I)
"""Without one of these a question asks one thing."""
BETWEEN = re.compile(rf"(?:\?\s+(?:and\s+)?|\s*;\s*|\s*,?\s+\b(?:and|but)\s+)(?=(?:\w+\s+)?{ASKING.pattern})", re.I)
"""What stands between two questions that are asked in one."""
LINE = r"([A-Z][a-z]{1,4} )?([Ww](hat|hich|ho|hose|hen|here|hy)|[Hh]ow|Is|Are|Was|Were|Do|Does|Did|Can) [^\n?]{3,160}\?"
LINES = rf"({LINE}\n){{1,{PARTS - 1}}}{LINE}"
"""The form of the model's plan: one question a line."""
CITED = re.compile(r"\s*\[(\d+)\]")
CLAUSES = re.compile(r"[;,:]|\b(?:and|but|while|whereas)\b", re.I)

answer_one = rag.compile()


class Part(TypedDict):
    """A part of the question; one that points back is understood after the one `before` it."""

    number: int
    question: str
    before: str


class Finding(TypedDict):
    """What a worker found. `failed` says why it could not look."""

    number: int
    question: str
    answer: str
    sources: list[Source]
    failed: str


class State(TypedDict, total=False):
    question: str
    plan: list[str]
    findings: Annotated[list[Finding], operator.add]
    answer: str
    sources: list[Source]


async def plan(state: State, runtime: Runtime[Context]) -> dict[str, object]:
    """The parts of the question. What the workers found for an earlier question of the thread is put away."""
    question = " ".join(state["question"].split())
    parts = [question]
    if JOINED.search(question):
        made = await runtime.context.ask("research_plan", max_tokens=120, pattern=LINES, question=question)
        parts = next((some for some in (made.text.splitlines(), split(question)) if sound(some, question)), parts)
    return {"plan": parts, "findings": Overwrite([])}


def split(question: str) -> list[str]:
    """The question cut at conjunctions that another question follows."""
    parts = [part.strip(" ?.,") for part in BETWEEN.split(question)[::2]]
    return [f"{part[0].upper()}{part[1:]}?" for part in parts if part]


def sound(parts: list[str], question: str) -> bool:
    """Whether the parts ask what the question asks: in its words and leaving none out, and none a piece of another. Only the
    first has to stand alone."""
    words = [frozenset(terms(part)) for part in parts]
    distinct = not any(one <= other for one, other in itertools.permutations(words, 2))
    asked = all(ASKING.search(part) for part in parts) and stands_alone(parts[0])
    return 2 <= len(parts) <= PARTS and asked and distinct and frozenset().union(*words) == frozenset(terms(question))


def fan_out(state: State) -> list[Send]:
    parts = state["plan"]
    return [Send("work", Part(number=n, question=part, before=parts[n - 1] if n else "")) for n, part in enumerate(parts)]


async def work(state: Part) -> State:
    """One part, answered by the graph `rag`. Where the index cannot be reached the other workers' answers are kept."""
    finding = Finding(number=state["number"], question=state["question"], answer="", sources=[], failed="")
    asked: Asked = {"question": state["question"]}
    if state["before"]:
        asked["history"] = [{"question": state["before"], "answer": ""}]
    try:
        done = await answer_one.ainvoke(asked)
    except RetrieverUnavailable as error:
        return {"findings": [{**finding, "failed": str(error)}]}
    return {"findings": [{**finding, "answer": done["answer"], "sources": done["sources"]}]}


async def edit(state: State, runtime: Runtime[Context]) -> State:
    """All answers in the order asked, with one list of sources. Answers become one sentence where that says all of them.

    Raises:
        RetrieverUnavailable: no worker could look.
    """
    findings = sorted(state["findings"], key=lambda finding: finding["number"])
    if all(finding["failed"] for finding in findings):
        raise RetrieverUnavailable(findings[0]["failed"], hint="see: agentops doctor")
    sources: dict[tuple[str, str], Source] = {}
    known: dict[tuple[str, ...], str] = {}
    unknown: list[str] = []
    for finding in findings:
        if finding["sources"]:
            answer = renumbered(finding["answer"], finding["sources"], sources)
            known.setdefault(tuple(terms(CITED.sub("", answer))), answer)
        else:
            unknown.append(finding["answer"] or f"“{finding['question']}” could not be looked up: {finding['failed']}")
    said = list(known.values())
    joined = await join(said, runtime.context) if len(said) > 1 else ""
    return {"answer": "\n".join(([joined] if joined else said) + unknown), "sources": list(sources.values())}


def renumbered(answer: str, own: list[Source], sources: dict[tuple[str, str], Source]) -> str:
    """The answer with the numbers that its own sources have in the list of all, to which new ones are added."""
    numbers: dict[str, int] = {}
    for source in own:
        place = (source["source"], source["heading"])
        numbers[str(source["n"])] = sources.setdefault(place, {**source, "n": len(sources) + 1})["n"]
    return CITED.sub(lambda cited: f" [{numbers[cited[1]]}]" if cited[1] in numbers else cited[0], answer)


async def join(answers: list[str], context: Context) -> str:
    """One sentence of the model's with the citations of all answers, or nothing. Each of its clauses may have the words of one
    answer only, since a clause that mixes two says what neither says, and each answer's words must all be there."""
    plain = [CITED.sub("", answer) for answer in answers]
    made = await context.ask("research_edit", max_tokens=120, stop=["\n"], answers="\n".join(plain))
    clauses = CLAUSES.split(made.text)
    whole = all(
        coverage(answer, " ".join(clause for clause in clauses if coverage(clause, answer) == 1)) == 1 for answer in plain
    )
    own = all(any(coverage(clause, answer) == 1 for answer in plain) for clause in clauses)
    if not (whole and own):
        return ""
    return f"{made.text.strip()} {' '.join(dict.fromkeys(f'[{n}]' for answer in answers for n in CITED.findall(answer)))}"


graph = StateGraph(State, context_schema=Context)
graph.add_node("plan", plan)
graph.add_node("work", work, input_schema=Part)
graph.add_node("edit", edit)
graph.add_edge(START, "plan")
graph.add_conditional_edges("plan", fan_out, ["work"])
graph.add_edge("work", "edit")
graph.add_edge("edit", END)
