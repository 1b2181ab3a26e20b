"""`agentops metrics`: the record's numbers in the text format of Prometheus, printed once or served on loopback.

Nothing is drained, made or changed for it: how far the store is behind the journal is among what it tells.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from agentops.errors import AgentOpsError, UsageError

if TYPE_CHECKING:
    from http.server import ThreadingHTTPServer

    from agentops.clock import Clock
    from agentops.prices import Price
    from agentops.settings import Settings
    from agentops.store.metrics import Histogram, Measures
    from agentops.tracer.backlog import Backlog

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_HOSTS = ("127.0.0.1", "localhost")
_IDLE_S = 5.0
_SHARE = 10
"""Measuring anew takes at most one part in so many of the time."""

Sample = tuple[str, tuple[tuple[str, str], ...]]
"""What follows the family's name (`_bucket`), and the labels."""


@dataclass(frozen=True, slots=True)
class Family:
    """Samples of one name. A counter's and a histogram's never fall while they are served, a gauge's may."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    samples: dict[Sample, float] = field(default_factory=dict)

    def add(self, value: float, part: str = "", **labels: str) -> None:
        """Two that cannot be told apart once they are safe to print are one."""
        from agentops.text import clean

        key = part, tuple((name, clean(text)) for name, text in labels.items())
        self.samples[key] = self.samples.get(key, 0) + value

    def text(self) -> Iterator[str]:
        yield f"# HELP {self.name} {self.help}\n# TYPE {self.name} {self.kind}\n"
        for (part, labels), value in self.samples.items():
            told = ",".join(f'{name}="{_escaped(text)}"' for name, text in labels)
            yield f"{self.name}{part}{f'{{{told}}}' if told else ''} {value!r}\n"


def register(app: typer.Typer) -> None:
    app.command()(metrics)


def metrics(
    serve: Annotated[
        str | None, typer.Option(metavar="[HOST:]PORT", help="Serve them on loopback, under /metrics, until Ctrl-C.")
    ] = None,
) -> None:
    """Print the record's numbers as Prometheus reads them, or serve them."""
    from agentops.settings import load_settings

    settings = load_settings()
    if serve is not None:
        _serve(Source(settings), *_address(serve))
        return
    sys.stdout.write(Source(settings).text())


class Source:
    """The text, measured anew where that has not just been done. Usable from several threads.

    What retention and erasing take from the record would let counters fall, and be read as a new start from nothing with all that
    is left come at once: what was counted stays counted for as long as this lives.
    """

    def __init__(self, settings: Settings, clock: Clock | None = None) -> None:
        from agentops.clock import SystemClock
        from agentops.prices import load_prices

        self._settings = settings
        self._clock = clock or SystemClock()
        self._prices = load_prices(settings)
        self._lock = threading.Lock()
        self._counted: dict[tuple[str, Sample], tuple[float, float]] = {}
        self._text = ""
        self._good_until_ns = -1

    def text(self) -> str:
        """
        Raises:
            RecordError: the record cannot be read now, or is not there.
        """
        with self._lock:
            if (began := self._clock.monotonic_ns()) > self._good_until_ns:
                found = list(self._measured())
                self._text = "".join(line for family in found for line in self._kept(family).text())
                ended = self._clock.monotonic_ns()
                self._good_until_ns = ended + _SHARE * (ended - began)
            return self._text

    def _measured(self) -> Iterator[Family]:
        from agentops.store.metrics import measure
        from agentops.store.pages import open_pages
        from agentops.tracer.backlog import backlog

        began = self._clock.monotonic_ns()
        with open_pages(self._settings, wait_s=self._settings.record.lock_timeout_s) as store:
            found = measure(store)
        waiting = backlog(self._settings.paths.home / "journal", found.positions)
        yield from families(found, waiting, self._prices, self._clock.now_ns())
        yield _gauge("measuring_seconds", "How long it took to measure all this.", (self._clock.monotonic_ns() - began) / 1e9)

    def _kept(self, family: Family) -> Family:
        if family.kind == "gauge":
            return family
        gone = ((key, 0) for name, key in self._counted if name == family.name and key not in family.samples)
        for key, now in [*family.samples.items(), *gone]:
            before, total = self._counted.get((family.name, key), (0, 0))
            self._counted[family.name, key] = now, total + max(0, now - before)
            family.samples[key] = self._counted[family.name, key][1]
        return family


def families(found: Measures, waiting: Backlog, prices: Mapping[str, Price], now_ns: int) -> Iterator[Family]:
    """What was measured, by name. Durations are in seconds."""
    version = Family("agentops_info", "gauge", "The version that tells this.")
    version.add(1, version=metadata.version("agentops-runtime"))
    yield version
    runs = Family("agentops_runs", "gauge", "Runs on record.")
    for (graph, status), number in sorted(found.runs.items()):
        runs.add(number, graph=graph, status=status)
    yield runs
    yield _gauge("runs_unbalanced", "Runs of which something is missing.", sum(one.unbalanced for one in found.graphs.values()))
    for name, about in (
        ("emitted", "Spans that runs have begun."),
        ("stored", "Spans that are in the store; where all is well, with those that were sampled out as many as were emitted."),
        ("sampled_out", "Spans of done runs that went by the rule of what is sampled."),
        ("faults", "Failures of the recording itself."),
    ):
        counter = Family(f"agentops_{'' if name == 'faults' else 'spans_'}{name}_total", "counter", about)
        for graph, sums in sorted(found.graphs.items()):
            counter.add(getattr(sums, name), graph=graph)
        yield counter
    cut = Family("agentops_payloads_truncated_total", "counter", "Inputs and outputs that were cut for their size.")
    cut.add(found.truncated)
    yield cut
    still = Family("agentops_spans_open", "gauge", "Spans that have not ended.")
    ended = Family("agentops_spans_ended_total", "counter", "Spans that have ended, but for those of whole runs.")
    for (kind, status), number in sorted(found.spans.items()):
        if status == "open":
            still.add(number, kind=kind)
        else:
            ended.add(number, kind=kind, status=status)
    yield still
    yield ended
    sittings = {graph: sums.sittings for graph, sums in found.graphs.items()}
    yield _histogram("run_seconds", "How long runs took, from a start or a resumption to an end or a pause.", "graph", sittings)
    yield _histogram("span_seconds", "How long spans took.", "kind", found.durations)
    used = Family("agentops_tokens_total", "counter", "Tokens of model calls: read and computed, read from a cache, written.")
    spent = Family("agentops_cost_total", "counter", "What model calls cost by cost.prices; of models without a price nothing.")
    for model, usage in sorted(found.usage.items()):
        used.add(usage.computed_tokens, model=model, kind="computed")
        used.add(usage.cached_tokens, model=model, kind="cached")
        used.add(usage.output_tokens, model=model, kind="output")
        if model in prices:
            spent.add(prices[model].of(usage), model=model)
    yield used
    yield spent
    yield from _engine(found)
    oldest = 0.0 if waiting.oldest_ns is None else max(0.0, (now_ns - waiting.oldest_ns) / 1e9)
    yield _gauge("journal_segments", "Files of this home's journal.", waiting.segments)
    yield _gauge("journal_backlog_bytes", "What of this home's journal the store has not taken.", waiting.waiting_bytes)
    yield _gauge("journal_drain_lag_seconds", "Age of the oldest event that the store has not taken.", oldest)
    yield _gauge("journal_damaged_segments", "Files of this home's journal that were put aside as damaged.", waiting.damaged)
    yield _gauge("journal_damaged_records", "Records that could not be read, of the files that are still there.", found.damaged)


def _engine(found: Measures) -> Iterator[Family]:
    phases = Family("agentops_call_seconds_total", "counter", "Where the time of model calls went: queue, prefill, decode.")
    for model, timing in sorted(found.timing.items()):
        for phase in ("queue", "prefill", "decode"):
            phases.add(getattr(timing, f"{phase}_ms") / 1e3, model=model, phase=phase)
    yield phases
    blocks = Family(
        "agentops_engine_blocks", "gauge", "Blocks of the KV cache when the model's last call ended, by what they held."
    )
    waiting = Family("agentops_engine_waiting", "gauge", "Requests in the engine's queue when the model's last call ended.")
    memory = Family("agentops_engine_peak_memory_bytes", "gauge", "The most memory that the engine's process had had by then.")
    for model, held in sorted(found.footprints.items()):
        blocks.add(held.used_blocks - held.pinned_blocks, model=model, state="used")
        blocks.add(held.pinned_blocks, model=model, state="pinned")
        blocks.add(held.cached_blocks, model=model, state="cached")
        blocks.add(held.free_blocks, model=model, state="free")
        waiting.add(held.waiting, model=model)
        memory.add(held.peak_memory_bytes, model=model)
    yield from (blocks, waiting, memory)


def _gauge(name: str, help: str, value: float) -> Family:
    family = Family(f"agentops_{name}", "gauge", help)
    family.add(value)
    return family


def _histogram(name: str, help: str, label: str, found: Mapping[str, Histogram]) -> Family:
    from agentops.store.metrics import BOUNDS_S

    family = Family(f"agentops_{name}", "histogram", help)
    for key, histogram in sorted(found.items()):
        for bound, number in zip(BOUNDS_S, histogram.below, strict=True):
            family.add(number, "_bucket", **{label: key, "le": f"{bound:g}"})
        family.add(histogram.count, "_bucket", **{label: key, "le": "+Inf"})
        family.add(histogram.seconds, "_sum", **{label: key})
        family.add(histogram.count, "_count", **{label: key})
    return family


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _address(text: str) -> tuple[str, int]:
    host, found, port = text.rpartition(":")
    if found and host not in _HOSTS:
        raise UsageError(
            f"'{host}' is not on this machine alone, and whoever reaches it may read",
            hint=f"one of {', '.join(_HOSTS)}; for others put a server with a password before it",
        )
    if not port.isdecimal() or not 1 <= int(port) <= 65_535:
        raise UsageError(f"'{port}' is no port", hint="write it as in: agentops metrics --serve 9464")
    return host or _HOSTS[0], int(port)


def _serve(source: Source, host: str, port: int) -> None:
    try:
        server = server_of(source.text, host, port)
    except OSError as error:
        raise UsageError(f"nothing can be served at {host}:{port}: {error.strerror}", hint="take another port") from None
    print(f"metrics: http://{host}:{port}/metrics  (Ctrl-C ends it)", file=sys.stderr)
    with server, suppress(KeyboardInterrupt):
        server.serve_forever()


def server_of(text: Callable[[], str], host: str, port: int) -> ThreadingHTTPServer:
    """Serves what `text` gives, to programs and pages of this machine only; what it raises is told as 503.

    Raises:
        OSError: the port is taken.
    """
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Answer(BaseHTTPRequestHandler):
        timeout = _IDLE_S

        def do_GET(self) -> None:
            self._answer(*self._found())

        def do_HEAD(self) -> None:
            self._answer(*self._found(), body=False)

        def _found(self) -> tuple[int, str]:
            here = [f"{name}:{server.server_port}" for name in _HOSTS]
            origins = [value.removeprefix("http://") for value in self.headers.get_all("Origin", [])]
            # Any page that the user's browser shows may call this port, under a name of its own too: it must not read that way.
            if [one for one in [*self.headers.get_all("Host", [""]), *origins] if one not in here]:
                return 403, "only programs and pages of this machine may be here\n"
            if self.path.partition("?")[0] != "/metrics":
                return 404, "there is only /metrics\n"
            try:
                return 200, text()
            except AgentOpsError as error:
                return 503, f"{error}\n"

        def _answer(self, status: int, told: str, body: bool = True) -> None:
            data = told.encode(errors="replace")
            self.send_response(status)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            if body:
                self.wfile.write(data)

        def version_string(self) -> str:
            return "agentops"

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            # Who asked has left; anything else is a defect.
            if not isinstance(sys.exception(), OSError):
                super().handle_error(request, client_address)  # type: ignore[arg-type]

    server = Server((host, port), Answer)
    return server
