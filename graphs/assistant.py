"""Does what is asked with tools: works out, tells the time, looks up in a collection, keeps notes.

    read -> choose -+-> fill -> act -+-> answer -+-> end
              ^  ^  |                |     ^  |
              |  |  +-- no tool -----|-----+  |
              |  +------ failed -----+        |
              +---------- next request -------+

Which tool serves a request is measured, not asked: how likely and how near the request is, given what the tool says of
itself and its example requests. Only the user's words take part in that, never what a tool has found. The arguments are
written by the model, held to the tool's schema, and believed only where they say what the request says. What is written
outside waits for a person. A tool that failed or was refused is not called again for the same request: the next best tool
that fits gets it, or the request ends there.
"""

from __future__ import annotations

import operator
import re
from dataclasses import replace
from typing import Annotated, Any, TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime

from agentops import Context
from agentops.choice import described
from agentops.errors import ToolError
from agentops.grounding import coverage, numbers_missing, terms
from agentops.records import ToolCall, ToolResult
from agentops.text import split_sentences
from agentops.tools import Toolbox
from graphs._desk import TOOLS, append_note, calculator, clock, formulas, places, search
from graphs.rag import SUPPORTED, Turn, leaves_out

CALLS = 6
"""How many calls a question may cost."""
AGAIN = 1.1
"""Least score of a tool that takes over where another failed; of 53 requests, three had a tool with more that was not meant."""
TALK = "talk"
CANNOT = "cannot"
OTHERWISE = {
    TALK: """Greets, thanks, jokes and chats.

    Examples:
        Hello!
        Thanks a lot.
        Goodbye!
        Tell me a story about a dog.
        What is your name?
    """,
    CANNOT: """Something that has to be done out in the world.

    Examples:
        Book a flight to Rome.
        Turn off the radio.
        Send a message to Tom.
        Order a coffee.
    """,
}
"""What a request may be for beside the tools."""

STEPS = re.compile(
    r"(?<=[.!?])\s+(?:and\s+)?(?:then|afterwards|after that)\b,?\s*"
    r"|[,;]?\s+and then\s+|[,;]\s+then\s+"
    r"|(?<=\?)\s+(?=(?:please\s+)?(?:write|note|add|save|remember|jot|put|record)\b)"
    r"|,?\s+and\s+(?=(?:write|note|save|jot|record)\b)",
    re.I,
)
"""What stands between two requests that are made in one; anything else is one request, however many sentences it has."""
FOLLOWS = re.compile(r"^(and|or|but|what about|how about)\b", re.I)
REFERS = re.compile(
    r"\b(?:it|this|them|those|these|(?:the )?(?:results?|answer))\b|\bthat\b(?=\W*$|\s+(?:down|to|into|in)\b)", re.I
)
FREE = {search.name: "query", append_note.name: "text"}
"""Arguments that are a piece of the request in words."""
PLACE = r"\b(?:in|at|for|to)\s+(?:the\s+)?{}\b"
"""How a place is named."""
SOMEWHERE = re.compile(r"\b(?:in|at)\s+([A-Z][\w'-]*)")
"""A name that may be a place's; the clock says when it knows none of that name, rather than tell the time of another."""


class State(TypedDict, total=False):
    question: str
    history: Annotated[list[Turn], operator.add]
    todo: list[str]
    said: list[str]
    results: list[ToolResult]
    tried: list[ToolResult]
    chosen: str
    call: ToolCall | None
    answer: str


def toolbox(context: Context) -> Toolbox:
    """The tools of this file, and those of the servers that the settings name; of two of one name, ours."""
    own = Toolbox(TOOLS.values())
    return own.joined(one for one in context.tools if one.name not in own)


async def read(state: State) -> State:
    """The requests that the question makes, one after the other."""
    todo = [part.strip() for part in STEPS.split(state["question"]) if part.strip()]
    return {"todo": todo or [state["question"]], "said": [], "results": [], "tried": [], "chosen": "", "call": None, "answer": ""}


async def choose(state: State, runtime: Runtime[Context]) -> State:
    """The tool that fits the request best; after one has failed another one, if it fits by itself."""
    request, tried = state["todo"][0], {result.call.name for result in state["tried"]}
    if FOLLOWS.match(request) and (history := state.get("history")):
        request = f"{history[-1]['question']} {request}"
    tools = toolbox(runtime.context).descriptions()
    options = {name: text for name, text in tools.items() if name not in tried} | ({} if tried else OTHERWISE)
    if not request.strip() or not options or len(state["results"]) >= CALLS:
        return {"chosen": ""}
    best = (await runtime.context.choose("assistant_choose", request, options))[0]
    return {"chosen": best.name if not tried or best.score >= AGAIN else "", "call": None}


def chosen(state: State) -> str:
    return "answer" if state["chosen"] in ("", *OTHERWISE) else "fill"


async def fill(state: State, runtime: Runtime[Context]) -> State:
    """The call of the chosen tool. A tool of this file has a prompt with examples of its own."""
    name, request, box = state["chosen"], in_full(state), toolbox(runtime.context)
    try:
        if name in TOOLS:
            call = await runtime.context.propose(f"assistant_{name}", narrowed(box, name, request), name, request=request)
            call = replace(call, arguments=faithful(name, call.arguments, request))
        else:
            call = await runtime.context.propose(
                "assistant_arguments",
                box,
                name,
                tool=name,
                description=described(box.descriptions()[name])[0],
                parameters=box.parameters(name),
                request=request,
            )
    except ToolError as error:
        return _came_of(state, ToolResult(ToolCall(name, {}, ""), "failed", str(error)))
    return {"call": call}


def filled(state: State) -> str:
    return "act" if state["call"] else "choose"


async def act(state: State, runtime: Runtime[Context]) -> State:
    """Runs the call under its policy. Here the run waits for a person, and nothing comes before that in this node."""
    call = state["call"]
    assert call is not None  # `filled` saw to it
    return _came_of(state, await runtime.context.perform(toolbox(runtime.context), call))


def acted(state: State) -> str:
    return "answer" if state["tried"][-1].status == "ok" else "choose"


def _came_of(state: State, result: ToolResult) -> State:
    return {"results": [*state["results"], result], "tried": [*state["tried"], result], "call": None}


async def answer(state: State, runtime: Runtime[Context]) -> State:
    """Says what came of the request; the last one ends the turn."""
    request, *todo = state["todo"]
    said = [*state["said"], await _worded(state, request, runtime.context)]
    done: State = {"todo": todo, "said": said, "tried": []}
    if not todo:
        done["answer"] = " ".join(said)
        done["history"] = [{"question": state["question"], "answer": done["answer"]}]
    return done


def answered(state: State) -> str:
    return "choose" if state["todo"] else END


async def _worded(state: State, request: str, context: Context) -> str:
    tried = state["tried"]
    if tried and tried[-1].status == "ok":
        unwanted = [_told(result) for result in tried if result.status in ("refused", "denied")]
        return " ".join([*unwanted, await sentence(tried[-1].content, request, context)])
    if tried:
        return " ".join(_told(result) for result in tried)
    if state["chosen"] == TALK:
        made = await context.ask("assistant_talk", max_tokens=48, stop=["\n"], request=request)
        if words := split_sentences(made.text)[:2]:
            return " ".join(words)
    if len(state["results"]) >= CALLS:
        return f"I stopped after {CALLS} calls: {request}"
    tools = toolbox(context).descriptions().items()
    can = "; ".join(f"{name} ({described(text)[0].rstrip('.')})" for name, text in tools)
    return f"I cannot do that. My tools are: {can}."


def _told(result: ToolResult) -> str:
    """What went wrong, without the name of the error's class."""
    what = re.sub(r"^\w+ failed: \w+: ", "", result.content).rstrip(".")
    return f"{what[:1].upper()}{what[1:]}."


async def sentence(content: str, request: str, context: Context) -> str:
    """A result in one sentence: as it is where it is one, else the model's if it is carried by the result, else the first."""
    lines = split_sentences(content)
    if len(lines) <= 1 and not content.lstrip().startswith(("{", "[")):
        return content
    made = await context.ask("assistant_answer", max_tokens=64, stop=["\n"], text=content[:2000], request=request)
    drafted = " ".join(split_sentences(made.text)[:1])
    carried = coverage(drafted, content) >= SUPPORTED and not numbers_missing(drafted, content)
    if drafted and carried and not leaves_out(drafted, lines[0], request):
        return drafted
    return lines[0]


def in_full(state: State) -> str:
    """The request, and in brackets what it refers back to. A note that has words of its own refers to nothing, and the time
    is nobody's result."""
    request, tool, history = state["todo"][0], state["chosen"], state.get("history") or []
    before = [*(turn["answer"] for turn in history[-1:]), *state["said"]]
    if not before or tool == clock.name or not REFERS.search(request):
        return request
    if tool == append_note.name and set(terms(REFERS.sub("", request))) - set(terms(described(append_note.description)[0])):
        return request
    return f"{request} ({before[-1].rpartition(' = ')[2] if tool == calculator.name else before[-1]})"


def narrowed(box: Toolbox, name: str, request: str) -> Toolbox:
    """The tools as the model is held to them for one request: a formula has its numbers, each once, and the time is that of a
    place it names."""
    if name == calculator.name and (pattern := formulas(request)):
        held: dict[str, Any] = {"expression": {"type": "string", "pattern": pattern}}
    elif name == clock.name and (named := places(request)):
        held = {"zone": {"enum": named}}
    else:
        return box
    schema = {**box.schema(name), "properties": held, "required": list(held)}
    return Toolbox([TOOLS[name].model_copy(update={"args_schema": schema})])


def faithful(name: str, arguments: dict[str, Any], request: str) -> dict[str, Any]:
    """The arguments without what the model invented: words that are not the request's, or a note that leaves some out, give
    way to the request itself; a place that the request does not name as one is left out. A request that does not speak of
    searching is its own best query."""
    if name == clock.name:
        place = str(arguments.get("zone") or "").rpartition("/")[2].replace("_", " ")
        if place and re.search(PLACE.format(re.escape(place)), request, re.I):
            return arguments
        elsewhere = SOMEWHERE.search(request)
        return {"zone": elsewhere[1]} if elsewhere else {}
    if name not in FREE:
        return arguments
    text, own = str(arguments[FREE[name]]), set(terms(described(TOOLS[name].description)[0]))
    true = coverage(text, request) == 1 and not numbers_missing(text, request) and set(terms(text)) - own
    full = coverage(request, text, lambda term: term not in own) >= SUPPORTED and not numbers_missing(request, text)
    if name == search.name:
        full = bool(own & set(terms(request)))
    return {FREE[name]: text if true and full else request}


graph = StateGraph(State, context_schema=Context)
for node in (read, choose, fill, act, answer):
    graph.add_node(node.__name__, node)
graph.add_edge(START, "read")
graph.add_edge("read", "choose")
graph.add_conditional_edges("choose", chosen, ["fill", "answer"])
graph.add_conditional_edges("fill", filled, ["act", "choose"])
graph.add_conditional_edges("act", acted, ["answer", "choose"])
graph.add_conditional_edges("answer", answered, ["choose", END])
