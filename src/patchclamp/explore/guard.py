"""What every request passes: only GET, only hosts that are ours, and headers that shut a page in."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    # No inline script or style, nothing from elsewhere, no frame around the page.
    "Content-Security-Policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_ANY_ADDRESS = ("0.0.0.0", "::")
_HOST = re.compile(r"(\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[^:\[\]\s]+))(:\d*)?")


class Guard:
    """ASGI middleware around the whole application.

    A page of another origin cannot read our answers, unless its name is made to point at this
    machine (DNS rebinding). Its requests then carry that name as their Host, and are refused.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str] = ()) -> None:
        given = {host.lower().strip("[]") for host in hosts}
        self.app = app
        self.names = {"localhost", "127.0.0.1", "::1"} | given
        # Bound to every address, the server is reached by names that nobody listed. An address in
        # numbers is safe to allow: rebinding needs a name.
        self.by_number = not given.isdisjoint(_ANY_ADDRESS)
        if self.by_number:
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send) if scope["type"] == "lifespan" else None

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        hosts = Headers(scope=scope).getlist("host")
        if len(hosts) != 1 or not self.knows(hosts[0]):
            answer = JSONResponse({"detail": "this server does not answer for that host"}, 400)
        elif scope["method"] != "GET":
            answer = JSONResponse({"detail": "the explorer only reads: use GET"}, 405, headers={"Allow": "GET"})
        else:
            return await self.app(scope, receive, send_with_headers)
        await answer(scope, receive, send_with_headers)

    def knows(self, host: str) -> bool:
        """Whether a Host header names this server."""
        name = _name_in(host)
        return name in self.names or (self.by_number and _is_number(name))


def _name_in(host: str) -> str:
    """The name or address in a Host header, in lower case and without its port; "" where it is malformed."""
    match = _HOST.fullmatch(host.strip().lower())
    return (match["address"] or match["name"].removesuffix(".")) if match else ""


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
