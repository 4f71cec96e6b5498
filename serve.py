"""Serve the weights of every stage: OpenAI's API, and a page to chat.

this machine  python serve.py                                            then open http://127.0.0.1:8000
one file      python serve.py --checkpoint out/SFT_best.pth --port 8080
a network     WEAKWATER_API_KEY=… python serve.py --host 0.0.0.0

OpenAI clients take the base URL http://127.0.0.1:8000/v1; a model's name is its stage, and each is loaded when it is
first asked for. Requests that arrive together are computed together. SIGTERM and Ctrl-C finish what is running; a
second one ends at once. docs/DEPLOY.md says more.
"""

import argparse
import asyncio
import contextlib
import errno
import functools
import os
import re
import signal
import socket
import sys
import threading

from common import exits
from Config import FLAGS, OneLineParser, UserError, number

KEY_VARIABLE = "WEAKWATER_API_KEY"
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s@]+")
LEFT_OVER = 5  # seconds that connections have at the end, when all replies are computed


def read_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags, checked. Raises UserError."""
    parser = OneLineParser(prog="serve.py", description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", metavar="PATH", help="serve this weights file only")
    for name in ("out_dir", "tokenizer_path", "device", "dtype"):
        flag = FLAGS[name]
        parser.add_argument(f"--{name}", default=flag.default, choices=flag.choices or None,
                            help=flag.help if flag.default is None else f"{flag.help} (default: {flag.default})")
    parser.add_argument("--plain", action="store_true", help=FLAGS["plain"].help)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; one that others can reach needs a "
                                                            "key (default: 127.0.0.1)")
    parser.add_argument("--port", type=number(int, 0, 65535), default=8000, help="0: any free one (default: 8000)")
    parser.add_argument("--api_key", metavar="KEY", help=f"clients must send it as their bearer (default: "
                                                         f"${KEY_VARIABLE}, which other users do not see)")
    parser.add_argument("--cors", metavar="ORIGIN", nargs="+", default=[],
                        help="pages of these origins may use the server, e.g. https://chat.example ('*': of all)")
    parser.add_argument("--slots", type=number(int, 1, 256), default=16, help="requests computed at once (default: 16)")
    parser.add_argument("--queue", type=number(int, 0, 10_000), default=64, help="requests that may wait (default: 64)")
    parser.add_argument("--max_new_tokens", type=number(int, 1), default=512,
                        help="longest answer of a request that names no max_tokens (default: 512)")
    args = parser.parse_args(argv)
    args.model_mode = None
    if args.api_key is None:
        args.api_key = os.environ.get(KEY_VARIABLE) or None
    if args.api_key is not None and not re.fullmatch("[!-~]+", args.api_key):
        raise UserError("--api_key: must be ASCII, without spaces, and not empty")
    for origin in args.cors:
        if origin != "*" and not ORIGIN.fullmatch(origin):
            raise UserError(f"--cors {origin}: not an origin; write https://name or http://name:port, without a path")
    return args


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError where it cannot."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM,
                                                         flags=socket.AI_PASSIVE)[0]
    except (socket.gaierror, UnicodeError):
        raise UserError(f"--host {host}: no such address") from None
    listening = socket.socket(family, kind)
    try:
        if os.name != "nt":  # there it would let two servers share a port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        listening.close()
        in_use = "in use; name another one, or 0 for any free one" if error.errno == errno.EADDRINUSE else None
        if in_use or error.errno == errno.EACCES:
            raise UserError(f"--port {port}: {in_use or error.strerror}") from None
        raise UserError(f"--host {host}: {error.strerror}") from None
    listening.setblocking(False)
    return listening


def make_server(app, engine, address: str):
    """A uvicorn server that ends when the engine has finished what runs."""
    import uvicorn

    from serving import connections

    class Server(uvicorn.Server):
        """Says where it serves, and answers 503 while it stops."""

        async def startup(self, sockets=None) -> None:
            """Say so when it listens, not before: tests and scripts wait for the line."""
            await super().startup(sockets)
            print(f"serving on {address}  (page: open this address; OpenAI clients: {address}/v1)", file=sys.stderr,
                  flush=True)

        @contextlib.contextmanager
        def capture_signals(self):
            """The first signal begins the end, in place of uvicorn's handlers, which would cut what runs."""
            if threading.current_thread() is not threading.main_thread():  # in a test
                yield
                return

            def stop(number: int, frame) -> None:
                if engine.stopping:
                    os._exit(128 + number)
                loop.call_soon_threadsafe(engine.stop)
                engine.stopping = True
                print("stopping: what runs is finished; once more ends at once", file=sys.stderr, flush=True)

            loop = asyncio.get_running_loop()
            numbers = (signal.SIGINT, signal.SIGTERM)
            before = [signal.signal(number, stop) for number in numbers]
            try:
                yield
            finally:
                for number, handler in zip(numbers, before, strict=True):
                    signal.signal(number, handler)

        async def on_tick(self, counter: int) -> bool:
            """True to end, asked ten times a second: after a signal when no request is left, which may take longer than
            uvicorn's own shutdown gives."""
            return await super().on_tick(counter) or engine.stopping and engine.idle

    return Server(uvicorn.Config(
        app, http=functools.partial(connections.Connection, incomplete={}), ws="none", lifespan="off", log_config=None,
        log_level="error", access_log=False, server_header=False, proxy_headers=False, timeout_keep_alive=15,
        timeout_graceful_shutdown=LEFT_OVER, h11_max_incomplete_event_size=connections.HEADERS_SIZE))


def main(argv: list[str] | None = None) -> int:
    args = read_args(argv)
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install fastapi uvicorn") from None
    from serving.guard import is_loopback

    def check_reach(address: str) -> None:
        if args.api_key is None and not is_loopback(address):
            raise UserError(f"--host {args.host}: others can reach it, so set a key with --api_key or ${KEY_VARIABLE}")

    check_reach(args.host)
    # For how long OpenMP's threads spin before they block. Its own default is milliseconds, which on a machine with
    # other work are taken from the thread they wait for.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from common import runtime
    from serving.app import make_app
    from serving.engine import Engine
    from serving.models import Models

    models = Models(args)
    runtime.pick_device(args.device)  # fail now, not at the first request
    with listen(args.host, args.port) as listening:
        address, port, *_ = listening.getsockname()
        check_reach(address)  # a name that ends in .localhost may resolve to any
        engine = Engine(args.slots, args.queue)
        app = make_app(models, engine, args.max_new_tokens, args.api_key, args.host, args.cors)
        host = f"[{args.host}]" if ":" in args.host else args.host
        make_server(app, engine, f"http://{host}:{port}").run(sockets=[listening])
    return 0


if __name__ == "__main__":
    sys.exit(exits.run(main))
