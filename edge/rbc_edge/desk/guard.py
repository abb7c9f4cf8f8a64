"""Who may ask the review page for what. It stands before every route and decides by the request's head alone.

A page on this computer can be reached by every web site that its browser opens. So the guard looks at more
than the token: at Host (a foreign name may be made to point here), at Origin and Sec-Fetch-Site (a foreign
page may send forms here), at sizes and at rates.
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address
from secrets import compare_digest
from typing import Final
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_URL_BYTES: Final = 4096
MAX_BODY_BYTES: Final = 16_384
LOGIN: Final = "/login"
STATIC: Final = "/static/"

_HEADERS: Final = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}


class Bucket:
    """A limit of rate: so many at once, and so many in a second."""

    def __init__(self, at_once: float, per_s: float, monotonic_s: Callable[[], float]) -> None:
        self._most, self._per_s, self._monotonic_s = at_once, per_s, monotonic_s
        self._left, self._then_s = at_once, monotonic_s()

    def take(self) -> bool:
        """Takes one. False: there is none left now."""
        now_s = self._monotonic_s()
        self._left = min(self._most, self._left + (now_s - self._then_s) * self._per_s)
        self._then_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Guard:
    """An ASGI application around another one, which gets only what is allowed.

    Args:
        app: The application behind it.
        token: The secret of this server's address, and then of its cookie.
        port: Where the server listens.
        host: The address that it listens on. Beyond loopback, every number is a good name for it.
        password: Takes the place of the token in the address. Empty: there is none.
        read_only: Nothing may be written.
        monotonic_s: The clock of the rates.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str,
        port: int,
        host: str = "127.0.0.1",
        password: str = "",
        read_only: bool = False,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app, self._token, self._password, self._read_only = app, token, password, read_only
        self._port, self._any_address = port, not is_loopback(host)
        self._cookie = f"rbc_edge_review_{port}"
        self._requests = Bucket(300, 100, monotonic_s)
        self._writes = Bucket(40, 10, monotonic_s)
        self._guesses = Bucket(5, 1 / 12, monotonic_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or lets the application answer it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            refused = self._refused(scope)
            if scope["path"] == LOGIN and refused is None:
                refused = await self._logged_in(receive)
            guarded = self._with_headers(scope, send)
            await (
                refused(scope, receive, guarded) if refused else self._app(scope, _limited(receive), guarded)
            )

    def _refused(self, scope: Scope) -> Response | None:
        """Returns the answer to a request that is not allowed."""
        headers, method, path = Headers(scope=scope), scope["method"], scope["path"]
        host = headers.getlist("host")
        if len(host) != 1 or not self._is_ours(host[0]):
            return _no(421, "this page is not served under this name")
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_URL_BYTES:
            return _no(414, "the address is too long")
        if method not in ("GET", "HEAD", "POST"):
            return _no(405, "only GET and POST")
        if not self._requests.take():
            return _no(429, "too many requests: wait a moment")
        is_opening = method == "GET" and path == "/" and headers.get("sec-fetch-mode") == "navigate"
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none") and not is_opening:
            return _no(403, "asked for by another page")
        if method == "POST":
            if headers.get("origin") != f"http://{host[0]}":
                return _no(403, "sent by another page")
            if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
                return _no(415, "only JSON")
            length = headers.get("content-length", "")
            if not length.isdecimal():
                return _no(411, "no length")
            if len(length) > 9 or int(length) > MAX_BODY_BYTES:
                return _no(413, "too much at once")
        if path.startswith(STATIC) or (path == LOGIN and method == "POST"):
            return None
        if not self._is_known(scope, headers):
            what = "log in" if self._password else "open the address that `rbc-edge review` prints"
            return _login_page() if self._password and path == "/" else _no(403, f"not allowed: {what}")
        if method == "POST":
            if self._read_only:
                return _no(403, "this page only shows: it was started with --read-only")
            if not self._writes.take():
                return _no(429, "too many changes at once: wait a moment")
        return None

    def _is_ours(self, host: str) -> bool:
        """Tells whether a Host header names this server. A foreign name may point here (DNS rebinding)."""
        name, _, port = host.rpartition(":")
        if port != str(self._port):
            return False
        if name.lower() in ("127.0.0.1", "localhost", "[::1]"):
            return True
        return self._any_address and _is_number(name.strip("[]"))

    def _is_known(self, scope: Scope, headers: Headers) -> bool:
        if scope["path"] == "/" and not self._password:
            given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
            if _equal(given, self._token):
                return True
        # Lenient: other programs on this computer may have left odd cookies.
        return _equal(cookie_parser(headers.get("cookie", "")).get(self._cookie, ""), self._token)

    async def _logged_in(self, receive: Receive) -> Response:
        """Answers a password. Few in a minute: it can be guessed, unlike the token."""
        body = b""
        limited = _limited(receive)
        while (message := await limited())["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if not self._password or not self._guesses.take():
            return _no(429 if self._password else 404, "wait a minute")
        given: object = None
        with suppress(ValueError, RecursionError):
            given = json.loads(body)
        if not isinstance(given, str) or not _equal(given, self._password):
            return _no(403, "another password is needed")
        return JSONResponse({})

    def _with_headers(self, scope: Scope, send: Send) -> Send:
        opens = (scope["path"] == "/" and not self._password) or scope["path"] == LOGIN

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if opens and message["status"] == 200:
                    about = "HttpOnly; SameSite=Strict; Path=/"
                    headers.append("set-cookie", f"{self._cookie}={self._token}; {about}")
            await send(message)

        return guarded


def is_loopback(host: str) -> bool:
    """Tells whether an address is one that only this computer reaches."""
    return host == "localhost" or (_is_number(host) and ip_address(host).is_loopback)


def _is_number(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _equal(given: str, expected: str) -> bool:
    return compare_digest(given.encode("utf-8", "replace"), expected.encode())


def _limited(receive: Receive) -> Receive:
    """Gives a body no further than its limit, whatever its head said."""
    n = 0

    async def limited() -> Message:
        nonlocal n
        message = await receive()
        n += len(message.get("body", b""))
        return {"type": "http.disconnect"} if n > MAX_BODY_BYTES else message

    return limited


def _no(status: int, why: str) -> Response:
    return PlainTextResponse(f"{why}\n", status)


def _login_page() -> Response:
    return Response(LOGIN_PAGE, 401, media_type="text/html")


LOGIN_PAGE: Final = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>rbc-edge review: password</title>
<link rel="stylesheet" href="static/review.css">
<main>
<h1>Review</h1>
<form id="login">
<label>Password <input type="password" id="password" autocomplete="current-password" required></label>
<button>Log in</button>
<p id="said" role="status"></p>
</form>
</main>
<script src="static/login.js"></script>
</html>
"""
