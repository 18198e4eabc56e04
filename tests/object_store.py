"""A real S3 interface on localhost (moto's server), reached through a proxy that can drop connections.

python -m tests.object_store record URL SECONDS    a process that records there until it is killed
"""

from __future__ import annotations

import os
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

BUCKET = "the-bucket"
_REQUEST = re.compile(rb"(GET|PUT|POST|HEAD|DELETE) (\S+) HTTP/1\.1\r\n")


class Proxy:
    """Forwards TCP connections, and drops some in the middle.

    Attributes:
        requests: (method, path) of all that went through.
        rule: of a request -> "request" (it never reaches the server), "answer" (the server does what is asked, and its
            answer is lost), "half" (half of what the answer begins with arrives), or "" (nothing happens).
        dropped: how many were.
    """

    def __init__(self, port: int) -> None:
        self._server = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.requests: list[tuple[str, str]] = []
        self.rule: Callable[[str, str], str] = lambda method, path: ""
        self.dropped = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def quiet(self) -> None:
        """Nothing is dropped from now on, and nothing was."""
        self.rule, self.dropped = lambda method, path: "", 0
        self.requests.clear()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = socket.create_connection(("127.0.0.1", self._server))
        what = [""]

        def back() -> None:
            with suppress(OSError):
                while piece := server.recv(1 << 16):
                    if what[0]:
                        if what[0] == "half":
                            client.sendall(piece[: len(piece) // 2])
                        self._drop(client, server)
                        return
                    client.sendall(piece)

        threading.Thread(target=back, daemon=True).start()
        with suppress(OSError):
            while piece := client.recv(1 << 16):
                if found := _REQUEST.match(piece):
                    method, path = found[1].decode(), found[2].decode()
                    self.requests.append((method, path))
                    what[0] = self.rule(method, path)
                    if what[0] == "request":
                        self._drop(client, server)
                        return
                server.sendall(piece)
        server.close()

    def _drop(self, *sockets: socket.socket) -> None:
        self.dropped += 1
        for each in sockets:
            with suppress(OSError):
                # Close with a reset, as a cable that is pulled does in the end.
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                each.shutdown(socket.SHUT_RDWR)
                each.close()


@contextmanager
def running() -> Iterator[Proxy]:
    """A server with an empty bucket, and the environment that leads to it."""
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    proxy = Proxy(server.get_host_and_port()[1])
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    S3FileSystem.clear_instance_cache()
    S3FileSystem().mkdir(BUCKET)
    try:
        yield proxy
    finally:
        S3FileSystem.clear_instance_cache()
        proxy.close()
        server.stop()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _record(url: str, seconds: float) -> None:
    """Record slowly, with a checkpoint after every batch."""
    from tests.recording import tiny

    import patchclamp as pc
    from patchclamp.recording import checkpoint, run
    from patchclamp.storage import lease

    lease.SECONDS = seconds
    checkpoint.FIRST_AFTER, checkpoint.SHARE = 0.0, 1e9
    take = run.Accumulation.take

    def slowly(self: run.Accumulation, read: object) -> None:
        time.sleep(0.2)
        take(self, read)  # type: ignore[arg-type]

    run.Accumulation.take = slowly  # type: ignore[method-assign, assignment]
    model = pc.load(tiny.bert(), tokenizer=tiny.tokenizer())
    pc.record(model, tiny.texts(200), "mlp.*", store=url, activations=True, batch_tokens=60, progress=False)


if __name__ == "__main__":
    _record(sys.argv[2], float(sys.argv[3]))
