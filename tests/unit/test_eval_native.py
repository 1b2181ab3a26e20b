"""Native metrics: what code says of a sample, and that nothing it is given makes it raise or hang."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentops.errors import SettingsError
from agentops.prices import load_prices
from agentops.records import Score, ToolCall, Usage
from agentops.settings import load_settings
from agentops.sync import run_sync
from evals.metrics import NO_REFERENCE, Metric
from evals.metrics.native import ANSWER_CHARACTERS, native_metrics
from evals.samples import Context, Reference, Sample

METRICS = native_metrics()
BRIDGE = Context("d1", "The bridge over the Tay was opened in 1878. It was built by Thomas Bouch.")
STORM = Context("d2", "A storm blew the bridge down in December 1879.")


def scored(name: str, sample: Sample) -> Score:
    return run_sync(METRICS[name].score(sample))


def value(name: str, sample: Sample) -> float | None:
    return scored(name, sample).value


def answered(answer: str, **more: Any) -> Sample:
    return Sample("When was the bridge opened?", answer, contexts=(BRIDGE, STORM), cited={"1": 0, "2": 1}, **more)


def found(retrieved: list[str], wanted: list[str] | None) -> Sample:
    contexts = tuple(Context(key, "text") for key in retrieved)
    return Sample("q", "a", contexts=contexts, reference=Reference(contexts=None if wanted is None else tuple(wanted)))


def called(made: list[ToolCall], wanted: list[ToolCall] | None) -> Sample:
    reference = Reference(trajectory=None if wanted is None else tuple(wanted))
    return Sample("q", "a", tool_calls=tuple(made), reference=reference)


def call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall(name, arguments, "any")


def test_the_names_and_bounds_that_a_registry_needs() -> None:
    assert list(native_metrics(ks=(3,)))[2:5] == ["recall_at_3", "ndcg_at_3", "mrr"]
    for name, metric in METRICS.items():
        checked: Metric = metric
        assert checked.name == name
        assert checked.low == 0
        assert (checked.better, checked.high) == (("low", math.inf) if name in ("latency_ms", "tokens", "cost") else ("high", 1))


def test_the_documentation_names_every_metric() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "detectors.md").read_text(encoding="utf-8")
    assert [name for name in (*METRICS, "hallucination", "toxicity") if f"`{name}`" not in page] == []


# --- citations ---


def test_citations_resolve_where_the_number_leads_to_a_document() -> None:
    assert value("citations_resolve", answered("It was opened in 1878 [1].")) == 1
    half = scored("citations_resolve", answered("It was opened in 1878 [1]. It fell [3]."))
    assert (half.value, half.comment) == (0.5, "[3] leads nowhere")
    lost = Sample("q", "It fell [1, 2].", contexts=(BRIDGE,), cited={"1": 0, "2": 7})
    assert value("citations_resolve", lost) == 0.5
    assert scored("citations_resolve", answered("It was opened in 1878.")).reason == "no citations"
    assert scored("citations_resolve", answered(" ")).reason == "no answer"


def test_numbers_in_brackets_are_citations_only_where_there_are_sources() -> None:
    fell = "It fell [1]."
    for name in ("citations_resolve", "citations_support"):
        for output in (None, "It fell [1].", {"answer": fell}, {"answer": fell, "sources": None}):
            score = scored(name, Sample("q", fell, contexts=(BRIDGE,), output=output))
            assert (score.value, score.reason) == (None, "the output has no sources")
        assert value(name, Sample("q", fell, contexts=(BRIDGE,), output={"answer": fell, "sources": []})) == 0
        code = "Take `items[0]`:\n```python\nprint(items[7], [3])\n```\n"
        assert scored(name, answered(code)).reason == "no citations"
        assert value(name, answered(code + "The bridge was opened in 1878 [1].")) == 1


@pytest.mark.parametrize(
    ("answer", "wanted", "blamed"),
    [
        ("The bridge was opened in 1878 [1].", 1, ""),
        ("The bridge was opened in 1878. [1] A storm blew it down. [2]", 1, ""),
        ("A storm blew it down [1].", 0, "A storm blew it down ."),
        ("The bridge was opened in 1887 [1].", 0, "The bridge was opened in 1887 ."),
        ("The bridge was opened in 1878 [1]. A storm blew it down in 1879 [1].", 0.5, "A storm blew it down in 1879 ."),
        ("The bridge was opened in 1878 and a storm blew it down [1][2].", 1, ""),
        ("The bridge was opened in 1878 and a storm blew it down [1, 2].", 1, ""),
        ("The bridge was opened in 1878 [9].", 0, "The bridge was opened in 1878 ."),
        ("1. The bridge was opened in 1878 [1]\n2. [2] A storm blew it down", 1, ""),
        ("Nobody knows this. The bridge was opened in 1878 [1].", 1, ""),
    ],
)
def test_a_citation_supports_where_the_document_carries_the_sentence(answer: str, wanted: float, blamed: str) -> None:
    score = scored("citations_support", answered(answer))
    assert (score.value, score.comment) == (wanted, blamed)


def test_what_a_citation_lacks_is_told() -> None:
    score = scored("citations_support", answered("The bridge was opened in 1887 [1]."))
    (one,) = score.details["unsupported"]
    assert (one["cites"], one["numbers_missing"], one["coverage"]) == (["1"], ["1887"], 0.667)


# --- retrieval ---


def test_retrieval_by_ids() -> None:
    sample = found(["x", "a", "y", "b"], ["a", "b", "c"])
    assert value("recall_at_5", sample) == pytest.approx(2 / 3)
    assert scored("recall_at_5", sample).details["missing"] == ["c"]
    assert value("mrr", sample) == 0.5
    gained, possible = 1 / math.log2(3) + 1 / math.log2(5), 1 + 1 / math.log2(3) + 1 / 2
    assert value("ndcg_at_5", sample) == pytest.approx(gained / possible)
    at_one = native_metrics(ks=(1,))
    assert run_sync(at_one["recall_at_1"].score(sample)).value == 0
    assert run_sync(at_one["ndcg_at_1"].score(found(["a"], ["a", "b"]))).value == 1


def test_retrieval_with_bad_input() -> None:
    for name in ("recall_at_5", "ndcg_at_10", "mrr"):
        assert scored(name, found(["a"], None)).reason == NO_REFERENCE
        assert scored(name, found(["a"], [])).reason == "no document belongs to the question"
        assert value(name, found([], ["a"])) == 0
        assert value(name, found(["x", "y"], ["never heard of"])) == 0
        assert value(name, found(["a", "a", "a"], ["a", "a"])) == 1


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from("abcdefgh"), unique=True), st.lists(st.sampled_from("abcdefgh"), min_size=1))
def test_retrieval_stays_within_its_bounds_and_grows_with_k(retrieved: list[str], wanted: list[str]) -> None:
    sample = found(retrieved, wanted)
    metrics = native_metrics(ks=(1, 3, 8, 100))
    names = [name for name in metrics if name.startswith(("recall", "ndcg", "mrr"))]
    values = {name: run_sync(metrics[name].score(sample)).value or 0.0 for name in names}
    assert all(0 <= one <= 1 for one in values.values())
    assert values["recall_at_1"] <= values["recall_at_3"] <= values["recall_at_8"] == values["recall_at_100"]
    assert values["recall_at_8"] == len(set(retrieved) & set(wanted)) / len(set(wanted))
    perfect = found([*dict.fromkeys(wanted), *retrieved], wanted)
    assert run_sync(metrics["ndcg_at_8"].score(perfect)).value == pytest.approx(1)


# --- trajectories ---

A, B, C = call("search", text="tay"), call("clock"), call("note", n=1, tags=["x", "y"])


@pytest.mark.parametrize(
    ("made", "wanted", "fitting"),
    [
        ([A, B], [A, B], {"strict", "unordered", "subset", "superset"}),
        ([B, A], [A, B], {"unordered", "subset", "superset"}),
        ([A], [A, B], {"subset"}),
        ([A, B, C], [A, B], {"superset"}),
        ([A, A], [A], {"superset"}),
        ([A], [A, A], {"subset"}),
        ([A, C], [A, B], set()),
        ([call("search", text="forth")], [A], set()),
        ([call("search", text="tay", k=3)], [A], set()),
        ([call("note", tags=["x", "y"], n=1.0)], [C], {"strict", "unordered", "subset", "superset"}),
        ([call("note", n=True, tags=["x", "y"])], [C], set()),
        ([call("note", n=1, tags=["y", "x"])], [C], set()),
        ([], [], {"strict", "unordered", "subset", "superset"}),
        ([A], [], {"superset"}),
    ],
)
def test_trajectories(made: list[ToolCall], wanted: list[ToolCall], fitting: set[str]) -> None:
    sample = called(made, wanted)
    assert {mode for mode in ("strict", "unordered", "subset", "superset") if value(f"trajectory_{mode}", sample)} == fitting


def test_a_trajectory_says_what_is_missing_and_what_is_too_much() -> None:
    score = scored("trajectory_strict", called([A, C], [A, B]))
    assert score.comment == 'missing: clock({}); surplus: note({"n": 1, "tags": ["x", "y"]})'
    assert scored("trajectory_strict", called([B, A], [A, B])).comment == "another order"
    assert scored("trajectory_subset", called([A], None)).reason == NO_REFERENCE


CALLS = st.lists(st.builds(call, st.sampled_from("ab"), n=st.integers(0, 1)), max_size=4)


@settings(deadline=None, max_examples=60)
@given(CALLS, CALLS)
def test_the_ways_to_compare_trajectories_agree(made: list[ToolCall], wanted: list[ToolCall]) -> None:
    one, other = called(made, wanted), called(wanted, made)
    modes = {mode: value(f"trajectory_{mode}", one) for mode in ("strict", "unordered", "subset", "superset")}
    assert modes["unordered"] == min(modes["subset"] or 0, modes["superset"] or 0)
    assert (modes["strict"] or 0) <= (modes["unordered"] or 0)
    assert modes["subset"] == value("trajectory_superset", other)


# --- form ---

SCHEMA = {"type": "object", "properties": {"year": {"type": "integer"}}, "required": ["year"]}


def formed(answer: str = "", output: Any = None, schema: Any = SCHEMA) -> Sample:
    return Sample("q", answer, output=output, reference=Reference(schema=schema))


def test_json_schema() -> None:
    assert value("json_schema", formed(output={"year": 1878})) == 1
    assert value("json_schema", formed('{"year": 1878}')) == 1
    wrong = scored("json_schema", formed(output={"year": "1878"}))
    assert (wrong.value, wrong.comment) == (0, "year: '1878' is not of type 'integer'")
    assert scored("json_schema", formed("in 1878")).comment.startswith("the answer is no JSON")
    assert value("json_schema", formed("[" * 50_000)) == 0
    assert (value("json_schema", formed("")), value("json_schema", formed(" "))) == (0, 0)
    assert scored("json_schema", formed(output=1, schema=None)).reason == NO_REFERENCE


@pytest.mark.parametrize("broken", [{"type": "nonsense"}, {"$ref": "#/nowhere"}, {"$ref": "#"}, {"properties": 3}])
def test_a_broken_schema_is_not_the_outputs_fault(broken: Any) -> None:
    score = scored("json_schema", formed(output={"year": 1}, schema=broken))
    assert score.value is None
    assert score.reason.startswith("the schema itself is broken")


def test_exact_forgives_white_space_and_nothing_else() -> None:
    def against(said: str, wanted: str | None) -> Score:
        return scored("exact", Sample("q", said, reference=Reference(answer=wanted)))

    assert against(" Thomas \n Bouch", "Thomas Bouch").value == 1
    assert against("Cafe\u0301", "Caf\u00e9").value == 1
    assert against("thomas bouch", "Thomas Bouch").value == 0
    assert against("", "").value == 1
    assert against("x", None).reason == NO_REFERENCE


def matched(answer: str, pattern: str | None) -> Score:
    return scored("regex", Sample("q", answer, reference=Reference(pattern=pattern)))


def test_regex() -> None:
    assert matched("opened in 1878", r"\b18\d\d$").value == 1
    assert matched("opened in 1878", r"^18").value == 0
    assert matched("OPENED", r"(?i)opened").value == 1
    assert matched("x", None).reason == NO_REFERENCE
    assert (matched("", "x").value, matched(" \n", "x").value) == (0, 0), "who says nothing says nothing that matches"
    assert matched("", "^$").value == 1


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("[", "unclosed character class"),
        ("(?=x)y", "look-around"),
        (r"(a)\1", "backreferences"),
        (r"(?:a{1000}){1000}", "size limit"),
        ("a" * 1_001, "1,001 characters"),
    ],
)
def test_a_pattern_that_cannot_be_used_leaves_unscored(pattern: str, why: str) -> None:
    score = matched("a", pattern)
    assert score.value is None
    assert why in score.reason


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(a|aa)+$", r"(.*)*x", r"^(\w+\s?)*$"])
def test_no_pattern_hangs(pattern: str) -> None:
    began = time.process_time()
    assert matched("a" * 50_000 + "!", pattern).value == 0
    assert time.process_time() - began < 5


# --- effort ---


def test_effort() -> None:
    sample = Sample("q", "a", usage=Usage(100, 20, 60, 40), latency_ms=12.5)
    assert value("latency_ms", sample) == 12.5
    assert value("tokens", sample) == 120
    assert scored("tokens", sample).details["cached_tokens"] == 60


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_an_amount_that_is_none_leaves_unscored(bad: float) -> None:
    assert scored("latency_ms", Sample("q", "a", latency_ms=bad)).value is None
    assert scored("latency_ms", Sample("q", "a")).reason == "not measured"


SPENT = {"big": Usage(1_000_000, 200_000, 400_000, 600_000), "small": Usage(10, 5, 0, 10)}


def priced(*prices: str) -> Metric:
    given = load_settings(environment={"AGENTOPS_COST_PRICES": ",".join(prices)}, folder=Path("/nowhere"))
    return native_metrics(prices=load_prices(given))["cost"]


def test_cost_is_money_for_computed_cached_and_written_tokens() -> None:
    metric = priced("big=2.5/0.25/10", "small = 0 / 0")
    score = run_sync(metric.score(Sample("q", "a", spent=SPENT)))
    assert score.value == pytest.approx(0.6 * 2.5 + 0.4 * 0.25 + 0.2 * 10)
    assert score.details == {"by_model": {"big": pytest.approx(3.6), "small": 0}}
    # Without a price of their own, cached tokens cost what the others do.
    assert run_sync(priced("big=1/2").score(Sample("q", "a", spent={"big": SPENT["big"]}))).value == pytest.approx(1.4)


def test_without_a_price_cost_is_unscored_and_names_the_model() -> None:
    assert scored("cost", Sample("q", "a", spent=SPENT)).reason == "no_price: big"
    assert run_sync(priced("big=1/1").score(Sample("q", "a", spent=SPENT))).reason == "no_price: small"
    assert scored("cost", Sample("q", "a", spent={"": Usage(1)})).reason == "no_price: a model without a name"
    assert value("cost", Sample("q", "a")) == 0, "no model was called"


def test_other_prices_are_another_version_of_cost() -> None:
    versions = [priced(*one).version for one in ((), ("big=1/1",), ("big=1/2",), ("big=1/0/2",))]
    assert len(set(versions)) == 4
    assert priced("a=1/1", "b=2/2").version == priced("b=2/2", "a=1/1").version


@pytest.mark.parametrize("wrong", ["big", "=1/2", "big=1", "big=1/2/3/4", "big=x/2", "big=-1/2", "big=nan/1", "big=1/1,big=2/2"])
def test_a_price_that_cannot_be_read_is_told(wrong: str) -> None:
    with pytest.raises(SettingsError, match=r"^\$AGENTOPS_COST_PRICES: cost\.prices has") as told:
        priced(wrong)
    assert "MODEL=INPUT/CACHED/OUTPUT" in told.value.hint


# --- whatever comes ---


def test_huge_answers_are_refused_or_read_in_time() -> None:
    huge = "The bridge [1]. " * (ANSWER_CHARACTERS // 10)
    reference = Reference(answer="x", pattern="x", schema=SCHEMA, contexts=("d1",), trajectory=())
    began = time.process_time()
    for name in METRICS:
        score = scored(name, answered(huge, reference=reference))
        if name.startswith("citations") or name in ("regex", "json_schema"):
            assert "characters" in score.reason
    big = Context("big", "word " * 1_000_000)
    score = scored("citations_support", Sample("q", "A word [1].", contexts=(big,), cited={"1": 0}))
    assert score.value == 1
    assert time.process_time() - began < 20


@settings(deadline=None, max_examples=60)
@given(
    st.text(st.sampled_from("ab 1.[],\n\ud800é"), max_size=40),
    st.lists(st.text(max_size=10), max_size=3),
    st.dictionaries(st.sampled_from("12"), st.integers(-3, 5)),
    st.text(st.sampled_from("ab()[]*+?\\{}1^$|"), max_size=8),
)
def test_no_metric_raises(answer: str, texts: list[str], cited: dict[str, int], pattern: str) -> None:
    reference = Reference(answer=answer, pattern=pattern, schema={"pattern": pattern}, contexts=tuple(texts), trajectory=(A,))
    contexts = tuple(Context(text, text) for text in texts)
    sample = Sample("q", answer, contexts=contexts, cited=cited, tool_calls=(A,), reference=reference)
    for metric in METRICS.values():
        score = run_sync(metric.score(sample))
        assert score.value is None or score.value >= 0


def test_a_value_that_json_cannot_write_does_not_raise() -> None:
    deep: Any = []
    for _ in range(5_000):
        deep = [deep]
    made, wanted = [call("a", x={1, 2}), call("b", deep=deep)], [call("a", x=object())]
    for mode in ("strict", "subset"):
        assert scored(f"trajectory_{mode}", called(made, wanted)).value in (None, 0.0)
