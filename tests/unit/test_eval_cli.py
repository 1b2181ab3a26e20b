"""`agentops eval`, `dataset`, `experiments` and `score`, as a user calls them."""

from __future__ import annotations

import io
import json
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from agentops import Runtime, Settings
from agentops.cli import main, progress
from agentops.cli.evaluate import _experiment_names, _metric_names
from agentops.store import open_store
from agentops.tracer import catch_up


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Cli = Callable[..., Done]

PARROT = """
    from typing import TypedDict
    from langgraph.graph import END, START, StateGraph

    class State(TypedDict, total=False):
        question: str
        answer: str

    async def answer(state):
        if state["question"] == "fail":
            raise ValueError("no luck")
        return {"answer": state["question"].WORD()}

    graph = StateGraph(State)
    graph.add_node("answer", answer)
    graph.add_edge(START, "answer")
    graph.add_edge("answer", END)
"""


@pytest.fixture
def cli(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs the console script's own function, in a folder with two graphs and a dataset."""
    monkeypatch.setenv("AGENTOPS_PATHS_HOME", str(settings.paths.home))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    for name, word in (("loud", "upper"), ("calm", "lower")):
        Path(f"{name}.py").write_text(textwrap.dedent(PARROT).replace("WORD", word))
    rows = [{"id": f"c{n}", "question": f"Word {n}", "answer": f"WORD {n}"} for n in range(6)]
    Path("cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def call(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["agentops", *arguments])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as left:
            code = int(left.code or 0)
        return Done(code, *capsys.readouterr())

    return call


def experiment(cli: Cli, graph: str, *more: str) -> Done:
    return cli("eval", "--dataset", "cases.jsonl", "--graph", f"{graph}.py:graph", "--metrics", "exact", *more)


def test_an_experiment_and_its_report_in_every_form(cli: Cli) -> None:
    done = experiment(cli, "loud", "--name", "loud", "--html", "report.html")
    assert done.code == 0, done.err
    assert "exact" in done.out
    assert "1.000" in done.out
    assert "6 cases, 6 run now, 6 judged now; 6 scored + 0 unscored = 6 asked" in done.err
    assert "<html" in Path("report.html").read_text()
    again = cli("eval", "--resume", "loud", "--json")
    assert "0 run now, 0 judged now; 6 scored + 0 unscored = 6 asked" in again.err
    (arm,) = json.loads(again.out)["arms"]
    assert [case["id"] for case in arm["cases"]] == [f"c{n}" for n in range(6)]
    assert "| exact |" in cli("eval", "--resume", "loud", "--markdown", "--quiet").out.replace("`", "")


class Terminal(io.StringIO):
    """What stands in for standard error of a terminal."""

    def isatty(self) -> bool:
        return True


def test_what_takes_long_shows_how_many_cases_are_done(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")

    def shown(after_s: float, *more: str) -> str:
        monkeypatch.setattr(progress, "AFTER_S", after_s)
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stderr", screen := Terminal())
            assert experiment(cli, "loud", *more).code == 0
        return screen.getvalue()

    assert "/6 cases" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown(0.0))
    for silent in (shown(60.0), shown(0.0, "--json"), shown(0.0, "--quiet")):
        assert "/6" not in silent
    assert shown(0.0, "--quiet") == ""
    monkeypatch.setattr(progress, "AFTER_S", 0.0)
    told = experiment(cli, "loud").err
    assert "/6" not in told, "standard error is no terminal"
    assert "6 cases, 6 run now" in told


def test_two_experiments_are_compared(cli: Cli) -> None:
    experiment(cli, "loud", "--quiet")
    experiment(cli, "calm", "--quiet")
    done = cli("eval", "--compare", "loud-cases", "calm-cases", "--json")
    assert done.code == 0, done.err
    comparison = json.loads(done.out)["comparison"]
    assert comparison["common"] == 6
    (exact,) = comparison["metrics"]
    assert (exact["difference"]["value"], exact["lower"], exact["verdict"]) == (-1.0, 6, "worse")
    assert exact["p"] == pytest.approx(2 / 64)
    assert cli("eval", "--compare", "loud-cases", "calm-cases", "--fail-under", "exact=.5").code == 1
    assert cli("eval", "--compare", "calm-cases", "loud-cases", "--fail-under", "exact=.5").code == 0
    assert cli("eval", "--compare", "calm-cases", "nobody").code == 1
    assert cli("eval", "--compare", "calm-cases", "calm-cases").code == 2
    listed = cli("experiments").out
    assert "loud-cases" in listed
    assert "6/6 cases" in listed
    assert "exact 0.000" in listed
    assert [one["means"] for one in json.loads(cli("experiments", "--json").out)] == [{"exact": 0.0}, {"exact": 1.0}]
    assert _experiment_names("lo") == ["loud-cases"]
    assert _metric_names("mrr,ex") == ["mrr,exact"]


def test_a_name_that_is_taken_gets_a_number(cli: Cli) -> None:
    experiment(cli, "loud", "--quiet")
    assert "experiment loud-cases-2 (exp_" in experiment(cli, "loud").err


def test_the_bar_decides_the_exit_code(cli: Cli) -> None:
    assert experiment(cli, "loud", "--fail-under", "exact=1").code == 0
    under = experiment(cli, "calm", "--fail-under", "exact=.9", "--fail-under", "latency_ms=100000")
    assert under.code == 1
    assert "under the bar: exact has a mean of 0.000 (6 scored" in under.err
    assert "latency_ms" in under.out, "what has a bar is measured"


def test_a_case_that_fails_does_not_fail_the_command(cli: Cli) -> None:
    Path("cases.jsonl").write_text('{"question": "fail", "answer": "x"}\n{"question": "a", "answer": "A"}\n')
    done = experiment(cli, "loud")
    assert done.code == 0
    assert "1 failed; 1 scored + 1 unscored = 2 asked" in done.err
    assert "no luck" in done.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "there is nothing to evaluate"),
        (("last", "--dataset", "cases.jsonl"), "do not go together"),
        (("--dataset", "cases.jsonl"), "a dataset is run through a graph"),
        (("--dataset", "none.jsonl", "--graph", "rag"), "none.jsonl cannot be read"),
        (("--dataset", "cases.jsonl", "--graph", "loud.py:graph", "--metrics", "exat"), "no metric is called 'exat'"),
        (("--dataset", "cases.jsonl", "--graph", "loud.py:graph", "--fail-under", "exact"), "'exact' is no bar"),
        (("--dataset", "cases.jsonl", "--graph", "loud.py:graph", "--name", "last"), "cannot name an experiment"),
        (("--dataset", "cases.jsonl", "--graph", "rag", "--prompt", "rag_write"), "names no prompt and file"),
        (("--dataset", "cases.jsonl", "--graph", "rag", "--prompt", "rag_write=none.md"), "cannot be read from none.md"),
        (("last", "--prompt", "a=b"), "--prompt does not go with this"),
        (("last", "--json", "--markdown"), "two forms of one report"),
        (("last", "--html", "none/report.html"), "there is no folder"),
    ],
)
def test_wrong_use_is_exit_code_2_and_says_how(cli: Cli, words: tuple[str, ...], said: str) -> None:
    done = cli("eval", *words)
    assert done.code == 2, done.err
    assert said in done.err
    assert " hint: " in done.err


def test_nothing_recorded_says_what_to_do_next(cli: Cli) -> None:
    assert "start with: agentops eval --dataset" in cli("experiments").out
    done = cli("eval", "last")
    assert (done.code, "nothing has been recorded yet" in done.err) == (1, True)
    assert cli("eval", "--since", "1h").code == 1
    assert cli("score", "last", "--up").code == 1


def test_people_say_what_they_think_of_runs_and_spans(cli: Cli, settings: Settings) -> None:
    experiment(cli, "loud", "--quiet")
    with open_store(settings) as store:
        run = store.runs(limit=1)[0].id
        span = next(one.id for one in store.spans(run) if one.kind == "node")
    assert cli("score", run, "--up", "--comment", "well\x1b[31m said", "--author", "ann").code == 0
    assert cli("score", "last", "exact", "0.25", "--author", "ann").code == 0
    assert cli("score", span, "helpful", "3").code == 0
    catch_up(settings)
    with open_store(settings) as store:
        said = {one.score.name: one for one in store.scores(run=run) if one.score.source == "human"}
    assert [(said[name].score.value, said[name].author) for name in ("thumbs", "exact")] == [(1.0, "ann"), (0.25, "ann")]
    assert said["helpful"].span_id == span
    shown = cli("eval", run, "--metrics", "latency_ms", "--quiet")
    assert "ann" in shown.out
    assert "well" in shown.out
    assert "\x1b[31m" not in shown.out
    for wrong in ((), ("--up", "--down"), ("helpful",), ("helpful", "nan"), ("helpful", "1", "--up")):
        assert cli("score", "last", *wrong).code == 2
    assert cli("score", "sp_none", "--up").code == 1


def test_a_dataset_is_checked_and_made_from_runs(cli: Cli) -> None:
    checked = cli("dataset", "check", "cases.jsonl")
    assert checked.code == 0
    assert "6 cases, hash b2:" in checked.out
    about = json.loads(cli("dataset", "check", "cases.jsonl", "--json").out)
    assert (about["cases"], about["columns"]) == (6, {"question": 6, "answer": 6})
    Path("bad.jsonl").write_text('{"question": "a"}\n{"answer": "b"}\n')
    bad = cli("dataset", "check", "bad.jsonl")
    assert (bad.code, 'bad.jsonl, line 2 has no "question"' in bad.err) == (2, True)

    experiment(cli, "calm", "--quiet")
    made = cli("dataset", "from-runs", "--since", "1h", "--output", "made.jsonl")
    assert made.code == 0, made.err
    rows = [json.loads(line) for line in Path("made.jsonl").read_text().splitlines()]
    assert sorted((row["question"], row["answer"]) for row in rows) == [(f"Word {n}", f"word {n}") for n in range(6)]
    assert cli("dataset", "check", "made.jsonl").code == 0
    assert cli("dataset", "from-runs", "--since", "1h", "--output", "made.jsonl").code == 2
    below = cli("dataset", "from-runs", "--worse-than", "exact=.5")
    assert len(below.out.splitlines()) == 6
    assert "answer" not in json.loads(below.out.splitlines()[0])
    assert cli("dataset", "from-runs", "--worse-than", "exact=0").code == 1
    assert cli("dataset", "from-runs").code == 2
    assert experiment(cli, "calm", "--dataset", "made.jsonl", "--fail-under", "exact=1").code == 0


def test_worse_is_more_where_less_is_better(cli: Cli, settings: Settings) -> None:
    experiment(cli, "loud", "--quiet")
    with open_store(settings) as store:
        runs = [run.id for run in store.runs(limit=6)]
    for run, value in zip(runs, (0.1, 0.5, 0.9), strict=False):
        assert cli("score", run, "hallucination", str(value)).code == 0
        assert cli("score", run, "helpful", str(value)).code == 0

    def worse(bar: str) -> set[str]:
        done = cli("dataset", "from-runs", "--worse-than", bar)
        return {json.loads(line)["id"] for line in done.out.splitlines()}

    assert worse("hallucination=.5") == {runs[2]}
    assert worse("helpful=.5") == {runs[0]}
    assert worse("helpful=.95") == set(runs[:3]), "a run without a score is not worse"
    wrong = cli("dataset", "from-runs", "--worse-than", "helpful")
    assert (wrong.code, "--worse-than faithfulness=.5" in wrong.err) == (2, True)


PROMPTED = """
    from typing import TypedDict
    from langgraph.graph import END, START, StateGraph
    from langgraph.runtime import Runtime
    from agentops import Context

    class State(TypedDict, total=False):
        question: str
        answer: str

    async def answer(state, runtime: Runtime[Context]):
        return {"answer": (await runtime.context.ask("say", question=state["question"])).text}

    graph = StateGraph(State, context_schema=Context)
    graph.add_node("answer", answer)
    graph.add_edge(START, "answer")
    graph.add_edge("answer", END)
"""


def test_a_prompt_is_replaced_for_an_experiment_and_when_it_is_taken_up(
    cli: Cli, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agentops import ScriptedEngine
    from agentops.retrieval.embed import HashEmbedder

    echoes = lambda settings, progress: ScriptedEngine(lambda request: request.messages[-1].content)  # noqa: E731
    monkeypatch.setattr("agentops.runtime.open_engine", echoes)
    monkeypatch.setattr(Runtime, "embedder", HashEmbedder())
    Path("prompts").mkdir()
    Path("prompts/say.md").write_text("## user\nfile: {question}\n")
    Path("other.md").write_text("## user\nother: {question}\n")
    Path("strange.md").write_text("## user\nother: {questions}\n")
    Path("prompted.py").write_text(textwrap.dedent(PROMPTED))
    Path("cases.jsonl").write_text('{"question": "q", "answer": "other: q"}\n{"question": "r", "answer": "other: r"}\n')
    assert experiment(cli, "prompted", "--fail-under", "exact=1").code == 1
    wrong = experiment(cli, "prompted", "--prompt", "say=strange.md")
    assert "has other variables than the one whose place it takes" in wrong.err
    assert "no prompt is called 'sya'" in experiment(cli, "prompted", "--prompt", "sya=other.md").err
    done = experiment(cli, "prompted", "--prompt", "say=other.md", "--name", "other", "--fail-under", "exact=1")
    assert done.code == 0, done.err
    Path("other.md").unlink()
    assert cli("eval", "--resume", "other", "--metrics", "exact,tokens", "--fail-under", "exact=1").code == 0
    with open_store(settings) as store:
        found = store.experiment("other")
        assert store.payload(found.settings["prompts"]["say"]) == "## user\nother: {question}\n"
        # Each run's own record says which prompt was used, and has its text.
        used = {
            (span.prompt_name, store.prompt(span.prompt_version).template)
            for case in store.cases(found.id)
            for span in store.spans(case.run_id or "")
            if span.prompt_version
        }
        assert used == {("say", "## user\nother: {question}\n")}


@pytest.mark.model
@pytest.mark.long
def test_three_cases_with_the_real_model(cli: Cli, settings: Settings, model_folder: Path, embedder_folder: Path) -> None:
    Path("docs").mkdir()
    Path("docs/tea.md").write_text("# Tea\n\nGreen tea is brewed at 80 degrees. Black tea is brewed at 95 degrees.\n")
    Path("docs/cups.md").write_text("# Cups\n\nA cup holds 250 millilitres. Cups are washed by hand.\n")
    rows = [
        {"question": "At how many degrees is green tea brewed?", "answer": "Green tea is brewed at 80 degrees.", "pattern": "80"},
        {"question": "How much does a cup hold?", "answer": "A cup holds 250 millilitres.", "pattern": "250"},
        {"question": "Who won the football world cup in 1966?", "pattern": "do not know"},
    ]
    Path("cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli("ingest", "docs", "--collection", "tea").code == 0
    done = cli("eval", "-d", "cases.jsonl", "-g", "rag", "-c", "tea", "--json", "--fail-under", "regex=.6")
    assert done.code == 0, done.err
    (arm,) = json.loads(done.out)["arms"]
    metrics = {one["name"]: one for one in arm["metrics"]}
    assert {"faithfulness", "answer_relevancy", "context_recall", "hallucination", "toxicity", "citations_support"} <= set(
        metrics
    )
    for one in metrics.values():
        assert len(one["values"]) + sum(one["unscored"].values()) == one["asked"] == 3
    assert metrics["faithfulness"]["judged"] == {"computed": 3}
    assert metrics["context_recall"]["unscored"] == {"no_reference": 1}
    assert metrics["citations_resolve"]["interval"]["value"] == 1
