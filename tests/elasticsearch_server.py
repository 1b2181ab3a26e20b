#!/usr/bin/env python3
"""A real Elasticsearch 9 on loopback, without Docker: fetched once with Maven, started, and stopped by its own process id.

    python tests/elasticsearch_server.py start [--port 9200] [--password]   `make elasticsearch`
    python tests/elasticsearch_server.py stop [--remove]                    `make elasticsearch-stop`
    python tests/elasticsearch_server.py check                              what is missing on this machine

It needs Java 21 or newer and Maven, and nothing but Python's standard library beside them. The distribution is the core of
Elasticsearch, for tests and for trying things out: it holds no licensed features and is no server to run in production.
Elasticsearch refuses to run as root: there it gets a system user of its own and folders that this user can reach.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import json
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

VERSION = "9.5.3"
ARTIFACT = f"org.elasticsearch.distribution.integ-test-zip:elasticsearch:{VERSION}:zip"
JAVA = 21
USER = "agentops-elasticsearch"
START_S = 120
FETCH_S = 900
SHORT_LIVED = "-XX:TieredStopAtLevel=1"
"""For a server of some minutes: code that is compiled well would cost more time than it saves."""


class ServerError(Exception):
    """The server cannot be had; the text says why and what to do."""


@dataclass(frozen=True)
class Server:
    """A started server. `pid` and `born` (clock ticks since boot) together name its process, it writes in `folder` alone."""

    url: str
    pid: int
    born: int
    folder: str
    user: str = ""
    password: str = ""

    def alive(self) -> bool:
        return _born(self.pid) == self.born

    def stop(self, *, remove: bool = False) -> None:
        """Ends this process and no other; `remove` also takes its folder away."""
        for sign, patience_s in ((signal.SIGTERM, 20), (signal.SIGKILL, 10)):
            if self.alive():
                os.kill(self.pid, sign)
            deadline = time.monotonic() + patience_s
            while self.alive() and time.monotonic() < deadline:
                time.sleep(0.05)
        if remove:
            shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self) -> None:
        """Ends it as a crash would."""
        if self.alive():
            os.kill(self.pid, signal.SIGKILL)
        while self.alive():
            time.sleep(0.01)


def missing() -> str:
    """Why no server can be started on this machine, or an empty string."""
    try:
        find_java()
        if not _unpacked().exists():
            _maven()
    except ServerError as error:
        return str(error)
    return ""


def start(
    folder: Path,
    port: int = 0,
    *,
    roles: str = "",
    users: Mapping[str, tuple[str, str]] | None = None,
    tls: tuple[Path, Path] | None = None,
    java_options: str = "",
) -> Server:
    """Starts a server that keeps its data below `folder` and waits until it takes requests. `port` 0 takes a free one.

    With `users` (name to password and roles, separated by commas) it asks who one is; `roles` is the text of `roles.yml`.
    `tls` names the files of a certificate and its key.

    Raises:
        ServerError
    """
    if sys.platform != "linux":
        raise ServerError("the test server is started on Linux only; elsewhere install Elasticsearch 9 and name its address")
    java, home = find_java(), distribution()
    port = port or _free_port()
    if _taken(port):
        raise ServerError(f"port {port} is taken by another program; name another: --port N")
    account = _account()
    config, pid_file = folder / "config", folder / "pid"
    for part in (folder, config, folder / "data", folder / "logs", folder / "tmp"):
        part.mkdir(parents=True, exist_ok=True)
    for file in ("jvm.options", "log4j2.properties", "users", "users_roles", "roles.yml", "role_mapping.yml"):
        shutil.copy(home / "config" / file, config / file)
    (config / "jvm.options.d").mkdir(exist_ok=True)
    (config / "elasticsearch.yml").write_text(_configuration(folder, port, bool(users), tls), encoding="utf-8")
    if roles:
        (config / "roles.yml").write_text(roles, encoding="utf-8")
    for kind, file in zip(("certificate", "key"), tls or (), strict=False):
        shutil.copy(file, config / f"{kind}.pem")
    pid_file.unlink(missing_ok=True)
    if account is not None:
        _give(folder, account)
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(folder),
        "ES_JAVA_HOME": str(java),
        "ES_PATH_CONF": str(config),
        "ES_JAVA_OPTS": f"-Xms512m -Xmx512m {java_options}",
        "ES_TMPDIR": str(folder / "tmp"),
    }

    def call(program: str, *arguments: str, patience_s: float) -> None:
        log = folder / "start.log"
        with log.open("ab") as out:
            done = subprocess.run(
                [str(home / "bin" / program), *arguments],
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                timeout=patience_s,
                check=False,
                **({} if account is None else {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}),  # type: ignore[arg-type]
            )
        if done.returncode != 0:
            said = log.read_text(encoding="utf-8", errors="replace").strip()[-1500:]
            raise ServerError(f"Elasticsearch did not start (exit code {done.returncode}); it said:\n{said}")

    name = password = ""
    for name, (password, roles_of) in reversed((users or {}).items()):
        call("elasticsearch-users", "useradd", name, "-p", password, "-r", roles_of, patience_s=60)
    try:
        call("elasticsearch", "-d", "-p", str(pid_file), patience_s=START_S)
        pid = int(pid_file.read_text())
    except subprocess.TimeoutExpired:
        raise ServerError(f"Elasticsearch was not up after {START_S} s; see {folder / 'start.log'}") from None
    scheme = "https" if tls else "http"
    server = Server(f"{scheme}://127.0.0.1:{port}", pid, _born(pid), str(folder), name, password)
    try:
        _wait(server)
    except BaseException:
        server.stop()
        raise
    return server


def find_java() -> Path:
    """The home of the newest Java of this machine.

    Raises:
        ServerError: none is new enough.
    """
    homes = [Path(os.environ[name]) for name in ("ES_JAVA_HOME", "JAVA_HOME") if os.environ.get(name)]
    for place in ("/usr/lib/jvm", "/usr/java", "/opt/java", "/opt"):
        homes += sorted(Path(place).glob("*"))
    if found := shutil.which("java"):
        homes.append(Path(found).resolve().parent.parent)
    versions = {home: _java_version(home) for home in homes if (home / "bin" / "java").exists()}
    newest = max(versions, key=lambda home: versions[home], default=None)
    if newest is None or versions[newest] < JAVA:
        have = "none was found" if newest is None else f"the newest here is {versions[newest]}"
        raise ServerError(
            f"Elasticsearch needs Java {JAVA} or newer and {have}; install one, as in apt-get install"
            f" openjdk-21-jre-headless, or name its folder in JAVA_HOME"
        )
    return newest


def distribution() -> Path:
    """The unpacked distribution, fetched with Maven the first time.

    Raises:
        ServerError
    """
    home = _unpacked()
    if home.exists():
        return home
    home.parent.mkdir(parents=True, exist_ok=True)
    with _locked(home.parent / "lock"):
        if home.exists():
            return home
        print(f"fetching Elasticsearch {VERSION} (132 MB) with Maven ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=home.parent) as made:
            package = _fetch(Path(made))
            _unzip(package, Path(made))
            (unpacked,) = (path for path in Path(made).iterdir() if path.is_dir())
            unpacked.chmod(0o755)
            unpacked.rename(home)
    return home


def _fetch(folder: Path) -> Path:
    command = [
        _maven(),
        "-q",
        "-B",
        "-Dstyle.color=never",
        "dependency:copy",
        f"-Dartifact={ARTIFACT}",
        f"-DoutputDirectory={folder}",
    ]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=FETCH_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise ServerError(f"Maven did not fetch Elasticsearch within {FETCH_S} s") from None
    found = list(folder.glob("*.zip"))
    if done.returncode != 0 or not found:
        said = (done.stdout + done.stderr).strip()[-800:]
        raise ServerError(f"Maven could not fetch Elasticsearch {VERSION}; it said:\n{said}")
    return found[0]


def _unzip(package: Path, folder: Path) -> None:
    with zipfile.ZipFile(package) as archive:
        for entry in archive.infolist():
            made = Path(archive.extract(entry, folder))
            if not entry.is_dir():
                # zipfile forgets what may be run.
                made.chmod(0o755 if made.parent.name == "bin" else 0o644)


def _unpacked() -> Path:
    return _cache() / f"elasticsearch-{VERSION}"


def _cache() -> Path:
    if os.geteuid() == 0:
        # Root's own cache lies in a folder that no other user can enter.
        return Path("/var/cache/agentops-runtime")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agentops-runtime"


def _maven() -> str:
    found = shutil.which("mvn")
    if found is None:
        raise ServerError("Maven (mvn) is needed to fetch Elasticsearch and was not found; install it: apt-get install maven")
    return found


def _java_version(home: Path) -> int:
    with contextlib.suppress(OSError):
        if match := re.search(r'^JAVA_VERSION="(?:1\.)?(\d+)', (home / "release").read_text(encoding="utf-8"), re.M):
            return int(match[1])
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        said = subprocess.run([home / "bin" / "java", "-version"], capture_output=True, text=True, timeout=30, check=False)
        if match := re.search(r'version "(?:1\.)?(\d+)', said.stderr):
            return int(match[1])
    return 0


def _configuration(folder: Path, port: int, secured: bool, tls: tuple[Path, Path] | None) -> str:
    lines = {
        "cluster.name": "agentops",
        "node.name": "agentops",
        "discovery.type": "single-node",
        "network.host": "127.0.0.1",
        "http.port": port,
        "transport.port": _free_port(),
        "path.data": str(folder / "data"),
        "path.logs": str(folder / "logs"),
        "cluster.routing.allocation.disk.threshold_enabled": False,
        "xpack.security.enabled": secured,
        "xpack.security.autoconfiguration.enabled": False,
    }
    if tls:
        lines |= {
            "xpack.security.http.ssl.enabled": True,
            "xpack.security.http.ssl.certificate": "certificate.pem",
            "xpack.security.http.ssl.key": "key.pem",
        }
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items())


def _account() -> pwd.struct_passwd | None:
    """The system user that the server runs as, where we are root; it is made when it is missing."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam(USER)
    except KeyError:
        pass
    command = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", USER]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = done.stderr.strip()
    except OSError as error:
        said = str(error)
    try:
        return pwd.getpwnam(USER)
    except KeyError:
        raise ServerError(f"Elasticsearch refuses root, and the user {USER} could not be made: {said}") from None


def _give(folder: Path, account: pwd.struct_passwd) -> None:
    for place, _, files in os.walk(folder):
        for path in (place, *(os.path.join(place, file) for file in files)):  # noqa: PTH118
            os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)


def _wait(server: Server) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if not server.alive():
            break
        with contextlib.suppress(OSError, ValueError):
            if _healthy(server):
                return
        time.sleep(0.2)
    raise ServerError(f"Elasticsearch started and does not answer; see the logs in {Path(server.folder) / 'logs'}")


def _healthy(server: Server) -> bool:
    import ssl

    request = urllib.request.Request(server.url + "/_cluster/health?wait_for_status=yellow&timeout=5s")
    if server.user:
        token = base64.b64encode(f"{server.user}:{server.password}".encode()).decode()
        request.add_header("Authorization", f"Basic {token}")
    # Only whether our own process on loopback is up is asked here.
    context = ssl._create_unverified_context() if server.url.startswith("https") else None
    try:
        with urllib.request.urlopen(request, timeout=10, context=context) as answer:
            return str(json.load(answer).get("status")) in ("yellow", "green")
    except urllib.error.HTTPError:
        return False


def _born(pid: int) -> int:
    """When a process was started, in clock ticks since boot; 0 when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


# -- one server shared by several processes: those of a test run


@contextlib.contextmanager
def shared(name: str) -> Iterator[Server]:
    """The server that all processes using this name share: the first starts it, the last, the dead not counted, stops it.

    Raises:
        ServerError
    """
    folder = Path(tempfile.gettempdir()) / f"agentops-elasticsearch-{os.getuid()}-{name}"
    folder.mkdir(mode=0o755, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.is_symlink():
        raise ServerError(f"{folder} belongs to somebody else")
    record, users = folder / "server.json", folder / "users"
    users.mkdir(exist_ok=True)
    me = users / f"{os.getpid()}-{_born(os.getpid())}"

    def in_use() -> bool:
        pairs = (tuple(map(int, file.name.split("-"))) for file in users.iterdir())
        return any(_born(pid) == born for pid, born in pairs)

    with _locked(folder / "lock"):
        server = Server(**json.loads(record.read_text())) if record.exists() else None
        if server is None or not server.alive():
            # Not below our folder, which the server's user, who is another for root, need not be able to enter.
            data = Path(tempfile.mkdtemp(prefix="agentops-elasticsearch-data-"))
            try:
                server = start(data, java_options=SHORT_LIVED)
            except BaseException:
                shutil.rmtree(data, ignore_errors=True)
                raise
            record.write_text(json.dumps(asdict(server)))
        me.touch()
    try:
        yield server
    finally:
        with _locked(folder / "lock"):
            me.unlink(missing_ok=True)
            if not in_use():
                server.stop(remove=True)
                shutil.rmtree(folder, ignore_errors=True)


# -- the command line: one server of the user's own


def _state() -> Path:
    return _cache() / "elasticsearch"


def _recorded() -> Server | None:
    try:
        return Server(**json.loads((_state() / "server.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _start(port: int, password: bool) -> None:
    _state().mkdir(parents=True, exist_ok=True)
    with _locked(_state() / "lock"):
        server = _recorded()
        if server is None or not server.alive():
            users = {"agentops": (secrets.token_urlsafe(18), "superuser")} if password else None
            server = start(_state() / "server", port, users=users)
            record = _state() / "server.json"
            record.touch(mode=0o600)
            record.write_text(json.dumps(asdict(server)), encoding="utf-8")
            print(f"Elasticsearch {VERSION} answers at {server.url}")
        else:
            print(f"Elasticsearch {VERSION} runs already at {server.url}")
    print(f"use it:   agentops ingest PATH --retriever elasticsearch --es-url {server.url}")
    if server.user:
        print(f"          with elasticsearch.user = {server.user}; its password is in {_state() / 'server.json'}")
    print("stop it:  make elasticsearch-stop")
    print(f"its data: {server.folder}")


def _stop(remove: bool) -> None:
    server = _recorded()
    if server is not None and server.alive():
        server.stop()
        print(f"stopped the server at {server.url}")
    else:
        print("no server of ours runs")
    (_state() / "server.json").unlink(missing_ok=True)
    if remove:
        shutil.rmtree(_state() / "server", ignore_errors=True)
        print("its data is removed")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    starting = verbs.add_parser("start", help="start it, or say where it runs already")
    starting.add_argument("--port", type=int, default=9200, help="port on 127.0.0.1")
    starting.add_argument("--password", action="store_true", help="ask for a user and a password, which is made up")
    stopping = verbs.add_parser("stop", help="stop the one that was started")
    stopping.add_argument("--remove", action="store_true", help="remove its data, too")
    verbs.add_parser("check", help="say what is missing to start one")
    given = parser.parse_args()
    try:
        if given.verb == "start":
            _start(given.port, given.password)
        elif given.verb == "stop":
            _stop(given.remove)
        elif why := missing():
            raise ServerError(why)
        else:
            print(f"Java in {find_java()}; Elasticsearch {VERSION} can be started")
    except (ServerError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
