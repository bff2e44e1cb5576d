"""Who may talk to the page: the names it is reached by, the pages that may ask, and the token."""

import hmac
import ipaddress
import socket
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "samlora_token"  # and the port: cookies are shared by all ports of a host
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",  # the token may stand in the address
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Middleware that answers foreign requests itself.

    host: the address the server is bound to. token: what every request must know, None on a loopback address.
    A Host header must be the server's own: a page of another name that resolves to this machine (DNS rebinding) is
    turned away. So is a request that another page's script sends (Origin, Sec-Fetch-Site). The token comes in the
    address once, and then in a cookie; or in the header `Authorization: Bearer TOKEN`.
    """

    def __init__(self, app: ASGIApp, host: str, token: str | None):
        self.app, self.token = app, token
        self.loopback = is_loopback(host)
        own = () if self.loopback else (host, socket.gethostname(), socket.getfqdn())
        self.names = {name.lower() for name in ("localhost", *own)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # a websocket is closed: nothing here speaks that
        answer = self._refusal(scope)
        await (answer or self.app)(scope, receive, self._with_headers(send))

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if len(headers.getlist("host")) != 1 or not self._own_name(headers["host"]):
            return PlainTextResponse("this server is not reached by that name; open the address it printed", 400)
        origin = headers.get("origin")
        foreign = origin is not None and urlsplit(origin).netloc.lower() != headers["host"].lower()
        # A link from elsewhere may open the page (navigate); nothing else may be fetched from elsewhere.
        site = headers.get("sec-fetch-site", "same-origin")
        linked = headers.get("sec-fetch-mode") == "navigate" and scope["method"] == "GET" and scope["path"] == "/"
        if foreign or (site not in ("same-origin", "none") and not linked):
            return PlainTextResponse("requests from other pages are not answered", 403)
        return None if self.token is None else self._without_token(scope, headers)

    def _own_name(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self.names:
            return True
        try:  # an address cannot be made to point elsewhere, as a name can
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self.loopback

    def _without_token(self, scope: Scope, headers: Headers) -> Response | None:
        query = parse_qsl(scope["query_string"].decode("latin-1"))
        given = dict(query).get("token")
        if given is not None and scope["path"] == "/" and self._matches(given):
            rest = urlencode([(key, value) for key, value in query if key != "token"])
            answer = RedirectResponse(f"/?{rest}" if rest else "/", 303)
            answer.set_cookie(_cookie(headers), given, httponly=True, samesite="strict")
            return answer
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self._matches(bearer):
            return None
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(_cookie(headers))
        except CookieError:
            cookie = None
        if cookie is not None and self._matches(cookie.value):
            return None
        return PlainTextResponse("a token is needed: open the whole address that samlora app printed", 401)

    def _matches(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())

    @staticmethod
    def _with_headers(send: Send) -> Send:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        return sending


def _cookie(headers: Headers) -> str:
    port = headers["host"].rpartition(":")[2]
    return f"{COOKIE}_{port}" if port.isascii() and port.isdigit() else COOKIE


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
