"""TLS handshakes, which come before a connection is one that the server counts."""

import ssl
from weakref import WeakSet


def bound_handshakes(context: ssl.SSLContext, most: int) -> None:
    """Let no more than `most` of a context's handshakes be under way at once: one more fails as it begins.

    Clients that begin one and say no more would else hold as many descriptors, and some 60 KB each, as there are.
    """
    under_way = WeakSet[ssl.SSLObject]()  # a client that goes, or is timed out, takes its own with it

    class Bounded(ssl.SSLObject):
        def do_handshake(self) -> None:
            """Begin or go on; raises for as long as more must come."""
            if self not in under_way and len(under_way) >= most:
                raise ssl.SSLError("too many handshakes are under way")
            under_way.add(self)
            super().do_handshake()
            under_way.discard(self)

    context.sslobject_class = Bounded
