"""A run as a tree and a waterfall in one: a line a span, with its place in the tree, tokens, time, and a bar on the time axis.

Branches fold. Spans that come while the run goes on are put in their place; the cursor stays on its span. A span whose parent
is not on record stands at the top.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar

from textual.binding import Binding, BindingType

from agentops.records import SpanStatus
from agentops.store.pages import SpanLine
from agentops.text import count, duration, short_name
from tui.text import cell, flatten
from tui.widgets.lines import Lines, Piece

MARKS: dict[SpanStatus, tuple[str, str]] = {
    "ok": ("", ""),
    "error": ("✗ ", "bad"),
    "crashed": ("✗ ", "bad"),
    "interrupted": ("⏸ ", "warn"),
    "cancelled": ("■ ", "warn"),
    "open": ("… ", "live"),
}
_KIND_INKS = {"generation": "model", "retrieval": "search", "tool": "tool", "workflow": "strong", "agent": "strong"}
_TIME_CELLS = 9
_TOKEN_CELLS = 12


class Outline:
    """The spans of a run in the order in which they are shown, without what is folded away."""

    def __init__(self) -> None:
        self.spans: dict[str, SpanLine] = {}
        self.folded: set[str] = set()
        self.visible: list[tuple[str, str]] = []
        self.tokens: dict[str, int] = {}
        self._children: dict[str | None, list[str]] = {}
        self._edges: dict[str, tuple[int, int]] = {}

    def with_spans(self, lines: Iterable[SpanLine]) -> tuple[Outline, set[str] | None]:
        """This outline with new spans and changed ones; the ids of the changed, or None where the order is another now.

        It stays as it is, so that another thread can do the work while this one is on the screen."""
        new = Outline()
        new.spans, new.folded, new.visible, new._children = dict(self.spans), self.folded, self.visible, self._children
        new.tokens, new._edges = self.tokens, self._edges
        changed = new._take(lines)
        return new, changed

    @property
    def unsettled(self) -> list[int]:
        """Keys of the spans that have not ended."""
        return [line.key for line in self.spans.values() if line.status == "open"]

    def _take(self, lines: Iterable[SpanLine]) -> set[str] | None:
        changed: set[str] = set()
        grown = False
        for line in lines:
            old = self.spans.get(line.id)
            if old == line:
                continue
            grown = grown or old is None or old.parent_id != line.parent_id
            self.spans[line.id] = line
            changed.add(line.id)
        if not changed:
            return changed
        self._measure()
        if not grown:
            return changed
        self._arrange()
        return None

    def fold(self, ids: Iterable[str], folded: bool) -> None:
        self.folded = self.folded | set(ids) if folded else self.folded - set(ids)
        self._show()

    def children(self, span: str) -> list[str]:
        return self._children.get(span, [])

    def edges(self, line: SpanLine, now_ns: int) -> tuple[int, int]:
        """Start and end of the time axis that a span's bar is drawn on."""
        start, end = self._edges.get(line.root_id, (line.start_ns, line.start_ns))
        return start, max(end if end >= 0 else now_ns, start + 1)

    def _measure(self) -> None:
        """The time axis of each root, and tokens with those of everything below."""
        edges: dict[str, tuple[int, int]] = {}
        for line in self.spans.values():
            start, end = edges.get(line.root_id, (line.start_ns, 0))
            own = -1 if line.duration_ns is None and line.status == "open" else line.start_ns + (line.duration_ns or 0)
            edges[line.root_id] = (min(start, line.start_ns), -1 if own < 0 or end < 0 else max(end, own))
        self._edges = edges
        tokens = dict.fromkeys(self.spans, 0)
        for line in self.spans.values():
            if line.kind == "generation" and (spent := line.input_tokens + line.output_tokens):
                above: str | None = line.id
                # Bounded, because a damaged record may have a ring of parents.
                for _ in range(200):
                    if above is None or above not in tokens:
                        break
                    tokens[above] += spent
                    above = self.spans[above].parent_id
        self.tokens = tokens

    def _arrange(self) -> None:
        children: dict[str | None, list[str]] = {}
        spans = self.spans
        for line in spans.values():
            above = line.parent_id if line.parent_id in spans and line.parent_id != line.id else None
            children.setdefault(above, []).append(line.id)
        reached = _reached(children, children.get(None, []))
        for line in spans.values():
            if line.id not in reached:
                # A ring of parents, which a damaged record may have, is cut open here: its first span stands at the top.
                children[line.parent_id].remove(line.id)
                children.setdefault(None, []).append(line.id)
                reached |= _reached(children, [line.id])
        self._children = children
        self._show()

    def _show(self) -> None:
        visible: list[tuple[str, str]] = []
        children, folded = self._children, self.folded
        stack = [(span, "", "") for span in reversed(children.get(None, []))]
        while stack:
            span, lead, below = stack.pop()
            visible.append((span, lead))
            inner = children.get(span)
            if not inner or span in folded:
                continue
            stack.append((inner[-1], below + "└─", below + "  "))
            along, under = below + "├─", below + "│ "
            stack += [(child, along, under) for child in reversed(inner[:-1])]
        self.visible = visible


class Trace(Lines):
    """Shows a `Outline`. `now_ns` ends the bars of spans that are open."""

    head_lines = 1
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "fold_or_unfold", "Fold", show=False),
        Binding("left", "fold", "Fold", show=False),
        Binding("right", "unfold", "Unfold", show=False),
    ]

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.outline = Outline()
        self.now_ns = 0

    @property
    def line_count(self) -> int:
        return len(self.outline.visible)

    @property
    def span(self) -> SpanLine | None:
        """The span under the cursor."""
        return self.outline.spans[self.outline.visible[self.cursor][0]] if self.line_count else None

    def update_spans(self, lines: Iterable[SpanLine], now_ns: int) -> None:
        """Takes new spans and changed ones, here and now."""
        self.show_outline(*self.outline.with_spans(lines), now_ns)

    def show_outline(self, outline: Outline, changed: set[str] | None, now_ns: int) -> None:
        """Shows what `Outline.with_spans` made of the one that is shown; what was folded meanwhile stays so."""
        held = self.span
        self.now_ns = now_ns
        if outline.folded != self.outline.folded:
            outline.fold(self.outline.folded - outline.folded, True)
            outline.fold(outline.folded - self.outline.folded, False)
            changed = None
        self.outline = outline
        if changed is None:
            self._rearranged(held.id if held else None)
        elif changed:
            for index in self.seen:
                span = self.outline.spans[self.outline.visible[index][0]]
                if span.id in changed or span.status == "open" or self.outline.children(span.id):
                    self.refresh_index(index)

    def go_to(self, span_id: str) -> bool:
        """Puts the cursor on a span, unfolding what is above it; False when there is none."""
        if span_id not in self.outline.spans:
            return False
        above: set[str] = set()
        at = self.outline.spans[span_id].parent_id
        while at is not None and at in self.outline.spans and at not in above:
            above.add(at)
            at = self.outline.spans[at].parent_id
        if above & self.outline.folded:
            self.outline.fold(above, False)
            self._rearranged(None)
        self.move_to(next((index for index, (span, _) in enumerate(self.outline.visible) if span == span_id), self.cursor))
        return True

    def go_to_newest(self) -> None:
        """Puts the cursor on the span that started last, or on the branch that it is folded away in."""
        newest = max(self.outline.spans.values(), key=lambda line: (line.start_ns, line.key), default=None)
        places = {span: index for index, (span, _) in enumerate(self.outline.visible)}
        for _ in range(len(self.outline.spans)):
            if newest is None or newest.id in places:
                break
            newest = self.outline.spans.get(newest.parent_id or "")
        if newest is not None and newest.id in places:
            self.move_to(places[newest.id])

    def next_problem(self) -> bool:
        """Puts the cursor on the next span that failed, crashed or was stopped, from the top again after the last."""
        bad = [line.id for line in self._in_order() if line.status in ("error", "crashed", "interrupted", "cancelled")]
        if not bad:
            return False
        order = {line.id: place for place, line in enumerate(self._in_order())}
        here = order[self.span.id] if self.span else -1
        return self.go_to(next((span for span in bad if order[span] > here), bad[0]))

    def _in_order(self) -> Iterator[SpanLine]:
        return iter(self.outline.spans.values())

    def _rearranged(self, held: str | None) -> None:
        place = self.cursor - self.scroll_offset.y
        self.resized_lines()
        if held is not None and (self.span is None or self.span.id != held):
            for index, (span, _) in enumerate(self.outline.visible):
                if span == held:
                    self.cursor = index
                    self.scroll_to(y=max(0, index - place), animate=False, force=True)
                    break
        self.refresh()

    def action_fold_or_unfold(self) -> None:
        if self.span is not None:
            self._fold(self.span.id, self.span.id not in self.outline.folded)

    def action_fold(self) -> None:
        span = self.span
        if span is None:
            return
        if self.outline.children(span.id) and span.id not in self.outline.folded:
            self._fold(span.id, True)
        elif span.parent_id in self.outline.spans:
            self.go_to(str(span.parent_id))

    def action_unfold(self) -> None:
        if self.span is not None and self.span.id in self.outline.folded:
            self._fold(self.span.id, False)
        else:
            self.action_move(1)

    def fold_all(self) -> None:
        """Folds every branch below the top, or unfolds all where something is folded."""
        held = self.span
        inner = [
            span for span in self.outline.spans if self.outline.children(span) and self.outline.spans[span].parent_id is not None
        ]
        self.outline.fold(self.outline.folded or inner, not self.outline.folded)
        self._rearranged(held.id if held else None)

    def _fold(self, span: str, folded: bool) -> None:
        if self.outline.children(span):
            self.outline.fold([span], folded)
            self._rearranged(span)

    def head(self, y: int, width: int) -> Iterable[Piece]:
        label, tokens, bar = self._cells(width)
        yield cell("  span", label), ""
        yield cell("tokens", tokens, right=True), ""
        yield cell("time", _TIME_CELLS + 1, right=True), ""
        root = self.span or next(iter(self.outline.spans.values()), None)
        start, end = self.outline.edges(root, self.now_ns) if root else (0, 0)
        yield cell(" 0", bar // 2) + cell(duration(end - start), bar - bar // 2, right=True), ""

    def _cells(self, width: int) -> tuple[int, int, int]:
        tokens = _TOKEN_CELLS if width >= 90 else 0
        bar = max(10, (width - tokens - _TIME_CELLS) * 2 // 5)
        return width - tokens - _TIME_CELLS - 1 - bar, tokens, bar

    def pieces(self, index: int, width: int) -> Iterable[Piece]:
        span_id, lead = self.outline.visible[index]
        line = self.outline.spans[span_id]
        label, tokens, bar = self._cells(width)
        mark, ink = MARKS.get(line.status, ("? ", "bad"))
        inner = self.outline.children(span_id)
        fold = ("▸" if span_id in self.outline.folded else "▾") if inner else ("─" if lead else " ")
        yield ("▸ " if index == self.cursor else "  "), "live"
        # Deep branches keep the end of their lines, where they differ.
        most = max(4, label // 2)
        shown = lead if len(lead) <= most else "…" + lead[-most + 1 :]
        yield f"{shown}{fold} ", "dim"
        room = label - 4 - len(shown)
        yield mark, ink
        name = short_name(flatten(line.name)) if line.kind == "workflow" else line.name
        hidden = f"  +{_below(self.outline, span_id)}" if span_id in self.outline.folded else ""
        kind = "" if line.kind in ("node", "workflow") or line.kind == name else f" {line.kind}"
        room -= len(mark) + len(hidden)
        text = flatten(name)
        own = min(room, max(4, len(text) + 1)) if not text.isascii() else min(room, len(text))
        yield cell(text, own), ink if line.status in ("error", "crashed") else _KIND_INKS.get(line.kind, "plain")
        yield cell(kind, room - own), "dim"
        yield hidden, "warn"
        spent = self.outline.tokens.get(span_id, 0)
        yield cell(count(spent) if spent else "", tokens, right=True), "dim"
        open_ns = self.now_ns - line.start_ns if line.status == "open" else None
        took = line.duration_ns if line.duration_ns is not None else open_ns
        yield cell(duration(took), _TIME_CELLS, right=True) + " ", "live" if line.status == "open" else "plain"
        yield self._bar(line, bar), ink or _KIND_INKS.get(line.kind, "plain")

    def _bar(self, line: SpanLine, cells: int) -> str:
        start, end = self.outline.edges(line, self.now_ns)
        scale = cells / (end - start)
        left = max(0, min(cells - 1, int((line.start_ns - start) * scale)))
        stop = end if line.duration_ns is None else line.start_ns + line.duration_ns
        length = max(1, min(cells - left, round((stop - start) * scale) - left))
        return " " * left + ("┄" if line.duration_ns is None else "━") * length + " " * (cells - left - length)


def _below(outline: Outline, span: str) -> int:
    """How many spans are below one."""
    return len(_reached(outline._children, outline.children(span)))


def _reached(children: Mapping[str | None, Sequence[str]], tops: Iterable[str]) -> set[str]:
    """These spans and all below them."""
    found: set[str] = set()
    stack = list(tops)
    while stack:
        if (at := stack.pop()) not in found:
            found.add(at)
            stack += children.get(at, ())
    return found
