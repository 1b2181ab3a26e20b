"""Whole sessions: in tmux, as a person sees and types, and in a browser. Where a program is missing the test says so."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tui_record import NOW, Seeds, small

from agentops import Settings


def until(look: Callable[[], str], wanted: str, seconds: float = 30.0) -> str:
    begun, text = time.monotonic(), ""
    while time.monotonic() - begun < seconds:
        if wanted in (text := look()):
            return text
        time.sleep(0.1)
    raise AssertionError(f"{wanted!r} was not shown:\n{text}")


@contextmanager
def tmux(command: list[str], environment: dict[str, str], socket_file: Path) -> Iterator[Callable[..., str]]:
    """A session of 100 x 30. Called with keys it types them, without any it gives what is on the screen."""
    base = ["tmux", "-S", str(socket_file)]

    def do(*words: str) -> str:
        done = subprocess.run([*base, *words], capture_output=True, text=True, env=environment)
        return done.stdout

    def session(*keys: str) -> str:
        if keys:
            do("send-keys", "-t", "screens", *keys)
        return do("capture-pane", "-p", "-t", "screens")

    do("-f", "/dev/null", "new-session", "-d", "-s", "screens", "-x", "100", "-y", "30", shlex.join(command))
    try:
        yield session
    finally:
        do("kill-server")


@pytest.mark.skipif(shutil.which("tmux") is None, reason="no tmux here: apt-get install tmux")
def test_a_session_in_tmux(settings: Settings, environment: dict[str, str], tmp_path: Path) -> None:
    small(settings)
    command = [sys.executable, "-m", "agentops", "tui", "runs"]
    with tmux(command, environment | {"TERM": "xterm-256color"}, tmp_path / "socket") as screen:
        text = until(screen, "✓ done")
        assert re.search(r"▸ ✓ done .* rag", text)
        seeds = Seeds()
        seeds.run("run_99Z", graph="newcomer", status="done", started_ns=NOW, ended_ns=NOW + 1)
        seeds.write(settings)
        until(screen, "newcomer")
        screen("Enter")
        text = until(screen, "generate generation")
        assert "━" in text
        screen("Escape")
        until(screen, "mine.py")
        screen("2")
        until(screen, "Send this letter?")
        assert "your parcel is on its way." in screen()
        screen("3")
        until(screen, "longer-prompt")
        screen("4")
        until(screen, "tokens/s")
        screen("q")
        begun = time.monotonic()
        while screen() and time.monotonic() - begun < 10:
            time.sleep(0.1)
        assert screen() == "", "the session is over when the screens are left"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def status_of(url: str, **headers: str) -> int:
    request = urllib.request.Request(url, headers={name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)

PAGE = """
<iframe src="URL" style="width:1000px;height:700px"></iframe>
"""


@contextmanager
def served(environment: dict[str, str], port: int) -> Iterator[str]:
    command = [sys.executable, "-m", "agentops", "tui", "runs", "--serve", "--port", str(port)]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        begun = time.monotonic()
        while time.monotonic() - begun < 30:
            try:
                if status_of(url):
                    break
            except OSError:
                time.sleep(0.2)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_only_pages_of_this_machine_are_served(settings: Settings, environment: dict[str, str]) -> None:
    small(settings)
    port = free_port()
    with served(environment, port) as url:
        assert status_of(url) == 200
        assert status_of(url, Origin=url) == 200
        assert status_of(url, Origin="https://elsewhere.example") == 403
        assert status_of(f"{url}/ws", Origin="http://localhost:1") == 403
        assert status_of(url, Host="rebound.example") == 403
        listening = Path("/proc/net/tcp").read_text(encoding="ascii")
        assert f" 0100007F:{port:04X} " in listening
        assert f" 00000000:{port:04X} " not in listening


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_the_screens_in_a_browser(settings: Settings, environment: dict[str, str], tmp_path: Path) -> None:
    small(settings)
    with served(environment, free_port()) as url:
        page = tmp_path / "page.png"
        done = subprocess.run(
            [
                str(CHROMIUM),
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                f"--user-data-dir={tmp_path / 'profile'}",
                "--window-size=1000,700",
                "--virtual-time-budget=20000",
                "--timeout=20000",
                f"--screenshot={page}",
                url,
            ],
            capture_output=True,
            timeout=90,
            env=environment,
        )
        assert page.exists(), done.stderr[-2000:]
        shutil.copy(page, "/tmp/lab/e_pic/web.png")
