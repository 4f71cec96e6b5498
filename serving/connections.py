"""The HTTP protocol with bounds that uvicorn's lacks: on open connections, on slow headers, on readers that do not
read. 10,000 slow clients can then hold neither the memory nor the file handles that others need."""

import contextlib

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.errors import ApiError, dump

MOST = 256  # open connections: a quarter of the usual limit of 1,024 file handles, and with bodies 256 MiB
HEADERS_WITHIN = 10  # seconds from a request's first byte, or from the connection's beginning; also for what comes of a
# body after its answer
LINGER = 1  # seconds in which the client may read why it was refused, before what it still sends resets the connection
READ_WITHIN = 30  # seconds for which a client may leave what it was sent unread
HEADERS_SIZE = 16 * 1024  # bytes


class Connection(H11Protocol):
    """A connection. At the limit the oldest one that has no whole request yet makes place for a new one."""

    waiting: dict["Connection", None] = {}  # those without a whole request, the oldest first

    header_timer = read_timer = None
    refused = False

    def connection_made(self, transport) -> None:
        """A client has come."""
        super().connection_made(transport)
        if len(self.connections) > MOST:
            oldest = next(iter(self.waiting), self)
            oldest.refuse(503, "too many connections")
            if oldest is self:
                return
        self._await_headers()

    def connection_lost(self, exc) -> None:
        """The client, or this program, has ended the connection."""
        self._end_header_timer()
        if self.read_timer is not None:
            self.read_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a client."""
        if self.refused:
            return
        super().data_received(data)
        self._look(received=True)

    def on_response_complete(self) -> None:
        """A response was sent; another request may follow."""
        super().on_response_complete()
        self._look(received=False)

    def pause_writing(self) -> None:
        """The client does not read what it is sent."""
        super().pause_writing()
        if self.read_timer is None:
            self.read_timer = self.loop.call_later(READ_WITHIN, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read it."""
        super().resume_writing()
        if self.read_timer is not None:
            self.read_timer.cancel()
            self.read_timer = None

    def send_400_response(self, msg: str) -> None:
        """Called where a client does not speak HTTP."""
        self.refuse(400, msg)

    def refuse(self, status: int, message: str) -> None:
        """End the connection, with an error where the client has begun a request and has no answer yet."""
        self._end_header_timer()
        if self.refused or status != 400 and not self.conn.trailing_data[0]:
            self.transport.close()
            return
        self.refused, body = True, dump(ApiError(status, message).content)
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        with contextlib.suppress(h11.LocalProtocolError):  # in the midst of a response
            for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER, self.transport.close)

    def _look(self, received: bool) -> None:
        """See whether a whole request is there. From its first byte on its headers have a limit; between two requests
        uvicorn has a timer of its own."""
        if self.refused:
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._end_header_timer()
        elif not self.transport.is_closing():
            self.waiting.setdefault(self)
            if received and self.header_timer is None:
                self._await_headers()

    def _await_headers(self) -> None:
        self.waiting.setdefault(self)
        self.header_timer = self.loop.call_later(HEADERS_WITHIN, self.refuse, 408, "the request's headers did not come")

    def _end_header_timer(self) -> None:
        self.waiting.pop(self, None)
        if self.header_timer is not None:
            self.header_timer.cancel()
            self.header_timer = None
