"""Logging in on a board: as the person's own SSH configuration says, and never where an unknown machine answers.

fabric reads ~/.ssh/config and speaks SSH. Left alone it accepts the key of whoever answers; here a key that is not in known_hosts is
refused with the command that accepts it, on jump hosts too. Nobody is asked for a password.
"""

from __future__ import annotations

import logging
import shlex
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from targets.errors import DeviceError, RecipeError

if TYPE_CHECKING:
    from fabric import Connection
    from paramiko import Channel, PKey, SSHClient

CONNECT_TIMEOUT_S = 15.0
GOODBYE_S = 5.0
KNOWN_HOSTS = {  # where OpenSSH looks, unless its configuration says otherwise
    "userknownhostsfile": "~/.ssh/known_hosts ~/.ssh/known_hosts2",
    "globalknownhostsfile": "/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2",
}


@dataclass(frozen=True)
class Address:
    """ssh://user@host:port; user and port may be left to the person's SSH configuration."""

    host: str
    user: str | None = None
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises RecipeError for anything but ssh://user@host[:port], a password in it above all."""
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError as error:
            raise RecipeError(f"device '{text}': {error}. Write ssh://user@host or ssh://user@host:port.") from None
        host = _host_as_written(parts.netloc)
        if parts.password is not None:
            raise RecipeError(
                f"device 'ssh://{parts.username}:...@{host}': a password does not belong in a file. "
                f"Log in with a key: ssh-copy-id {parts.username}@{host}; then leave the password out."
            )
        if parts.scheme != "ssh" or not parts.hostname or parts.path.strip("/") or parts.query or parts.fragment:
            raise RecipeError(f"device '{text}': not an address. Write ssh://user@host or ssh://user@host:port.")
        return cls(host, parts.username or None, port)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ssh://{f'{self.user}@' if self.user else ''}{host}{f':{self.port}' if self.port else ''}"

    def command(self, *rest: str) -> str:
        """The line that logs in there by hand."""
        port = ["-p", str(self.port)] if self.port else []
        return shlex.join(["ssh", *port, f"{self.user}@{self.host}" if self.user else self.host, *rest])


class SshLink:
    """The supervisor's standard streams over SSH; the connection is its own and ends with it.

    `timeout_s`: how long the board may take no more of what is sent.
    """

    def __init__(self, connection: Connection, channel: Channel, timeout_s: float) -> None:
        self._connection, self._channel, self._timeout_s = connection, channel, timeout_s

    def send(self, data: bytes) -> None:
        self._channel.settimeout(self._timeout_s)  # `receive` leaves its own, a beat's, and it holds for both ways
        with _broken_as_os_error():
            self._channel.sendall(data)

    def receive(self, timeout_s: float) -> bytes:
        self._channel.settimeout(timeout_s)
        with _broken_as_os_error():
            data: bytes = self._channel.recv(1 << 16)
            return data

    def last_words(self) -> str:
        self._channel.settimeout(1.0)
        said = b""
        with suppress(OSError), _broken_as_os_error():
            while more := self._channel.recv_stderr(1 << 16):
                said += more
        lines = said.decode(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else ""

    @property
    def exit_status(self) -> int | None:
        return self._channel.recv_exit_status() if self._channel.exit_status_ready() else None

    def close(self) -> None:
        """End standard input there and wait, at most GOODBYE_S each time it says something, until the process has ended."""
        with suppress(OSError), _broken_as_os_error():
            self._channel.shutdown_write()
            while self.receive(GOODBYE_S):
                pass
        _close(self._connection)


def open_link(name: str, address: Address, argv: Sequence[str], timeout_s: float) -> SshLink:
    """Log in and start a process. Raises DeviceError: what stands in the way, and what to do about it."""
    logging.getLogger("paramiko").addHandler(logging.NullHandler())  # its own words would be tracebacks
    connection = _connection(name, address)
    try:
        with _in_words(name, address, _known_as(connection)):
            connection.open()
            transport = connection.client.get_transport()
            channel = transport.open_session(timeout=CONNECT_TIMEOUT_S)
            channel.settimeout(timeout_s)
            channel.exec_command(shlex.join(argv))
    except BaseException:
        _close(connection)
        raise
    return SshLink(connection, channel, timeout_s)


def _host_as_written(netloc: str) -> str:
    """urlsplit gives it in small letters, and the aliases of ~/.ssh/config are told apart by theirs."""
    host = netloc.rpartition("@")[2]
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _close(connection: Connection) -> None:
    """fabric leaves open what was refused, and the way over jump hosts."""
    for hop in _hops(connection):
        hop.client.close()


def _connection(name: str, address: Address) -> Connection:
    """As fabric makes it from the person's configuration, but for its trust in whoever answers: that holds for jump hosts too."""
    try:
        import fabric
    except ModuleNotFoundError:
        raise DeviceError(
            f"{name}: boards over SSH need fabric, which is not installed here. Run: pip install 'edgestill[devices]'."
        ) from None
    connection = fabric.Connection(address.host, address.user, address.port, connect_timeout=CONNECT_TIMEOUT_S)
    for hop in _hops(connection):
        hop.host = hop.host.lower()  # after the configuration was asked, as OpenSSH does: so it stands in known_hosts
        _trust_known_hosts_only(hop, name, address)
    return connection


def _hops(connection: Connection) -> Iterator[Connection]:
    """The connection, and those of the jump hosts that it goes through; a proxy command (a str) is the person's own."""
    hop = connection
    while hop is not None and not isinstance(hop, str):
        yield hop
        hop = hop.gateway


def _trust_known_hosts_only(connection: Connection, name: str, address: Address) -> None:
    client, config = connection.client, connection.ssh_config
    for option, usual in KNOWN_HOSTS.items():
        for path in (Path(file).expanduser() for file in config.get(option, usual).split()):
            if path.is_file():
                client.load_system_host_keys(str(path))
    if alias := config.get("hostkeyalias"):
        for kind, key in (client._system_host_keys.lookup(alias) or {}).items():
            client._system_host_keys.add(_known_as(connection), kind, key)
    client.set_missing_host_key_policy(_Refuse(name, address))


class _Refuse:
    """What paramiko asks about a host key that no known_hosts has."""

    def __init__(self, name: str, address: Address) -> None:
        self._name, self._address = name, address

    def missing_host_key(self, client: SSHClient, hostname: str, key: PKey) -> None:
        raise DeviceError(
            f"{self._name}: nobody has accepted the key of {hostname} yet ({key.get_name()} {key.fingerprint}). Compare it with "
            "what the board itself says (ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub, typed there),\n"
            f"then log in once, which asks and accepts it: {self._address.command('true')}"
        )


@contextmanager
def _broken_as_os_error() -> Iterator[None]:
    """paramiko has exceptions of its own for a line that broke."""
    from paramiko import SSHException

    try:
        yield
    except (EOFError, SSHException) as error:
        raise OSError(str(error) or "the line is closed") from None


@contextmanager
def _in_words(name: str, where: Address, known_as: str) -> Iterator[None]:
    """Turn what paramiko and sockets raise while connecting into DeviceErrors."""
    from paramiko import AuthenticationException, BadHostKeyException, PasswordRequiredException, SSHException

    by_hand = where.command("true")
    try:
        yield
    except BadHostKeyException as error:
        raise DeviceError(
            f"{name}: {error.hostname} shows another key than the one that was accepted: either the board was set up anew, or "
            "another machine answers in its place.\n"
            f"If you know that it was set up anew: ssh-keygen -R '{known_as}'; then {by_hand}"
        ) from None
    except PasswordRequiredException:
        raise DeviceError(
            f"{name}: the key for {where} is locked with a passphrase. Unlock it: ssh-add; then run this again."
        ) from None
    except AuthenticationException:
        raise DeviceError(
            f"{name}: {where} does not accept any of your keys. Try {by_hand}; bring a key there with "
            f"{where.command().replace('ssh', 'ssh-copy-id', 1)}, or name it in ~/.ssh/config (IdentityFile)."
        ) from None
    except socket.gaierror:
        raise DeviceError(
            f"{name}: there is no host '{where.host}'. Mend its name, or add it to ~/.ssh/config."
        ) from None
    except (SSHException, OSError, EOFError) as error:
        why = str(error) or type(error).__name__
        raise DeviceError(
            f"{name}: {where} cannot be reached: {why}. Is the board on, and its address right? Try {by_hand}"
        ) from None


def _known_as(connection: Connection) -> str:
    """The name of a host in known_hosts."""
    return connection.host if connection.port == 22 else f"[{connection.host}]:{connection.port}"
