"""A record with known rows, written as the drainer writes it: what the tests, the benchmark and the pictures show.

Ids and times are fixed, so that a picture of a screen is the same every time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from agentops.records import content_hash
from agentops.settings import Settings
from agentops.store import open_writer

SECOND = 1_000_000_000
NOW = 1_780_000_000 * SECOND

HOSTILE = (
    "\x1b]52;c;cHduZWQ=\x07",  # writes the clipboard
    "\x1b]0;pwned title\x07",
    "\x1b]2;pwned title\x1b\\",
    "\x1b[2J\x1b[1;1Hpwned cursor",
    "\x9b2Jpwned c1",
    "\x9d52;c;cHduZWQ=\x9c",
    "\x1bP+q544e\x1b\\",  # asks the terminal for its settings
    "\x1b[?1049l\x1b[5;35;44mpwned colours",
    "\x1bc\x1b#8",  # resets the terminal
    "\x1b]8;;file:///etc/passwd\x1b\\link\x1b]8;;\x1b\\",
    "\u202egnp.exe\u2066 reads backwards",
    "[@click=app.quit]click me[/] [bold red]marked up[/] [/nothing] [",
    "\x07\x08\x08\x08\x0b\x0c\r",
    "\ud83d lone surrogate \udcff",
    "z\u0300" + "\u0301" * 400,
    "\U000e0041\U000e0042 tag characters \ufeff",
    "\u2028line\u2029paragraph\x85next",
)
"""What would move the cursor, set the title, write the clipboard, reorder text or run an action of the application."""

HOSTILE_TEXT = " | ".join(HOSTILE)

FORBIDDEN = (
    b"\x1b]52",
    b"\x1b]0;",
    b"\x1b]2;",
    b"\x1b]8;",
    b"\x1b[2J\x1b[1;1Hpwned",
    b"\xc2\x9b",
    b"\xc2\x9d",
    b"\xc2\x9c",
    b"\x1bP+q",
    b"\x1bc",
    b"\x1b#8",
    b"\x1b[?1049l\x1b[5;35;44m",
    b"\xe2\x80\xae",
    b"\xe2\x81\xa6",
    b"\x07",
    b"\xf3\xa0\x81",
    b"\xef\xbb\xbf",
    b"\xe2\x80\xa8",
    b"\xc2\x85",
    b"\x9b2J",
    b"\x9d52",
)
"""The bytes of the hostile corpus that no terminal may ever be sent."""


class Seeds:
    """Events for the store's writer."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def payload(self, value: Any) -> str:
        data = json.dumps(value).encode()
        key = content_hash(data)
        self.events.append({"t": "payload", "ns": NOW, "hash": key, "data": data, "truncated": False})
        return key

    def run(self, key: str, **about: Any) -> str:
        """A run; `input`, `output` and `pending` are kept as payloads."""
        row: dict[str, Any] = {"thread_id": "th_1", "graph": "rag", "status": "done", "started_ns": NOW, "pid": 0, "segment": ""}
        for name in ("input", "output", "pending"):
            if name in about:
                about[f"{name}_hash"] = self.payload(about.pop(name))
        row |= about
        self.events.append({"t": "run", "ns": row["started_ns"], "id": key, **row})
        return key

    def span(self, key: str, run: str, **about: Any) -> str:
        row: dict[str, Any] = {
            "run_id": run,
            "root_id": run.replace("run", "sp"),
            "seq": 1,
            "kind": "node",
            "name": "node",
            "status": "ok",
            "start_ns": NOW,
            "duration_ns": SECOND,
        }
        for name in ("input", "output"):
            if name in about:
                about[f"{name}_hash"] = self.payload(about.pop(name))
        self.events.append({"t": "span", "ns": NOW, "id": key, **row, **about})
        return key

    def write(self, settings: Settings) -> None:
        with open_writer(settings) as writer:
            writer.apply(self.events, {}, {})
        assert writer.rejected == 0, "an event of the test makes no sense"
        self.events.clear()


def small(settings: Settings) -> None:
    """Six runs: done with a whole trace, failed, waiting with two questions, cancelled, crashed, and done elsewhere."""
    seeds = Seeds()
    answered(seeds, "run_01A", NOW - 30 * SECOND)
    seeds.run(
        "run_02B",
        status="failed",
        graph="/home/mine.py:graph",
        started_ns=NOW - 120 * SECOND,
        ended_ns=NOW - 118 * SECOND,
        error="NodeFailed: the node 'search' raised ValueError: no such index",
        input={"question": "Where is the index?"},
    )
    seeds.span(
        "sp_02B",
        "run_02B",
        kind="workflow",
        name="mine.py:graph",
        status="error",
        start_ns=NOW - 120 * SECOND,
        duration_ns=2 * SECOND,
        error="ValueError: no such index",
    )
    seeds.span(
        "sp_02C",
        "run_02B",
        parent_id="sp_02B",
        root_id="sp_02B",
        seq=2,
        name="search",
        status="error",
        start_ns=NOW - 119 * SECOND,
        duration_ns=SECOND,
        error="ValueError: no such index",
        attributes={"stack": "Traceback ...\n  raise ValueError"},
    )
    seeds.run(
        "run_03C",
        status="waiting",
        graph="review",
        started_ns=NOW - 300 * SECOND,
        ended_ns=NOW - 290 * SECOND,
        input={"question": "Write to the customer."},
        pending=[
            {
                "id": "int_aaaa1111",
                "kind": "approval",
                "question": "Send this letter?",
                "node": "send",
                "content": "Dear customer,\n\nyour parcel is on its way.",
                "schema": None,
            },
            {
                "id": "int_bbbb2222",
                "kind": "question",
                "question": "Which address?",
                "node": "ask",
                "content": None,
                "schema": None,
            },
        ],
    )
    seeds.run("run_04D", status="cancelled", graph="research", started_ns=NOW - 3600 * SECOND, ended_ns=NOW - 3500 * SECOND)
    seeds.run("run_05E", status="crashed", graph="triage", started_ns=NOW - 7200 * SECOND)
    seeds.run("run_06F", thread_id="th_2", graph="assistant", started_ns=NOW - 90_000 * SECOND, ended_ns=NOW - 89_990 * SECOND)
    experiment(seeds)
    seeds.write(settings)


def answered(seeds: Seeds, run: str, start: int) -> None:
    """A run of `rag` with a search and a generation under their nodes."""
    root = run.replace("run", "sp")
    seeds.run(
        run,
        started_ns=start,
        ended_ns=start + 4 * SECOND,
        input={"question": "What is a span?"},
        output={"answer": "A timed unit."},
    )
    seeds.span(root, run, kind="workflow", name="rag", start_ns=start, duration_ns=4 * SECOND)
    inner: dict[str, Any] = {"root_id": root}
    seeds.span(
        f"{root}1",
        run,
        seq=2,
        parent_id=root,
        name="retrieve",
        start_ns=start,
        duration_ns=SECOND,
        node="retrieve",
        step=1,
        **inner,
    )
    hits = [
        {
            "id": "d1",
            "source": "docs/record.md",
            "text": "A span is a timed unit.",
            "score": 0.93,
            "vector": {"rank": 1, "score": 0.81},
            "lexical": {"rank": 2, "score": 4.5},
        }
    ]
    seeds.span(
        f"{root}2",
        run,
        seq=3,
        parent_id=f"{root}1",
        kind="retrieval",
        name="search",
        start_ns=start + SECOND // 10,
        duration_ns=SECOND // 2,
        input="What is a span?",
        output=hits,
        attributes={"k": 8, "hits": 1},
        **inner,
    )
    seeds.span(
        f"{root}3",
        run,
        seq=4,
        parent_id=root,
        name="generate",
        start_ns=start + SECOND,
        duration_ns=3 * SECOND,
        node="generate",
        step=2,
        **inner,
    )
    seeds.span(
        f"{root}4",
        run,
        seq=5,
        parent_id=f"{root}3",
        kind="generation",
        name="generate",
        start_ns=start + SECOND,
        duration_ns=29 * SECOND // 10,
        input={
            "messages": [
                {"role": "system", "content": "Answer from the documents."},
                {"role": "user", "content": "What is a span?"},
            ]
        },
        output="A timed unit.",
        model="smollm2-135m-instruct",
        prompt_name="rag/answer",
        prompt_version="b2:0123456789abcdef",
        input_tokens=120,
        output_tokens=40,
        cached_tokens=32,
        computed_tokens=88,
        queue_ms=1.5,
        prefill_ms=300.0,
        decode_ms=2500.0,
        first_token_ms=310.0,
        attributes={"finish_reason": "stop", "temperature": 0.0},
        **inner,
    )
    seeds.events.append(
        {
            "t": "prompt",
            "ns": start,
            "name": "rag/answer",
            "version": "b2:0123456789abcdef",
            "template": "Answer from the documents.",
        }
    )


def experiment(seeds: Seeds) -> None:
    """Two experiments of three cases, with scores; a case of the first leads to the first run."""
    for number, key in enumerate(("exp_01", "exp_02")):
        seeds.events.append(
            {
                "t": "experiment",
                "ns": NOW,
                "id": key,
                "name": ("baseline", "longer-prompt")[number],
                "dataset": "cases.jsonl",
                "dataset_hash": "b2:0",
                "graph": "rag",
                "status": "done",
                "cases": 3,
                "started_ns": NOW - (500 - number) * SECOND,
                "ended_ns": NOW - 400 * SECOND,
                "settings": {"model": "m"},
            }
        )
        for place, case in enumerate("abc"):
            run = ("run_01A", "run_02B", None)[place]
            seeds.events.append(
                {
                    "t": "case",
                    "ns": NOW,
                    "experiment_id": key,
                    "case_id": case,
                    "place": place,
                    "status": ("done", "failed", "queued")[place],
                    "run_id": run,
                }
            )
            if run is not None:
                value = (0.5, 1.0)[place] + number / 10 - (number / 10 if place else 0)
                scored: tuple[tuple[str, float | None], ...] = (("faithfulness", value), ("recall", None))
                for name, given in scored:
                    seeds.events.append(
                        {
                            "t": "score",
                            "ns": NOW,
                            "id": f"sc_{key}{case}{name}",
                            "run_id": run,
                            "experiment_id": key,
                            "case_id": case,
                            "name": name,
                            "value": given,
                            "reason": "" if given is not None else "no_reference",
                            "source": "model",
                            "created_ns": NOW,
                            "judged": "computed",
                            "comment": "claim 2 has no support",
                        }
                    )


def hostile(settings: Settings) -> None:
    """One run, waiting, in which every text is hostile."""
    seeds = Seeds()
    deep = HOSTILE_TEXT
    bad = deep.encode("utf-8", "replace").decode()  # columns take no lone surrogates; contents do
    asked = {"id": "int_cccc", "kind": "approval", "question": bad, "node": bad, "content": {"body": deep}, "schema": None}
    seeds.run(
        "run_0BAD",
        thread_id=bad,
        graph=bad,
        status="waiting",
        error=bad,
        ended_ns=NOW,
        input={"question": deep},
        output=deep,
        pending=[asked],
    )
    seeds.span(
        "sp_0BAD",
        "run_0BAD",
        kind="workflow",
        name=bad,
        status="error",
        error=bad,
        attributes={bad: bad, "stack": bad},
        input=deep,
    )
    inner: dict[str, Any] = {
        "parent_id": "sp_0BAD",
        "root_id": "sp_0BAD",
        "error": bad,
        "name": bad,
        "model": bad,
        "prompt_name": bad,
        "prompt_version": bad,
    }
    seeds.span(
        "sp_0BAD1",
        "run_0BAD",
        kind="generation",
        seq=2,
        node=bad,
        input={"messages": [{"role": bad, "content": deep}], bad: bad},
        output=deep,
        **inner,
    )
    seeds.span("sp_0BAD2", "run_0BAD", kind="retrieval", seq=3, output=[{"source": bad, "text": deep, "score": 1.0}], **inner)
    seeds.span("sp_0BAD3", "run_0BAD", kind="tool", seq=4, output={bad: [deep]}, **inner)
    seeds.events.append(
        {
            "t": "experiment",
            "ns": NOW,
            "id": "exp_0BAD",
            "name": bad,
            "dataset": bad,
            "dataset_hash": "b2:0",
            "graph": bad,
            "status": "failed",
            "cases": 1,
            "started_ns": NOW,
            "ended_ns": NOW,
            "settings": {bad: bad},
            "error": bad,
        }
    )
    seeds.events.append(
        {
            "t": "case",
            "ns": NOW,
            "experiment_id": "exp_0BAD",
            "case_id": bad,
            "place": 0,
            "status": "failed",
            "run_id": "run_0BAD",
            "error": bad,
        }
    )
    for given in (0.5, None):
        seeds.events.append(
            {
                "t": "score",
                "ns": NOW,
                "id": f"sc_{given}",
                "run_id": "run_0BAD",
                "span_id": "sp_0BAD1",
                "experiment_id": "exp_0BAD",
                "case_id": bad,
                "name": bad,
                "value": given,
                "reason": "" if given is not None else bad,
                "source": "model",
                "author": bad,
                "comment": bad,
                "created_ns": NOW,
                "judged": bad,
            }
        )
    seeds.write(settings)


def many(settings: Settings, runs: int, spans: int) -> Iterator[int]:
    """`runs` runs of `spans` spans each, half of them under the one before; yields how many rows are in."""
    seeds = Seeds()
    for number in range(runs):
        key, start = f"run_{number:010d}", NOW - (runs - number) * SECOND
        seeds.run(
            key,
            thread_id=f"th_{number % 100}",
            started_ns=start,
            ended_ns=start + SECOND,
            input={"question": f"question {number % 50}"},
        )
        root = key.replace("run", "sp")
        for place in range(spans):
            above = None if place == 0 else root + (f"_{(place - 1) // 4}" if place > 4 else "")
            kind = "workflow" if place == 0 else ("node", "generation", "retrieval", "tool")[place % 4]
            seeds.span(
                root if place == 0 else f"{root}_{place}",
                key,
                root_id=root,
                parent_id=above,
                seq=place + 1,
                kind=kind,
                name=f"step {place % 7}",
                start_ns=start + place * SECOND // spans,
                duration_ns=SECOND // spans,
                input_tokens=10,
                output_tokens=5,
            )
        if len(seeds.events) > 20_000:
            seeds.write(settings)
            yield number
    seeds.write(settings)
    yield runs
