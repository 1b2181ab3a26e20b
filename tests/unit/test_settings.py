"""Settings: which source wins, and what a wrong value is told."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from agentops.cli import app
from agentops.errors import SettingsError
from agentops.settings import Settings, describe, is_secret, load_settings, variable


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_each_source_beats_the_one_before_and_is_remembered(tmp_path: Path) -> None:
    user = write(
        tmp_path / "conf" / "config.toml", "[retrieval]\nk = 3\ncollection = 'user'\nchunk_tokens = 200\n[model]\nname = 'user'\n"
    )
    project = write(
        tmp_path / "project" / "agentops.toml", "[retrieval]\nk = 4\ncollection = 'project'\n[model]\nname = 'project'\n"
    )
    environment = {"AGENTOPS_CONFIG": str(user.parent), "AGENTOPS_RETRIEVAL_K": "5", "AGENTOPS_MODEL_NAME": "env"}

    got = load_settings({"model.name": "flag", "engine.device": None}, environment=environment, folder=project.parent)

    assert got.retrieval.overlap_tokens == Settings().retrieval.overlap_tokens
    assert got.source("retrieval.overlap_tokens") == "default"
    assert (got.retrieval.chunk_tokens, got.source("retrieval.chunk_tokens")) == (200, str(user))
    assert (got.retrieval.collection, got.source("retrieval.collection")) == ("project", str(project))
    assert (got.retrieval.k, got.source("retrieval.k")) == (5, "$AGENTOPS_RETRIEVAL_K")
    assert (got.model.name, got.source("model.name")) == ("flag", "--model")
    assert got.source("engine.device") == "default", "a flag that was not given is no source"


def test_every_setting_is_described_and_can_be_set_from_the_environment() -> None:
    builtin = Settings()
    for key, about in describe().items():
        given: dict[Any, Any] = {None: Path("/some/where"), "": "word", (): ("one", "two")}
        value = given.get(builtin.get(key), builtin.get(key))
        written = ", ".join(value) if isinstance(value, tuple) else str(value)
        got = load_settings({}, environment={variable(key): written}, folder=Path("/nonexistent"))
        assert about, key
        assert got.get(key) == value, key
        assert type(got.get(key)) is type(value), key
        assert got.source(key) == f"${variable(key)}"


def test_a_value_from_the_command_line_names_a_flag_that_there_is() -> None:
    given = {"run": ("model.name", "engine.device", "run.seed", "run.trim"), "search": ("retrieval.k", "retrieval.embedder")}
    values = {"engine.device": "cpu"}
    group = typer.main.get_group(app)
    for verb, keys in given.items():
        flags = {flag for option in group.commands[verb].params for flag in option.opts}
        for key in keys:
            got = load_settings({key: values.get(key, "1")}, environment={}, folder=Path("/nonexistent"))
            assert got.source(key) in flags, key
    with pytest.raises(SettingsError, match=r"^--model: model\.name must be a word"):
        load_settings({"model.name": ""}, environment={}, folder=Path("/nonexistent"))


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().model.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "raw", "told"),
    [
        ("retrieval.k", "many", "a whole number"),
        ("retrieval.k", "0", "between 1 and 1,000"),
        ("retrieval.k", "2.5", "a whole number"),
        ("model.hub_timeout_s", "soon", "a number"),
        ("model.hub_timeout_s", "nan", "between"),
        ("engine.device", "tpu", "one of auto, cpu, cuda"),
        ("model.offline", "perhaps", "true or false"),
        ("paths.home", "  ", "a path"),
        ("model.name", "", "a word"),
    ],
)
def test_a_wrong_value_names_its_source_and_what_is_expected(key: str, raw: str, told: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings({}, environment={variable(key): raw}, folder=Path("/nonexistent"))
    assert told in str(caught.value)
    assert f"${variable(key)}" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "told", "hint"),
    [
        ("[retrieval]\nkk = 4\n", "retrieval.kk", "retrieval.k"),
        ("[retreival]\nk = 4\n", "retreival.k", "retrieval.k"),
        ("k = 4\n", "outside a section", "[model]"),
        ("[model\n", "agentops.toml", "mend the file"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, told: str, hint: str) -> None:
    write(tmp_path / "agentops.toml", text)
    with pytest.raises(SettingsError) as caught:
        load_settings({}, environment={"AGENTOPS_CONFIG": str(tmp_path / "none")}, folder=tmp_path)
    assert told in str(caught.value)
    assert "agentops.toml" in str(caught.value)
    assert hint in caught.value.hint


def test_bytes_that_are_not_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "agentops.toml").write_bytes(b"[model]\nname = '\xff'\n")
    with pytest.raises(SettingsError, match=r"agentops\.toml"):
        load_settings({}, environment={"AGENTOPS_CONFIG": str(tmp_path / "none")}, folder=tmp_path)


def test_an_unknown_flag_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(SettingsError, match=r"model\.nam"):
        load_settings({"model.nam": "x"}, environment={}, folder=Path("/nonexistent"))


def test_paths_are_absolute_and_the_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    environment = {"AGENTOPS_PATHS_HOME": "record", "AGENTOPS_PATHS_CACHE": "~/cache"}
    got = load_settings({}, environment=environment, folder=tmp_path)
    assert got.paths.home == tmp_path / "record"
    assert got.paths.cache == tmp_path / "me" / "cache"


def test_tests_never_touch_the_users_home() -> None:
    real = Path("~").expanduser()
    for home in (Settings().paths.home, load_settings().paths.home):
        assert not home.is_relative_to(real)
        assert home.is_relative_to(Path(os.environ["XDG_DATA_HOME"]).parent)


def test_secrets_are_known_as_such_and_never_shown(environment: dict[str, str]) -> None:
    secrets = [key for key in describe() if is_secret(key)]
    assert secrets == ["elasticsearch.password", "elasticsearch.api_key", "record.url", "judge.api_key"]
    environment |= {"AGENTOPS_ELASTICSEARCH_PASSWORD": "hunter2"}
    for more in ([], ["--json"]):
        command = [sys.executable, "-m", "agentops", "config", "elasticsearch", *more]
        shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        assert "***" in shown
        assert "hunter2" not in shown
