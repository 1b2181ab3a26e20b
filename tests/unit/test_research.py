"""Every branch of the graph research on a scripted engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tea import likely, open_runtime

from agentops import Request, Runtime, Settings
from agentops.errors import RetrieverUnavailable
from agentops.records import Query, Retrieval, ScoreRequest
from agentops.store import open_store
from agentops.tracer import catch_up
from graphs.research import naming, sound, split, things

GREEN, CUP = "At how many degrees is green tea brewed?", "How many millilitres does a cup hold?"
QUESTION = "At how many degrees is green tea brewed, and how many millilitres does a cup hold?"
FACTS = {
    "green": "Green tea is brewed at 80 degrees.",
    "black": "Black tea is brewed at 95 degrees.",
    "cup": "A cup holds 250 millilitres.",
}


def script(
    *, plan: str = f"{GREEN}\n{CUP}", joined: str = "Tea is nice.", facts: dict[str, str] = FACTS
) -> Callable[[Request], str]:
    """The planner's and the editor's words, and for a question the fact whose key is in it."""

    def answer(request: Request) -> str:
        orders, said = request.messages[0].content, request.messages[-1].content
        if orders.startswith("You split"):
            return plan
        if orders.startswith("You join"):
            return joined
        return next((fact for key, fact in facts.items() if key in said.rpartition("Question:")[2]), "I have no idea.")

    return answer


@pytest.fixture
def ask(settings: Settings) -> Iterator[Callable[..., Any]]:
    opened: list[Runtime] = []

    def run(answers: Callable[[Request], str], *questions: str, **options: Any) -> dict[str, Any]:
        runtime = open_runtime(settings, answers, **options)
        opened.append(runtime)
        for question in questions or (QUESTION,):
            result = runtime.run("research", question, collection="tea", thread="t")
        assert result.status == "done"
        return {**result.output, "run": result.run_id}

    yield run
    for runtime in opened:
        runtime.close()


def test_each_part_is_answered_with_one_list_of_sources(ask: Callable[..., Any], settings: Settings) -> None:
    done = ask(script())
    assert done["plan"] == [GREEN, CUP]
    assert done["answer"] == "Green tea is brewed at 80 degrees. [1]\nA cup holds 250 millilitres. [2]"
    assert [(source["n"], source["source"]) for source in done["sources"]] == [(1, "tea.md"), (2, "cups.md")]
    catch_up(settings)
    with open_store(settings) as store:
        spans = store.spans(done["run"])
        assert store.balance(done["run"]).balanced
    nodes = [span.node for span in spans if span.kind == "node"]
    assert [nodes.count(name) for name in ("plan", "work", "retrieve", "critic", "edit")] == [1, 2, 2, 2, 1]


def test_one_source_has_one_number(ask: Callable[..., Any]) -> None:
    black = "At how many degrees is black tea brewed?"
    plan = "\n".join((GREEN, CUP, black))
    done = ask(
        script(plan=plan), "At how many degrees are green tea and black tea brewed, and how many millilitres does a cup hold?"
    )
    assert done["plan"] == [GREEN, CUP, black]
    assert done["answer"].splitlines()[2] == "Black tea is brewed at 95 degrees. [1]"
    assert len(done["sources"]) == 2


def test_answers_become_one_sentence_when_it_says_all_of_them(ask: Callable[..., Any]) -> None:
    joined = "Green tea is brewed at 80 degrees, and a cup holds 250 millilitres."
    assert ask(script(joined=joined))["answer"] == f"{joined} [1] [2]"


@pytest.mark.parametrize(
    "joined",
    [
        "Green tea is brewed at 250 degrees, and a cup holds 80 millilitres.",
        "Green tea and a cup are brewed at 80 degrees, which holds 250 millilitres.",
        "Green tea is brewed at 80 degrees, and a cup holds millilitres.",
        "Green tea is brewed at 80 degrees.",
        "Green tea is brewed at 80 degrees, and a cup holds 250 millilitres, and it is healthy.",
        "",
    ],
    ids=["swapped", "mixed", "number lost", "answer lost", "added", "nothing"],
)
def test_a_joining_sentence_that_says_something_else_is_not_used(ask: Callable[..., Any], joined: str) -> None:
    assert ask(script(joined=joined))["answer"] == "Green tea is brewed at 80 degrees. [1]\nA cup holds 250 millilitres. [2]"


def test_what_is_not_known_is_said_for_its_part(ask: Callable[..., Any]) -> None:
    unknown = "Who won the football game?"
    done = ask(script(plan=f"{GREEN}\n{unknown}"), "At how many degrees is green tea brewed, and who won the football game?")
    first, second = done["answer"].splitlines()
    assert first == "Green tea is brewed at 80 degrees. [1]"
    assert second.startswith(f"I do not know: the documents do not answer “{unknown}”.")
    assert len(done["sources"]) == 1


def test_what_answers_two_parts_is_said_once(ask: Callable[..., Any]) -> None:
    facts = {"brewed": "Green tea is brewed at 80 degrees."}
    plan = "Is green tea brewed at 80 degrees?\nAt how many degrees is green tea brewed by hand?"
    done = ask(
        script(plan=plan, facts=facts), "Is green tea brewed at 80 degrees, and at how many degrees is green tea brewed by hand?"
    )
    assert len(done["plan"]) == 2
    assert done["answer"] == "Green tea is brewed at 80 degrees. [1]"


@pytest.mark.parametrize(
    "plan",
    [
        f"{GREEN}\n{CUP}\nWho drinks green tea?",
        f"{GREEN}\n{GREEN}\n{CUP}",
        f"{GREEN}\nHow much does it hold?",
        f"{GREEN}\nIs green tea brewed?\n{CUP}",
        f"How much does it hold?\n{QUESTION}",
        QUESTION,
    ],
    ids=["invented", "twice", "left out", "a piece", "points at nothing", "not split"],
)
def test_a_plan_that_asks_something_else_gives_way_to_a_split(plan: str) -> None:
    assert not sound(plan.splitlines(), QUESTION)
    assert sound(split(QUESTION), QUESTION)


def test_a_bad_plan_is_not_followed(ask: Callable[..., Any]) -> None:
    done = ask(script(plan="What is the capital of France?\nWho is its president?"))
    assert done["plan"] == ["At how many degrees is green tea brewed?", "How many millilitres does a cup hold?"]


@pytest.mark.parametrize(
    ("question", "parts"),
    [
        ("What is tea? And who drinks it?", ["What is tea?", "Who drinks it?"]),
        ("What is tea; at what degrees is it brewed?", ["What is tea?", "At what degrees is it brewed?"]),
        ("Who drinks tea and coffee and who does not?", ["Who drinks tea and coffee?", "Who does not?"]),
        ("Who drinks tea and coffee?", ["Who drinks tea and coffee?"]),
    ],
)
def test_questions_are_cut_where_another_begins(question: str, parts: list[str]) -> None:
    assert split(question) == parts


def test_a_question_that_no_rule_and_no_plan_splits_stays_whole(ask: Callable[..., Any]) -> None:
    question = "Are cups and plates washed by hand?"
    done = ask(script(plan="Who knows that?\nWhat do we know?", facts={"cups": "Cups are washed by hand."}), question)
    assert done["plan"] == [question]
    assert done["answer"] == "Cups are washed by hand. [1]"


def test_a_single_question_is_not_planned(ask: Callable[..., Any]) -> None:
    def answer(request: Request) -> str:
        assert not request.messages[0].content.startswith("You split")
        return FACTS["cup"]

    assert ask(answer, CUP)["plan"] == [CUP]


def reading(request: ScoreRequest) -> list[float]:
    """Of the readings of a part that points back, the one that speaks of a cup is likeliest."""
    if request.messages[0].content.startswith("You rewrite"):
        assert f"Question: {CUP}\nFollow-up: How is it washed?" in request.messages[-1].content
        return [-1.0 if choice == "How is a cup washed?" else -9.0 for choice in request.choices]
    return likely(request)


def test_a_part_that_points_back_is_understood_after_the_one_before(ask: Callable[..., Any]) -> None:
    answers = script(plan=f"{CUP}\nHow is it washed?", facts={"washed": "Cups are washed by hand.", "cup": FACTS["cup"]})

    done = ask(answers, "How many millilitres does a cup hold, and how is it washed?", scores=reading)
    assert done["plan"] == [CUP, "How is a cup washed?"]
    assert done["answer"].splitlines() == ["A cup holds 250 millilitres. [1]", "Cups are washed by hand. [1]"]


def test_a_part_that_says_itself_what_it_points_at_stays_as_it_is(ask: Callable[..., Any]) -> None:
    own = "Is a tea hot when it is brewed?"
    done = ask(script(plan=f"{CUP}\n{own}"), "How many millilitres does a cup hold, and is a tea hot when it is brewed?")
    assert done["plan"] == [CUP, own]


@pytest.mark.parametrize(
    ("question", "spoken_of"),
    [
        ("What is tea?", ["tea"]),
        ("Where are the old cups kept?", ["old", "cups", "kept", "the old", "old cups", "cups kept"]),
        ("Is it?", []),
    ],
)
def test_a_question_speaks_of_things(question: str, spoken_of: list[str]) -> None:
    assert things(question)[: len(spoken_of)] == spoken_of
    assert len(things(" ".join(f"word{number}" for number in range(5000)))) < 200


@pytest.mark.parametrize(
    ("part", "thing", "said"),
    [
        ("Who washes it?", "a cup", "Who washes a cup?"),
        ("Its price is what?", "a cup", "a cup's price is what?"),
        ("Who washes them and their lids?", "cups", "Who washes cups and cups' lids?"),
    ],
)
def test_a_thing_is_put_in_place_of_what_points(part: str, thing: str, said: str) -> None:
    assert naming(part, thing) == said


def test_an_earlier_question_of_the_thread_leaves_nothing_behind(ask: Callable[..., Any]) -> None:
    done = ask(script(), QUESTION, CUP)
    assert [finding["question"] for finding in done["findings"]] == [CUP]
    assert done["answer"] == "A cup holds 250 millilitres. [1]"


class Shaky:
    """An index that cannot be reached when it is asked about some things."""

    def __init__(self, inner: Any, *about: str) -> None:
        self._inner, self._about = inner, about

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def search(self, query: Query) -> Retrieval:
        if any(word in query.text for word in self._about):
            raise RetrieverUnavailable("no server answers", hint="start it")
        found: Retrieval = await self._inner.search(query)
        return found


def test_a_worker_that_cannot_search_does_not_lose_the_others_answers(ask: Callable[..., Any], settings: Settings) -> None:
    with open_runtime(settings) as first:
        done = ask(script(), index=Shaky(first.index, "cup"))
        assert done["answer"].splitlines() == [
            "Green tea is brewed at 80 degrees. [1]",
            f"“{CUP}” could not be looked up: no server answers",
        ]
        with pytest.raises(RetrieverUnavailable, match="no server answers"):
            ask(script(), index=Shaky(first.index, "cup", "tea"))


def test_workers_work_at_the_same_time(ask: Callable[..., Any], settings: Settings) -> None:
    done = ask(script(), delay_s=0.01)
    catch_up(settings)
    with open_store(settings) as store:
        one, other = [span for span in store.spans(done["run"]) if span.node == "work" and span.kind == "node"]
    assert one.duration_ns
    assert other.duration_ns
    assert one.start_ns < other.start_ns + other.duration_ns
    assert other.start_ns < one.start_ns + one.duration_ns
