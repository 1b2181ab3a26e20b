"""What do the two retrieval back-ends give on the same documents and questions? Ingest, search and quality on Cranfield.

The peer of the embedded index (ours) is the index on an Elasticsearch server, started for this on loopback. Both are given the
same vectors, made beforehand: what is measured is the index, not the embedder. Searches come one after the other, the back-ends
in turns, so that a busy machine slows both alike. Not measured: many clients at once, a cluster of several machines, and more
documents than there are here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from cranfield import ndcg, read_documents, read_questions  # noqa: E402
from elasticsearch_server import VERSION, missing, start  # noqa: E402

from agentops.parts import open_embedder  # noqa: E402
from agentops.records import Query, SearchMode  # noqa: E402
from agentops.retrieval import Embedder, Index  # noqa: E402
from agentops.retrieval.analysis import embedding_text  # noqa: E402
from agentops.retrieval.elastic import open_index as open_elastic  # noqa: E402
from agentops.retrieval.embedded import open_index as open_embedded  # noqa: E402
from agentops.settings import load_settings  # noqa: E402
from agentops.sync import run_sync  # noqa: E402

MODES: tuple[SearchMode, ...] = ("vector", "lexical", "hybrid")


class Prepared:
    """An embedder that only hands out what another made before."""

    def __init__(self, embedder: Embedder, texts: Sequence[str]) -> None:
        self.name, self.revision, self.dimensions = embedder.name, embedder.revision, embedder.dimensions
        self.count_tokens = embedder.count_tokens
        self._made = dict(zip(texts, embedder.embed(texts), strict=True))

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.stack([self._made[text] for text in texts])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="300 documents and 40 questions instead of all")
    quick = parser.parse_args().quick
    folder = Path(os.environ.get("AGENTOPS_SHARED_DATA") or ROOT.parent / "shared" / "data") / "cranfield"
    if not folder.is_dir():
        raise SystemExit("the Cranfield collection is not here: name the folder of data sets in AGENTOPS_SHARED_DATA")
    if why := missing():
        raise SystemExit(why)
    documents = read_documents(folder, last=300 if quick else 1400)
    there = {document.id for document in documents}
    questions = [
        (text, kept)
        for text, gains in read_questions(folder)
        if (kept := {key: gain for key, gain in gains.items() if key in there})
    ][: 40 if quick else None]
    embedder = Prepared(open_embedder(load_settings()), [*map(embedding_text, documents), *(text for text, _ in questions)])
    with tempfile.TemporaryDirectory() as home:
        server = start(Path(tempfile.mkdtemp(prefix="agentops-bench-")))
        try:
            settings = load_settings({"elasticsearch.url": server.url, "elasticsearch.timeout_s": 60})
            indices: dict[str, Index] = {
                "embedded": open_embedded(Path(home), embedder),
                "elasticsearch": open_elastic(settings, embedder),
            }
            rows = measure(indices, documents, questions)
            for index in indices.values():
                index.close()
        finally:
            server.stop(remove=True)
    print(f"{'':22} {'embedded':>10} {'elastic':>10} {'ratio':>6}   {len(documents)} documents, {len(questions)} questions")
    for row in rows:
        print(f"{row['metric']:22} {row['ours']:10} {row['theirs']:10} {row['ratio']:6}   {row['unit']}")
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps({"bench": "retrieval_backends", "machine": machine, "rows": rows}))


def measure(indices: dict[str, Index], documents: Sequence, questions: Sequence) -> list[dict[str, object]]:  # type: ignore[type-arg]
    taken: dict[tuple[str, str], float] = {}
    for name, index in indices.items():
        index.upsert("warm", documents[:50])
        begun = time.perf_counter()
        for at in range(0, len(documents), 256):
            index.upsert("c", documents[at : at + 256])
        taken["ingest", name] = len(documents) / (time.perf_counter() - begun)
        begun = time.perf_counter()
        index.upsert("c", documents)
        taken["ingest_unchanged", name] = len(documents) / (time.perf_counter() - begun)
    for mode in MODES:
        times: dict[str, list[float]] = {name: [] for name in indices}
        found: dict[str, list[float]] = {name: [] for name in indices}
        for turn in range(2):  # the first warms up
            for text, gains in questions:
                for name, index in indices.items():
                    begun = time.perf_counter()
                    hits = run_sync(index.search(Query(text, "c", 10, mode))).hits
                    times[name].append((time.perf_counter() - begun) * 1e3)
                    if turn:
                        found[name].append(ndcg([hit.document.id for hit in hits], gains))
        for name in indices:
            taken[f"{mode}_p50", name] = statistics.median(times[name][len(questions) :])
            taken[f"{mode}_p95", name] = statistics.quantiles(times[name][len(questions) :], n=20)[-1]
            taken[f"{mode}_ndcg10", name] = statistics.mean(found[name])
    rows: list[dict[str, object]] = []
    for metric in dict.fromkeys(metric for metric, _ in taken):
        ours, theirs = taken[metric, "embedded"], taken[metric, "elasticsearch"]
        faster = theirs / ours if metric.endswith(("p50", "p95")) else ours / theirs
        unit, digits = ("docs/s", 0) if metric.startswith("ingest") else ("nDCG@10", 3) if "ndcg" in metric else ("ms", 1)
        rows.append(
            {
                "metric": metric,
                "ours": round(ours, digits),
                "peer": f"Elasticsearch {VERSION}",
                "theirs": round(theirs, digits),
                "ratio": round(faster, 2),
                "unit": unit,
            }
        )
    return rows


if __name__ == "__main__":
    main()
