"""Reaching a Postgres: addresses that are none, servers that do not answer or refuse, and passwords that are told to nobody."""

from __future__ import annotations

import subprocess
import sys
import time
import traceback
from urllib.parse import quote

import pytest
from postgres_server import Postgres

from agentops.errors import RecordError, SettingsError, StoreLocked, StoreUnavailable
from agentops.postgres import arguments, translated, where

SECRET = "Pa$$w0rd-of-nobody"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"postgresql://me:{quote(SECRET)}@db.example:5432/record?sslmode=require", "postgresql://db.example:5432/record"),
        (f"postgres://db/record?password={SECRET}", "postgresql://db/record"),
        ("postgresql://me@one:1,two:2/record", "postgresql://one:1,two:2/record"),
        ("postgresql://[::1]:5432/record", "postgresql://[::1]:5432/record"),
        ("postgresql:///record?host=/var/run/postgresql", "postgresql:///record"),
        ("postgresql://%2Fvar%2Frun/record", "postgresql://%2Fvar%2Frun/record"),
    ],
)
def test_an_address_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert where(url) == shown
    assert SECRET not in shown
    assert arguments(url)["connect_timeout"] == 3
    assert arguments(f"{url}{'&' if '?' in url else '?'}connect_timeout=7")["connect_timeout"] == "7"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:sec@ret@db/record",
        "postgresql://me:sec/ret@db/record",
        "postgresql://me:sec?ret@db/record",
        "postgresql://me:sec#ret@db/record",
        "postgresql://me:sec:ret@db/record",
        "postgresql://me:sec ret@db/record",
        "postgresql://me:%secret@db/record",
        "postgresql://me:secret@db:port/record",
        "postgresql://me:secret@db/record?unheard=of",
        "host=db password=secret",
        "mysql://me:secret@db/record",
        "secret",
    ],
)
def test_what_is_no_address_is_refused_without_repeating_a_part_of_it(url: str) -> None:
    with pytest.raises(SettingsError, match=r"record\.url") as caught:
        arguments(url)
    assert caught.value.__context__ is None, "the driver's own words would be in a traceback"
    told = str(caught.value) + caught.value.hint
    assert "sec" not in told
    assert "ret" not in told


def refused(url: str, statement: str = "") -> RecordError:
    """What connecting there, and executing something, ends with."""
    import psycopg

    started = time.monotonic()
    with pytest.raises(RecordError) as caught, translated(url), psycopg.connect(**arguments(url)) as connection:
        connection.execute(statement)
    assert time.monotonic() - started < 60
    assert caught.value.hint
    return caught.value


def test_servers_that_do_not_answer_or_refuse_are_told_without_the_password(postgres_server: Postgres) -> None:
    good, password = postgres_server.database(), quote(postgres_server.password)
    database = good.rpartition("/")[2]
    for url, kind, told in (
        (good.replace(password, quote(SECRET)), StoreUnavailable, "does not let this user in"),
        (good.replace("agentops:", "nobody:"), StoreUnavailable, "does not let this user in"),
        (good.replace(database, "nothing"), StoreUnavailable, "is missing"),
        (good.replace(str(postgres_server.port), "1"), StoreUnavailable, "no Postgres answers"),
        (good.replace("127.0.0.1", "no.such.host.invalid"), StoreUnavailable, "no Postgres answers"),
        (f"{good}?sslmode=require", StoreUnavailable, "no safe connection"),
    ):
        error = refused(url)
        assert type(error) is kind
        assert told in str(error)
        assert where(url) in str(error)
        everything = "".join(traceback.format_exception(error)) + error.hint
        assert password not in everything
        assert quote(SECRET) not in everything
        assert SECRET not in everything


def test_what_the_server_refuses_later_is_told(postgres_server: Postgres) -> None:
    import psycopg

    url = postgres_server.database()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE one (number int); INSERT INTO one VALUES (1); CREATE ROLE low LOGIN PASSWORD 'low'")
    low = url.replace(f"agentops:{quote(postgres_server.password)}", "low:low")
    assert "may not do that" in str(refused(low, "CREATE TABLE two (number int)"))
    assert "takes no writes" in str(refused(url, "SET TRANSACTION READ ONLY; UPDATE one SET number = 2"))
    assert "is damaged" in str(refused(url, "SELECT * FROM nothing"))
    assert "refused a request: division by zero" in str(refused(url, "SELECT 1 / 0"))
    with psycopg.connect(url) as other:
        other.execute("UPDATE one SET number = 3")
        assert isinstance(refused(url, "SET lock_timeout = 10; UPDATE one SET number = 2"), StoreLocked)


def test_a_server_that_goes_away_is_told(postgres_server: Postgres) -> None:
    import psycopg

    url = postgres_server.database()
    for end in (postgres_server.stop, postgres_server.kill):
        with psycopg.connect(**arguments(url)) as connection:
            end()
            with pytest.raises(StoreUnavailable), translated(url):
                connection.execute("SELECT 1")
        postgres_server.start()


def test_without_the_driver_it_is_told_how_to_get_it() -> None:
    program = (
        "import sys; sys.modules['psycopg'] = None\n"
        "from agentops.postgres import arguments\n"
        "try:\n    arguments('postgresql://me:secret@db/record')\n"
        "except Exception as error:\n    print(type(error).__name__, error, error.hint)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.startswith("RecordError")
    assert "agentops-runtime[postgres]" in said
    assert "secret" not in said
