"""How the screens act: they start the verbs of the command line as processes.

A process that was started goes on when the screens are closed: it has a session of its own, and writes to a file that nobody
has to read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentops.settings import Settings
from agentops.store.pages import RunLine

_KEPT_BYTES = 1_000_000


class Job:
    """A verb at work. `text` is what it has said so far, the last million bytes of it, foreign text; `code` its exit code once
    it has ended."""

    def __init__(self, settings: Settings, words: Sequence[str], *, given: str = "") -> None:
        """Starts `agentops WORDS` with `given` on its standard input.

        Raises:
            OSError: it cannot be started.
        """
        self.words = tuple(words)
        self.code: int | None = None
        self.text = ""
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the job
        environment = os.environ | {
            "AGENTOPS_PATHS_HOME": str(settings.paths.home),
            "AGENTOPS_PATHS_CACHE": str(settings.paths.cache),
            "NO_COLOR": "1",
            "COLUMNS": "100",
            "PYTHONUNBUFFERED": "1",
        }
        with tempfile.TemporaryFile() as source:
            source.write(given.encode("utf-8", "replace"))
            source.seek(0)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "agentops", *words],
                stdin=source,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def poll(self) -> bool:
        """Reads what is new; whether there was anything new."""
        if self.code is not None:
            return False
        code = self._process.poll()
        handle = self._output.fileno()
        raw = os.pread(handle, _KEPT_BYTES, max(0, os.fstat(handle).st_size - _KEPT_BYTES))
        text = raw.decode("utf-8", "replace")
        new = text != self.text or code is not None
        self.text, self.code = text, code
        if code is not None:
            self._output.close()
        return new

    def leave(self) -> None:
        """Lets it go on alone."""
        self._output.close()
        # Whoever leaves does not wait for it; the interpreter need not warn of that.
        if self.code is None:
            self._process.returncode = 0

    @property
    def line(self) -> str:
        return " ".join(("agentops", *self.words))


def answer_words(run_id: str) -> list[str]:
    """The verb that answers a waiting run, with the answers on standard input."""
    return ["resume", run_id, "--answers", "-"]


def answers(interrupt_id: str, kind: str, content: Any) -> str:
    """What standard input is given: `content` is a decision as JSON knows it, or the answer to a question."""
    return json.dumps({interrupt_id: True if kind == "pause" else content})


def _holds(pid: int, file: Path) -> bool:
    folder = Path(f"/proc/{pid}/fd")
    try:
        if folder.stat().st_uid != os.getuid():
            return False
        wanted = file.stat()
        for handle in folder.iterdir():
            try:
                found = handle.stat()
            except OSError:
                continue
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    except OSError:
        return False
    return False


def _works_on(settings: Settings, run: RunLine) -> bool:
    """Whether the process that a run names is the one that it was started in: a number of a process is used again."""
    return bool(run.pid and run.segment) and _holds(run.pid, settings.paths.home / "journal" / Path(run.segment).name)


def memory_bytes(settings: Settings, run: RunLine) -> int | None:
    """What the process of a run holds in memory; None where that process is gone, or this system does not tell."""
    if not _works_on(settings, run):
        return None
    try:
        pages = int(Path(f"/proc/{run.pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
