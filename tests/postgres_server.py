"""A real Postgres on loopback: a cluster of the tests' own, in a folder of their own, stopped by its own process id.

It needs the server's programs (`apt-get install postgresql`) and nothing else. Postgres refuses to run as root: there the cluster
belongs to the system's user `postgres`.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

USER = "agentops"
START_S = 60


class ServerError(Exception):
    """The server cannot be had; the text says why and what to do."""


@dataclass
class Postgres:
    """A cluster. `database()` gives the address of a new, empty database; `stop` and `start` are an outage, `kill` a crash."""

    programs: Path
    folder: Path
    port: int
    password: str = field(repr=False)
    account: pwd.struct_passwd | None
    process: subprocess.Popen[bytes] | None = None

    def url(self, database: str) -> str:
        return f"postgresql://{USER}:{quote(self.password)}@127.0.0.1:{self.port}/{database}"

    def database(self) -> str:
        import psycopg

        name = f"test_{secrets.token_hex(8)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        return self.url(name)

    def start(self) -> None:
        """Starts the server and waits until it takes connections.

        Raises:
            ServerError
        """
        options = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "port": str(self.port),
            "max_connections": "200",
            "shared_buffers": "32MB",
            # What is tested dies with processes, not with the machine.
            "fsync": "off",
        }
        arguments = [f"-c{name}={value}" for name, value in options.items()]
        log = self.folder / "log"
        with log.open("ab") as out:
            command = [str(self.programs / "postgres"), "-D", str(self.folder / "data"), *arguments]
            self.process = subprocess.Popen(command, stdout=out, stderr=out, cwd=self.folder, **_as(self.account))
        deadline = time.monotonic() + START_S
        ready = [str(self.programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        while subprocess.run(ready, check=False).returncode != 0:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise ServerError(f"Postgres did not start; it said:\n{log.read_text(errors='replace')[-1500:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Ends the server in order, and breaks its connections."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """Ends the server as a crash would."""
        self._end(signal.SIGQUIT)

    def _end(self, sign: signal.Signals) -> None:
        if self.process is not None:
            if self.process.poll() is None:
                self.process.send_signal(sign)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None


def programs() -> Path:
    """The folder of the newest server's programs.

    Raises:
        ServerError: there is none.
    """
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    here = shutil.which("postgres") or (str(found[-1]) if found else None)
    if here is None:
        raise ServerError("Postgres was not found; install it: apt-get install postgresql")
    return Path(here).resolve().parent


@contextmanager
def cluster() -> Iterator[Postgres]:
    """A started cluster, gone after the block.

    Raises:
        ServerError
    """
    found, account = programs(), None
    if os.geteuid() == 0:
        try:
            account = pwd.getpwnam("postgres")
        except KeyError:
            raise ServerError("Postgres refuses root, and there is no user 'postgres'") from None
    folder = Path(tempfile.mkdtemp(prefix="agentops-postgres-"))
    try:
        password, file = secrets.token_hex(16), folder / "password"
        file.write_text(password)
        if account is not None:
            for path in (folder, file):
                os.chown(path, account.pw_uid, account.pw_gid)
        initdb = [str(found / "initdb"), "-D", str(folder / "data"), "-U", USER, "-A", "scram-sha-256", f"--pwfile={file}"]
        _run([*initdb, "-E", "UTF8", "--no-locale", "--no-sync"], folder, account)
        server = Postgres(found, folder, _free_port(), password, account)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(command: Sequence[str], folder: Path, account: pwd.struct_passwd | None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, **_as(account))
    if done.returncode != 0:
        raise ServerError(f"{Path(command[0]).name} failed; it said:\n{(done.stdout + done.stderr)[-1500:]}")


def _as(account: pwd.struct_passwd | None) -> dict[str, object]:
    return {} if account is None else {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
