"""The paths that the HTTP server answers at, and the names in them and in their queries."""

import re
from urllib.parse import parse_qs, unquote

from headstart.serving.server.errors import bad_request
from headstart.serving.server.wire.head import Head
from headstart.serving.server.wire.protocol import LONGEST_NAME

ROUTES: tuple[tuple[str, str, str], ...] = (
    ("GET", "/", "home"),
    ("GET", "/openapi.json", "openapi"),
    ("GET", "/metrics", "metrics"),
    ("GET", "/v1/card", "card"),
    ("POST", "/v1/predict", "predict"),
    ("GET", "/v2", "server_metadata"),
    ("GET", "/v2/health/live", "live"),
    ("GET", "/v2/health/ready", "ready"),
    ("GET", "/v2/models/stats", "statistics"),
    ("GET", "/v2/models/{name}", "model_metadata"),
    ("GET", "/v2/models/{name}/ready", "model_ready"),
    ("GET", "/v2/models/{name}/config", "model_config"),
    ("GET", "/v2/models/{name}/stats", "statistics"),
    ("POST", "/v2/models/{name}/infer", "infer"),
    ("GET", "/v2/models/{name}/versions/{version}", "model_metadata"),
    ("GET", "/v2/models/{name}/versions/{version}/ready", "model_ready"),
    ("GET", "/v2/models/{name}/versions/{version}/config", "model_config"),
    ("GET", "/v2/models/{name}/versions/{version}/stats", "statistics"),
    ("POST", "/v2/models/{name}/versions/{version}/infer", "infer"),
    ("POST", "/v2/repository/index", "repository_index"),
    ("POST", "/v2/repository/models/{name}/load", "load"),
    ("POST", "/v2/repository/models/{name}/unload", "unload"),
)
"""Method, path and handler of all that is served."""

HEALTH = ("live", "ready")
"""What `/v2/health/` is asked for."""
_NAME = re.compile(rf"[^/\\\x00-\x1f\x7f]{{1,{LONGEST_NAME}}}")


def match(template: list[str], segments: list[str]) -> tuple[str, ...] | None:
    """What the words in braces of a template stand for in a path, or None where it is another path.

        match(["v2", "models", "{name}"], ["v2", "models", "a%20b"])  # ("a b",)

    Args:
        template: of a route, split at its slashes.
        segments: of a path as sent, split in the same way.
    """
    if len(template) != len(segments):
        return None
    names = []
    for expected, segment in zip(template, segments, strict=True):
        if not expected.startswith("{"):
            if segment != expected:
                return None
            continue
        try:
            name = unquote(segment, errors="strict")
        except UnicodeDecodeError:
            return None
        if not _NAME.fullmatch(name) or name in (".", ".."):
            return None
        names.append(name)
    return tuple(names)


def model_named(head: Head) -> str | None:
    """The `model` of a query, or None.

    Raises:
        ServeError: 400, where it is no name, or there are several.
    """
    try:
        names = parse_qs(head.query, keep_blank_values=True, max_num_fields=16, errors="strict").get("model", [])
    except ValueError:
        raise bad_request("the query cannot be read; accepted: ?model=NAME") from None
    if len(names) > 1 or (names and (not _NAME.fullmatch(names[0]) or names[0] in (".", ".."))):
        raise bad_request("the query names no model, or several; accepted: ?model=NAME")
    return names[0] if names else None
