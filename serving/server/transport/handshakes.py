"""TLS handshakes, which come before a connection is one that the server counts."""

import logging
import ssl
from weakref import WeakSet

_LOG = logging.getLogger(__name__)
_PLAIN = "HTTP_REQUEST"  # what OpenSSL says of a request in the place of a handshake


def bound_handshakes(context: ssl.SSLContext, most: int) -> None:
    """Let no more than `most` of a context's handshakes be under way at once: one more fails as it begins.

    Clients that begin one and say no more would else hold as many descriptors, and some 60 KB each, as there are. One
    that speaks plain HTTP, as a probe or a proxy that was not told of TLS, is in the log the first time.
    """
    under_way = WeakSet[ssl.SSLObject]()  # a client that goes, or is timed out, takes its own with it

    is_told = False

    class Bounded(ssl.SSLObject):
        def do_handshake(self) -> None:
            """Begin or go on; raises for as long as more must come."""
            if self not in under_way and len(under_way) >= most:
                raise ssl.SSLError("too many handshakes are under way")
            under_way.add(self)
            try:
                super().do_handshake()
            except ssl.SSLError as error:
                nonlocal is_told
                if error.reason == _PLAIN and not is_told:
                    is_told = True
                    _LOG.warning("a client spoke plain HTTP to the TLS port and was cut off; ask for https://")
                raise
            under_way.discard(self)

    context.sslobject_class = Bounded
