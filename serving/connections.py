"""The HTTP protocol with bounds that uvicorn's lacks: on open connections, on slow headers, on readers that do not
read. 10,000 slow clients can then hold neither the memory nor the file handles that others need."""

import contextlib

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.errors import ApiError, dump

MAX_CONNECTIONS = 256  # a quarter of the usual limit of 1,024 file handles, and with bodies 256 MiB
HEADERS_WITHIN = 10  # seconds from a request's first byte, or from the connection's beginning; also for what comes of a
# body after its answer
LINGER = 1  # seconds in which the client may read why it was refused, before what it still sends resets the connection
READ_WITHIN = 30  # seconds for which a client may leave what it was sent unread
HEADERS_SIZE = 16 * 1024  # bytes


class Connection(H11Protocol):
    """A connection. At the limit the oldest one that has no whole request yet, its body included, makes room for a new
    one. `incomplete` are those of a server, the oldest first; the values mean nothing."""

    header_timer = read_timer = None
    refused = False

    def __init__(self, *args, incomplete: dict["Connection", None], **options):
        super().__init__(*args, **options)
        self.incomplete = incomplete

    def connection_made(self, transport) -> None:
        """Make room where there are too many."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            oldest = next(iter(self.incomplete), self)
            oldest.refuse(503, "too many connections")
            if oldest is self:
                return
        self.incomplete[self] = None
        self._start_header_timer()

    def connection_lost(self, exc) -> None:
        """Forget the connection; super wakes the app where it waits for the body, and tells it."""
        self.incomplete.pop(self, None)
        self._end_header_timer()
        if self.read_timer is not None:
            self.read_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Drop what a refused client still sends: unread, it would reset the connection before the answer is read."""
        if self.refused:
            return
        super().data_received(data)
        self._note_progress(received=True)

    def on_response_complete(self) -> None:
        """Another request may follow, or be here already."""
        super().on_response_complete()
        self._note_progress(received=False)

    def pause_writing(self) -> None:
        """Start a timer: a client that does not read would hold its memory forever."""
        super().pause_writing()
        if self.read_timer is None:
            self.read_timer = self.loop.call_later(READ_WITHIN, self.transport.abort)

    def resume_writing(self) -> None:
        """End that timer."""
        super().resume_writing()
        if self.read_timer is not None:
            self.read_timer.cancel()
            self.read_timer = None

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to a client that does not speak HTTP, in OpenAI's shape."""
        self.refuse(400, msg)

    def refuse(self, status: int, message: str) -> None:
        """End the connection, with an error where the client has begun a request and has no answer yet."""
        self.incomplete.pop(self, None)
        self._end_header_timer()
        begun = status == 400 or self.conn.trailing_data[0] or self.conn.their_state is h11.SEND_BODY
        if self.refused or not begun:
            self.transport.close()
            return
        self.refused = True
        if self.cycle is not None and not self.cycle.response_complete:
            if self.cycle.response_started:
                self.transport.abort()
                return
            self.cycle.disconnected = True  # the app, which waits for the body, is to see that nobody waits for it
            self.cycle.waiting_for_100_continue = False
            self.cycle.message_event.set()
        self._send_error(ApiError(status, message))
        if len(self.connections) > 2 * MAX_CONNECTIONS:  # too many linger
            self.transport.close()
            return
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER, self.transport.close)

    def _send_error(self, error: ApiError) -> None:
        body = dump(error.content)
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        with contextlib.suppress(h11.LocalProtocolError):  # this request has its answer
            for event in (h11.Response(status_code=error.status, headers=headers), h11.Data(data=body),
                          h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))

    def _note_progress(self, received: bool) -> None:
        """See how much of a request is there. From its first byte on its headers have a limit, and the app sets one for
        its body; between two requests uvicorn has a timer of its own."""
        if self.refused:
            return
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering:
            self._end_header_timer()
        if answering and self.conn.their_state is not h11.SEND_BODY:
            self.incomplete.pop(self, None)
        elif not self.transport.is_closing():
            self.incomplete.setdefault(self)
            if received and not answering and self.header_timer is None:
                self._start_header_timer()

    def _start_header_timer(self) -> None:
        self.header_timer = self.loop.call_later(HEADERS_WITHIN, self.refuse, 408, "the request's headers did not come")

    def _end_header_timer(self) -> None:
        if self.header_timer is not None:
            self.header_timer.cancel()
            self.header_timer = None
