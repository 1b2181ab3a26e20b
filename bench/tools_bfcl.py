"""Does a small model write arguments that can be used? Calls of the Berkeley Function-Calling Leaderboard, constrained and not.

For each case of `simple_python` the default model writes the arguments of the one function, greedily, after the prompt
`assistant_arguments` of the graphs: once held to the function's schema (`Toolbox.write`, as graphs do), and once, the peer,
freely after the same prompt, where the first JSON object in what it wrote counts. Accuracy is judged by the leaderboard's
rules, written anew here: every argument must be one of the accepted values (texts without case, spaces and punctuation),
and one may be left out where '' is accepted. For `multiple`, the choice of the function: by likelihood (`choice.choose`),
and, the peer, by the model naming one of them, held to the names.
Not measured: other languages, several calls at once, and calls that should not be made.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from langchain_core.tools import StructuredTool

from agentops.choice import choose
from agentops.engine import Engine, generate
from agentops.errors import ToolError
from agentops.prompts import PromptLibrary
from agentops.records import Constraint, Generation, Message, Request
from agentops.retrieval import Embedder
from agentops.schema import violation
from agentops.settings import Settings, load_settings
from agentops.tools import Toolbox

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = PromptLibrary(ROOT / "graphs" / "prompts")
QUICK = 30
TOKENS = 256
TOGETHER = 16
"""Cases under way at once; the engine decodes them in one batch."""
_TYPES = {"dict": "object", "float": "number", "tuple": "array"}


@dataclass(frozen=True)
class Function:
    name: str
    description: str
    schema: dict[str, Any]

    def box(self) -> Toolbox:
        return Toolbox([StructuredTool(name=self.name, description=self.description, args_schema=self.schema, func=print)])


@dataclass(frozen=True)
class Case:
    id: str
    request: str
    functions: tuple[Function, ...]
    name: str
    accepted: dict[str, list[Any]]
    """For each argument of the function to call the values that are right; '' where it may be left out."""

    @property
    def function(self) -> Function:
        return next(function for function in self.functions if function.name == self.name)


@dataclass(frozen=True)
class Outcome:
    case: Case
    text: str
    parses: bool
    fits: bool
    right: bool
    seconds: float


def data() -> Path:
    """
    Raises:
        SystemExit: the data set is not here.
    """
    folder = Path(os.environ.get("AGENTOPS_SHARED_DATA") or ROOT.parent / "shared" / "data") / "bfcl"
    if not folder.is_dir():
        sys.exit("no Berkeley Function-Calling data here: name the folder that has bfcl/ in AGENTOPS_SHARED_DATA")
    return folder


def load(folder: Path, kind: str) -> list[Case]:
    """The cases of `simple_python` or `multiple`, in order."""
    answers = {row["id"]: row["ground_truth"] for row in _rows(folder / "possible_answer" / f"BFCL_v4_{kind}.json")}
    cases = []
    for row in _rows(folder / f"BFCL_v4_{kind}.json"):
        ((name, accepted),) = answers[row["id"]][0].items()
        functions = tuple(Function(one["name"], one["description"], json_schema(one["parameters"])) for one in row["function"])
        request = "\n".join(message["content"] for message in row["question"][0])
        cases.append(Case(row["id"], request, functions, name, accepted))
    return cases


def some(cases: Sequence[Case], count: int) -> list[Case]:
    """So many of them, evenly spread."""
    return [cases[number * len(cases) // count] for number in range(min(count, len(cases)))]


def json_schema(node: Any) -> Any:
    """The leaderboard's schema in JSON schema's own words: dict is object, float is number, tuple is array, any is anything."""
    if isinstance(node, list):
        return [json_schema(one) for one in node]
    if not isinstance(node, dict):
        return node
    made = {key: json_schema(value) for key, value in node.items()}
    kind = made.get("type")
    if isinstance(kind, str):
        made["type"] = _TYPES.get(kind, kind)
        if kind == "any":
            del made["type"]
    return made


def right(case: Case, arguments: Any) -> bool:
    """Whether a call is one of those that the leaderboard accepts."""
    if not isinstance(arguments, dict) or set(arguments) - set(case.accepted):
        return False
    return all(
        any(_same(arguments[name], value) for value in values if value != "" or arguments[name] == "")
        if name in arguments
        else "" in values
        for name, values in case.accepted.items()
    )


def _same(made: Any, accepted: Any) -> bool:
    if isinstance(made, bool) or isinstance(accepted, bool):
        return made is accepted
    if isinstance(made, str) and isinstance(accepted, str):
        return _letters(made) == _letters(accepted)
    if isinstance(made, list) and isinstance(accepted, list):
        return len(made) == len(accepted) and all(map(_same, made, accepted))
    if isinstance(made, dict) and isinstance(accepted, dict):
        # In an object each key again has a list of what is accepted.
        lists = {key: value if isinstance(value, list) else [value] for key, value in accepted.items()}
        if set(made) - set(lists):
            return False
        return all(any(_same(made[key], one) for one in some) if key in made else "" in some for key, some in lists.items())
    return type(made) in (int, float) and type(accepted) in (int, float) and made == accepted


def _letters(text: str) -> str:
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


# Arguments


async def constrained(engine: Engine, case: Case) -> Outcome:
    function, box = case.function, case.function.box()
    texts: list[str] = []

    async def ask(form: dict[str, Any]) -> Generation:
        made = await _ask(engine, case, Constraint("json_schema", form))
        texts.append(made.text)
        return made

    begun = time.monotonic()
    try:
        arguments = await box.write(function.name, ask, max_tokens=TOKENS)
    except ToolError as error:
        return Outcome(case, f"{error} {texts}", parses=False, fits=False, right=False, seconds=time.monotonic() - begun)
    fits = violation(box.schema(function.name), arguments) == ""
    text = texts[-1] if texts else "{}"
    return Outcome(case, text, True, fits, right(case, arguments), time.monotonic() - begun)


async def unconstrained(engine: Engine, case: Case) -> Outcome:
    begun = time.monotonic()
    made = await _ask(engine, case, None)
    seconds = time.monotonic() - begun
    arguments = first_object(made.text)
    if arguments is None:
        return Outcome(case, made.text, parses=False, fits=False, right=False, seconds=seconds)
    fits = violation(case.function.box().schema(case.name), arguments) == ""
    return Outcome(case, made.text, True, fits, fits and right(case, arguments), seconds)


def first_object(text: str) -> dict[str, Any] | None:
    """The first JSON object in a text, wherever it stands."""
    decoder = json.JSONDecoder()
    for start in (match.start() for match in re.finditer(r"\{", text)):
        try:
            found, _ = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        return found if isinstance(found, dict) else None
    return None


async def _ask(engine: Engine, case: Case, constraint: Constraint | None) -> Generation:
    function = case.function
    messages = PROMPTS.get("assistant_arguments").render(
        tool=function.name,
        description=function.description,
        parameters=function.box().parameters(function.name),
        request=case.request,
    )
    return await generate(engine, Request(messages=messages, max_tokens=TOKENS, constraint=constraint))


# The choice of a function


async def by_likelihood(engine: Engine, embedder: Embedder, case: Case) -> bool:
    options = {function.name: function.description for function in case.functions}
    prompt = PROMPTS.get("assistant_choose")
    best = await choose(engine, embedder, case.request, options, lambda text: prompt.render(text=text))
    return best[0].name == case.name


async def by_name(engine: Engine, case: Case) -> bool:
    listed = "\n".join(f"- {function.name}: {function.description}" for function in case.functions)
    text = f"Functions:\n{listed}\n\nRequest: {case.request}\n\nAnswer with the name of the function that serves the request."
    names = [function.name for function in case.functions]
    request = Request(messages=(Message("user", text),), max_tokens=64, constraint=Constraint("choice", names))
    return (await generate(engine, request)).text == case.name


async def all_of(cases: Sequence[Case], what: Callable[[Case], Awaitable[T]], name: str) -> list[T]:
    gate, done = asyncio.Semaphore(TOGETHER), 0

    async def one(case: Case) -> T:
        nonlocal done
        async with gate:
            made = await what(case)
        done += 1
        print(f"\r{name}: {done} of {len(cases)}", end="", file=sys.stderr, flush=True)
        return made

    made = await asyncio.gather(*map(one, cases))
    print(file=sys.stderr)
    return made


def share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else 0.0


async def measure(settings: Settings, *, quick: bool, show: bool) -> list[dict[str, Any]]:
    from agentops.parts import open_embedder, open_engine

    folder = data()
    cases, several = load(folder, "simple_python"), load(folder, "multiple")
    if quick:
        cases, several = some(cases, QUICK), some(several, QUICK)
    engine = open_engine(settings)
    try:
        ours = await all_of(cases, lambda case: constrained(engine, case), "constrained")
        theirs = await all_of(cases, lambda case: unconstrained(engine, case), "unconstrained")
        embedder = open_embedder(settings)
        likely = await all_of(several, lambda case: by_likelihood(engine, embedder, case), "choice by likelihood")
        named = await all_of(several, lambda case: by_name(engine, case), "choice by name")
    finally:
        await engine.close()
    if show:
        for one, other in zip(ours, theirs, strict=True):
            mark = f"{'ok' if one.right else '--'} {'ok' if other.right else '--'}"
            print(f"{mark} {one.case.id}: {one.case.request}\n     {one.text}\n     {other.text!r}\n     {one.case.accepted}")
    free = "unconstrained, same prompt"
    rows = [
        _row("parse", share([one.parses for one in ours]), free, share([one.parses for one in theirs])),
        _row("validate", share([one.fits for one in ours]), free, share([one.fits for one in theirs])),
        _row("accuracy", share([one.right for one in ours]), free, share([one.right for one in theirs])),
        _row("choice_of_function", share(likely), "naming one of the names", share(named)),
    ]
    chance = share_by_chance(several)
    rows.append({**_row("choice_of_function_by_chance", chance, "none", None), "why": "what guessing gives"})
    per_call = [sum(one.seconds for one in some) / len(some) / TOGETHER for some in (ours, theirs)]
    seconds = {
        "metric": "seconds_a_call",
        "ours": round(per_call[0], 3),
        "peer": free,
        "theirs": round(per_call[1], 3),
        "unit": "s",
    }
    rows.append({**seconds, "ratio": round(per_call[1] / per_call[0], 2)})
    return [{**row, "cases": len(several if "choice" in row["metric"] else cases)} for row in rows]


def share_by_chance(cases: Sequence[Case]) -> float:
    return sum(1 / len(case.functions) for case in cases) / len(cases)


def _row(metric: str, ours: float, peer: str, theirs: float | None) -> dict[str, Any]:
    ratio = round(ours / theirs, 2) if theirs else None
    told = round(theirs, 3) if theirs is not None else None
    row = {"metric": metric, "ours": round(ours, 3), "peer": peer, "theirs": told, "ratio": ratio, "unit": "share of cases"}
    return row if ratio is not None or theirs is None else {**row, "why": "the peer had none"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} cases of each kind instead of all")
    parser.add_argument("--show", action="store_true", help="print every case with what was written")
    given = parser.parse_args()
    settings = load_settings()
    rows = asyncio.run(measure(settings, quick=given.quick, show=given.show))
    print(f"{'':30} {'cases':>6} {'ours':>7} {'peer':>7}   peer")
    for row in rows:
        theirs = f"{row['theirs']:7.3f}" if row["theirs"] is not None else f"{'-':>7}"
        print(f"{row['metric']:30} {row['cases']:6} {row['ours']:7.3f} {theirs}   {row['peer']}")
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps({"bench": "tools_bfcl", "machine": machine, "model": settings.model.name, "rows": rows}))


if __name__ == "__main__":
    main()
