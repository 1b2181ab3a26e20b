"""Answers a question that asks several things: each is looked up by itself, at the same time, and an editor puts the answers
together.

           +-> work -+
    plan --+-> work -+--> edit
           +-> work -+

The planner splits the question. The model may word the parts, and is believed only where they ask with the question's own
words and leave none of it out; else the question is split at its conjunctions, and one that cannot be split stays whole. What
a part points back to is not asked of the model but measured: the reading that it finds likeliest.
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
from graphs.rag import ASKING, POINTING, Source
from graphs.rag import graph as rag

PARTS = 4
"""How many parts a question is split into at most."""
WORDS = 30
"""How much of a part the next one may point back to."""

JOINED = re.compile(r"\b(?:and|or|but)\b|[;,]|\?\s", re.I)
"""Without one of these a question asks one thing."""
BETWEEN = re.compile(rf"(?:\?\s+(?:and\s+)?|\s*;\s*|\s*,?\s+\b(?:and|but)\s+)(?=(?:\w+\s+)?{ASKING.pattern})", re.I)
"""What stands between two questions that are asked in one."""
LINE = r"([A-Z][a-z]{1,4} )?([Ww](hat|hich|ho|hose|hen|here|hy)|[Hh]ow|Is|Are|Was|Were|Do|Does|Did|Can) [^\n?]{3,160}\?"
LINES = rf"({LINE}\n){{1,{PARTS - 1}}}{LINE}"
"""The form of the model's plan: one question a line."""
OWN = re.compile(rf"\b(?:the|an?)\s+\w.*{POINTING.pattern}", re.I)
"""A question that says itself what it points at."""
CITED = re.compile(r"\s*\[(\d+)\]")
CLAUSES = re.compile(r"[;,:]|\b(?:and|but|while|whereas)\b", re.I)

answer_one = rag.compile()


class Part(TypedDict):
    number: int
    question: str


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
    for number in range(1, len(parts)):
        parts[number] = await stand_alone(parts[number], parts[number - 1], runtime.context)
    return {"plan": parts, "findings": Overwrite([])}


def split(question: str) -> list[str]:
    """The question cut at conjunctions that another question follows."""
    parts = [part.strip(" ?.,") for part in BETWEEN.split(question)[::2]]
    return [f"{part[0].upper()}{part[1:]}?" for part in parts if part]


def sound(parts: list[str], question: str) -> bool:
    """Whether the parts ask what the question asks: in its words and leaving none out, and none a piece of another."""
    words = [frozenset(terms(part)) for part in parts]
    distinct = not any(one <= other for one, other in itertools.permutations(words, 2))
    asked = all(ASKING.search(part) for part in parts)
    return 2 <= len(parts) <= PARTS and asked and distinct and frozenset().union(*words) == frozenset(terms(question))


async def stand_alone(part: str, before: str, context: Context) -> str:
    """The part with the likeliest of the things that the one before speaks of where it only points at one."""
    if not POINTING.search(part) or OWN.search(part):
        return part
    readings = [naming(part, thing) for thing in things(before)]
    if not readings:
        return part
    return (await context.score("research_point", readings, question=before, follow_up=part)).best.text


def things(question: str) -> list[str]:
    """What a question speaks of: up to four words of it that end with a content word."""
    words = [word.strip(",;:") for word in question.strip(" ?").split()][-WORDS:]
    spans = [words[start : start + count] for count in range(1, 5) for start in range(len(words) - count + 1)]
    begins = [span for span in spans if terms(span[-1]) and (terms(span[0]) or span[0].lower() in ("the", "a", "an"))]
    return list(dict.fromkeys(" ".join(span) for span in begins if not ASKING.search(" ".join(span))))


def naming(part: str, thing: str) -> str:
    """The part with the thing in place of what points."""
    owner = thing + ("'" if thing.endswith("s") else "'s")
    return POINTING.sub(lambda pointed: owner if pointed[0].lower() in ("its", "their", "his") else thing, part)


def fan_out(state: State) -> list[Send]:
    return [Send("work", Part(number=number, question=part)) for number, part in enumerate(state["plan"])]


async def work(state: Part) -> State:
    """One part, answered by the graph `rag`. Where the index cannot be reached the other workers' answers are kept."""
    finding = Finding(number=state["number"], question=state["question"], answer="", sources=[], failed="")
    try:
        done = await answer_one.ainvoke({"question": state["question"]})
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
