"""Every branch of the graph review on a scripted engine, and that an answer is filed once, whatever happens."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tea import TEXTS, open_runtime

from agentops import RunResult, Runtime, Settings
from agentops.errors import AnswerUnfit
from agentops.records import Decision
from agentops.store import open_store
from agentops.tracer import catch_up

QUESTION = "At how many degrees is green tea brewed?"
DRAFT = "Green tea is brewed at 80 degrees. [1]"
REJECT = Decision("reject")


@pytest.fixture
def opened(settings: Settings) -> Iterator[Callable[..., Runtime]]:
    runtimes: list[Runtime] = []

    def make(*answers: str) -> Runtime:
        runtimes.append(open_runtime(settings, list(answers or ["Green tea is brewed at 80 degrees."])))
        return runtimes[-1]

    yield make
    for runtime in runtimes:
        runtime.close()


def start(runtime: Runtime, question: str = QUESTION) -> RunResult:
    result = runtime.run("review", question, collection="tea")
    assert result.status == "waiting"
    return result


def filed(settings: Settings) -> list[Path]:
    return sorted(path for path in settings.files.rglob("*") if path.is_file())


def nodes(settings: Settings, run_id: str) -> list[str | None]:
    catch_up(settings)
    with open_store(settings) as store:
        assert store.balance(run_id).balanced
        return [span.node for span in store.spans(run_id) if span.kind == "node"]


def test_nothing_is_filed_before_a_person_has_decided(opened: Callable[..., Runtime], settings: Settings) -> None:
    waiting = start(opened())
    (asked,) = waiting.interrupts
    assert (asked.kind, asked.node, asked.content) == ("approval", "decide", DRAFT)
    assert QUESTION in asked.question
    assert filed(settings) == []


def test_an_approved_answer_is_filed_with_its_sources(opened: Callable[..., Runtime], settings: Settings) -> None:
    runtime = opened()
    done = runtime.resume(start(runtime).run_id, answer=Decision("approve"))
    assert done.status == "done"
    assert done.output["outcome"] == "approved"
    (path,) = filed(settings)
    assert path == settings.files / done.output["file"]
    assert path.parent.name == "reviews"
    assert path.read_text(encoding="utf-8") == textwrap.dedent(f"""\
        # {QUESTION}

        {DRAFT}

        ## Sources

        1. tea.md: Brewing

        ## Decision

        A person approved this answer as it was drafted.
        """)


def test_an_edited_answer_is_filed_as_edited(opened: Callable[..., Runtime], settings: Settings) -> None:
    runtime = opened()
    edited = "At 80 °C, says the book. [1]\nBlack tea wants more."
    done = runtime.resume(start(runtime).run_id, answer=Decision("edit", edited))
    text = filed(settings)[0].read_text(encoding="utf-8")
    assert done.output["answer"] == edited
    assert f"\n{edited}\n" in text
    assert DRAFT not in text
    assert "1. tea.md" in text
    assert "A person wrote this answer" in text


def test_an_edit_that_cites_nothing_claims_no_sources(opened: Callable[..., Runtime], settings: Settings) -> None:
    runtime = opened()
    runtime.resume(start(runtime).run_id, answer=Decision("edit", "Nobody knows."))
    assert "## Sources" not in filed(settings)[0].read_text(encoding="utf-8")


@pytest.mark.parametrize("answer", [Decision("edit", 5), Decision("edit", ""), "maybe"], ids=str)
def test_an_answer_that_does_not_fit_leaves_the_run_waiting(
    opened: Callable[..., Runtime], settings: Settings, answer: Any
) -> None:
    runtime = opened()
    waiting = start(runtime)
    with pytest.raises(AnswerUnfit):
        runtime.resume(waiting.run_id, answer=answer)
    assert filed(settings) == []
    assert runtime.resume(waiting.run_id, answer=Decision("approve")).output["outcome"] == "approved"


def test_the_reason_of_a_rejection_decides_what_is_written_next(opened: Callable[..., Runtime], settings: Settings) -> None:
    runtime = opened("Green tea is brewed at 80 degrees.", "Black tea is brewed at 95 degrees.")
    first = start(runtime)
    reason = "Black tea."
    second = runtime.resume(first.run_id, answer=Decision("reject", reason=reason))
    assert second.status == "waiting"
    assert second.interrupts[0].content == "Black tea is brewed at 95 degrees. [1]"
    assert filed(settings) == []
    done = runtime.resume(first.run_id, answer=Decision("approve"))
    text = filed(settings)[0].read_text(encoding="utf-8")
    assert done.output["answer"] == "Black tea is brewed at 95 degrees. [1]"
    assert f"Rejected before: {DRAFT}\nReason: {reason}\n" in text
    decided = [name for name in nodes(settings, done.run_id) if name in ("draft", "decide", "revise", "file")]
    assert decided == ["draft", "decide", "decide", "revise", "decide", "decide", "file"]


def test_a_revision_without_ground_gives_way_to_the_source_itself(opened: Callable[..., Runtime]) -> None:
    runtime = opened("Green tea is brewed at 80 degrees.", "Emperors invented it in 1791.")
    reason = "Black tea."
    second = runtime.resume(start(runtime).run_id, answer=Decision("reject", reason=reason))
    assert second.interrupts[0].content == "Black tea is brewed at 95 degrees. [1]"


def test_what_was_rejected_is_not_offered_again_and_in_the_end_nothing_is_filed(
    opened: Callable[..., Runtime], settings: Settings
) -> None:
    runtime = opened("Green tea is brewed at 80 degrees.", *["Green tea is brewed at 80 degrees."] * 2)
    run, offered, answer = start(runtime), [], Decision("reject", reason="Black tea.")
    while run.status == "waiting":
        offered.append(run.interrupts[0].content)
        run = runtime.resume(run.run_id, answer=answer)
    assert offered[:2] == [DRAFT, "Black tea is brewed at 95 degrees. [1]"]
    assert len(set(offered)) == len(offered) <= 3
    assert run.status == "done"
    assert run.output["outcome"] == "rejected"
    assert run.output["answer"].startswith("Nothing was filed")
    assert run.output["file"] == ""
    assert filed(settings) == []


def test_the_third_rejection_is_the_last(opened: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch) -> None:
    many = " ".join(f"Green tea number {n} is brewed at {n} degrees." for n in range(70, 78))
    monkeypatch.setitem(TEXTS, "tea.md", ("Brewing", many))
    runtime = opened(*["I have no idea."] * 6)
    run, asked = start(runtime), 0
    while run.status == "waiting":
        asked += 1
        run = runtime.resume(run.run_id, answer=REJECT)
    assert asked == 3
    assert run.output["outcome"] == "rejected"


def test_what_the_documents_do_not_say_a_person_may(opened: Callable[..., Runtime], settings: Settings) -> None:
    runtime = opened()
    waiting = start(runtime, "Who won the football game?")
    assert waiting.interrupts[0].content.startswith("I do not know")
    runtime.resume(waiting.run_id, answer=Decision("edit", "Nobody did."))
    assert "Nobody did." in filed(settings)[0].read_text(encoding="utf-8")


def test_two_runs_with_one_question_file_two_documents(opened: Callable[..., Runtime], settings: Settings) -> None:
    runtime = opened(*["Green tea is brewed at 80 degrees."] * 2)
    for run in [start(runtime), start(runtime)]:
        runtime.resume(run.run_id, answer=Decision("approve"))
    assert len(filed(settings)) == 2


@pytest.mark.parametrize(
    "question", ["../../etc/passwd: what is green tea?", "绿茶在多少度冲泡？", "a" * 3000 + "?"], ids=["path", "cjk", "long"]
)
def test_any_question_makes_a_name_inside_the_folder(opened: Callable[..., Runtime], settings: Settings, question: str) -> None:
    runtime = opened()
    runtime.resume(start(runtime, question).run_id, answer=Decision("edit", "Yes."))
    (path,) = filed(settings)
    assert path.parent == settings.files / "reviews"
    assert len(path.name) < 80


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from tea import open_runtime
from agentops.settings import load_settings
from agentops.records import Decision
import graphs.review

put = graphs.review.put

def put_and_die(path, text):
    {before}
    put(path, text)
    os.kill(os.getpid(), signal.SIGKILL)

graphs.review.put = put_and_die
runtime = open_runtime(load_settings({{"paths.home": {home!r}}}))
runtime.resume({run!r}, answer=Decision("approve"))
"""


@pytest.mark.parametrize("before", ["pass", "os.kill(os.getpid(), signal.SIGKILL)"], ids=["after writing", "before writing"])
def test_a_process_that_dies_at_filing_files_once(
    opened: Callable[..., Runtime], settings: Settings, environment: dict[str, str], before: str
) -> None:
    runtime = opened()
    run = start(runtime).run_id
    code = KILLED.format(tests=str(Path(__file__).parent), home=str(settings.paths.home), run=run, before=before)
    died = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert died.returncode == -signal.SIGKILL, died.stderr
    written = [path.read_bytes() for path in filed(settings)]
    assert len(written) == (before == "pass")
    done = runtime.resume(run)
    assert done.output["outcome"] == "approved"
    (path,) = filed(settings)
    assert path.name == Path(done.output["file"]).name
    assert [path.read_bytes()] == (written or [path.read_bytes()])
    assert DRAFT in path.read_text(encoding="utf-8")


def test_a_folder_that_cannot_be_written_fails_the_run_which_can_be_resumed(
    opened: Callable[..., Runtime], settings: Settings
) -> None:
    settings.files.mkdir(parents=True)
    (settings.files / "reviews").write_text("in the way")
    runtime = opened()
    waiting = start(runtime)
    with pytest.raises(Exception, match="reviews"):
        runtime.resume(waiting.run_id, answer=Decision("approve"))
    (settings.files / "reviews").unlink()
    assert runtime.resume(waiting.run_id).output["outcome"] == "approved"
    assert len(filed(settings)) == 1
