"""`agentops doctor`, `agentops config`, `--version` and shell completion: each fault is made for real and must be named."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from postgres_server import Postgres
from typer.testing import CliRunner

from agentops.cli import app, house
from agentops.cli.house import Finding
from agentops.settings import Settings, describe, load_settings

AGENTOPS = Path(sys.executable).with_name("agentops")
NO_GPU = not (Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi"))


def invoke(*words: str, **environment: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, words, env=environment)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def faults(found: Any) -> list[Finding]:
    return [finding for finding in found if finding.verdict != "ok"]


@pytest.fixture
def healthy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    monkeypatch.setenv("AGENTOPS_PATHS_HOME", str(home))
    return home


def test_a_sound_installation_has_nothing_broken(healthy: Path) -> None:
    code, printed = invoke("doctor", "--json")
    report = json.loads(printed)
    assert code == 0, printed
    assert report["ok"] is True
    assert report["version"] == metadata.version("agentops-runtime")
    checks = {finding["check"]: finding for finding in report["findings"]}
    assert {"settings", "python", "runtime", "packages", "names", "processor", "gpu", "home", "cache"} <= set(checks)
    assert {"model", "embedder", "sqlite", "store", "index"} <= set(checks)
    assert f"torch {metadata.version('torch')}" in checks["packages"]["detail"]
    assert all(finding["mend"] for finding in report["findings"] if finding["verdict"] != "ok")
    assert not healthy.exists(), "the doctor makes nothing"


def test_the_doctor_for_people_counts_what_it_found(healthy: Path) -> None:
    code, printed = invoke("doctor")
    assert code == 0
    assert printed.rstrip().endswith("0 broken")


def test_the_doctor_loads_no_torch(environment: dict[str, str]) -> None:
    code = "import sys, agentops.cli as c\ntry: c.app(['doctor'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_a_broken_setting_is_named_and_the_other_checks_still_run(healthy: Path) -> None:
    code, printed = invoke("doctor", "--json", AGENTOPS_RETRIEVAL_K="many")
    report = json.loads(printed)
    assert code == 1
    (broken,) = [finding for finding in report["findings"] if finding["verdict"] == "broken"]
    assert broken["check"] == "settings"
    assert "retrieval.k must be a whole number" in broken["detail"]
    assert len(report["findings"]) > 8


def test_a_misspelt_variable_is_a_warning_with_the_right_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTOPS_MODEL_NAMES", "x")
    (fault,) = faults(house._settings(load_settings()))
    assert fault.verdict == "warning"
    assert "AGENTOPS_MODEL_NAMES" in fault.detail
    assert "AGENTOPS_MODEL_NAME?" in fault.mend


def test_missing_and_outdated_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["no-such-thing>=1", "numpy>=99", "typer>=0.1", 'never>=1; extra == "evals"']
    monkeypatch.setattr(metadata, "requires", lambda _: asked)
    (fault,) = faults(house._packages(Settings()))
    assert fault.verdict == "broken"
    assert "no-such-thing is missing" in fault.detail
    assert "numpy" in fault.detail
    assert "typer" not in fault.detail
    assert "never" not in fault.detail


@pytest.mark.parametrize("name", ["agentops", "evals"])
def test_the_other_distribution_of_our_name_is_named(name: str, tmp_path: Path, environment: dict[str, str]) -> None:
    info = tmp_path / "site" / f"{name}-9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n", encoding="utf-8")
    (info / "top_level.txt").write_text(f"{name}\n", encoding="utf-8")
    done = subprocess.run(
        [AGENTOPS, "doctor", "--json"], env=environment | {"PYTHONPATH": str(info.parent)}, capture_output=True, text=True
    )
    (fault,) = [found for found in json.loads(done.stdout)["findings"] if found["verdict"] == "broken"]
    assert done.returncode == 1
    assert f"the distribution {name}" in fault["detail"]
    assert f"pip uninstall {name}" in fault["mend"]


def test_a_folder_that_hides_one_of_our_packages_is_named(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "mine" / "evals").mkdir(parents=True)
    (tmp_path / "mine" / "evals" / "__init__.py").touch()
    done = subprocess.run(
        [AGENTOPS, "doctor", "--json"], env=environment | {"PYTHONPATH": str(tmp_path / "mine")}, capture_output=True, text=True
    )
    (fault,) = [found for found in json.loads(done.stdout)["findings"] if found["verdict"] == "broken"]
    assert done.returncode == 1
    assert str(tmp_path / "mine" / "evals") in fault["detail"]


@pytest.mark.skipif(not NO_GPU, reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_broken_and_auto_is_not() -> None:
    (fault,) = faults(house._device(load_settings({"engine.device": "cuda"})))
    assert fault.check == "gpu"
    assert fault.verdict == "broken"
    assert not faults(house._device(load_settings()))


def test_folders_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    bad = {"paths.home": tmp_path / "file" / "below", "paths.cache": Path("/proc/agentops")}
    first, second = faults(house._folders(load_settings(bad)))
    assert (first.check, first.verdict) == ("home", "broken")
    assert "is a file" in first.detail
    assert (second.check, second.verdict) == ("cache", "broken")
    assert "cannot be written" in second.detail
    assert "paths.cache" in second.mend


@pytest.mark.parametrize(("free", "verdict"), [(10 << 30, "ok"), (1 << 30, "warning"), (100 << 20, "broken")])
def test_a_disk_that_fills_up_is_a_warning_first(
    free: int, verdict: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(20 << 30, 0, free))
    assert {finding.verdict for finding in house._folders(settings)} == {verdict}


def test_a_model_folder_that_is_not_there_is_broken(tmp_path: Path) -> None:
    found = list(house._models(load_settings({"model.name": str(tmp_path / "nothing")})))
    (fault,) = [finding for finding in found if finding.check == "model"]
    assert fault.verdict == "broken"
    assert str(tmp_path / "nothing") in fault.detail
    assert fault.mend


def test_a_model_that_is_not_prepared_is_a_warning_with_the_command(tmp_path: Path) -> None:
    found = list(house._models(load_settings({"paths.cache": tmp_path})))
    assert {(finding.check, finding.verdict) for finding in found} == {("model", "warning"), ("embedder", "warning")}
    assert "agentops models prepare" in found[0].mend


def test_a_model_folder_that_is_damaged_is_broken(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]', encoding="utf-8")
    found = list(house._models(load_settings({"model.name": str(tmp_path), "retrieval.embedder": str(tmp_path)})))
    assert {(finding.check, finding.verdict) for finding in found} == {("model", "broken"), ("embedder", "broken")}


@pytest.mark.model
def test_a_prepared_model_is_found(model_folder: Path, embedder_folder: Path, settings: Settings) -> None:
    found = list(house._models(settings))
    assert not faults(found)
    assert str(model_folder) in found[0].detail


def test_what_is_no_store_is_named_and_left_alone(settings: Settings) -> None:
    settings.paths.home.mkdir(parents=True)
    file = settings.paths.home / "record.db"
    file.write_bytes(b"not a database, " * 100)
    (fault,) = faults(house._store(settings))
    assert fault.verdict == "broken"
    assert fault.mend
    assert file.read_bytes() == b"not a database, " * 100


def test_a_store_of_a_newer_version_is_named(settings: Settings) -> None:
    settings.paths.home.mkdir(parents=True)
    with sqlite3.connect(settings.paths.home / "record.db") as database:
        database.execute("CREATE TABLE alembic_version (version_num TEXT)")
        database.execute("INSERT INTO alembic_version VALUES ('9999')")
    database.close()
    (fault,) = faults(house._store(settings))
    assert "newer version" in fault.detail


def test_a_sound_store_tells_its_schema(settings: Settings) -> None:
    from agentops.store import open_store
    from agentops.store.opening import HEAD

    assert "nothing is recorded yet" in [finding.detail for finding in house._store(settings)]
    open_store(settings).close()
    _, store = house._store(settings)
    assert store.verdict == "ok"
    assert f"schema {HEAD}" in store.detail


def test_a_record_in_postgres_is_told_with_its_server_and_without_its_password(
    postgres_settings: Settings, postgres_server: Postgres
) -> None:
    from agentops.store import open_store
    from agentops.store.opening import HEAD

    def told() -> house.Finding:
        _, store = house._store(postgres_settings)
        assert postgres_server.password not in store.detail + store.mend
        assert f"postgresql://127.0.0.1:{postgres_server.port}/test_" in store.detail
        return store

    assert told().detail.endswith("nothing is recorded yet")
    open_store(postgres_settings).close()
    assert told().detail.startswith("PostgreSQL 1")
    assert f"MB, schema {HEAD}, 0 journal segments" in told().detail
    assert not (postgres_settings.paths.home / "record.db").exists()
    postgres_server.stop()
    try:
        fault = told()
        assert fault.verdict == "broken"
        assert "no Postgres answers" in fault.detail
        assert fault.mend
    finally:
        postgres_server.start()


@pytest.mark.parametrize(("version", "named"), [((3, 40, 1), True), ((3, 51, 2), True), ((3, 51, 3), False), ((3, 6, 9), False)])
def test_sqlite_with_the_wal_reset_bug_is_named_with_what_protects(
    version: tuple[int, ...], named: bool, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", version)
    sqlite, *_ = house._store(settings)
    assert sqlite.verdict == "ok"
    assert ("take turns behind a file lock" in sqlite.detail) is named


def test_a_damaged_index_is_named(settings: Settings) -> None:
    folder = settings.paths.home / "index"
    folder.mkdir(parents=True)
    (folder / "documents.sqlite").write_bytes(b"not a database, " * 100)
    (fault,) = faults(house._index(settings))
    assert (fault.check, fault.verdict) == ("index", "broken")


def test_config_shows_every_setting_with_its_source(healthy: Path) -> None:
    code, printed = invoke("config", "--json", AGENTOPS_RETRIEVAL_K="3")
    rows = json.loads(printed)
    assert code == 0
    assert list(rows) == list(describe())
    assert rows["retrieval.k"] == {
        "value": 3,
        "source": "$AGENTOPS_RETRIEVAL_K",
        "default": Settings().retrieval.k,
        "variable": "AGENTOPS_RETRIEVAL_K",
        "about": describe()["retrieval.k"],
    }
    assert rows["paths.home"]["value"] == str(healthy)
    assert rows["engine.device"]["source"] == "default"


def test_config_for_people_takes_a_key_or_a_section() -> None:
    lines: Callable[..., list[str]] = lambda *words: invoke("config", *words)[1].splitlines()  # noqa: E731
    assert len(lines()) == len(describe())
    assert [line.split()[:3] for line in lines("model.name")] == [["model.name", Settings().model.name, "default"]]
    assert {line.split(".")[0] for line in lines("model")} == {"model"}


def test_config_clears_what_could_steer_the_terminal() -> None:
    _, printed = invoke("config", "model.name", AGENTOPS_MODEL_NAME="x\x1b]52;c;aGk=\x07y")
    assert "\x1b" not in printed
    assert "\x07" not in printed


def test_an_unknown_key_gets_a_suggestion() -> None:
    done = subprocess.run([AGENTOPS, "config", "model.nam"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "did you mean model.name?" in done.stderr
    assert "Traceback" not in done.stderr


def test_version() -> None:
    assert invoke("--version") == (0, f"agentops {metadata.version('agentops-runtime')}\n")


def test_the_shell_completes_verbs_and_options(environment: dict[str, str]) -> None:
    def complete(line: str) -> list[str]:
        words = {"_AGENTOPS_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
        return subprocess.run([AGENTOPS], env=environment | words, capture_output=True, text=True).stdout.split()

    assert complete("agentops doc") == ["doctor"]
    assert complete("agentops doctor --j") == ["--json"]


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
def test_the_completion_script_is_one_that_bash_takes(environment: dict[str, str]) -> None:
    script = subprocess.run(
        ["bash", "-c", "agentops --show-completion; true"], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert "_AGENTOPS_COMPLETE=complete_bash" in script
    loaded = subprocess.run(
        ["bash", "-c", script + "\ncomplete -p agentops"], env=environment | {"HOME": os.devnull}, capture_output=True, text=True
    )
    assert loaded.returncode == 0, loaded.stderr
    assert "complete" in loaded.stdout
