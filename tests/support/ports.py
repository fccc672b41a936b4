"""Port numbers for the servers that tests start."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """A loopback port that nobody listens on, below the range that the kernel hands to outgoing connections.

    A server of a test goes away and comes back on its port. From the kernel's own range, a client that keeps trying
    could be given that very port meanwhile, take it away from the server, or even connect to itself.
    """
    while True:
        port = random.randrange(12_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
