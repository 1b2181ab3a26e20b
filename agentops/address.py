"""Addresses of servers that settings name: whether they can be right, and which secrets may go there.

Connects to nothing, and knows no server.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from agentops.errors import SettingsError
from agentops.settings import Settings


def check_address(settings: Settings, key: str, *, port: bool, form: str, secrets: str) -> None:
    """`key` is the setting that holds the address. `port` says whether it must name one. `form` is how an address is written
    and `secrets` where a name or a password belongs, for the hints.

    Raises:
        SettingsError: it is no http address, or it holds a name or a password.
    """
    url, source = settings.get(key), settings.source(key)
    try:
        parts = urlsplit(url)
        named = parts.port
    except ValueError:
        raise SettingsError(f"{source}: {key} is no address", hint=f"write it as {form}") from None
    if parts.username is not None or parts.password is not None:
        raise SettingsError(f"{source}: {key} holds a name or a password", hint=f"give {secrets}, which is never shown")
    if parts.query or parts.fragment:
        raise SettingsError(f"{source}: {key} goes on behind the path", hint=f"write it as {form}")
    plain = url.isprintable() and " " not in url
    if parts.scheme not in ("http", "https") or not parts.hostname or (port and not named) or not plain:
        raise SettingsError(f"{source}: {key} cannot be {url!r}", hint=f"write it as {form}")


def may_send(settings: Settings, secret: str, address: str) -> bool:
    """Whether the secret of one key may go to the address of another: an address that overrides the user's own configuration
    gets only secrets that were given in the same place. Places are the user's own configuration (with the built-in defaults),
    the current folder's `agentops.toml`, and the command with its environment."""
    place = _place(settings.source(address))
    return place == "own" or place == _place(settings.source(secret))


def check_secret(settings: Settings, secret: str, address: str) -> None:
    """
    Raises:
        SettingsError: the secret is set and may not go to the address.
    """
    if settings.get(secret) and not may_send(settings, secret, address):
        raise SettingsError(
            f"{secret} ({settings.source(secret)}) is not sent to {settings.get(address)}, "
            f"which {settings.source(address)} names",
            hint="give the address where the secret is given, or the secret where the address is",
        )


def _place(source: str) -> str:
    if source.startswith(("$", "--")):
        return "command"
    return source if Path(source).name == "agentops.toml" else "own"
