"""Starting the server: the port, the address, and what is said when it cannot be had."""

from __future__ import annotations

import socket

import pytest

from patchclamp.atlas import Atlas
from patchclamp.errors import PatchclampError
from patchclamp.explore import serve
from patchclamp.explore.server import _in_address, _is_loopback


@pytest.fixture
def taken() -> object:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def _fail(line: str) -> None:
    raise AssertionError(f"the server started and said: {line}")


def test_a_taken_port_is_named_with_the_next_free_one(atlas: Atlas, taken: int) -> None:
    with pytest.raises(PatchclampError, match=rf"port {taken} of 127\.0\.0\.1 is in use: try --port (\d+)") as caught:
        serve(atlas, port=taken, open_browser=False, say=_fail)
    free = int(str(caught.value).rsplit(" ", 1)[1])
    assert free > taken
    socket.create_server(("127.0.0.1", free)).close()


def test_ports_that_are_taken_too_are_passed_over(atlas: Atlas, taken: int) -> None:
    try:
        second = socket.create_server(("127.0.0.1", taken + 1))
    except OSError:
        pytest.skip("the port after the taken one is taken by somebody else")
    with second, pytest.raises(PatchclampError) as caught:
        serve(atlas, port=taken, open_browser=False, say=_fail)
    assert int(str(caught.value).rsplit(" ", 1)[1]) > taken + 1


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "not a host", "x" * 300])
def test_a_host_that_is_not_this_machine_is_named(atlas: Atlas, host: str) -> None:
    with pytest.raises(PatchclampError, match="is no address of this machine"):
        serve(atlas, host=host, port=0, open_browser=False, say=_fail)


def test_addresses() -> None:
    assert _in_address("::1") == "[::1]" and _in_address("0.0.0.0") == "localhost" and _in_address("lab") == "lab"
    assert _is_loopback("127.0.0.1") and _is_loopback("::1") and _is_loopback("localhost")
    assert not _is_loopback("0.0.0.0") and not _is_loopback("10.0.0.1") and not _is_loopback("lab")
