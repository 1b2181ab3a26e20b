"""`agentops eval`, `dataset`, `experiments` and `score`, as a user calls them."""

from __future__ import annotations

import errno
import io
import json
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import pytest
from judge_server import completion, judge_server
from langgraph.graph import START, StateGraph

from agentops import Runtime, ScriptedEngine, Settings
from agentops.cli import main, progress
from agentops.cli.evaluate import _experiment_names, _metric_names
from agentops.retrieval.embed import HashEmbedder
from agentops.store import open_store
from agentops.tracer import catch_up


class Spoken(TypedDict, total=False):
    question: str
    answer: str


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
    for wrong in ((), ("--up", "--down"), ("helpful",), ("helpful", "nan"), ("helpful", "1", "--up"), ("faithfulness", "7")):
        assert cli("score", "last", *wrong).code == 2
    assert cli("score", "sp_none", "--up").code == 1


def test_a_dataset_is_checked_and_made_from_runs(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with monkeypatch.context() as patched:

        def full(file: Path, target: Path) -> Path:
            raise OSError(errno.ENOSPC, "No space left on device")

        patched.setattr(Path, "replace", full)
        refused = cli("dataset", "from-runs", "--since", "1h", "--output", "never.jsonl")
    assert (refused.code, "never.jsonl cannot be written: No space left" in refused.err) == (2, True)
    assert not list(Path().glob("*never*")) + list(Path().glob(".*never*")), "nothing half is left"
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


def graded(body: dict[str, Any], number: int) -> tuple[int, str]:
    return completion('{"feedback": "so it is", "score": 5}')


@pytest.fixture
def judged(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Runs an experiment whose metric needs a judge."""
    pytest.importorskip("ragas")
    monkeypatch.setattr(Runtime, "embedder", HashEmbedder())
    row = {"question": "a", "answer": "A", "rubric": {"1": "wrong", "5": "right"}}
    Path("cases.jsonl").write_text(json.dumps(row) + "\n")
    return lambda *more: cli("eval", "-d", "cases.jsonl", "-g", "loud.py:graph", "--metrics", "rubric", "--name", "one", *more)


def test_an_experiment_is_taken_up_with_the_judge_that_it_was_begun_with(
    cli: Cli, judged: Callable[..., Done], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    down = True
    reply = lambda body, number: (503, "{}") if down else graded(body, number)  # noqa: E731
    monkeypatch.setenv("AGENTOPS_JUDGE_RETRIES", "0")
    monkeypatch.setenv("AGENTOPS_JUDGE_API_KEY", "secret")
    monkeypatch.setenv("AGENTOPS_BUDGET_STEPS", "7")
    with judge_server(reply) as server, judge_server(graded) as other:
        first = judged("--judge-url", server.url, "--judge", "big")
        assert "0 scored + 1 unscored" in first.err
        with open_store(settings) as store:
            kept = store.experiment("one").settings
        assert kept["settings"]["judge.url"] == server.url
        assert kept["settings"]["budget.steps"] == 7
        assert "secret" not in json.dumps(kept)
        down = False
        monkeypatch.setenv("AGENTOPS_JUDGE_URL", other.url)
        monkeypatch.setenv("AGENTOPS_JUDGE_MODEL", "else")
        for more in (("--judge-url", other.url), ("--judge", "else")):
            refused = cli("eval", "--resume", "one", *more)
            assert refused.code == 2
            assert f"was begun with big at {server.url} as its judge" in refused.err
        again = cli("eval", "--resume", "one", "--judge", "big")
        assert "1 scored + 0 unscored" in again.err, again.err
        assert (len(other.asked), server.asked[-1]["model"], server.keys[-1]) == (0, "big", "Bearer secret")


def test_an_experiment_without_a_server_is_not_taken_up_with_one(
    cli: Cli, judged: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentops.runtime.open_engine", lambda settings, progress: ScriptedEngine(()))
    assert "1 unscored" in judged().err
    with judge_server(graded) as server:
        refused = cli("eval", "--resume", "one", "--judge", "big", "--judge-url", server.url)
        assert (refused.code, "was begun with its engine's own model as its judge" in refused.err) == (2, True)
        monkeypatch.setenv("AGENTOPS_JUDGE_URL", server.url)
        monkeypatch.setenv("AGENTOPS_JUDGE_MODEL", "big")
        assert cli("eval", "--resume", "one").code == 0
        assert server.asked == []


def test_a_key_does_not_go_to_an_address_that_a_folder_named_when_the_experiment_was_begun(
    cli: Cli, judged: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    with judge_server(lambda body, number: (503, "{}")) as server:
        Path("agentops.toml").write_text(f'[judge]\nurl = "{server.url}"\nmodel = "big"\nretries = 0\n')
        assert judged().code == 0
        Path("agentops.toml").unlink()
        monkeypatch.setenv("AGENTOPS_JUDGE_API_KEY", "secret")
        refused = cli("eval", "--resume", "one")
        assert refused.code != 0
        assert "judge.api_key ($AGENTOPS_JUDGE_API_KEY) is not sent to" in refused.err
        Path("agentops.toml").write_text('[judge]\napi_key = "another folder\'s"\n')
        monkeypatch.delenv("AGENTOPS_JUDGE_API_KEY")
        Path("elsewhere").mkdir()
        Path("agentops.toml").rename("elsewhere/agentops.toml")
        monkeypatch.chdir("elsewhere")
        Path("loud.py").write_text(Path("../loud.py").read_text())
        refused = cli("eval", "--resume", "one")
        assert (refused.code != 0, "is not sent to" in refused.err) == (True, True)
        assert set(server.keys) == {"Bearer none"}


@pytest.mark.parametrize("mode", ["last", "--resume one", "--compare one two", "-d cases.jsonl -g loud.py:graph"])
@pytest.mark.parametrize(("bar", "said"), [("exakt=.5", "no metric is called 'exakt'"), ("all=.5", "a bar is for one metric")])
def test_a_bar_for_what_is_no_metric_is_told(cli: Cli, mode: str, bar: str, said: str) -> None:
    for name in ("one", "two"):
        assert experiment(cli, "loud", "--name", name, "--quiet").code == 0
    done = cli("eval", *mode.split(), "--fail-under", bar)
    assert (done.code, said in done.err) == (2, True), done.err


def test_cases_that_failed_are_run_again_where_that_is_asked_for(cli: Cli) -> None:
    Path("cases.jsonl").write_text('{"question": "fail", "answer": "FAIL"}\n{"question": "a", "answer": "A"}\n')
    assert "1 failed" in experiment(cli, "loud", "--name", "one").err
    Path("loud.py").write_text(Path("loud.py").read_text().replace('"fail"', '"never"'))
    assert "0 run now" in cli("eval", "--resume", "one").err
    again = cli("eval", "--resume", "one", "--retry-failed", "--fail-under", "exact=1")
    assert (again.code, "1 run now" in again.err, "failed" in again.err) == (0, True, False), again.err
    assert cli("eval", "last", "--retry-failed").code == 2


@pytest.mark.parametrize("moved", [0, 1, 2])
@pytest.mark.parametrize("threads", [False, True])
def test_experiments_that_hardly_differ_are_compared(cli: Cli, moved: int, threads: bool) -> None:
    rows = [
        {"id": f"c{n}", "question": f"{'x' if n // 2 < moved else 'X'} {n}", "answer": f"X {n}"}
        | ({"thread": f"t{n // 2}"} if threads else {})
        for n in range(8)
    ]
    Path("same.py").write_text(Path("loud.py").read_text().replace(".upper()", ".strip()"))
    Path("cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:: 1 if threads else 2]))
    experiment(cli, "loud", "--name", "one", "--quiet")
    experiment(cli, "same", "--name", "two", "--quiet")
    done = cli("eval", "--compare", "one", "two", "--json")
    assert done.code == 0, done.err
    (exact,) = json.loads(done.out)["comparison"]["metrics"]
    assert (exact["p"], exact["lower"]) == (0.5 if moved == 2 else 1.0, moved * (2 if threads else 1))


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
    assert metrics["faithfulness"]["judged"] == {"computed": 2}
    assert metrics["faithfulness"]["unscored"] == {"no claims": 1}, "a refusal is right here, and claims nothing"
    assert metrics["context_recall"]["unscored"] == {"no_reference": 1}
    assert metrics["citations_resolve"]["interval"]["value"] == 1


def test_turns_stay_in_their_conversations_and_no_text_can_break_a_dataset(cli: Cli, settings: Settings) -> None:
    texts = {"a": ["hello", "follow A"], "b": ["hello", "follow B"], "c": ["hello"], "d": ["hello"], "e": ["odd"], "f": ["half"]}
    said = {"odd": "one\u2028two\u0085three\u202e\x9b31mred é日", "half": "\ud800"}

    def speak(state: Spoken) -> Spoken:
        return {"answer": said.get(state["question"], "well")}

    graph = StateGraph(Spoken).add_node("speak", speak).add_edge(START, "speak").compile()
    with Runtime(settings, engine=ScriptedEngine()) as runtime:
        for thread, questions in texts.items():
            for question in questions:
                runtime.run(graph, {"question": question}, thread=thread)
    made = cli("dataset", "from-runs", "--since", "1h", "--output", "made.jsonl")
    assert made.code == 0, made.err
    raw = Path("made.jsonl").read_text(encoding="utf-8")
    assert not {"\u2028", "\u0085", "\u202e", "\x9b"} & set(raw)
    assert "é日" in raw
    rows = [json.loads(line) for line in raw.splitlines()]
    talks = [(row.get("thread"), row["question"]) for row in rows]
    assert talks == [("a", "hello"), ("a", "follow A"), ("b", "hello"), ("b", "follow B"), (None, "hello"), (None, "odd")]
    assert rows[-1]["answer"] == said["odd"]
    assert made.err.count("says the same as another") == 1
    assert made.err.count("half of a surrogate pair") == 1
    Path("half.jsonl").write_text('{"question": "a"}\n{"question": "b", "thread": "\\ud800"}\n')
    half = cli("dataset", "check", "half.jsonl")
    assert (half.code, "half.jsonl, line 2 has half of a surrogate pair" in half.err) == (2, True)
