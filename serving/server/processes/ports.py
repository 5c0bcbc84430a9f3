"""The ports of a server of several processes, which its supervisor holds for them."""

import socket

from headstart.serving.server.errors import StartError


class ReservedPort:
    """A port that the workers of this server may listen on and nobody else: bound, and never listened on.

        with ReservedPort("127.0.0.1", 0, "--port") as reserved:
            ...  # start the workers, which listen on reserved.port

    Args:
        host: address.
        port: 0 takes a free one.
        option: of the command line that chooses the port, for messages.

    Raises:
        StartError: it is in use or may not be used, or the address is not this machine's.
    """

    def __init__(self, host: str, port: int, option: str) -> None:
        self._sockets: list[socket.socket] = []
        try:
            for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                # First alone: a port that is shared could be another server's of the same user, who would not be told.
                with socket.socket(family, kind, protocol) as alone:
                    alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    alone.bind((address[0], port, *address[2:]))
                    port = alone.getsockname()[1]
                self._sockets.append(shared := socket.socket(family, kind, protocol))
                shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                # For what connections of a server of one process leave for a minute, and no longer: others have it too.
                shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                shared.bind((address[0], port, *address[2:]))
                shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        except OSError as error:
            self.__exit__()
            raise StartError.of_port(error, host, port, option) from error
        self.port = port
        """The one that is held."""

    def __enter__(self) -> "ReservedPort":
        return self

    def __exit__(self, *error: object) -> None:
        for one in self._sockets:
            one.close()
