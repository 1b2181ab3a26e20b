"""Does a question belong to a topic? Cosines of the default embedder on 40 questions of ten topics (`topics.json`, written for
this), each against each topic.

A question is compared with "a question about TOPIC", as the computed topic adherence does; the peer is the topic's bare name.
The accuracy is balanced, with the threshold of the house and with the one that is best on the other half of the questions.
Not measured: topics that lie near each other, and questions that belong to several.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentops.parts import open_embedder
from agentops.settings import load_settings
from evals.verdicts import ON_TOPIC

Pair = tuple[bool, float]


def balanced(pairs: Sequence[Pair], threshold: float) -> float:
    """Mean share of right verdicts on pairs that belong together and on those that do not."""
    inside, outside = [v for label, v in pairs if label], [v for label, v in pairs if not label]
    return (sum(v >= threshold for v in inside) / len(inside) + sum(v < threshold for v in outside) / len(outside)) / 2


def area(pairs: Sequence[Pair]) -> float:
    inside, outside = [v for label, v in pairs if label], [v for label, v in pairs if not label]
    return sum((a > b) + (a == b) / 2 for a in inside for b in outside) / (len(inside) * len(outside))


def best(pairs: Sequence[Pair]) -> float:
    """The threshold that separates them best."""
    return max((value for _, value in pairs), key=lambda value: balanced(pairs, value))


def crossed(halves: Sequence[Sequence[Pair]]) -> float:
    """Accuracy with thresholds from the other half."""
    return sum(balanced(halves[side], best(halves[1 - side])) for side in (0, 1)) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="the same: it takes seconds")
    parser.parse_args()
    settings = load_settings()
    embedder = open_embedder(settings)
    named: dict[str, list[str]] = json.loads((Path(__file__).parent / "topics.json").read_text(encoding="utf-8"))
    topics, asked = list(named), [(topic, question) for topic, questions in named.items() for question in questions]
    vectors = embedder.embed([question for _, question in asked])

    def halves(form: str) -> list[list[Pair]]:
        near = vectors @ embedder.embed([form.format(topic) for topic in topics]).T
        made: list[list[Pair]] = [[], []]
        for number, (topic, _) in enumerate(asked):
            made[number % 2] += [(topic == other, float(near[number][place])) for place, other in enumerate(topics)]
        return made

    ours, theirs = halves("a question about {}"), halves("{}")
    all_ours, all_theirs = [*ours[0], *ours[1]], [*theirs[0], *theirs[1]]
    rows: list[dict[str, Any]] = []
    for metric, one, other in (
        ("auc", area(all_ours), area(all_theirs)),
        ("balanced_accuracy", crossed(ours), crossed(theirs)),
        ("balanced_accuracy_of_the_house", balanced(all_ours, ON_TOPIC), balanced(all_theirs, ON_TOPIC)),
    ):
        numbers = {"ours": round(one, 3), "peer": "the bare name", "theirs": round(other, 3), "ratio": round(one / other, 2)}
        rows.append({"metric": metric, **numbers, "unit": f"over {len(asked) * len(topics)} pairs"})
    print(f"{'':32} {'ours':>7} {'peer':>7}   peer")
    for row in rows:
        print(f"{row['metric']:32} {row['ours']:7.3f} {row['theirs']:7.3f}   {row['peer']}")
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps({"bench": "topics", "machine": machine, "model": embedder.name, "rows": rows}))


if __name__ == "__main__":
    main()
