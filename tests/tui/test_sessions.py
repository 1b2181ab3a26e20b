"""Whole sessions: in tmux, as a person sees and types, and in a browser. Where a program is missing the test says so."""

from __future__ import annotations

import asyncio
import base64
import io
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
from typing import Any

import aiohttp
import pytest
from PIL import Image
from tui_emulated import Emulated
from tui_record import NOW, Seeds, many, small

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
    """A session of 100 x 30. Called with keys it types them, without any it gives what is on the screen; with `-e` in colours."""
    base = ["tmux", "-S", str(socket_file)]
    # Else the screens believe these, and not tmux.
    environment = {name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES")}

    def do(*words: str) -> str:
        done = subprocess.run([*base, *words], capture_output=True, text=True, env=environment)
        return done.stdout

    def session(*keys: str) -> str:
        if keys and keys != ("-e",):
            do("send-keys", "-t", "screens", *keys)
        return do("capture-pane", "-p", *(("-e", "-N") if keys == ("-e",) else ()), "-t", "screens")

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


def seen(captured: str) -> object:
    """What is on a screen in colours, the ink of blanks left out."""
    screen = Emulated(100, 30)
    screen.write(captured)
    return screen.seen


@pytest.mark.skipif(shutil.which("tmux") is None, reason="no tmux here: apt-get install tmux")
def test_what_is_sent_in_parts_is_what_a_whole_screen_is(settings: Settings, environment: dict[str, str], tmp_path: Path) -> None:
    list(many(settings, 60, 40))
    command = [sys.executable, "-m", "agentops", "tui", "runs"]
    with tmux(command, environment | {"TERM": "xterm-256color"}, tmp_path / "socket") as screen:
        until(screen, "✓ done")
        for keys in ("jjjj", "PPkk", "Ejk", "tP", "\r", "jjzjz", "Pdjd", "?jj", "q1EE", "\r"):
            for key in keys:
                screen({"P": "NPage", "E": "End", "\r": "Enter"}.get(key, key))
                time.sleep(0.04)
            time.sleep(0.4)
            parts = seen(screen("-e"))
            screen("C-l")
            time.sleep(0.4)
            assert seen(screen("-e")) == parts, keys


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


class Browser:
    """A page in Chromium, over its debugging port."""

    def __init__(self, line: aiohttp.ClientWebSocketResponse) -> None:
        self._line = line
        self._calls = 0

    async def call(self, method: str, **about: Any) -> dict[str, Any]:
        self._calls += 1
        await self._line.send_json({"id": self._calls, "method": method, "params": about})
        while True:
            answer = await self._line.receive_json(timeout=20)
            if answer.get("id") == self._calls:
                return dict(answer["result"])

    async def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            about = {"text": key} if kind == "keyDown" else {}
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=ord(key.upper()), **about)
        await asyncio.sleep(1.5)

    async def picture(self) -> Image.Image:
        shot = await self.call("Page.captureScreenshot", format="png")
        return Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")


def inks(picture: Image.Image) -> set[tuple[int, int, int]]:
    return {colour for _, colour in picture.getcolors(1 << 24)}


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
async def test_the_screens_in_a_browser(settings: Settings, environment: dict[str, str], tmp_path: Path) -> None:
    small(settings)
    port = free_port()
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1000,700", profile]
    colourful = {name: value for name, value in environment.items() if name != "NO_COLOR"}
    with served(colourful, free_port()) as url:
        chromium = subprocess.Popen(
            [str(CHROMIUM), *flags, f"--remote-debugging-port={port}", url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            async with aiohttp.ClientSession() as http:
                for _ in range(150):
                    try:
                        async with http.get(f"http://127.0.0.1:{port}/json") as answer:
                            pages = await answer.json()
                        break
                    except aiohttp.ClientError:
                        await asyncio.sleep(0.1)
                (page,) = (one for one in pages if one["type"] == "page")
                async with http.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as line:
                    browser = Browser(line)
                    for _ in range(80):
                        shown = await browser.call("Runtime.evaluate", expression="document.body.className")
                        if "-first-byte" in str(shown["result"].get("value")):
                            break
                        await asyncio.sleep(0.5)
                    await asyncio.sleep(2)
                    await browser.call("Runtime.evaluate", expression="document.querySelector('textarea').focus()")
                    runs = await browser.picture()
                    assert (36, 47, 56) in inks(runs), "no bar"
                    assert len(inks(runs)) > 20, "no text"
                    top = (0, 0, 1000, 40)
                    await browser.press("4")
                    assert (await browser.picture()).crop(top).tobytes() != runs.crop(top).tobytes(), "keys do nothing"
                    await browser.press("1")
                    await browser.press("r")
                    assert (await browser.picture()).crop(top).tobytes() == runs.crop(top).tobytes(), "something was started"
        finally:
            chromium.kill()
            chromium.wait()
