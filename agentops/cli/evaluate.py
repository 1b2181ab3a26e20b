"""`agentops eval`, `experiments` and `score`: scores what is on record, runs datasets, compares, and takes what people say."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentops.cli.graph import names as graph_names
from agentops.errors import RunCancelled, RunNotFound, UsageError

if TYPE_CHECKING:
    from agentops.graph import LoadedGraph
    from agentops.runtime import Runtime
    from agentops.settings import Settings
    from agentops.store import ExperimentRow, Store
    from agentops.tracer import Tracer
    from evals.report import Bar, Report

_MOST_RUNS = 100_000
_KEPT = (
    *("model.name", "run.seed", "run.trim"),
    *("retrieval.k", "retrieval.retriever", "retrieval.collection", "retrieval.embedder", "retrieval.on_error"),
    *("budget.steps", "budget.model_calls", "budget.tokens", "budget.seconds"),
)
_KEPT_OF_JUDGE = ("judge.how", "judge.url", "judge.model", "judge.timeout_s", "judge.retries", "judge.max_tokens")
"""Settings that an experiment is taken up with again, those of the judge where there is one. No secrets are among them."""


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate)
    app.command()(experiments)
    app.command()(score)


def _metric_names(incomplete: str) -> list[str]:
    """For the shell's completion: names after the last comma."""
    from evals.metrics.registry import ENTRIES

    before, comma, last = incomplete.rpartition(",")
    return [before + comma + name for name in ENTRIES if name.startswith(last)]


def _experiment_names(incomplete: str) -> list[str]:
    """For the shell's completion, which must stay silent whatever is wrong here."""
    with contextlib.suppress(Exception), _record() as store:
        found = store.experiments(limit=1_000)
        return list(dict.fromkeys(name for one in found for name in (one.name, one.id) if name.startswith(incomplete)))
    return []


def evaluate(
    runs: Annotated[list[str] | None, typer.Argument(metavar="RUN", help="Recorded runs to score: ids, or last.")] = None,
    thread: Annotated[str | None, typer.Option("--thread", "-t", help="Score the recorded runs of this thread.")] = None,
    since: Annotated[str | None, typer.Option(help="Score runs recorded since: 30m, 1h, 7d, or 2026-11-01.")] = None,
    dataset: Annotated[
        Path | None, typer.Option("--dataset", "-d", help="Run an experiment: every case of this JSONL or CSV file, scored.")
    ] = None,
    graph: Annotated[
        str | None,
        typer.Option("--graph", "-g", help="Graph of the experiment; of recorded runs only those.", autocompletion=graph_names),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Model that runs the graph, and judges by default.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FILE", help="Put this file in the place of the graph's prompt. Repeatable.")
    ] = None,
    collection: Annotated[str | None, typer.Option("--collection", "-c", help="Collection of documents to search.")] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(help="Metrics, with commas, or all; else those that fit the cases.", autocompletion=_metric_names),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the experiment.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Cases at a time.")] = 4,
    timeout: Annotated[float, typer.Option(min=0.01, help="Give up on one score of one case after so many seconds.")] = 600.0,
    resume: Annotated[
        str | None, typer.Option(help="Take up an experiment that was stopped.", autocompletion=_experiment_names)
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="With --resume: run the cases that failed again.")] = False,
    compare: Annotated[
        tuple[str, str],
        typer.Option(metavar="A B", help="Compare two experiments: what B changed.", autocompletion=_experiment_names),
    ] = ("", ""),
    common: Annotated[bool, typer.Option("--common", help="Compare the cases that two different datasets have both.")] = False,
    fail_under: Annotated[
        list[str] | None, typer.Option(metavar="METRIC=NUMBER", help="Exit code 1 where the mean is worse. Repeatable.")
    ] = None,
    judge: Annotated[str | None, typer.Option(help="Name of the judging model at --judge-url.")] = None,
    judge_url: Annotated[str | None, typer.Option(help="Server with the API of OpenAI whose model judges.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the report as Markdown, for a pull request.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the report, with plots, as one HTML page.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the report.")] = False,
) -> None:
    """Score recorded runs, run a dataset as an experiment, or compare two experiments."""
    from evals.metrics.registry import chosen
    from evals.report import parse_bars

    bars = parse_bars(fail_under or ())
    recorded = bool(runs or thread or since)
    _one_of(
        {"RUN, --thread or --since": recorded, "--dataset": bool(dataset), "--resume": bool(resume), "--compare": any(compare)}
    )
    if as_json and markdown:
        raise UsageError("--json and --markdown are two forms of one report", hint="give one of them")
    if html is not None and not html.absolute().parent.is_dir():
        raise UsageError(f"there is no folder for {html}", hint="make it first")
    for flag, given, fits in (
        ("--prompt", prompt, bool(dataset)),
        ("--name", name, bool(dataset)),
        ("--collection", collection, bool(dataset)),
        ("--retry-failed", retry_failed, bool(resume)),
        ("--common", common, any(compare)),
        ("--graph", graph, bool(dataset) or recorded),
        ("--model", model, bool(dataset) or recorded),
        ("--metrics", metrics, not any(compare)),
    ):
        if given and not fits:
            raise UsageError(f"{flag} does not go with this", hint="see: agentops eval --help")
    if not any(compare):
        _known_bars(bars)
    asked = [one.strip() for part in metrics or () for one in part.split(",") if one.strip()]
    # What has a bar is measured, also where it was not asked for.
    wanted = chosen([*asked, *(bar.metric for bar in bars)] if asked else ()) if not any(compare) else ()
    work = _Work(
        flags={"model.name": model, "judge.model": judge, "judge.url": judge_url},
        metrics=wanted,
        extra=tuple(bar.metric for bar in bars),
        concurrency=concurrency,
        timeout_s=timeout,
        quiet=quiet,
        as_json=as_json,
    )
    if any(compare):
        report = work.comparison(compare, common=common)
    elif dataset is not None:
        report = work.experiment(dataset, graph or "", name, prompt or [], collection)
    elif resume is not None:
        report = work.resumed(resume, retry_failed=retry_failed)
    else:
        report = work.recorded(runs or [], thread, since, graph)
    if any(compare):
        _known_bars(bar for bar in bars if report.arms[-1].metric(bar.metric) is None)
    _show(report, as_json=as_json, markdown=markdown, html=html)
    from evals.report import failures

    if missed := failures(report, bars):
        from agentops.cli.render import clean

        for line in missed:
            print(clean(f"under the bar: {line}"), file=sys.stderr)
        raise typer.Exit(1)


def _known_bars(bars: Iterable[Bar]) -> None:
    """
    Raises:
        UsageError: a bar is for what is no metric.
    """
    from evals.metrics.registry import ENTRIES, chosen

    for bar in bars:
        if bar.metric not in ENTRIES and chosen([bar.metric]):
            raise UsageError(f"a bar is for one metric, not for '{bar.metric}'", hint="give each metric one --fail-under")


def _one_of(modes: Mapping[str, bool]) -> None:
    given = [mode for mode, there in modes.items() if there]
    if not given:
        raise UsageError(
            "there is nothing to evaluate",
            hint="agentops eval last, or agentops eval --dataset FILE --graph rag, or agentops eval --compare A B",
        )
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} do not go together", hint="see: agentops eval --help")


@dataclasses.dataclass(frozen=True, slots=True)
class _Work:
    """What an evaluation is done with. `metrics` are those asked for, none where nothing was; `extra` are measured as well."""

    flags: Mapping[str, Any]
    metrics: tuple[str, ...]
    extra: tuple[str, ...]
    concurrency: int
    timeout_s: float
    quiet: bool
    as_json: bool

    def recorded(self, ids: Sequence[str], thread: str | None, since: str | None, graph: str | None) -> Report:
        """Scores runs as they are on record."""
        from agentops.cli.record import _reference, _since
        from agentops.sync import run_sync
        from evals.experiment import score_runs
        from evals.metrics.registry import make_metrics
        from evals.report import report_of

        with _record() as store:
            found = [store.run(one) for one in ids]
            if thread is not None or since is not None:
                about = {"graph": _reference(graph) if graph else None, "since_ns": _since(since), "limit": _MOST_RUNS}
                found += store.runs(thread=thread, **about)[::-1]  # type: ignore[arg-type]
        over = {run.id: run for run in found if run.status not in ("queued", "running")}
        if not over:
            said = "they still run" if found else "none was recorded" + (f" in thread '{thread}'" if thread else "")
            raise RunNotFound(f"there are no runs to score: {said}", hint="list them with: agentops runs")
        names = self._names([None])
        with self._opened({}) as (runtime, tracer, told):
            self._prepare(runtime, names, graph=None)

            async def work() -> Any:
                async with make_metrics(
                    names, runtime.settings, engine=lambda: runtime.engine, embedder=lambda: runtime.embedder
                ) as made:
                    return await score_runs(
                        runtime, tracer, over, made, concurrency=self.concurrency, timeout_s=self.timeout_s, told=told
                    )

            try:
                tally = run_sync(work())
            except KeyboardInterrupt:
                raise RunCancelled(
                    "stopped; what was scored is on record", run_id="", hint="give the same command to go on"
                ) from None
        self._say(tally)
        with _record() as store:
            return report_of(store, runs=list(over), **_behind(store))

    def experiment(self, file: Path, graph: str, name: str | None, prompts: Sequence[str], collection: str | None) -> Report:
        """Runs and scores a dataset."""
        from agentops.graph import load_graph
        from evals.datasets import load_dataset
        from evals.experiment import begin
        from evals.metrics.registry import needs_judge

        if not graph:
            raise UsageError("a dataset is run through a graph", hint="name it: --graph rag (see: agentops graphs)")
        data = load_dataset(file)
        self._note(data.notes)
        names = self._names([case.reference for case in data.cases])
        loaded = load_graph(graph)
        instead = {key: _prompt_text(path) for key, path in map(_prompt_file, prompts)}
        loaded = _with_prompts(loaded, instead)
        with self._opened({}) as (runtime, tracer, told):
            settings = runtime.settings
            self._prepare(runtime, names, loaded)
            kept = (*_KEPT, *(_KEPT_OF_JUDGE if needs_judge(names) else ()))
            about = {
                "model": settings.model.name,
                "metrics": list(names),
                "collection": collection,
                "prompts": {key: tracer.content(text) for key, text in instead.items()},
                "settings": {key: settings.get(key) for key in kept},
                # Where a key may go depends on who named the address.
                "sources": {key: settings.source(key) for key in kept},
            }
            with _record() as store:
                called = _fresh_name(store, f"{loaded.name}-{file.stem}"[:80]) if name is None else _sound_name(name)
            experiment_id = begin(tracer, data, loaded, name=called, settings=about)
            self._note([f"experiment {called} ({experiment_id}): {len(data.cases)} cases, {len(names)} metrics"])
            self._carry_out(runtime, tracer, told, experiment_id, loaded, names, collection)
        return _report_of(experiment_id)

    def resumed(self, wanted: str, *, retry_failed: bool) -> Report:
        """Goes on with an experiment as it was begun."""
        from agentops.graph import load_graph
        from evals.metrics.registry import chosen

        with _record() as store:
            row = store.experiment(wanted)
            about = row.settings
            instead = {str(key): str(store.whole(kept)) for key, kept in dict(about.get("prompts") or {}).items()}
        if row.status == "running":
            raise UsageError(f"experiment {row.name or row.id} is still running", hint="stop it first, or wait for its end")
        self._check_judge(row)
        names = chosen((*(self.metrics or tuple(about.get("metrics") or ())), *self.extra))
        loaded = _with_prompts(load_graph(row.graph, recorded=True), instead)
        collection = about.get("collection")
        with self._opened(about) as (runtime, tracer, told):
            self._prepare(runtime, names, loaded)
            collection = str(collection) if collection else None
            self._carry_out(runtime, tracer, told, row.id, loaded, names, collection, retry_failed=retry_failed)
        return _report_of(row.id)

    def comparison(self, pair: tuple[str, str], *, common: bool) -> Report:
        from evals.report import compare

        with _record() as store:
            return compare(store, *pair, common=common, **_behind(store))

    # -- what they share

    def _names(self, references: Sequence[Any]) -> tuple[str, ...]:
        from evals.metrics.registry import chosen, fitting
        from evals.samples import Reference

        return self.metrics or chosen([*fitting(one or Reference() for one in references), *self.extra])

    def _check_judge(self, row: ExperimentRow) -> None:
        """
        Raises:
            UsageError: another judge is asked for than the one that the experiment was begun with.
        """
        kept = dict(row.settings.get("settings") or {})
        asked = {key: self.flags.get(key) for key in ("judge.model", "judge.url")}
        if any(value is not None and key in kept and kept[key] != value for key, value in asked.items()):
            begun = f"{kept['judge.model']} at {kept['judge.url']}" if kept.get("judge.url") else "its engine's own model"
            raise UsageError(
                f"experiment {row.name or row.id} was begun with {begun} as its judge, and two judges' scores have no mean",
                hint="leave out --judge and --judge-url, or begin another experiment",
            )

    def _prepare(self, runtime: Runtime, names: Sequence[str], graph: LoadedGraph | None) -> None:
        """Opens the model where one is needed, with its own progress and before anything is begun."""
        from evals.judge import check_judge
        from evals.metrics.registry import needs_embedder, needs_judge, needs_model

        if needs_judge(names):
            check_judge(runtime.settings)
        if needs_model(names, runtime.settings) or (graph is not None and graph.uses_context):
            _ = runtime.engine
        if needs_embedder(names):
            _ = runtime.embedder

    def _carry_out(
        self,
        runtime: Runtime,
        tracer: Tracer,
        told: Callable[[int, int], None],
        experiment_id: str,
        graph: LoadedGraph,
        names: Sequence[str],
        collection: str | None,
        *,
        retry_failed: bool = False,
    ) -> None:
        from agentops.sync import run_sync
        from evals.experiment import carry_out
        from evals.metrics.registry import make_metrics

        async def work() -> Any:
            async with make_metrics(
                names, runtime.settings, engine=lambda: runtime.engine, embedder=lambda: runtime.embedder
            ) as made:
                return await carry_out(
                    runtime,
                    tracer,
                    experiment_id,
                    graph,
                    made,
                    concurrency=self.concurrency,
                    timeout_s=self.timeout_s,
                    collection=collection,
                    retry_failed=retry_failed,
                    told=told,
                )

        try:
            self._say(run_sync(work()))
        except KeyboardInterrupt:
            raise RunCancelled(
                "the experiment was stopped; what was done is on record",
                run_id="",
                hint=f"go on with: agentops eval --resume {experiment_id}",
            ) from None

    @contextlib.contextmanager
    def _opened(self, begun: Mapping[str, Any]) -> Iterator[tuple[Runtime, Tracer, Callable[[int, int], None]]]:
        from agentops.cli.progress import counted, stages
        from agentops.clock import SystemClock, UlidSource
        from agentops.settings import load_settings
        from agentops.tracer import open_tracer

        given = {key: value for key, value in self.flags.items() if value is not None}
        settings = _as_begun(load_settings(given), begun)
        with stages(settings.model.name, quiet=self.quiet) as progress:
            progress("start", 0, 0)
            from agentops.runtime import Runtime

            with Runtime(settings, progress=progress) as runtime:
                clock = SystemClock()
                tracer = open_tracer(settings, clock=clock, ids=UlidSource(clock))
                progress("start", 1, 1)
                with counted("cases", quiet=self.quiet or self.as_json) as tell, contextlib.closing(tracer):
                    yield runtime, tracer, tell

    def _say(self, tally: Any) -> None:
        parts = [f"{tally.cases} {'case' if tally.cases == 1 else 'cases'}", f"{tally.run} run now", f"{tally.judged} judged now"]
        parts += [f"{tally.failed} failed"] if tally.failed else []
        self._note([f"{', '.join(parts)}; {tally.scored} scored + {tally.unscored} unscored = {tally.asked} asked"])

    def _note(self, lines: Sequence[str]) -> None:
        from agentops.cli.render import clean

        for line in lines if not self.quiet else ():
            print(clean(line), file=sys.stderr, flush=True)


# --- reports ---


def _report_of(experiment_id: str) -> Report:
    from evals.report import report_of

    with _record() as store:
        return report_of(store, experiment=experiment_id, **_behind(store))


def _behind(store: Store) -> dict[str, Any]:
    """What is behind a report's numbers: scales of metrics, samples of cases, traces of runs."""
    from agentops.cli.render import trace_tree
    from evals.metrics.registry import ENTRIES
    from evals.reading import Samples
    from evals.report import Scale

    def trace(run_id: str) -> list[str]:
        return [line.plain for line in trace_tree(store.spans(run_id), 110)]

    scales = {
        one.name: Scale(one.low, one.high if math.isfinite(one.high) else None, one.better, one.binary)
        for one in ENTRIES.values()
    }
    return {"scales": scales, "sample": Samples(store), "trace": trace}


def _show(report: Report, *, as_json: bool, markdown: bool, html: Path | None) -> None:
    from agentops.cli.record import _console
    from evals.report import to_html, to_json, to_markdown, to_terminal

    if html is not None:
        try:
            html.write_text(to_html(report), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{html} cannot be written: {error.strerror}", hint="name another file") from None
    if as_json:
        print(json.dumps(to_json(report), indent=2))
    elif markdown:
        print(to_markdown(report))
    else:
        _console().print(to_terminal(report))
    if html is not None:
        print(f"the report is in {html}", file=sys.stderr)


# --- what an experiment is begun with ---


def _as_begun(settings: Settings, begun: Mapping[str, Any]) -> Settings:
    """The settings with those that an experiment was begun with, and who gave them then."""
    kept, sources = dict(begun.get("settings") or {}), dict(begun.get("sources") or {})
    for key in (*_KEPT, *_KEPT_OF_JUDGE):
        if key in kept and kept[key] != settings.get(key):
            section, _, name = key.partition(".")
            part = dataclasses.replace(getattr(settings, section), **{name: kept[key]})
            source = str(sources.get(key, "the experiment"))
            settings = dataclasses.replace(settings, **{section: part}, sources={**settings.sources, key: source})
    return settings


def _prompt_file(text: str) -> tuple[str, Path]:
    name, equals, file = text.partition("=")
    if not equals or not name or not file:
        raise UsageError(f"'{text}' names no prompt and file", hint="write it as: --prompt rag_write=my_prompt.md")
    return name, Path(file)


def _prompt_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the prompt cannot be read from {file}: {error}", hint="it must be a UTF-8 text file") from None


def _with_prompts(graph: LoadedGraph, instead: Mapping[str, str]) -> LoadedGraph:
    from agentops.prompts import Prompt

    if not instead:
        return graph
    prompts = graph.prompts.replaced(Prompt(name, text) for name, text in instead.items())
    return dataclasses.replace(graph, prompts=prompts)


def _sound_name(name: str) -> str:
    if not name.strip() or len(name) > 80 or not name.isprintable() or name == "last" or name.startswith("exp_"):
        raise UsageError("this cannot name an experiment", hint="use one line of up to 80 characters, not 'last' or 'exp_...'")
    return name


def _fresh_name(store: Store, name: str) -> str:
    """The name, with a number where an experiment has it already."""
    taken = {one.name for one in store.experiments(limit=_MOST_RUNS)}
    return next(one for number in range(1, _MOST_RUNS) if (one := name if number == 1 else f"{name}-{number}") not in taken)


@contextlib.contextmanager
def _record() -> Iterator[Store]:
    from agentops.cli.record import _record as opened

    with opened() as store:
        yield store


# --- experiments, and what people say ---


def experiments(
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="At most so many, newest first.")] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """List experiments, newest first, with the means of their scores."""
    with _record() as store:
        rows = [(row, *_standing(store, row)) for row in store.experiments(limit=limit)]
    if as_json:
        plain = [{**dataclasses.asdict(row), "cases_done": done, "means": means} for row, done, means in rows]
        print(json.dumps(plain, indent=2))
        return
    if not rows:
        print("no experiments yet; start with: agentops eval --dataset FILE --graph rag")
        return
    from rich.text import Text

    from agentops.cli.record import _console
    from agentops.cli.render import STATUS_COLOURS, moment, one_line
    from agentops.text import short_name

    console = _console()
    widths = [max(len(one_line(text, 40)) for text in column) for column in zip(*(_cells(row) for row, *_ in rows), strict=True)]
    for row, done, means in rows:
        first = "  ".join(one_line(cell, 40).ljust(width) for cell, width in zip(_cells(row), widths, strict=True))
        line = Text(f"{first}  ")
        line.append(f"{row.status:9}", style=STATUS_COLOURS.get(row.status, ""))
        line.append(f"  {moment(row.started_ns)}  {done}/{row.cases} cases  {one_line(short_name(row.graph), 30)}")
        line.append("  " + "  ".join(f"{one_line(name, 40)} {mean:.3f}" for name, mean in means.items()), style="dim")
        line.rstrip()
        console.print(line)


def _cells(row: ExperimentRow) -> tuple[str, ...]:
    return row.name or "-", row.id, row.dataset


def _standing(store: Store, row: ExperimentRow) -> tuple[int, dict[str, float]]:
    """How many cases have ended, and the mean of each metric's latest scores."""
    done = sum(case.status in ("done", "failed", "waiting") for case in store.cases(row.id))
    values: dict[str, dict[str, float]] = {}
    for one in store.scores(experiment=row.id):
        if one.score.source != "human":
            of_metric = values.setdefault(one.score.name, {})
            of_metric.pop(one.case_id or "", None)
            if one.score.value is not None:
                of_metric[one.case_id or ""] = one.score.value
    return done, {name: math.fsum(found.values()) / len(found) for name, found in values.items() if found}


def score(
    target: Annotated[str, typer.Argument(metavar="RUN|SPAN", help="A run's or a span's id, or last.")],
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="What is scored, such as helpful; without it, the answer as a whole.")
    ] = None,
    value: Annotated[float | None, typer.Argument(metavar="[VALUE]", help="A number.")] = None,
    up: Annotated[bool, typer.Option("--up", help="Thumb up: the same as the value 1.")] = False,
    down: Annotated[bool, typer.Option("--down", help="Thumb down: the same as the value 0.")] = False,
    comment: Annotated[str, typer.Option(help="Why.")] = "",
    author: Annotated[str | None, typer.Option(help="Who says so; else the name of this user.")] = None,
) -> None:
    """Say what you think of a run or a span. It is shown beside the judge's scores in: agentops eval RUN."""
    from evals.report.build import THUMBS

    if (value is not None) + up + down != 1:
        raise UsageError(
            "a score needs one value", hint="agentops score last --up, or agentops score last helpful 0.5 --comment 'why'"
        )
    number = 1.0 if up else 0.0 if down else value
    if number is None or not math.isfinite(number):
        raise UsageError("a score is a finite number", hint="give one, such as 0.5, or --up or --down")
    name = name or THUMBS
    if not name.strip() or len(name) > 80 or not name.isprintable():
        raise UsageError("this cannot name a score", hint="use one line of up to 80 characters, such as helpful")
    from evals.metrics.registry import ENTRIES

    if (scale := ENTRIES.get(name)) is not None and not scale.low <= number <= scale.high:
        raise UsageError(
            f"{name} is a metric from {scale.low:g} to {scale.high:g}",
            hint="give a number between, or a name of your own: agentops score last helpful 7",
        )
    from agentops.cli.render import clean
    from agentops.clock import SystemClock, UlidSource
    from agentops.records import Score
    from agentops.settings import load_settings
    from agentops.tracer.recorder import open_tracer

    run_id, span_id = _scored(target)
    by = author if author is not None else _user()
    clock = SystemClock()
    with contextlib.closing(open_tracer(load_settings(), clock=clock, ids=UlidSource(clock))) as tracer:
        tracer.score(Score(name, number, "human", comment=comment), run_id=run_id, span_id=span_id, author=by)
    print(clean(f"{name} {number:g} for {span_id or run_id}, said by {by}"))


def _scored(target: str) -> tuple[str, str | None]:
    """The run that is meant, and the span where one is."""
    with _record() as store:
        if not target.startswith("sp_"):
            try:
                return store.run(target).id, None
            except RunNotFound as error:
                if target.startswith("run_") or target == "last" or "more than one" in str(error):
                    raise
        try:
            span = store.span(target)
        except RunNotFound as error:
            if target.startswith("sp_"):
                raise
            raise RunNotFound(f"no run and no span is called '{target}'", hint=error.hint) from None
        return span.run_id, span.id


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "somebody"
