"""`agentops models`: what it prints, and what the prepared default model is worth."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from agentops.engine.checkpoint import open_checkpoint
from agentops.settings import Settings
from tests.tiny_model import write_tiny_model

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(environment: dict[str, str], tmp_path: Path) -> Run:
    """Runs `agentops models ...` with an empty cache."""
    environment["AGENTOPS_PATHS_CACHE"] = str(tmp_path / "cache")

    def call(*words: str, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "agentops", "models", *words]
        changed = environment | ({"AGENTOPS_PATHS_CACHE": str(cache)} if cache else {})
        return subprocess.run(command, capture_output=True, text=True, env=changed, cwd=tmp_path, check=False)

    return call


def test_an_empty_cache_lists_the_catalogue(run: Run) -> None:
    plain = run("list")
    assert plain.returncode == 0
    assert re.search(r"smollm2-135m-instruct +llm +not prepared", plain.stdout)
    cards = json.loads(run("list", "--json").stdout)
    assert {card["name"]: card["folder"] for card in cards} == {"smollm2-135m-instruct": None, "all-minilm-l6-v2": None}


def test_a_prepared_model_is_listed_shown_and_removed(run: Run, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "cache" / "models" / "tiny--model", bits=4)
    report = {
        "name": "tiny/model",
        "source": {"kind": "hub", "repository": "tiny/model", "revision": "abc123"},
        "perplexity": {"float": 10.0, "quantized": 11.0, "tokens": 2000, "text": "something\x1b[2J else"},
        "calibration": {"tokens": 8000, "texts": "prose"},
    }
    (folder / "prepare.json").write_text(json.dumps(report))
    assert "tiny/model" in run("list").stdout
    shown = run("show", "tiny/model").stdout
    for part in ("gptq 4-bit, group 32", "abc123", "hub tiny/model", "10.00 before, 11.00 after (1.100 times)", "8,000 tokens"):
        assert part in shown
    assert "\x1b" not in shown
    assert json.loads(run("show", "tiny/model", "--json").stdout)["report"]["perplexity"]["quantized"] == 11.0
    refused = run("remove", "tiny/model")
    assert refused.returncode == 1
    assert folder.is_dir()
    removed = run("remove", "tiny/model", "--yes")
    assert removed.returncode == 0
    assert "MB freed" in removed.stdout
    assert not folder.exists()


def test_json_is_ascii_whatever_a_report_holds(run: Run, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "cache" / "models" / "tiny--model", bits=4)
    hostile = "\udc80 \x9b2J \u202e"
    (folder / "prepare.json").write_text(json.dumps({"name": "tiny/model", "calibration": {"tokens": 1, "texts": hostile}}))
    for words in (("list",), ("show", "tiny/model")):
        done = run(*words, "--json")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.isascii()
    assert json.loads(done.stdout)["report"]["calibration"]["texts"] == hostile


def test_faults_are_one_line_and_a_hint(run: Run) -> None:
    offline = run("prepare", "smollm2-135m-instruct", "--offline")
    assert offline.returncode == 1
    assert offline.stderr.startswith("error: smollm2-135m-instruct is not in the cache")
    assert " hint: " in offline.stderr
    unknown = run("show", "smollm")
    assert unknown.returncode == 1
    assert "no model 'smollm'" in unknown.stderr
    assert run("remove", "all-minilm-l6-v2", "--yes").returncode == 1
    assert "Traceback" not in offline.stderr + unknown.stderr


@pytest.mark.model
def test_preparing_what_is_prepared_checks_it_and_prints_its_perplexities(
    run: Run, model_folder: Path, settings: Settings
) -> None:
    done = run("prepare", "smollm2-135m-instruct", "--offline", cache=settings.paths.cache)
    assert done.returncode == 0, done.stderr
    assert str(model_folder) in done.stdout
    assert re.search(r"perplexity \d+\.\d\d before, \d+\.\d\d after \(1\.\d{3} times\)", done.stdout)


@pytest.mark.model
def test_the_default_model_is_whole_and_lost_little(model_folder: Path) -> None:
    opened = open_checkpoint(model_folder)
    assert opened.quantization is not None
    assert (opened.quantization.bits, opened.quantization.group_size, opened.quantization.sym) == (4, 32, True)
    assert opened.config.tied
    report = json.loads((model_folder / "prepare.json").read_text())
    assert set(report["source"]) >= {"kind"}
    assert report["calibration"]["tokens"] > 5000
    assert report["perplexity"]["quantized"] < 1.17 * report["perplexity"]["float"]


@pytest.mark.model
def test_the_default_models_perplexity_on_text_it_never_saw(model_folder: Path, shared_data: Path) -> None:
    import torch

    from agentops.engine.calibration import float_decoder
    from agentops.engine.quantize import perplexity
    from agentops.engine.tokenizer import ChatTokenizer

    # The float model's perplexity on these six abstracts, measured with the package's weights.
    unquantized = 44.12
    opened = open_checkpoint(model_folder)
    tokenizer = ChatTokenizer(opened)
    articles = (shared_data / "cranfield" / "cran.all.1400").read_text().split("\n.I ")[700:706]
    texts = [tokenizer.encode(article.split("\n.W\n")[1].replace("\n", " "))[:512] for article in articles]
    found = perplexity(float_decoder(opened), [torch.tensor(text) for text in texts], threads=2)
    assert 0.8 * unquantized < found < 1.17 * unquantized


def test_a_second_process_says_that_it_waits(settings: Settings, tmp_path: Path) -> None:
    from agentops.engine import models
    from agentops.errors import DownloadFailed

    alone = replace(
        settings, paths=replace(settings.paths, cache=tmp_path / "cache"), model=replace(settings.model, offline=True)
    )
    folder = alone.paths.cache / "models"
    folder.mkdir(parents=True)
    stages: list[str] = []
    lock = FileLock(folder / ".all-minilm-l6-v2.lock")
    lock.acquire()

    def progress(stage: str, done: int, total: int) -> None:
        stages.append(stage)
        lock.release()

    with pytest.raises(DownloadFailed):
        models.prepare("all-minilm-l6-v2", alone, progress)
    assert stages == ["wait"]
