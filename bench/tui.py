"""Are the screens quick on a big record? CPU, wall time and bytes sent to a pseudo-terminal, beside Textual's own widgets.

The record has a million spans: 33,000 runs of 30, and one of 30,000. The peers are Textual's `DataTable` and `Tree` with as many
rows as they take in a bearable time. Times are CPU seconds of the screens' process where nothing else is said. Not measured: a
cold file cache, the terminal's own work, and a terminal at the end of a slow line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# In place of this folder, in which this very file has the name of the package.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "tui"))

from tui_pty import Terminal, terminal
from tui_record import NOW, SECOND, Seeds, many

from agentops.settings import Settings, load_settings

BIG = "run_big"
ME = str(Path(__file__).resolve())


def cpu_s(pid: int) -> float:
    """CPU time of a process so far; hundredths of a second."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def fill(settings: Settings, spans: int, big: int) -> int:
    """A record of about `spans` spans; the first are written as a run writes them, the rest are copies. How many there are."""
    runs, each = 1_000, 30
    list(many(settings, runs, each))
    seeds = Seeds()
    seeds.run(BIG, started_ns=NOW + SECOND, ended_ns=NOW + 31 * SECOND, status="done")
    for place in range(big):
        above = None if place == 0 else "sp_big" if place < 200 else f"sp_big_{place % 200 or 1}"
        kind = "workflow" if place == 0 else ("node", "generation", "retrieval", "tool")[place % 4]
        about: dict[str, Any] = {
            "root_id": "sp_big",
            "parent_id": above,
            "seq": place + 1,
            "kind": kind,
            "name": f"step {place % 9}",
        }
        span = "sp_big" if place == 0 else f"sp_big_{place}"
        seeds.span(span, BIG, start_ns=NOW + SECOND + place * 1_000_000, duration_ns=900_000, input_tokens=3, **about)
    seeds.write(settings)
    copies = max(0, (spans - runs * each) // (runs * each))
    database = sqlite3.connect(settings.paths.home / "record.db")
    with database:
        for table, named in (("run", ("id",)), ("span", ("id", "run_id", "root_id", "parent_id"))):
            columns = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
            shown = ", ".join(
                f"{name} || ?" if name in named else f"{name} - ?" if name == "started_ns" else name for name in columns
            )
            which = "id" if table == "run" else "run_id"
            originals = f"{which} LIKE 'run_0000%' AND length({which}) = 14"
            for copy in range(1, copies + 1):
                values = [
                    f"c{copy}" if name in named else copy * SECOND * runs
                    for name in columns
                    if name in named or name == "started_ns"
                ]
                database.execute(f"INSERT INTO {table} SELECT {shown} FROM {table} WHERE {originals}", values)
        (found,) = database.execute("SELECT count(*) FROM span").fetchone()
    database.close()
    return int(found)


# What is measured inside a process of its own, in a pseudo-terminal: `python bench/tui.py --probe NAME HOME OUTPUT`.


def probe_paint(settings: Settings, note: dict[str, float]) -> None:
    """First paint, then a run of 30,000 spans, then 500 new spans a second into it."""
    from textual.timer import Timer

    from tui.app import TerminalApp
    from tui.screens.run import RunScreen
    from tui.screens.runs import RunsScreen
    from tui.widgets.table import Table

    note["imported"] = time.process_time()

    class Probe(TerminalApp):
        late = 0.0
        stage = ""
        begun = (0.0, 0.0)

        def on_mount(self) -> None:
            self.ticks: Timer = self.set_interval(0.02, self.tick)
            self.last = time.monotonic()

        def tick(self) -> None:
            now = time.monotonic()
            if self.stage == "writing" and isinstance(self.screen, RunScreen):
                if self.screen._trace.line_count == self.spans:
                    self.begun = time.process_time(), now  # the writer has not begun
                note["longest_stall_ms"] = max(note.get("longest_stall_ms", 0.0), (now - self.last - 0.02) * 1000)
            self.last = now
            if self.stage == "" and isinstance(self.screen, RunsScreen) and self.screen.query_one(Table).row:
                self.stage = "painted"
                self.call_after_refresh(self.painted)

        def painted(self) -> None:
            note["first_paint"] = time.process_time() - note["imported"]
            self.begun = time.process_time(), time.monotonic()
            self.push_screen(RunScreen(BIG))
            self.set_timer(0.005, self.look)

        def look(self) -> None:
            if not isinstance(self.screen, RunScreen) or not self.screen._trace.line_count:
                self.set_timer(0.005, self.look)
                return
            self.call_after_refresh(self.shown)

        def shown(self) -> None:
            note["open_cpu"] = time.process_time() - self.begun[0]
            note["open_wall"] = time.monotonic() - self.begun[1]
            # The whole list of runs is read behind it; what follows is measured when that is over.
            self.set_timer(6.0, self.write)

        def write(self) -> None:
            self.stage, self.last = "writing", time.monotonic()
            self.begun = time.process_time(), time.monotonic()
            self.spans = self.screen._trace.line_count if isinstance(self.screen, RunScreen) else 0
            writer = subprocess.Popen([sys.executable, ME, "--probe", "write", str(self.settings.paths.home), "-"])
            threading.Thread(target=writer.wait, daemon=True).start()
            self.set_timer(float(note["seconds"]) + 1, self.written)

        def written(self) -> None:
            spent, took = time.process_time() - self.begun[0], time.monotonic() - self.begun[1]
            note["writing_cpu_share"] = spent / took
            trace = self.screen._trace if isinstance(self.screen, RunScreen) else None
            note["spans_a_second_shown"] = (trace.line_count - self.spans) / took if trace else 0.0
            self.exit()

    Probe(settings, open_at="runs").run()


def probe_write(settings: Settings, seconds: float) -> None:
    """500 spans a second into the big run."""
    # The probe is run more than once, and what is on record already is not new.
    first = place = os.getpid() * 1_000_000
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        seeds = Seeds()
        for _ in range(100):
            place += 1
            seeds.span(
                f"sp_new_{place}", BIG, root_id="sp_big", parent_id="sp_big_7", seq=place, start_ns=NOW + 32 * SECOND + place
            )
        seeds.write(settings)
        time.sleep(max(0.0, (place - first) / 500 - (time.monotonic() - begun)))


def probe_widget(kind: str, rows: int, note: dict[str, float]) -> None:
    """CPU from making a widget of so many rows to its first paint."""
    from textual.app import App, ComposeResult
    from textual.widget import Widget
    from textual.widgets import DataTable, Tree

    from agentops.store.pages import SpanLine
    from tui.widgets.table import Column, Table
    from tui.widgets.trace import Trace

    note["imported"] = time.process_time()

    class Probe(App[None]):
        def compose(self) -> ComposeResult:
            made: Widget
            if kind == "table":
                made = Table([Column(name, 20, lambda row: (str(row), "plain")) for name in "abcd"])
            elif kind == "trace":
                made = Trace()
            elif kind == "datatable":
                made = DataTable(cursor_type="row")
            else:
                made = Tree("run")
            yield made

        def on_mount(self) -> None:
            if kind == "table":
                table = self.query_one(Table)
                table.show(array("q", range(rows)), {key: key for key in range(100)})
            elif kind == "trace":
                lines = [
                    SpanLine(n, f"s{n}", f"s{n // 8}" if n else None, "s0", "node", f"step {n}", "ok", n, 5, 0, 0, 0)
                    for n in range(rows)
                ]
                self.query_one(Trace).update_spans(lines, rows)
            elif kind == "datatable":
                peer = self.query_one(DataTable)
                peer.add_columns(*"abcd")
                peer.add_rows((str(n), str(n), str(n), str(n)) for n in range(rows))
            else:
                tree = self.query_one(Tree)
                nodes = [tree.root]
                for n in range(1, rows):
                    nodes.append(nodes[n // 8].add(f"step {n}", expand=True))
                tree.root.expand_all()
            self.call_after_refresh(lambda: self.call_after_refresh(self.done))

        def done(self) -> None:
            note["ready"] = time.process_time() - note["imported"]
            note["memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            self.exit()

    Probe().run()


def probed(name: str, home: Path, *, limit_s: float = 240) -> dict[str, float]:
    """Runs a probe in a pseudo-terminal of 120 x 40, and returns what it noted."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "note.json"
        with terminal([sys.executable, ME, "--probe", name, str(home), str(output)], dict(os.environ)) as screen:
            begun = time.monotonic()
            while screen.process.poll() is None and time.monotonic() - begun < limit_s:
                screen.read(0.5)
            if not output.exists() or screen.process.returncode:
                raise RuntimeError(f"{name}: {bytes(screen.output[-2000:]).decode(errors='replace')}")
        return dict(json.loads(output.read_text(encoding="utf-8")))


def keys(screen: Terminal, keys: Sequence[bytes], times: int) -> tuple[float, float, int]:
    """CPU milliseconds a key of `keys` in turn, and the median and the most of bytes sent for one."""
    before = cpu_s(screen.process.pid)
    sizes = [len(screen.send(keys[at % len(keys)], 0.4)) for at in range(times)]
    # What a resting application spends is not the keys'.
    spent = cpu_s(screen.process.pid) - before
    rest = cpu_s(screen.process.pid)
    begun = time.monotonic()
    time.sleep(2)
    idle = (cpu_s(screen.process.pid) - rest) / (time.monotonic() - begun)
    return max(0.0, (spent - idle * 0.27 * times)) / times * 1000, statistics.median(sizes), max(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a tenth of the record, and smaller peers")
    parser.add_argument("--probe", nargs=3, metavar=("NAME", "HOME", "OUTPUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        name, home, output = arguments.probe
        settings = load_settings({"paths.home": Path(home)})
        note: dict[str, float] = {"seconds": 8.0}
        if name == "write":
            probe_write(settings, note["seconds"])
            return
        if name == "paint":
            probe_paint(settings, note)
        else:
            kind, _, rows = name.partition(":")
            probe_widget(kind, int(rows), note)
        Path(output).write_text(json.dumps(note), encoding="utf-8")
        sys.exit(0 if len(note) > 2 else 1)
        return
    quick = arguments.quick
    spans, big = (100_000, 30_000) if quick else (1_000_000, 30_000)
    rows: list[dict[str, Any]] = []

    def row(
        metric: str, ours: float, unit: str, wanted: str = "", peer: str = "", theirs: float | None = None, why: str = ""
    ) -> None:
        ratio = round(theirs / ours, 1) if theirs is not None and ours else None
        rows.append(
            {
                "metric": metric,
                "ours": round(ours, 3),
                "unit": unit,
                "wanted": wanted,
                "peer": peer or None,
                "theirs": theirs,
                "ratio": ratio,
            }
            | ({"why": why} if ratio is None else {})
        )

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        settings = load_settings({"paths.home": home})
        begun = time.monotonic()
        held = fill(settings, spans, big)
        print(f"a record of {held:,} spans, made in {time.monotonic() - begun:.0f} s", file=sys.stderr)
        none = "no peer reads a record"
        environment = os.environ | {"AGENTOPS_PATHS_HOME": str(home)}
        starts = []
        for _ in range(3):
            with terminal([sys.executable, "-m", "agentops", "tui", "runs"], environment) as screen:
                while "✓ done".encode() not in screen.output:
                    screen.read(0.05)
                starts.append(cpu_s(screen.process.pid))
        row(f"start to first paint, {held:,} spans", min(starts), "CPU s", "<= 2.5", why=none)
        note = min((probed("paint", home) for _ in range(2)), key=lambda found: found["first_paint"])
        row(f"first paint after the imports, {held:,} spans", note["first_paint"], "CPU s", "<= 1.5", why=none)
        row(f"open a run of {big:,} spans", note["open_wall"], "s", "<= 1", why=none)
        row(f"open a run of {big:,} spans, CPU", note["open_cpu"], "CPU s", "", why=none)
        row("500 new spans/s: longest stall", note["longest_stall_ms"], "ms", "", why=none)
        row("500 new spans/s: shown", note["spans_a_second_shown"], "spans/s", "500", why=none)
        row("500 new spans/s: share of a core", note["writing_cpu_share"], "", "", why=none)
        down, up, last, first = b"\x1b[6~", b"\x1b[5~", b"\x1b[F", b"\x1b[H"
        with terminal([sys.executable, "-m", "agentops", "tui", "runs"], environment) as screen:
            screen.read_until("✓ done".encode())
            screen.read(4)
            time.sleep(2)
            screen.send(b"j", 1)
            for label, pressed, times in (("in the list", [b"j", b"k"], 80), ("down the list", [b"j"], 80)):
                spent, median, most = keys(screen, pressed, times)
                row(f"a key {label}", spent, "CPU ms", "<= 5", why=none)
                row(f"a key {label}, bytes: median", median, "bytes", "<= 2,048", why=none)
                row(f"a key {label}, bytes: most", most, "bytes", "", why=none)
            screen.send(b"g", 1)
            screen.send(b"\r", 2)
            screen.read(3)
            spent, median, most = keys(screen, [b"j"], 20)
            row("a key in a trace of 30,000 spans, and the detail", spent, "CPU ms", "", why=none)
            row("a key in a trace, and the detail, bytes: median", median, "bytes", "", why=none)
            # A held key: the detail follows once, when it is let go.
            before, start = cpu_s(screen.process.pid), len(screen.output)
            for _ in range(60):
                screen.press(b"j", 0.04)
            row(
                "a held key in a trace of 30,000 spans",
                (cpu_s(screen.process.pid) - before) / 60 * 1000,
                "CPU ms",
                "<= 5",
                why=none,
            )
            row("a held key in a trace, bytes", (len(screen.output) - start) / 60, "bytes", "<= 2,048", why=none)
        pages = (("PgDn", [down]), ("PgUp", [up]), ("End and Home", [last, first]))
        for width, height in ((80, 24), (120, 40)):
            with terminal([sys.executable, "-m", "agentops", "tui", "runs"], environment, width, height) as screen:
                screen.read_until("✓ done".encode())
                screen.read(4)
                time.sleep(2)
                for where, times in (("list", 40), ("trace", 20)):
                    for label, pressed in pages:
                        spent, median, most = keys(screen, pressed, times)
                        label = f"{label} in the {where}, {width} x {height}"
                        row(label, spent, "CPU ms", "<= 5", why=none)
                        row(f"{label}, bytes: median", median, "bytes", "<= 2,048", why=none)
                        row(f"{label}, bytes: most", most, "bytes", "<= 2,048", why=none)
                    screen.send(first, 1)
                    screen.send(b"\r", 2)
                    screen.read(3)
        small = 5_000 if quick else 20_000
        for ours, ours_rows, peer, peer_rows in (
            ("table", 1_000_000, "datatable", small if quick else 100_000),
            ("table", small, "datatable", small),
            ("trace", 30_000, "tree", small),
            ("trace", small, "tree", small),
        ):
            mine, theirs = probed(f"{ours}:{ours_rows}", home), probed(f"{peer}:{peer_rows}", home)
            label = f"{ours} of {ours_rows:,} rows, ready"
            row(label, mine["ready"], "CPU s", "", f"{peer} of {peer_rows:,}", round(theirs["ready"], 3))
    print(f"{'':52} {'ours':>10} {'wanted':>9}   {'theirs':>9}  peer")
    for one in rows:
        theirs = f"{one['theirs']:9.3f}" if one["theirs"] is not None else f"{'':9}"
        print(
            f"{one['metric']:52} {one['ours']:10.3f} {one['wanted']:>9}   {theirs}  {one['peer'] or ''}  {one['unit']}".rstrip()
        )
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps({"bench": "tui", "machine": machine, "rows": rows}))


if __name__ == "__main__":
    main()
