"""Who may ask: the API key, the Host and Origin rules, and CORS. An ASGI app around the app, so that streams pass
through it untouched.

Without a key the server answers every program on this machine. A browser on it runs pages of other sites, too, which
must not: a page may post to any address (refused by its Origin), and may let its own name resolve to 127.0.0.1, so that
it is same-origin (refused by its Host).
"""

import hashlib
import hmac
import ipaddress
import re

from serving.errors import ApiError, dump

PUBLIC = ("/", "/style.css", "/app.js", "/icon.svg", "/health")  # no key needed
LOOPBACK_NAME = re.compile(r"(?:[a-z0-9-]+\.)*localhost\.?")
MAX_AGE = b"600"  # seconds for which a browser remembers a preflight


def is_loopback(host: str) -> bool:
    """True for a name or an address that only this machine can reach."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return LOOPBACK_NAME.fullmatch(host.lower()) is not None


def digest(text: str) -> bytes:
    """The SHA-256 of a header's text."""
    return hashlib.sha256(text.encode("latin-1")).digest()


def host_name(host: str) -> str:
    """The name in a Host header, without the port."""
    return re.sub(r":\d*\Z", "", host).lower()


class Guard:
    """Lets a request through to `app`, or answers with an error. `key` None: any or no bearer; `host` is the one that
    the server is bound to; `cors` lists the origins that may use it from a browser, "*" is any."""

    def __init__(self, app, key: str | None, host: str, cors: list[str]):
        self.app, self.key, self.host, self.cors = app, key, host.lower(), cors

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        added = self._cors_headers(headers.get(b"origin"))

        async def send_with(message):
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message["headers"], *added]}
            await send(message)

        asked = headers.get(b"access-control-request-headers")
        try:
            self.check_host(headers.get(b"host", ""))
            self.check_origin(scope["method"], headers.get(b"origin"), headers.get(b"host", ""))
            if scope["method"] == "OPTIONS" and b"origin" in headers and b"access-control-request-method" in headers:
                return await self._preflight(send_with, asked, b"access-control-request-private-network" in headers)
            if scope["path"] not in PUBLIC:
                self.check_key(headers.get(b"authorization", ""))
        except ApiError as error:
            return await send_error(send_with, error)
        await self.app(scope, receive, send_with)

    def check_host(self, host: str) -> None:
        """Raises ApiError on a Host that this server is not called by, where no key protects it."""
        name = host_name(host)
        if self.key is None and not is_loopback(name) and name.strip("[]") != self.host:
            raise ApiError(403, "the Host header names another server; without --api_key only this machine's own names "
                           "are answered", code="host_not_allowed")

    def check_origin(self, method: str, origin: str | None, host: str) -> None:
        """Raises ApiError when a page of another site posts."""
        if method in ("GET", "HEAD") or origin is None or self._allowed(origin):
            return
        if origin.partition("://")[2].lower() != host.lower() or not host:
            raise ApiError(403, "a page of another origin may not use this server; --cors allows one",
                           code="origin_not_allowed")

    def check_key(self, authorization: str) -> None:
        """Raises ApiError where the bearer is not the key. Both are hashed, so that the time which that takes shows
        neither how much of a wrong one is right nor how long the key is."""
        scheme, _, given = authorization.partition(" ")
        if self.key is None or scheme.lower() == "bearer" and hmac.compare_digest(
                digest(given.strip()), digest(self.key)):
            return
        raise ApiError(401, "incorrect API key" if authorization else "no API key: send Authorization: Bearer KEY",
                       code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _allowed(self, origin: str) -> bool:
        return origin in self.cors or "*" in self.cors

    def _cors_headers(self, origin: str | None) -> list[tuple[bytes, bytes]]:
        if not self.cors:
            return []
        added = [(b"vary", b"Origin")]
        if origin is not None and self._allowed(origin):
            added += [(b"access-control-allow-origin", origin.encode("latin-1")),
                      (b"access-control-expose-headers", b"Retry-After")]
        return added

    async def _preflight(self, send, asked: str | None, private: bool) -> None:
        """A browser asks before it posts. The headers it names are allowed: clients send many of their own."""
        headers = [(b"access-control-allow-methods", b"GET, POST, OPTIONS"), (b"access-control-max-age", MAX_AGE)]
        if asked is not None:
            headers.append((b"access-control-allow-headers", asked.encode("latin-1")))
        if private:
            headers.append((b"access-control-allow-private-network", b"true"))
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


async def send_error(send, error: ApiError) -> None:
    """Answer with an error. What then comes of the request's body is dropped."""
    body = dump(error.content)
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    headers = [(name.lower().encode(), value.encode()) for name, value in (headers | error.headers).items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
