"""The way to an Elasticsearch server: calls that end in time, and its refusals in words that a user can act on.

Every call is over after `elasticsearch.timeout_s`, tries again included, whatever the server does: it runs in a thread of its
own that is left behind when the time is up. A password goes only where its owner sent it. Knows nothing of documents.
"""

from __future__ import annotations

import json
import logging
import queue
import random
import re
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from agentops.address import check_address, check_secret
from agentops.clock import Clock, SystemClock
from agentops.errors import RetrievalError, RetrieverUnavailable, SettingsError
from agentops.settings import Settings

if TYPE_CHECKING:
    from elasticsearch import Elasticsearch

BUSY = frozenset({429, 502, 503, 504})
"""Answers after which the same is asked again."""

_PREFIX = re.compile(r"[a-z0-9][a-z0-9_.-]{0,99}")
_BULK_ITEMS, _BULK_BYTES = 500, 5_000_000
_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
_CONNECTIONS = 32
_SHOWN_CHARACTERS = 300

Action = tuple[dict[str, Any], dict[str, Any] | None]
"""One line of a bulk request, and the document for it where it takes one."""


class Conflict(Exception):
    """Somebody else has written what was to be written, since it was read."""


class Missing(Exception):
    """No such index or document."""


class Cluster:
    """One server, asked from any thread. Nothing is connected before the first call."""

    def __init__(
        self,
        url: str,
        *,
        basic: tuple[str, str] | None = None,
        api_key: str | None = None,
        ca_file: Path | None = None,
        timeout_s: float = 10.0,
        clock: Clock | None = None,
    ) -> None:
        self.url = url
        self._basic, self._api_key, self._ca_file = basic, api_key, ca_file
        self._timeout_s = timeout_s
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._client: Elasticsearch | None = None

    def deadline(self) -> int:
        """The time of the monotonic clock, in ns, by which what begins now is over."""
        return self._clock.monotonic_ns() + int(self._timeout_s * 1e9)

    def ask(self, call: Callable[[Elasticsearch], Any], *, by: int | None = None) -> Any:
        """The body of the server's answer. A server that is busy is asked again until the time is over.

        Raises:
            Conflict, Missing
            RetrieverUnavailable: it does not answer, not in time, is overloaded, or refuses the user.
            RetrievalError: it refuses the request.
        """
        from elastic_transport import ApiError, TransportError
        from elasticsearch import UnsupportedProductError

        by = self.deadline() if by is None else by
        patience = _Patience(self._clock, by)
        while True:
            try:
                return self._in_time(call, by)
            except ApiError as error:
                if error.meta.status not in BUSY or not patience.wait():
                    raise self._refusal(error.meta.status, error.body, dict(error.meta.headers)) from error
            except UnsupportedProductError as error:
                raise self._foreign() from error
            except TransportError as error:
                raise self._failure(error) from error

    def search(self, searches: Sequence[tuple[str, Mapping[str, Any]]], *, by: int | None = None) -> list[dict[str, Any]]:
        """Answers to several searches, each an index and a body, asked in one request. A part of an answer is none.

        Raises: as `ask`
        """
        by = self.deadline() if by is None else by
        lines: list[Mapping[str, Any]] = []
        for index, body in searches:
            lines += [{"index": index, "allow_partial_search_results": False}, body]
        patience = _Patience(self._clock, by)
        while True:
            answers: list[dict[str, Any]] = self.ask(lambda client: client.msearch(searches=lines), by=by)["responses"]
            failed = next((answer for answer in answers if "error" in answer or answer.get("timed_out")), None)
            if failed is None:
                return answers
            status = int(failed["status"]) if "error" in failed else 504
            if status not in BUSY or not patience.wait():
                raise self._refusal(status, failed)

    def write(self, actions: Sequence[Action]) -> None:
        """Index and delete operations in order, in requests of bounded size. What the server has no room for now is sent again;
        deleting what is not there is done.

        Raises: as `ask`
        """
        chunk: list[Action] = []
        size = 0
        for action in actions:
            weight = len(json.dumps(action))
            if chunk and (len(chunk) == _BULK_ITEMS or size + weight > _BULK_BYTES):
                self._write(chunk)
                chunk, size = [], 0
            chunk.append(action)
            size += weight
        if chunk:
            self._write(chunk)

    def close(self) -> None:
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    # -- inside

    def _write(self, actions: list[Action]) -> None:
        by = self.deadline()
        patience = _Patience(self._clock, by)
        while actions:
            lines = [line for action in actions for line in action if line is not None]
            # Through an alias only: an index that was dropped meanwhile would otherwise be made anew by the write.
            answer = self.ask(lambda client: client.bulk(operations=lines, require_alias=True), by=by)  # noqa: B023
            again: list[Action] = []
            for action, item in zip(actions, answer["items"], strict=True):
                ((kind, result),) = item.items()
                status = int(result["status"])
                if status in BUSY:
                    again.append(action)
                elif status >= 300 and not (kind == "delete" and result.get("result") == "not_found"):
                    raise self._refusal(status, result)
            if again and not patience.wait():
                raise self._refusal(429, f"{len(again)} documents were not taken")
            actions = again

    def _in_time(self, call: Callable[[Elasticsearch], Any], by: int) -> Any:
        from elastic_transport import ConnectionTimeout

        left_s = (by - self._clock.monotonic_ns()) / 1e9
        if left_s <= 0:
            raise ConnectionTimeout("no time is left")
        client = self._connected().options(request_timeout=left_s)
        done: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def work() -> None:
            try:
                done.put((call(client).body, None))
            except BaseException as error:
                done.put((None, error))

        # The library's own time-out counts anew with every byte that arrives.
        threading.Thread(target=work, name="agentops-elasticsearch", daemon=True).start()
        try:
            answer, error = done.get(timeout=left_s + 0.1)
        except queue.Empty:
            raise ConnectionTimeout("the answer does not end") from None
        if error is not None:
            raise error
        return answer

    def _connected(self) -> Elasticsearch:
        from elastic_transport.client_utils import DEFAULT
        from elasticsearch import Elasticsearch

        with self._lock:
            if self._client is None:
                # It warns of each failure, which its caller is told anyway.
                logging.getLogger("elastic_transport.node_pool").setLevel(logging.ERROR)
                self._client = Elasticsearch(
                    self.url,
                    basic_auth=self._basic,
                    api_key=self._api_key,
                    max_retries=0,
                    retry_on_timeout=False,
                    connections_per_node=_CONNECTIONS,
                    ssl_context=self._trust() if self.url.startswith("https:") else DEFAULT,
                )
            return self._client

    def _trust(self) -> ssl.SSLContext:
        try:
            return ssl.create_default_context(cafile=self._ca_file)
        except OSError as error:
            hint = "elasticsearch.ca_file names a file with certificates in PEM"
            raise SettingsError(f"{self._ca_file} cannot be used: {error.strerror or error}", hint=hint) from error

    def _refusal(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> Exception:
        """What to raise for an answer that is an error. `headers` are given where it is an answer by itself."""
        reason, kinds = _reason(body)
        foreign = headers is not None and {key.lower() for key in headers}.isdisjoint({"x-elastic-product"})
        if status == 401:
            hint = "check elasticsearch.user and elasticsearch.password, or elasticsearch.api_key"
            return RetrieverUnavailable(f"Elasticsearch at {self.url} refuses the user: wrong name, password or key", hint=hint)
        if status == 403:
            hint = "the user needs the privilege 'all' on the indices that begin with elasticsearch.prefix; 'read' to search"
            return RetrieverUnavailable(f"Elasticsearch at {self.url} does not let this user do that: {reason}", hint=hint)
        if status in BUSY:
            hint = "try again later, or raise elasticsearch.timeout_s"
            return RetrieverUnavailable(f"Elasticsearch at {self.url} is overloaded or not ready ({status}): {reason}", hint=hint)
        if foreign or "media_type_header_exception" in kinds:
            return self._foreign()
        if status == 409:
            return Conflict(reason)
        if status == 404:
            return Missing(reason)
        kind = RetrieverUnavailable if status >= 500 else RetrievalError
        return kind(f"Elasticsearch at {self.url} refused a request ({status}): {reason}", hint="its log says more")

    def _foreign(self) -> RetrieverUnavailable:
        return RetrieverUnavailable(
            f"what answers at {self.url} is no Elasticsearch 9", hint="name another address in elasticsearch.url or with --es-url"
        )

    def _failure(self, error: Exception) -> RetrieverUnavailable:
        from elastic_transport import ConnectionTimeout, SerializationError, TlsError

        said = _short(str(error))
        if isinstance(error, ConnectionTimeout):
            return RetrieverUnavailable(
                f"Elasticsearch at {self.url} did not answer within {self._timeout_s:g} s",
                hint="see whether it is overloaded, or raise elasticsearch.timeout_s",
            )
        if isinstance(error, SerializationError):
            return self._foreign()
        if isinstance(error, TlsError):
            hint = "name its certificate authority in elasticsearch.ca_file, or write http:// where it speaks no TLS"
            return RetrieverUnavailable(f"the certificate of {self.url} cannot be trusted: {said}", hint=hint)
        return RetrieverUnavailable(
            f"no Elasticsearch answers at {self.url}: {said}",
            hint="start it (make elasticsearch), name another with --es-url, or use --retriever embedded",
        )


class _Patience:
    """Pauses between tries, longer every time, until `by`."""

    def __init__(self, clock: Clock, by: int) -> None:
        self._clock, self._by, self._pause_s = clock, by, _PAUSE_S

    def wait(self) -> bool:
        """Pauses; False, and at once, where the time would be over afterwards."""
        pause_s = self._pause_s * random.uniform(0.5, 1.0)
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        if self._clock.monotonic_ns() + pause_s * 1e9 >= self._by:
            return False
        time.sleep(pause_s)
        return True


def open_cluster(settings: Settings, clock: Clock | None = None) -> Cluster:
    """The server that the settings name; it is not asked anything yet.

    Raises:
        SettingsError: address or prefix cannot be right, or a password would go to an address from elsewhere.
    """
    wanted = settings.elasticsearch
    check_address(
        settings,
        "elasticsearch.url",
        port=True,
        form="http://HOST:PORT or https://HOST:PORT",
        secrets="elasticsearch.user and elasticsearch.password",
    )
    if not _PREFIX.fullmatch(wanted.prefix):
        raise SettingsError(
            f"elasticsearch.prefix cannot be {wanted.prefix!r}",
            hint="small letters, digits and _ . - after the first; 100 at most",
        )
    for secret in ("elasticsearch.api_key", "elasticsearch.password"):
        check_secret(settings, secret, "elasticsearch.url")
    basic = (wanted.user, wanted.password) if wanted.user and wanted.password and not wanted.api_key else None
    return Cluster(
        wanted.url,
        basic=basic,
        api_key=wanted.api_key or None,
        ca_file=wanted.ca_file,
        timeout_s=wanted.timeout_s,
        clock=clock,
    )


def readable_by_others(url: str) -> bool:
    """Whether what is sent to this address leaves the machine unencrypted."""
    parts = urlsplit(url)
    return parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "::1", "localhost")


def _reason(body: Any) -> tuple[str, set[str]]:
    """What an error's body says, and the kinds of error it names."""
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return _short(str(error or "no reason given")), set()
    causes = [error, *(cause for cause in error.get("root_cause") or () if isinstance(cause, dict))]
    kinds = {str(cause["type"]) for cause in causes if cause.get("type")}
    reason = next((cause["reason"] for cause in reversed(causes) if cause.get("reason")), "no reason given")
    return _short(str(reason)), kinds


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " ..."
