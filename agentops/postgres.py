"""A Postgres server as it is reached: an address that may be shown, connections that give up in time, and errors in our words.

The driver is an optional dependency and is loaded by the first call that needs it. An address holds a password: neither it
nor a text in which the driver repeats it is ever shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from agentops.errors import RecordError, SettingsError, StoreBroken, StoreLocked, StoreUnavailable

CONNECT_S = 3
"""So long a server that does not answer is waited for."""

# Nothing else is given to the driver: told of what it cannot read, it would repeat a part of the password.
_HOST = r"(?:[\w.%-]*|\[[0-9A-Fa-f:.%]+\])(?::\d*)?"
_ADDRESS = re.compile(
    r"postgres(?:ql)?://(?:(?P<user>[^@/?#:\s]*)(?::[^@/?#:\s]*)?@)?"
    rf"(?P<hosts>{_HOST}(?:,{_HOST})*)(?P<database>/[^@?#/\s]*)?(?:\?[^@?#\s]*)?"
)
_FORM = "postgresql://USER:PASSWORD@HOST:5432/DATABASE, with %40 for an @ in the password, %2F for a /, %3A for a :"
# A server that went away without a word is noticed after some ten seconds.
_PATIENCE: Mapping[str, Any] = {
    "connect_timeout": CONNECT_S,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "client_encoding": "UTF8",
    "application_name": "agentops",
}


def where(url: str) -> str:
    """The address without name, password and options.

    Raises:
        SettingsError: it is none.
    """
    found = _parts(url)
    return f"postgresql://{found['hosts']}{found['database'] or ''}"


def arguments(url: str) -> dict[str, Any]:
    """What `psycopg.connect` takes to connect to this address, giving up in time; the address' own options come first.

    Raises:
        SettingsError: it is no address.
        RecordError: the driver is not installed.
    """
    _parts(url)
    psycopg = _driver()
    from psycopg.conninfo import conninfo_to_dict

    try:
        return {**_PATIENCE, **conninfo_to_dict(url)}
    except psycopg.ProgrammingError as error:
        # Only the name of an option may be repeated.
        named = re.match(r'invalid URI query parameter: "(\w+)"', str(error))
        said = f"record.url has an unknown option: {named[1]}" if named else "record.url is no address of a Postgres"
    raise SettingsError(said, hint=f"write it as {_FORM}")


@contextmanager
def translated(url: str) -> Iterator[None]:
    """The driver's errors as ours; see `translation`."""
    psycopg = _driver()
    try:
        yield
    except psycopg.Error as error:
        raise translation(error, url) from error


def translation(error: BaseException, url: str) -> RecordError:
    """What an error of the driver is for a user: StoreUnavailable, StoreLocked, StoreBroken, or RecordError where it is none of
    these."""
    # The server's own words where there are some, without the line of SQL behind them.
    said = (getattr(getattr(error, "diag", None), "message_primary", None) or str(error)).strip().split("\n", 1)[0]
    code = getattr(error, "sqlstate", None) or ""
    place = where(url)
    for pattern, kind, what, hint in _KINDS:
        if re.search(pattern, f"{code}: {said}"):
            return kind(f"{what.format(place=place)}: {said}", hint=hint)
    psycopg = _driver()
    if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return StoreUnavailable(f"no Postgres answers at {place}: {said}", hint=_START)
    return RecordError(f"the Postgres at {place} refused a request: {said}", hint="its log says more")


_START = "start it, or check host and port in record.url; see: agentops doctor"
_KINDS: tuple[tuple[str, type[RecordError], str, str], ...] = (
    (
        r"^28...:|authentication failed|no password supplied|no pg_hba.conf entry|role \".*\" (does not exist|is not permitted)",
        StoreUnavailable,
        "the Postgres at {place} does not let this user in",
        "check name and password in record.url",
    ),
    (
        r"^3D000:|database \".*\" does not exist",
        StoreUnavailable,
        "the database at {place} is missing",
        "make it: createdb --encoding=UTF8 NAME; or name another one in record.url",
    ),
    (
        r"^42501:|permission denied",
        RecordError,
        "the user of record.url may not do that at {place}",
        "give it the rights: GRANT ALL ON SCHEMA public TO the user, or make it the database's owner",
    ),
    (
        r"^25006:",
        RecordError,
        "the Postgres at {place} takes no writes",
        "name the server that others copy from in record.url, not a copy",
    ),
    (
        r"^53300:|too many clients|remaining connection slots",
        StoreUnavailable,
        "the Postgres at {place} takes no more connections",
        "raise its max_connections, or let fewer processes run",
    ),
    (r"^53[12]00:", RecordError, "the Postgres at {place} has no room", "free some space on the server"),
    (
        r"^55P03:|^40P01:",
        StoreLocked,
        "another process holds the record at {place}",
        "wait for it to end, or allow more time with record.lock_timeout_s",
    ),
    (
        r"^XX00[12]:|^42P01:|^42703:|^58P01:",
        StoreBroken,
        "the record at {place} is damaged",
        "restore it from a backup, or name another database in record.url; new runs wait in the journal meanwhile",
    ),
    (r"^57P0[13]:|^08...:", StoreUnavailable, "the Postgres at {place} went away", _START),
    (
        r"certificate|SSL(?! connection has been closed| SYSCALL)",
        StoreUnavailable,
        "no safe connection to the Postgres at {place}",
        "check sslmode and sslrootcert in record.url",
    ),
)


def _parts(url: str) -> Mapping[str, str | None]:
    found = _ADDRESS.fullmatch(url)
    if found is None:
        raise SettingsError("record.url is no address of a Postgres", hint=f"write it as {_FORM}")
    return found.groupdict()


def _driver() -> Any:
    try:
        import psycopg
    except ImportError as error:
        raise RecordError(
            f"a record in Postgres needs a driver that is not here: {error}",
            hint="pip install 'agentops-runtime[postgres]'",
        ) from None
    return psycopg
