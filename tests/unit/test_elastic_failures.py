"""An Elasticsearch that is absent, slow, overloaded, foreign or unfriendly: a clear error in time, and no secret given away."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentops.address import may_send
from agentops.errors import RetrievalError, RetrieverUnavailable, SettingsError
from agentops.parts import open_index
from agentops.records import Document, Query, Retrieval, content_hash
from agentops.retrieval import LenientRetriever
from agentops.retrieval.cluster import Cluster, open_cluster, readable_by_others
from agentops.retrieval.elastic import ElasticIndex
from agentops.retrieval.embed import HashEmbedder
from agentops.settings import Settings, load_settings
from agentops.sync import run_sync

SECRET = "s3cret-that-nobody-may-see"
TIMEOUT_S = 0.5
QUERY = Query("fox", "c", 3)

Behaviour = Callable[[socket.socket, bytes], None]


class Stub:
    """A server of our own on loopback that reads a request and then behaves as told. `requests` are those it has read."""

    def __init__(self, behaviour: Behaviour, context: ssl.SSLContext | None = None) -> None:
        self.requests: list[bytes] = []
        self._behaviour, self._context = behaviour, context
        self._stop = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http{'s' if context else ''}://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            # Wrapping takes the socket over, also where the handshake fails.
            wrapped = self._context.wrap_socket(connection, server_side=True) if self._context else connection
            with wrapped:
                while request := _read(wrapped):
                    self.requests.append(request)
                    self._behaviour(wrapped, request)

    def close(self) -> None:
        self._stop.set()
        self._listener.close()


def _read(connection: socket.socket) -> bytes:
    request = b""
    while b"\r\n\r\n" not in request:
        part = connection.recv(65536)
        if not part or part.startswith(b"\x16\x03"):  # the beginning of TLS
            return b""
        request += part
    head, _, body = request.partition(b"\r\n\r\n")
    length = next((int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")), 0)
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def answer(status: int, body: Any, *, product: bool = True, kind: str = "application/vnd.elasticsearch+json") -> Behaviour:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"HTTP/1.1 {status} Said\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\n"
    head += "X-Elastic-Product: Elasticsearch\r\n" if product else ""
    return lambda connection, _: connection.sendall(head.encode() + b"\r\n" + content)


def error(kind: str, reason: str, status: int) -> dict[str, Any]:
    cause = {"type": kind, "reason": reason}
    return {"error": {"root_cause": [cause], **cause}, "status": status}


def in_turn(*behaviours: Behaviour) -> Behaviour:
    """The last one for good."""
    rest = list(behaviours)
    return lambda connection, request: (rest.pop(0) if len(rest) > 1 else rest[0])(connection, request)


def stall(_: socket.socket, __: bytes) -> None:
    time.sleep(30)


def dribble(connection: socket.socket, _: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Elastic-Product: Elasticsearch\r\nContent-Length: 100000\r\n\r\n")
    while True:
        connection.sendall(b" ")
        time.sleep(0.1)


def hang_up(connection: socket.socket, _: bytes) -> None:
    connection.close()


@pytest.fixture
def stub() -> Iterator[Callable[..., Stub]]:
    made: list[Stub] = []

    def make(behaviour: Behaviour, context: ssl.SSLContext | None = None) -> Stub:
        made.append(Stub(behaviour, context))
        return made[-1]

    yield make
    for one in made:
        one.close()


def at(url: str, **options: Any) -> ElasticIndex:
    options = {"timeout_s": TIMEOUT_S, "basic": ("reader", SECRET), **options}
    return ElasticIndex(Cluster(url, **options), HashEmbedder())


def search(index: ElasticIndex) -> Retrieval:
    return run_sync(index.search(QUERY))


def refused_by(index: ElasticIndex, kind: type[RetrievalError] = RetrieverUnavailable) -> RetrievalError:
    """The error of a search, after every call has given one in time that names no secret."""
    errors: list[RetrievalError] = []
    for call in (
        lambda: search(index),
        index.collections,
        lambda: index.sources("c"),
        lambda: index.upsert("c", [Document("a", "fox", content_hash("fox"))]),
        lambda: index.delete("c", ["a"]),
        lambda: index.drop("c"),
    ):
        begun = time.monotonic()
        with pytest.raises(kind) as caught:
            call()
        assert time.monotonic() - begun < TIMEOUT_S + 2
        assert SECRET not in f"{caught.value} {caught.value.hint} {caught.value.__cause__}"
        assert caught.value.hint
        errors.append(caught.value)
    return errors[0]


def test_absent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    begun = time.monotonic()
    said = refused_by(at(f"http://127.0.0.1:{port}", timeout_s=60))
    assert time.monotonic() - begun < 10, "a refused connection is no reason to wait"
    assert f"no Elasticsearch answers at http://127.0.0.1:{port}" in str(said)
    assert "make elasticsearch" in said.hint


def test_a_name_that_is_no_host() -> None:
    assert "no Elasticsearch answers" in str(refused_by(at("http://no-such-host.invalid:9200")))


@pytest.mark.parametrize("behaviour", [stall, dribble])
def test_slow(stub: Callable[..., Stub], behaviour: Behaviour) -> None:
    assert "did not answer within 0.5 s" in str(refused_by(at(stub(behaviour).url)))


@pytest.mark.parametrize("status", [429, 503])
def test_overloaded_for_good(stub: Callable[..., Stub], status: int) -> None:
    server = stub(answer(status, error("es_rejected_execution_exception", "queue is full", status)))
    said = refused_by(at(server.url))
    assert f"overloaded or not ready ({status}): queue is full" in str(said)
    assert len(server.requests) > 6, "it was asked again"


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_overloaded_for_a_moment(stub: Callable[..., Stub], status: int) -> None:
    busy = answer(status, error("es_rejected_execution_exception", "queue is full", status))
    empty = answer(200, {"responses": [{"hits": {"hits": []}, "status": 200}]})
    assert at(stub(in_turn(busy, busy, empty)).url).collections() == []


def test_a_part_of_a_search_that_is_overloaded_is_no_answer(stub: Callable[..., Stub]) -> None:
    busy = answer(200, {"responses": [{**error("x", "shard is busy", 429)}]})
    with pytest.raises(RetrieverUnavailable, match="shard is busy"):
        at(stub(busy).url).collections()
    empty = {"hits": {"hits": []}, "status": 200}
    cut = answer(200, {"responses": [{**empty, "timed_out": True}]})
    with pytest.raises(RetrieverUnavailable):
        at(stub(cut).url).collections()


def test_hanging_up(stub: Callable[..., Stub]) -> None:
    assert "no Elasticsearch answers" in str(refused_by(at(stub(hang_up).url)))


def test_wrong_password(stub: Callable[..., Stub]) -> None:
    server = stub(answer(401, error("security_exception", "unable to authenticate user [reader]", 401)))
    said = refused_by(at(server.url))
    assert "refuses the user" in str(said)
    assert "elasticsearch.password" in said.hint
    assert len(server.requests) <= 12, "a wrong password is not tried again"


def test_a_user_without_rights(stub: Callable[..., Stub]) -> None:
    said = refused_by(at(stub(answer(403, error("security_exception", "action [search] is unauthorized", 403))).url))
    assert "does not let this user do that: action [search] is unauthorized" in str(said)
    assert "privilege" in said.hint


@pytest.mark.parametrize(
    "behaviour",
    [
        answer(200, b"<html>Welcome</html>", product=False, kind="text/html"),
        answer(404, b"<html>Not Found</html>", product=False, kind="text/html"),
        answer(200, {"responses": []}, product=False, kind="application/json"),
        answer(200, b"{not json", product=True, kind="application/json"),
        answer(400, error("media_type_header_exception", "Invalid media-type value on headers [Accept]", 400)),
        answer(405, b"", product=False, kind="text/plain"),
    ],
)
def test_another_product(stub: Callable[..., Stub], behaviour: Behaviour) -> None:
    assert "is no Elasticsearch 9" in str(refused_by(at(stub(behaviour).url)))


def test_what_is_not_http(stub: Callable[..., Stub]) -> None:
    server = stub(lambda connection, _: connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n\x00\x01\x02\r\n"))
    refused_by(at(server.url))


def test_a_refusal_of_the_server_is_an_error_of_its_own(stub: Callable[..., Stub]) -> None:
    said = refused_by(at(stub(answer(400, error("parse_exception", "x" * 5000, 400))).url), RetrievalError)
    assert not isinstance(said, RetrieverUnavailable)
    assert len(str(said)) < 500


def test_a_password_is_not_sent_on(stub: Callable[..., Stub]) -> None:
    other = stub(answer(200, {"responses": []}))

    def redirect(connection: socket.socket, _: bytes) -> None:
        head = f"HTTP/1.1 302 Found\r\nLocation: {other.url}/\r\nContent-Length: 0\r\n\r\n"
        connection.sendall(head.encode())

    first = stub(redirect)
    with pytest.raises(RetrievalError):
        at(first.url).collections()
    assert first.requests
    assert b"authorization: basic" in first.requests[0].lower()
    assert not other.requests


def test_every_item_of_a_write_counts(stub: Callable[..., Stub]) -> None:
    def items(*statuses: int) -> Behaviour:
        why = {"type": "x", "reason": "no room"}
        made = [{"index": {"_id": str(n), "status": status, "error": why}} for n, status in enumerate(statuses)]
        return answer(200, {"errors": True, "items": made})

    cluster = Cluster(stub(in_turn(items(201, 429, 503), items(429, 201), items(201))).url, timeout_s=5)
    actions: list[Any] = [({"index": {"_index": "i", "_id": str(n)}}, {"n": n}) for n in range(3)]
    cluster.write(actions)
    with pytest.raises(RetrievalError, match="no room"):
        Cluster(stub(items(201, 400, 201)).url, timeout_s=5).write(actions)
    with pytest.raises(RetrieverUnavailable, match="1 documents were not taken"):
        Cluster(stub(in_turn(items(201, 201, 429), items(429))).url, timeout_s=0.5).write(actions)
    cluster.close()


def test_only_what_was_not_taken_is_sent_again(stub: Callable[..., Stub]) -> None:
    taken = answer(200, {"items": [{"index": {"status": 201}}, {"index": {"status": 429}}]})
    server = stub(in_turn(taken, answer(200, {"items": [{"index": {"status": 201}}]})))
    actions: list[Any] = [({"index": {"_index": "i", "_id": str(n)}}, {"n": n}) for n in range(2)]
    Cluster(server.url, timeout_s=5).write(actions)
    bodies = [request.partition(b"\r\n\r\n")[2] for request in server.requests]
    assert [json.loads(line) for line in bodies[1].splitlines()] == [{"index": {"_index": "i", "_id": "1"}}, {"n": 1}]
    assert b"require_alias=true" in server.requests[0].splitlines()[0], "an index that was dropped must not be made anew"


# -- encrypted connections


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that nobody has signed, and its key, made anew."""
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2 -subj /CN=test"
    try:
        subprocess.run([*command.split(), "-addext", "subjectAltName=IP:127.0.0.1"], cwd=folder, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return folder / "cert.pem", folder / "key.pem"


def test_a_certificate_must_be_trusted(stub: Callable[..., Stub], certificate: tuple[Path, Path]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server = stub(answer(200, {"responses": [{"hits": {"hits": []}}]}), context)
    said = refused_by(at(server.url))
    assert "cannot be trusted" in str(said)
    assert "elasticsearch.ca_file" in said.hint
    assert not server.requests, "nothing was sent, least of all the password"
    assert at(server.url, ca_file=certificate[0]).collections() == []


def test_tls_is_not_spoken(stub: Callable[..., Stub]) -> None:
    server = stub(answer(200, {}))
    said = refused_by(at(server.url.replace("http:", "https:")))
    assert "http://" in said.hint


@pytest.mark.parametrize("text", [None, "no certificate"])
def test_a_ca_file_that_is_none(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "ca.pem"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        at("https://127.0.0.1:1", ca_file=file).collections()
    assert "elasticsearch.ca_file" in caught.value.hint


# -- whom a secret is sent to


def told(tmp_path: Path, **places: dict[str, str]) -> Settings:
    """Settings with `[elasticsearch]` values given in the user's configuration (own), the folder's file, the environment or
    on the command line."""
    (tmp_path / "own").mkdir()
    (tmp_path / "folder").mkdir()
    for place, file in (("own", "own/config.toml"), ("folder", "folder/agentops.toml")):
        if place in places:
            lines = [f"{key} = {json.dumps(value)}" for key, value in places[place].items()]
            (tmp_path / file).write_text("[elasticsearch]\n" + "\n".join(lines))
    environment = {f"AGENTOPS_ELASTICSEARCH_{key.upper()}": value for key, value in places.get("environment", {}).items()}
    return load_settings(
        {f"elasticsearch.{key}": value for key, value in places.get("option", {}).items()},
        environment={"AGENTOPS_CONFIG": str(tmp_path / "own"), **environment},
        folder=tmp_path / "folder",
    )


@pytest.mark.parametrize("key", ["password", "api_key"])
@pytest.mark.parametrize(
    ("address", "secret", "sent"),
    [
        (None, "own", True),
        (None, "environment", True),
        ("own", "own", True),
        ("own", "environment", True),
        ("own", "folder", True),
        ("folder", "folder", True),
        ("folder", "own", False),
        ("folder", "environment", False),
        ("environment", "environment", True),
        ("option", "environment", True),
        ("environment", "own", False),
        ("option", "own", False),
        ("option", "folder", False),
    ],
)
def test_a_secret_goes_only_where_its_owner_sent_it(
    tmp_path: Path, key: str, address: str | None, secret: str, sent: bool
) -> None:
    places: dict[str, dict[str, str]] = {secret: {"user": "me", key: SECRET}}
    if address:
        places.setdefault(address, {})["url"] = "http://elsewhere.example:9200"
    settings = told(tmp_path, **places)
    assert may_send(settings, f"elasticsearch.{key}", "elasticsearch.url") is sent
    if sent:
        open_cluster(settings)
        return
    with pytest.raises(SettingsError, match=f"elasticsearch.{key}") as caught:
        open_cluster(settings)
    assert SECRET not in f"{caught.value}{caught.value.hint}"
    open_cluster(replace(settings, elasticsearch=replace(settings.elasticsearch, password="", api_key="")))


@pytest.mark.parametrize(
    "url",
    [
        "localhost:9200",
        "http://localhost",
        "ftp://localhost:9200",
        "http://:9200",
        "http://host:99999",
        "http://[::1:9200",
        "http://host:9200/?q=1",
        "http://host:9200/#x",
        "http://ho st:9200",
        "http://host:9200/\x1b[2J",
        f"http://me:{SECRET}@host:9200",
    ],
)
def test_an_address_that_cannot_be_right(url: str) -> None:
    with pytest.raises(SettingsError) as caught:
        open_cluster(load_settings({"elasticsearch.url": url}, environment={}))
    assert SECRET not in f"{caught.value}{caught.value.hint}"


def test_addresses_that_can() -> None:
    for url in ("http://127.0.0.1:9200", "https://es.example:443/behind/a/proxy", "http://[::1]:9200"):
        open_cluster(load_settings({"elasticsearch.url": url}, environment={}))
    assert readable_by_others("http://es.example:9200")
    assert not readable_by_others("http://127.0.0.1:9200")
    assert not readable_by_others("https://es.example:9200")


@pytest.mark.parametrize("prefix", ["Upper", "a*", "-a", "_a", "a b", "a,b", "..", "x" * 101])
def test_a_prefix_is_a_plain_name(prefix: str) -> None:
    with pytest.raises(SettingsError, match=r"elasticsearch\.prefix"):
        open_cluster(load_settings({"elasticsearch.prefix": prefix}, environment={}))


# -- going on without


def test_a_lenient_retriever_marks_what_it_could_not_search(stub: Callable[..., Stub]) -> None:
    index = at(stub(hang_up).url)
    found = run_sync(LenientRetriever(index).search(QUERY))
    assert found.hits == ()
    assert "no Elasticsearch answers" in found.error
    other = at(stub(answer(400, error("parse_exception", "bad", 400))).url)
    with pytest.raises(RetrievalError, match="bad"):
        run_sync(LenientRetriever(other).search(QUERY))


def test_settings_pick_the_back_end(stub: Callable[..., Stub]) -> None:
    server = stub(answer(200, {"responses": [{"hits": {"hits": []}}]}))
    index = open_index(load_settings({"retrieval.retriever": "elasticsearch", "elasticsearch.url": server.url}), HashEmbedder())
    assert not server.requests, "nothing is asked before it is needed"
    assert index.collections() == []
    assert server.requests
    index.close()
