"""Start the explorer: take the port, say the address, open the browser, serve until Ctrl-C."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
import webbrowser
from collections.abc import Callable

import uvicorn

from patchclamp.atlas import Atlas
from patchclamp.errors import PatchclampError
from patchclamp.explore.application import application

_LOOK_AHEAD = 50


def serve(
    atlas: Atlas,
    host: str = "127.0.0.1",
    port: int = 8765,
    open_browser: bool = True,
    say: Callable[[str], None] = print,
) -> None:
    """Serve the explorer of an atlas until it is interrupted.

    Args:
        atlas: the atlas to show.
        host: the address to listen on; the default is reached from this machine only.
        port: the port to listen on; 0 takes any that is free.
        open_browser: open the page in the user's browser.
        say: where the lines for the user go.

    Raises:
        PatchclampError: the port is taken or not allowed, or the host is no address of this
            machine; the message says which, and names a free port.
    """
    with _listen(host, port) as listening:
        address = f"http://{_in_address(host)}:{listening.getsockname()[1]}/"
        app = application(atlas, hosts=[host])
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, ws="none", lifespan="off"
        )

        def ready() -> None:
            say(f"The atlas of {atlas.manifest['model']['name']} is at {address}")
            if not _is_loopback(host):
                say(f"Anyone who can reach this machine as {host} can read it: there is no password.")
            say("Ctrl-C ends it.")
            if open_browser:
                webbrowser.open(address)

        with contextlib.suppress(KeyboardInterrupt):
            _Server(config, ready).run(sockets=[listening])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens at the address; taken before anything is said or opened."""
    try:
        return _bind(host, port)
    except (socket.gaierror, UnicodeError) as error:
        raise PatchclampError(f"{host!r} is no address of this machine") from error
    except OSError as error:
        raise PatchclampError(_why(error, host, port)) from error


def _bind(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError:
        listening.close()
        raise
    return listening


def _why(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        free = _next_free(host, port)
        return f"port {port} of {host} is in use" + (f": try --port {free}" if free else "")
    if error.errno == errno.EACCES:
        return f"port {port} of {host} is not allowed to you: try --port 8765"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host!r} is no address of this machine"
    return f"cannot listen on port {port} of {host}: {error.strerror or error}"


def _next_free(host: str, port: int) -> int | None:
    for candidate in range(port + 1, min(port + 1 + _LOOK_AHEAD, 65536)):
        try:
            _bind(host, candidate).close()
        except OSError:
            continue
        return candidate
    return None


def _in_address(host: str) -> str:
    # 0.0.0.0 and :: are for listening; a browser goes to this machine.
    if host in ("0.0.0.0", "::", ""):
        return "localhost"
    return f"[{host}]" if ":" in host else host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
