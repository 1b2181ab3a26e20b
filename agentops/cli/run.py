"""`agentops run`, `resume`, `fork` and `cancel`: starts graphs, shows them at work, and stops them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentops.cli.graph import names
from agentops.errors import RunCancelled, UsageError

if TYPE_CHECKING:
    from agentops.records import RunEvent, RunResult


Trim = Annotated[bool, typer.Option("--trim", help="Cut the oldest part of a prompt that does not fit the context.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only the answer and its sources.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Mcp = Annotated[
    Path | None,
    typer.Option(help="File with MCP servers (mcp.json) whose tools the graph is given; they ask before they run."),
]
Allow = Annotated[list[str] | None, typer.Option(help="A tool that runs without asking. Repeat for several.")]
Deny = Annotated[list[str] | None, typer.Option(help="A tool that never runs. Repeat for several.")]
MaxSteps = Annotated[int | None, typer.Option("--max-steps", help="Stop after so many supersteps.")]
MaxModelCalls = Annotated[int | None, typer.Option("--max-model-calls", help="Stop after so many model calls.")]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", help="Stop after so many computed and output tokens; calls under way still end.")
]
MaxSeconds = Annotated[float | None, typer.Option("--max-seconds", help="Stop after this time.")]
MaxMoney = Annotated[float | None, typer.Option("--max-money", help="Stop after this cost, by the setting cost.prices.")]
MaxOfNode = Annotated[
    list[str] | None, typer.Option("--max-of-node", help="NODE.WHAT=N: stop when a node has had so much. Repeat for several.")
]
Retriever = Annotated[str | None, typer.Option("--retriever", help="Where documents are: embedded or elasticsearch.")]
EsUrl = Annotated[str | None, typer.Option("--es-url", help="Address of the Elasticsearch server.")]


_STOPPING_S = 10.0
"""How long `cancel` waits for what it has stopped."""


def register(app: typer.Typer) -> None:
    app.command("run")(run)
    app.command("resume")(resume)
    app.command("fork")(fork)
    app.command("cancel")(cancel)


def run(
    graph: Annotated[
        str, typer.Argument(help="A graph's name (see: agentops graphs) or path/to/file.py:attribute.", autocompletion=names)
    ],
    text: Annotated[
        str | None, typer.Argument(metavar="[INPUT]", help="The question, or a JSON object; '-' reads standard input.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--input", help="Read the input from a file instead.")] = None,
    collection: Annotated[str | None, typer.Option("--collection", "-c", help="Collection of documents to search.")] = None,
    thread: Annotated[
        str | None, typer.Option("--thread", "-t", help="Go on with this conversation, or begin it under this name.")
    ] = None,
    run_id: Annotated[
        str | None,
        typer.Option("--run-id", help="Name of the run: given again, it goes on, or tells its result once it is done."),
    ] = None,
    user: Annotated[str, typer.Option(help="The user whom the run is for; kept with it.")] = "",
    tag: Annotated[list[str] | None, typer.Option(help="A tag to keep with the run. Repeat for several.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Catalogue name, local folder or hub id.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling.")] = None,
    trim: Trim = False,
    mcp: Mcp = None,
    allow: Allow = None,
    deny: Deny = None,
    max_steps: MaxSteps = None,
    max_model_calls: MaxModelCalls = None,
    max_tokens: MaxTokens = None,
    max_seconds: MaxSeconds = None,
    max_money: MaxMoney = None,
    max_of_node: MaxOfNode = None,
    retriever: Retriever = None,
    es_url: EsUrl = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run a graph and show its answer. Steps and tokens come first, then the answer, its sources and what it cost."""
    from agentops.records import Labels

    given = _read_input(text, file)
    flags = {
        "model.name": model,
        "engine.device": device,
        "run.seed": seed,
        "run.trim": trim or None,
        "tools.mcp": mcp,
        "tools.allow": allow,
        "tools.deny": deny,
        "budget.steps": max_steps,
        "budget.model_calls": max_model_calls,
        "budget.tokens": max_tokens,
        "budget.seconds": max_seconds,
        "budget.money": max_money,
        "budget.nodes": max_of_node or None,
        "retrieval.retriever": retriever,
        "elasticsearch.url": es_url,
    }
    with open_runtime(flags, quiet=quiet) as runtime:
        labels = Labels(user, tuple(tag or ())) if user or tag else None
        events = runtime.stream(graph, given, thread=thread, collection=collection, run_id=run_id, labels=labels)
        follow(events, quiet=quiet, as_json=as_json, files=runtime.settings.files)


def resume(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="Id of the run, a unique beginning of it, or 'last'.")],
    answer: Annotated[
        str | None, typer.Option("--answer", help="Answer to the question that the run waits for; JSON where it asks for that.")
    ] = None,
    approve: Annotated[bool, typer.Option("--approve", help="Approve what is proposed.")] = False,
    edit: Annotated[
        Path | None,
        typer.Option("--edit", help="Approve this instead: a file with the edited text or JSON; '-' for standard input."),
    ] = None,
    reject: Annotated[bool, typer.Option("--reject", help="Refuse what is proposed.")] = False,
    reason: Annotated[str, typer.Option(help="Why it is refused or edited; the model may read it.")] = "",
    interrupt: Annotated[
        str | None, typer.Option("--id", help="Which interrupt is answered, where several wait (see: agentops inbox).")
    ] = None,
    answers: Annotated[Path | None, typer.Option(help="A JSON file with several answers by the ids of their interrupts.")] = None,
    mcp: Mcp = None,
    allow: Allow = None,
    deny: Deny = None,
    max_steps: MaxSteps = None,
    max_model_calls: MaxModelCalls = None,
    max_tokens: MaxTokens = None,
    max_seconds: MaxSeconds = None,
    max_money: MaxMoney = None,
    max_of_node: MaxOfNode = None,
    retriever: Retriever = None,
    es_url: EsUrl = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Another model than the run began with.")] = None,
    trim: Trim = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Go on with a run that ended early or waits for an answer. It goes on from its last checkpoint."""
    said = _said(answer, approve=approve, edit=edit, reject=reject, reason=reason)
    by_id = _read_answers(answers) if answers else {}
    if said is None and interrupt is not None:
        raise UsageError("--id says which interrupt is answered, and no answer is given", hint="add --approve, --edit, ...")
    if said is not None and interrupt is not None:
        by_id, said = {**by_id, interrupt: said}, None
    flags = {
        "model.name": model,
        "run.trim": trim or None,
        "tools.mcp": mcp,
        "tools.allow": allow,
        "tools.deny": deny,
        "budget.steps": max_steps,
        "budget.model_calls": max_model_calls,
        "budget.tokens": max_tokens,
        "budget.seconds": max_seconds,
        "budget.money": max_money,
        "budget.nodes": max_of_node or None,
        "retrieval.retriever": retriever,
        "elasticsearch.url": es_url,
    }
    with open_runtime(flags, quiet=quiet) as runtime:
        events = runtime.stream_resume(run_id, answer=said, answers=by_id)
        follow(events, quiet=quiet, as_json=as_json, files=runtime.settings.files)


def fork(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="Id of the run to fork, a unique beginning of it, or 'last'.")],
    at: Annotated[
        str | None, typer.Option("--at", help="The checkpoint to begin at, of a subgraph too (see: agentops history).")
    ] = None,
    step: Annotated[
        int | None, typer.Option("--step", help="Begin after this step. Default: the last that has something after it.")
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="FIELD=JSON: another value in the state there. Repeat for several.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A folder of prompts in place of those of their names that the graph has.")
    ] = None,
    graph: Annotated[
        str | None, typer.Option(help="Go on with this graph instead: a name or path/to/file.py:attribute.", autocompletion=names)
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Another model than the run began with.")] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed of sampling.")] = None,
    max_steps: MaxSteps = None,
    max_model_calls: MaxModelCalls = None,
    max_tokens: MaxTokens = None,
    max_seconds: MaxSeconds = None,
    max_money: MaxMoney = None,
    max_of_node: MaxOfNode = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Begin a new run, on a new thread, from a checkpoint of another one. Models are called; the other run stays as it is."""
    if at is not None and step is not None:
        raise UsageError("give one of --at and --step", hint="--at takes any checkpoint, --step one of the graph itself")
    flags = {
        "model.name": model,
        "run.seed": seed,
        "budget.steps": max_steps,
        "budget.model_calls": max_model_calls,
        "budget.tokens": max_tokens,
        "budget.seconds": max_seconds,
        "budget.money": max_money,
        "budget.nodes": max_of_node or None,
    }
    given = dict(_change(one) for one in changes or ())
    with open_runtime(flags, quiet=quiet) as runtime:
        events = runtime.stream_fork(run_id, at=at, step=step, changes=given, prompts=prompts, graph=graph)
        follow(events, quiet=quiet, as_json=as_json, files=runtime.settings.files)


def _change(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        raise UsageError(f"--set {text[:80]!r} is no FIELD=JSON", hint="""--set 'question="why?"' or --set 'k=3'""") from None


def cancel(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="Id of a run, a unique beginning of it, or 'last'.")],
    as_json: AsJson = False,
) -> None:
    """Stop a run at work in any process of this machine, within a token, or one that waits. It can be resumed."""
    from agentops import cancelling
    from agentops.errors import RunNotFound
    from agentops.settings import load_settings

    settings = load_settings()
    try:
        run_id = cancelling.cancel(settings, run_id)
    except RunNotFound:
        from agentops.runtime import Runtime

        with Runtime(settings) as runtime:
            run_id = runtime.cancel(run_id)
    deadline = time.monotonic() + _STOPPING_S
    while (busy := cancelling.is_at_work(settings, run_id)) and time.monotonic() < deadline:
        time.sleep(0.01)
    if as_json:
        print(json.dumps({"run_id": run_id, "stopped": not busy}))
    elif busy:
        print(f"run {run_id} was asked to stop and has not yet; see: agentops show {run_id}")
    else:
        print(f"run {run_id} has stopped; go on with: agentops resume {run_id}")


def _said(answer: str | None, *, approve: bool, edit: Path | None, reject: bool, reason: str) -> Any:
    """What a person says with the options of `resume`; None when nothing is said."""
    from agentops.records import Decision

    if sum((answer is not None, approve, edit is not None, reject)) > 1:
        raise UsageError(
            "give one of --answer, --approve, --edit and --reject", hint="for several interrupts use --id or --answers"
        )
    if reason and not (reject or edit):
        raise UsageError("--reason says why something is refused or edited", hint="use it with --reject or --edit")
    if approve:
        return Decision("approve")
    if reject:
        return Decision("reject", reason=reason)
    if edit is not None:
        return Decision("edit", _read_text(edit), reason)
    if answer is not None and answer.lstrip().startswith(("{", "[")):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(answer)
    return answer


def _read_answers(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is no JSON: {error}", hint='it holds answers by id: {"ID": {"kind": "approve"}}') from error
    if not isinstance(found, dict):
        raise UsageError(f"{file} holds no JSON object", hint='it holds answers by id: {"ID": {"kind": "approve"}}')
    return found


def _read_text(file: Path) -> str:
    text = _read_input("-", None) if str(file) == "-" else _read_input(None, file)
    return text.removesuffix("\n")


def _read_input(text: str | None, file: Path | None) -> str:
    if (text is None) == (file is None):
        raise UsageError(
            "give the input as an argument or with --input, not both and not neither", hint="agentops run rag 'a question'"
        )
    if file is not None:
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the input cannot be read from {file}: {error}", hint="it must be a UTF-8 text file") from error
    if text != "-":
        return str(text)
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not text: {error}", hint="it must be UTF-8") from error


@contextlib.contextmanager
def open_runtime(flags: dict[str, Any], *, quiet: bool) -> Iterator[Any]:
    from agentops.cli.progress import stages
    from agentops.settings import load_settings

    settings = load_settings(flags)
    with stages(settings.model.name, quiet=quiet) as progress:
        progress("start", 0, 0)
        from agentops.runtime import Runtime

        with Runtime(settings, progress=progress) as runtime, _draining(runtime.drain):
            progress("start", 1, 1)
            yield runtime


@contextlib.contextmanager
def _draining(drain: Callable[[], bool]) -> Iterator[None]:
    """Told to end (SIGTERM), the process ends at the next step boundary of its run, at once where none is at work or when it is
    told again."""

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if not drain():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def follow(
    events: Generator[RunEvent, None, None], *, quiet: bool = False, as_json: bool = False, files: Path | None = None
) -> RunResult:
    """Shows a run while it happens, and its result at the end. `files` is the folder that graphs write in.

    Raises:
        RunCancelled: Ctrl-C; the run is on record and can be resumed.
    """
    from agentops.records import RunResult, RunStarted

    steps = None if quiet or as_json else _Steps()
    run_id = ""
    result: RunResult | None = None
    try:
        # Closed before anything else ends, so that a run that is left half-way is on record as cancelled.
        with contextlib.closing(events):
            for event in events:
                if isinstance(event, RunStarted):
                    run_id = event.run_id
                elif isinstance(event, RunResult):
                    result = event
                    if as_json:
                        _print_json(event)
                    else:
                        _print_result(event, quiet=quiet, files=files)
                elif steps is not None:
                    steps.show(event)
    except KeyboardInterrupt:
        said = f"run {run_id} was cancelled" if run_id else "cancelled before the run began"
        raise RunCancelled(said, run_id=run_id, hint="" if run_id else "nothing was recorded") from None
    if result is None:
        raise RuntimeError("a run ended without a result")
    return result


class _Steps:
    """Steps and what the model writes in them, as they come, on standard error. Of steps side by side one has the floor: while
    it is in the middle of a line, the others wait, and what their model writes follows in one piece."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._held: dict[str, str] = {}
        self._later: list[str] = []
        self._floor = self._last = ""
        self._midline = False

    def show(self, event: RunEvent) -> None:
        from agentops.cli.render import clean
        from agentops.records import StepEnded, StepStarted, Token

        if isinstance(event, StepStarted):
            self._names[event.span] = clean(" / ".join((*event.path, event.node)))
            if not self._midline:
                self._begin(event.span)
        elif isinstance(event, Token):
            self._held[event.span] = self._held.get(event.span, "") + clean(event.text)
            if not self._midline and self._floor != event.span:
                self._begin(event.span)
            if self._floor == event.span:
                print(("" if self._midline else "  ") + self._held.pop(event.span), end="", file=sys.stderr, flush=True)
                self._midline = True
        elif isinstance(event, StepEnded):
            self._end(event.span, clean(_ended(event)))

    def _begin(self, span: str) -> None:
        if self._last != (head := f"▸ {self._names.get(span, '')}") or span not in self._held:
            self._line(head)
        self._floor = span

    def _end(self, span: str, ended: str) -> None:
        name, held = self._names.pop(span, ""), self._held.pop(span, "")
        if self._floor == span:
            self._line(f"  {ended}")
            self._floor = ""
            for line in self._later:
                self._line(line)
            self._later.clear()
            return
        mark, _, rest = ended.partition(" ")
        lines = [f"▸ {name}", f"  {held}", f"  {ended}"] if held else [f"{mark} {name}  {rest}"]
        if self._midline:
            self._later += lines
            return
        for line in lines:
            self._line(line)

    def _line(self, text: str) -> None:
        print(("\n" if self._midline else "") + text, file=sys.stderr, flush=True)
        self._midline = False
        self._last = text


def _ended(event: Any) -> str:
    mark = {"ok": "✓", "interrupted": "⏸", "cancelled": "■"}.get(event.status, "✗")
    return f"{mark} {event.duration_ms / 1000:.1f} s" + (f"  {event.detail}" if event.detail else "")


def _print_json(result: RunResult) -> None:
    from agentops.tracer import to_plain

    plain = dataclasses.replace(result, output=to_plain(result.output), interrupts=tuple(map(to_plain, result.interrupts)))
    print(json.dumps(to_plain(dataclasses.asdict(plain))))


def _print_result(result: RunResult, *, quiet: bool, files: Path | None) -> None:
    from agentops.cli.render import clean

    output = result.output if isinstance(result.output, dict) else {"output": result.output}
    if not quiet:
        print(file=sys.stderr)
    if result.status == "waiting":
        from agentops.cli.render import interrupt_lines

        for asked in result.interrupts:
            print("\n".join(interrupt_lines(result.run_id, asked, several=len(result.interrupts) > 1)))
    elif result.status == "done":
        print(clean(_answer(output)))
        sources = output["sources"] if isinstance(output.get("sources"), list) else []
        if sources:
            print()
        for number, source in enumerate(sources, 1):
            print(clean(_source(source, number)))
        if files is not None and isinstance(written := output.get("file"), str) and written:
            print(clean(f"\nwritten: {files / written}"))
    if not quiet:
        usage = result.usage
        print(
            f"\nrun {result.run_id} · thread {result.thread_id} · {result.status} · "
            f"{usage.computed_tokens:,} tokens computed, {usage.cached_tokens:,} cached, {usage.output_tokens:,} output · "
            f"{result.duration_ms / 1000:.1f} s",
            file=sys.stderr,
        )


def _source(source: Any, number: int) -> str:
    if not isinstance(source, dict):
        return f"[{number}] {source}"
    place = " > ".join(str(part) for part in (source.get("source"), source.get("heading")) if part)
    return f"[{source.get('n', number)}] {place or source}"


def _answer(output: dict[str, Any]) -> str:
    if isinstance(output.get("answer"), str):
        return str(output["answer"])
    messages = output.get("messages")
    if isinstance(messages, list) and messages:
        last = messages[-1]
        return str(last.get("content", last) if isinstance(last, dict) else getattr(last, "content", last))
    from agentops.tracer import to_plain

    return json.dumps(to_plain(output), ensure_ascii=False, indent=2)
