"""A way to a server that can be cut: what a proxy that restarts, a sleeping laptop or a lost WLAN does to a page."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Wires:
    """Passes TCP connections on to a port of this machine, which may become another, until they are cut."""

    def __init__(self, port: int):
        self.target = port
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.down = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break all connections that there are."""
        for wire in list(self._open):
            with contextlib.suppress(OSError):
                wire.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def broken(self) -> Iterator[None]:
        """Break all connections, and let none come up meanwhile."""
        self.down = True
        self.cut()
        try:
            yield
        finally:
            self.down = False

    def close(self) -> None:
        self.down = True
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                if self.down:
                    near.close()
                    continue
                try:
                    far = socket.create_connection(("127.0.0.1", self.target))
                except OSError:  # nobody listens
                    near.close()
                    continue
                self._open |= {near, far}
                if self.down:  # since a moment
                    self.cut()
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
            self._open.discard(end)
