"""Two runs, or a run and its replay, laid side by side: which spans belong together, and where they first differ.

Spans are paired along the tree: children of a pair that were given the same, in whatever order they began, then by kind and name,
in order. Times, ids and tokens never count as differences; what went in, what came out and how it ended do. Nothing is run here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from agentops.errors import RecordError
from agentops.store import SpanRow, Store

_COMPARED = ("status", "error", "prompt_version", "attempt")
_TIMED = ("BudgetSpent: ", "NodeTimeoutError: ")
"""Errors that say how long something took."""
_ATTRIBUTES = (
    "route",
    "finish_reason",
    "policy",
    "decision",
    "collection",
    "k",
    "mode",
    "temperature",
    "max_tokens",
    "seed",
    "top_p",
    "top_k",
    "stop",
    "code",
)


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that is not the same: in `node` (the nodes around it, outermost first), of the span `kind` `name`, its `field`,
    a path into JSON where it is part of a content. A side that has no such span is None."""

    node: str
    kind: str
    name: str
    field: str
    one: Any
    two: Any


@dataclass(frozen=True, slots=True)
class Pair:
    """Spans that belong together, or one that has no counterpart. `depth` is that in the tree; `differences` are of this pair
    alone, not of what is below."""

    depth: int
    one: SpanRow | None
    two: SpanRow | None
    differences: tuple[Difference, ...] = ()


class Side:
    """The spans of one run, or of some of its sittings (`roots`, workflow spans' ids), and what they hold. The ends of spans that
    are `cut` do not count, and what is missing under them is no difference."""

    def __init__(
        self,
        store: Store,
        run_id: str,
        roots: Sequence[str] | None = None,
        *,
        inside_tools: bool = True,
        cut: Callable[[SpanRow], bool] = lambda span: False,
    ) -> None:
        self._store = store
        self.cut = cut
        spans = [span for span in store.spans(run_id) if roots is None or span.root_id in roots]
        self._by_id = {span.id: span for span in spans}
        self._children: dict[str | None, list[SpanRow]] = {}
        for span in spans:
            above = span.parent_id if span.parent_id in self._by_id else None
            if inside_tools or above is None or self._by_id[above].kind != "tool":
                self._children.setdefault(above, []).append(span)

    def children(self, parent: SpanRow | None) -> list[SpanRow]:
        found = self._children.get(parent.id if parent else None, [])
        return sorted(found, key=lambda span: (span.step or 0, str(span.attributes.get("packet", "")), span.seq))

    def content(self, hash: str | None) -> Any:
        if hash is None:
            return None
        try:
            return self._store.payload(hash)
        except RecordError as error:
            return {"$missing": str(error)}

    def node(self, span: SpanRow) -> str:
        names: list[str] = []
        at: SpanRow | None = span
        while at is not None:
            if at.kind == "node":
                names.append(at.name)
            at = self._by_id.get(at.parent_id or "")
        return " / ".join(reversed(names))


def aligned(one: Side, two: Side) -> list[Pair]:
    """All spans of both, in the order of the trees."""
    return list(_aligned(one, two, None, None, 0))


def first_difference(one: Side, two: Side) -> Difference | None:
    """The first difference, and of those that follow from each other the cause: what a node was given comes before what happened
    in it, and that before what it gave."""
    return _first(one, two, None, None)


def _first(one: Side, two: Side, above: SpanRow | None, below: SpanRow | None) -> Difference | None:
    for left, right in _paired(one.children(above), two.children(below)):
        if left is None or right is None:
            span, side = (right, two) if left is None else (left, one)
            assert span is not None
            if (above and one.cut(above)) if left is None else (below and two.cut(below)):
                continue
            only = (None, span.name) if left is None else (span.name, None)
            return Difference(side.node(span), span.kind, span.name, "span", *only)
        own = list(_differences(one, two, left, right))
        if given := [each for each in own if each.field.startswith("input")]:
            return given[0]
        if (inner := _first(one, two, left, right)) is not None:
            return inner
        if own and not one.cut(left) and not two.cut(right):
            return own[0]
    return None


def _aligned(one: Side, two: Side, above: SpanRow | None, below: SpanRow | None, depth: int) -> Iterator[Pair]:
    for left, right in _paired(one.children(above), two.children(below)):
        if left is None or right is None:
            yield from _alone(one if right is None else two, left or right, depth, first=right is None)
            continue
        yield Pair(depth, left, right, tuple(_differences(one, two, left, right)))
        yield from _aligned(one, two, left, right, depth + 1)


def _alone(side: Side, span: SpanRow | None, depth: int, *, first: bool) -> Iterator[Pair]:
    assert span is not None
    yield Pair(depth, span if first else None, None if first else span)
    for child in side.children(span):
        yield from _alone(side, child, depth + 1, first=first)


def _paired(left: list[SpanRow], right: list[SpanRow]) -> Iterator[tuple[SpanRow | None, SpanRow | None]]:
    """Each with its counterpart, in the order of the left ones; what only the right has stands where it would have been."""
    # What ran side by side began in any order.
    same: dict[Any, deque[SpanRow]] = {}
    for span in right:
        same.setdefault(_given(span), deque()).append(span)
    partner = {span.id: queue.popleft() for span in left if (queue := same.get(_given(span)))}
    taken = {span.id for span in partner.values()}
    partner |= _by_name([span for span in left if span.id not in partner], [span for span in right if span.id not in taken])
    taken = {span.id for span in partner.values()}
    alone = deque((place, span) for place, span in enumerate(right) if span.id not in taken)
    place_of = {span.id: place for place, span in enumerate(right)}
    for span in left:
        found = partner.get(span.id)
        while found is not None and alone and alone[0][0] < place_of[found.id]:
            yield None, alone.popleft()[1]
        yield span, found
    yield from ((None, span) for _, span in alone)


def _given(span: SpanRow) -> tuple[Any, ...]:
    return _key(span), span.step, span.attempt, span.attributes.get("packet"), span.input_hash


def _by_name(left: list[SpanRow], right: list[SpanRow]) -> dict[str, SpanRow]:
    """Counterparts of those on the left by their ids, in the order of both."""
    matcher = SequenceMatcher(None, [_key(span) for span in left], [_key(span) for span in right], autojunk=False)
    return {
        left[block.a + place].id: right[block.b + place] for block in matcher.get_matching_blocks() for place in range(block.size)
    }


def _key(span: SpanRow) -> tuple[str, str]:
    # A resumed run's workflow span says so in its name.
    return span.kind, "" if span.kind == "workflow" else span.name


def _differences(one: Side, two: Side, left: SpanRow, right: SpanRow) -> Iterator[Difference]:
    def differ(field: str, a: Any, b: Any) -> Difference:
        return Difference(one.node(left), left.kind, left.name, field, a, b)

    # What a run was resumed with names interrupts by ids, which are others in every run.
    for direction in ("output",) if left.name.endswith("(resumed)") and left.kind == "workflow" else ("input", "output"):
        a, b = getattr(left, f"{direction}_hash"), getattr(right, f"{direction}_hash")
        if a != b:
            path, *values = unequal(one.content(a), two.content(b))
            # The same keys in another order are the same value.
            if path or values[0] != values[1]:
                yield differ(f"{direction}{path}", *values)
    for field in _COMPARED:
        # What a tool raised is in its result; an interrupt's message has ids in it.
        if field == "error" and (left.kind == "tool" or left.status == "interrupted"):
            continue
        a, b = getattr(left, field), getattr(right, field)
        if field == "error" and any(str(a).startswith(kind) and str(b).startswith(kind) for kind in _TIMED):
            continue
        if a != b:
            yield differ(field, a, b)
    for field in _ATTRIBUTES:
        if (a := left.attributes.get(field)) != (b := right.attributes.get(field)):
            yield differ(field, a, b)


def unequal(one: Any, two: Any, path: str = "") -> tuple[str, Any, Any]:
    """Where two JSON values first differ: a path such as `.messages[1].content`, and what stands there in each."""
    if isinstance(one, dict) and isinstance(two, dict):
        for key in [*one, *(key for key in two if key not in one)]:
            if one.get(key) != two.get(key) or (key in one) != (key in two):
                return unequal(one.get(key), two.get(key), f"{path}.{key}")
    if isinstance(one, list) and isinstance(two, list):
        for place, (a, b) in enumerate(zip(one, two, strict=False)):
            if a != b:
                return unequal(a, b, f"{path}[{place}]")
        if len(one) != len(two):
            place = min(len(one), len(two))
            a, b = ((side[place] if place < len(side) else None) for side in (one, two))
            return f"{path}[{place}]", a, b
    return path, one, two
