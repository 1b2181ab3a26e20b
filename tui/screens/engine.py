"""Engine: how fast the model works, what the cache saves, how long calls queue, and what running processes hold in memory.

All of it is read from recorded model calls; processes are asked of the operating system.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType

from agentops.store.pages import NEWEST_SPANS, CallLine, Pages, RunFilter, RunLine
from agentops.text import count, duration
from tui.actions import bindings
from tui.screens.base import Base
from tui.verbs import memory_bytes
from tui.widgets.detail import Detail, Part

_MOST = 20
_BUCKETS = 60
_MINUTE_NS = 60_000_000_000
_HEIGHTS = " ▁▂▃▄▅▆▇█"
NOTHING = """No model call is on record yet.

Speed, cache and queue are those of recorded calls; this one makes some:

    agentops run assistant "What is 17 * 23?" """


Running = tuple[RunLine, int | None]
"""A run at work, and the bytes that its process holds in memory, where that can be told."""


class EngineScreen(Base):
    """Meters of the last hour, and the processes that run now."""

    where = "engine"
    section = "engine"
    nothing = NOTHING
    BINDINGS: ClassVar[list[BindingType]] = [*bindings("engine")]

    def body(self) -> ComposeResult:
        yield Detail(id="meters")

    def on_mount(self) -> None:
        self.query_one("#meters").focus()
        self.set_interval(2.0, self._again)

    def _again(self) -> None:
        if self.is_current:
            self.read(calm=True)

    def read(self, *, calm: bool = False) -> None:
        settings = self.terminal.settings

        def work(pages: Pages) -> tuple[list[CallLine], list[Running], int]:
            keys = pages.run_keys(RunFilter(statuses=("running",)), "started")
            lines = pages.run_lines(keys[:_MOST])
            running = [(line, memory_bytes(settings, line)) for key in keys[:_MOST] if (line := lines.get(key))]
            return pages.calls(), running, max(0, len(keys) - _MOST)

        self.ask("calls", work, lambda found: self._show(*found), calm=calm)

    def _show(self, calls: list[CallLine], running: list[Running], more: int) -> None:
        meters = self.query_one("#meters", Detail)
        self.show_nothing(not calls and not running, instead_of=meters)
        meters.show_parts(engine_parts(calls, running, self.terminal.now_ns(), more))


def engine_parts(calls: Sequence[CallLine], running: Sequence[Running], now_ns: int, more: int = 0) -> list[Part]:
    """The meters. Sparklines have a column a minute, the newest at the right. `more` runs are at work than those given."""
    parts: list[Part] = []
    for title, since_ns in (("The last hour", now_ns - _BUCKETS * _MINUTE_NS), ("All that was read", 0)):
        chosen = [call for call in calls if call.start_ns >= since_ns]
        parts += [
            Part(
                title, f"{len(chosen):,} model call{'s' * (len(chosen) != 1)} among the newest {NEWEST_SPANS:,} spans", block=True
            ),
            *_meters(chosen),
        ]
    hour = [call for call in calls if call.start_ns >= now_ns - _BUCKETS * _MINUTE_NS]
    parts.append(Part("Each minute of the last hour", "", block=True))
    parts.append(Part("  calls", _spark(_each_minute(hour, now_ns, lambda call: 1.0))))
    parts.append(Part("  output", _spark(_each_minute(hour, now_ns, lambda call: float(call.output_tokens)))))
    parts.append(Part("  queued", _spark(_each_minute(hour, now_ns, lambda call: call.queue_ms))))
    parts.append(Part("Models", "", block=True))
    for model in sorted({call.model or "-" for call in calls}):
        mine = [call for call in calls if (call.model or "-") == model]
        parts.append(Part("", f"{model}: {len(mine):,} call{'s' * (len(mine) != 1)}, {_speed(mine)}", block=True))
    parts.append(Part("Running now", "" if running else "no run is at work", block=True))
    for run, held in running:
        memory = f"{held / 2**20:,.0f} MB" if held is not None else "memory unknown"
        parts.append(Part("", f"process {run.pid}  {memory}  {run.id}  {duration(now_ns - run.started_ns)}", "live", block=True))
    if more:
        parts.append(Part("", f"and {more:,} more", "live", block=True))
    return parts


def _meters(calls: Sequence[CallLine]) -> list[Part]:
    given = sum(call.input_tokens for call in calls)
    cached = sum(call.cached_tokens for call in calls)
    failed = sum(call.status not in ("ok", "open") for call in calls)
    waits = sorted(call.queue_ms for call in calls)
    found = [
        Part("  speed", _speed(calls)),
        Part("  tokens", f"{count(given)} in, {count(sum(call.output_tokens for call in calls))} out"),
        Part("  cache", f"{cached / given:.0%} of the input came from the cache {_gauge(cached / given)}" if given else "-"),
        Part("  queue", f"median {_at(waits, 0.5):.1f} ms, 95 of 100 below {_at(waits, 0.95):.1f} ms" if waits else "-"),
    ]
    return [*found, Part("  failed", f"{failed:,}", "bad")] if failed else found


def _speed(calls: Sequence[CallLine]) -> str:
    decode_s = sum(call.decode_ms for call in calls) / 1000
    prefill_s = sum(call.prefill_ms for call in calls) / 1000
    computed = sum(call.input_tokens - call.cached_tokens for call in calls if call.prefill_ms)
    out = sum(call.output_tokens for call in calls if call.decode_ms)
    parts = [
        f"{out / decode_s:.1f} tokens/s out" if decode_s else "",
        f"{computed / prefill_s:.0f} tokens/s read" if prefill_s else "",
    ]
    return ", ".join(part for part in parts if part) or "no times on record"


def _at(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def _gauge(share: float) -> str:
    full = round(20 * min(1.0, max(0.0, share)))
    return "█" * full + "░" * (20 - full)


def _each_minute(calls: Sequence[CallLine], now_ns: int, value: Callable[[CallLine], float]) -> list[float]:
    sums = [0.0] * _BUCKETS
    for call in calls:
        place = _BUCKETS - 1 - (now_ns - call.start_ns) // _MINUTE_NS
        if 0 <= place < _BUCKETS:
            sums[place] += value(call)
    return sums


def _spark(values: Sequence[float]) -> str:
    top = max(values, default=0.0)
    bars = "".join(_HEIGHTS[0 if not value else max(1, round(8 * value / top))] for value in values)
    return f"{bars}▏ most: {top:,.0f}"
