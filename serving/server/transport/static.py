"""The page at `/`: one file, with the headers that let a browser run it and nothing else."""

import base64
import hashlib
import re
from importlib.resources import files

from headstart.serving.server.transport.exchange import Response


def page() -> Response:
    """The page as it is sent; its own script and style are allowed by their digests."""
    text = files("headstart.serving.page").joinpath("index.html").read_text(encoding="utf-8")
    policy = [
        "default-src 'none'",
        "connect-src 'self'",
        "img-src blob: data:",
        f"script-src {_digests(text, 'script')}",
        f"style-src {_digests(text, 'style')}",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    headers = (
        "Content-Type: text/html; charset=utf-8\r\n"
        f"Content-Security-Policy: {'; '.join(policy)}\r\n"
        "X-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\nCache-Control: no-cache\r\n"
    )
    return Response(200, headers.encode(), [text.encode()])


def _digests(text: str, tag: str) -> str:
    found = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in found)
