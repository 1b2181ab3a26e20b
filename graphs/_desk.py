"""The tools of the graph `assistant`: a calculator, a clock, a search and a file of notes.

Each is a plain function; its docstring is what the model chooses by, its example requests most of all. They know nothing
of the graph that calls them.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import fcntl
import math
import operator
import os
import re
import zoneinfo
from collections.abc import Callable
from datetime import UTC, datetime
from fractions import Fraction
from itertools import permutations
from pathlib import Path
from typing import Annotated

from langchain_core.tools import InjectedToolCallId
from langgraph.runtime import get_runtime

from agentops import Context
from agentops.tools import tool
from graphs.rag import retrieve

NOTES = "notes.md"
CHARACTERS = 200
"""Length of an expression at most; it bounds how deep it nests, too."""
BITS = 4_096
"""Size of a number at most: of what is being computed, not only of the result."""
SENTENCES = 3
"""How many sentences a search gives."""

NUMBER = r"\d+(?:\.\d+)?"
_WRITTEN = re.compile(r"(\d+(?:,\d{3})+|\d+)(\.\d+)?(?:\s?(%|per ?cent\b))?")
_FORMULA = re.compile(rf"\(*-?{NUMBER}%?\)*(?:\s*(?:\*\*|[-+*/^×÷])\s*\(*-?{NUMBER}%?\)*)+")
_PERCENT = re.compile(rf"({NUMBER})\s*%(?!\s*[\d(])")
_SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-", "^": "**"})

_Binary = Callable[[Fraction, Fraction], Fraction]
_OPERATORS: dict[type[ast.operator], _Binary] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda one, other: Fraction(one // other),
    ast.Mod: operator.mod,
}


@tool(effect="none")
def calculator(expression: str) -> str:
    """Computes an arithmetic expression: plus, minus, times, divided by, powers, percentages.

    Examples:
        What is 12 times 7?
        How much is 3.5 + 4?
        Add up 20, 35 and 8.
        What is 15% of 80?
        There are 6 rows of 11 chairs. How many chairs are there?

    Args:
        expression: numbers with + - * / ** ( ) between them; 15% is 15 of a hundred
    """
    return f"{expression} = {shown(value(expression))}"


@tool(effect="read")
def clock(zone: str | None = None) -> str:
    """Tells the current date, weekday and time, here or in another city.

    Examples:
        What is the time now?
        What day is today?
        How late is it in London?
        Which date is it?

    Args:
        zone: a city, or a time zone such as Europe/Paris; nothing for here
    """
    now = datetime.fromtimestamp(get_runtime(Context).context.clock.now_ns() / 1e9, UTC)
    if not zone or not zone.strip():
        return f"It is {now.astimezone():%A, %-d %B %Y, %H:%M}."
    named = find_zone(zone)
    return f"It is {now.astimezone(zoneinfo.ZoneInfo(named)):%A, %-d %B %Y, %H:%M} in {named}."


@tool(effect="read")
async def search(query: str) -> str:
    """Finds what the documents of the collection say about something.

    Examples:
        What do the documents say about shipping?
        Find the section on refunds.
        How does the heating work?
        Which rules are there for guests?
        What is a warrant?
        Where are the spare parts stored?

    Args:
        query: what to find, best as a question
    """
    found = await retrieve({"query": query}, get_runtime(Context))
    if found["verdict"] == "unknown":
        raise LookupError(f"the documents say nothing about “{query}”")
    return "\n".join(f"{one['text']} ({one['source']})" for one in found["evidence"][:SENTENCES])


@tool(effect="write")
async def append_note(text: str, call_id: Annotated[str, InjectedToolCallId]) -> str:
    """Writes a line into the notes, to be remembered for later.

    Examples:
        Write down that the plumber comes on Monday.
        Note: buy coffee.
        Remember that my seat is 14C.
        Add 'call Tom' to my notes.

    Args:
        text: what to remember
    """
    line = " ".join(text.replace("<!--", "").replace("-->", "").split())
    if not line:
        raise ValueError("there is nothing to note")
    await asyncio.to_thread(note, get_runtime(Context).context.files / NOTES, line, call_id)
    return f"Noted: {line}"


TOOLS = {one.name: one for one in (calculator, clock, search, append_note)}


def value(expression: str) -> Fraction:
    """What an arithmetic expression comes to, exactly; `15%` is 15 of a hundred.

    Raises:
        ValueError: it is none, or a number in it becomes too big.
        ZeroDivisionError
    """
    if len(expression) > CHARACTERS:
        raise ValueError(f"the expression has more than {CHARACTERS} characters")
    text = _PERCENT.sub(r"(\1/100)", expression.translate(_SIGNS)).strip()
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError as error:
        raise ValueError(f"'{expression}' is no arithmetic expression") from error
    return _value(tree.body, text)


def _value(node: ast.expr, text: str) -> Fraction:
    found: Fraction
    match node:
        case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
            written = ast.get_source_segment(text, node) or ""
            if re.search(r"[eE][-+]?\d{4}", written):
                raise ValueError("the numbers become too big")
            # As it is written: 0.1 is a tenth.
            found = Fraction(written.replace("_", ""))
        case ast.UnaryOp(op=ast.UAdd() | ast.USub()):
            inner = _value(node.operand, text)
            found = -inner if isinstance(node.op, ast.USub) else inner
        case ast.BinOp(op=ast.Pow()):
            found = _power(_value(node.left, text), _value(node.right, text))
        case ast.BinOp() if type(node.op) in _OPERATORS:
            found = _OPERATORS[type(node.op)](_value(node.left, text), _value(node.right, text))
        case _:
            raise ValueError(f"'{ast.unparse(node)[:40]}' is no arithmetic")
    if max(found.numerator.bit_length(), found.denominator.bit_length()) > BITS:
        raise ValueError("the numbers become too big")
    return found


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        root = float(base) ** float(exponent)
        if isinstance(root, complex) or not math.isfinite(root):
            raise ValueError("this power is no number")
        return Fraction(root)
    if max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent.numerator) > BITS:
        raise ValueError("the numbers become too big")
    return Fraction(base**exponent.numerator)


def shown(number: Fraction) -> str:
    """A number as people write it: all digits where they end soon, else twelve of them."""
    if number.denominator == 1:
        return str(number.numerator)
    try:
        return f"{float(number):.12g}"
    except OverflowError:
        return f"{number.numerator // number.denominator}"


def formulas(request: str) -> str:
    """Pattern of the expressions that a request can mean: the formula that stands in it, else its numbers, each once, in any
    order (four at most; more stay in their order); empty where it has none."""
    if written := [found.strip() for found in _FORMULA.findall(request)]:
        return f"^{_literally(max(written, key=len))}$"
    numbers = [
        whole.replace(",", "") + part + ("%" if share else "")
        for whole, part, share in _WRITTEN.findall(request.translate(_SIGNS))
    ]
    if not numbers:
        return ""
    if len(numbers) == 1:
        return rf"^{_literally(numbers[0])} ([*/]|\*\*) [2-9]$"
    orders = permutations(numbers) if len(numbers) <= 4 else [tuple(numbers)]
    return "^(" + "|".join(r" ([-+*/]|\*\*) ".join(map(_literally, order)) for order in orders) + ")$"


def _literally(text: str) -> str:
    """As a pattern that grammars read like `re` does: only signs are escaped."""
    return re.sub(r"([.+*()^])", r"\\\1", text)


def find_zone(name: str) -> str:
    """The time zone of that name, or of the city of that name.

    Raises:
        LookupError
    """
    wanted = "_".join(name.split()).casefold()
    known = sorted(zoneinfo.available_timezones(), key=lambda zone: (zone.count("/"), zone))
    for zone in known:
        if wanted in (zone.casefold(), zone.rpartition("/")[2].casefold()):
            return zone
    raise LookupError(f"no time zone is called '{name}'; name a big city, or a zone such as Europe/Paris")


def places(request: str) -> list[str]:
    """What a request names as a place, of the places that have a time zone."""
    found = []
    for spoken in re.finditer(r"\b(?:in|at|for)\s+(?:the\s+)?(?=([\w/'-]+(?:\s+[\w/'-]+){0,2}))", request):
        words = spoken[1].split()
        for name in (" ".join(words[:count]) for count in range(len(words), 0, -1)):
            with contextlib.suppress(LookupError):
                find_zone(name)
                found.append(name)
                break
    return found


def note(path: Path, line: str, call_id: str) -> None:
    """Adds a line to the notes, once: the call's id stands behind it, and a call that is made again finds it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before, mark = file.read(), f"<!-- {call_id} -->"
        if mark in before:
            return
        file.write(f"{'' if not before or before.endswith(chr(10)) else chr(10)}- {line} {mark}\n")
        file.flush()
        os.fsync(file.fileno())
