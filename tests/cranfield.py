"""The Cranfield collection: 1,400 abstracts on aerodynamics, 225 questions, and which abstracts answer them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from agentops.records import Document, content_hash


def read_documents(folder: Path, *, last: int = 1400) -> list[Document]:
    """The first abstracts by number; an empty one is left out."""
    text = (folder / "cran.all.1400").read_text(encoding="utf-8")
    found: list[Document] = []
    for part in re.split(r"(?m)^\.I ", text)[1 : last + 1]:
        number, _, rest = part.partition("\n")
        match = re.search(r"\.T\n(.*?)\n\.A\n.*?\n\.W\n(.*)", rest, re.DOTALL)
        if match and (body := " ".join(match[2].split())):
            title = " ".join(match[1].split())
            # Every abstract begins with its own title.
            found.append(Document(number, body.removeprefix(title).strip() or body, content_hash(body), {"title": title}))
    return found


def read_questions(folder: Path) -> list[tuple[str, dict[str, int]]]:
    """Questions with the gains of the documents that answer them. The judgements number questions by order, and call the best
    documents 1 and the least relevant 4."""
    text = (folder / "cran.qry").read_text(encoding="utf-8")
    asked = [" ".join(part.split("\n.W\n", 1)[1].split()) for part in re.split(r"(?m)^\.I ", text)[1:]]
    gains: list[dict[str, int]] = [{} for _ in asked]
    for line in (folder / "cranqrel").read_text(encoding="utf-8").splitlines():
        number, document, grade = map(int, line.split()[:3])
        if grade > 0:
            gains[number - 1][str(document)] = 5 - grade
    return [(question, gain) for question, gain in zip(asked, gains, strict=True) if gain]


def ndcg(found: Sequence[str], gains: dict[str, int], k: int = 10) -> float:
    """Normalised discounted cumulative gain of the first `k` (Järvelin and Kekäläinen, 2002)."""

    def dcg(values: Sequence[int]) -> float:
        return sum(value / math.log2(place + 2) for place, value in enumerate(values[:k]))

    best = dcg(sorted(gains.values(), reverse=True))
    return dcg([gains.get(key, 0) for key in found]) / best if best else 0.0
