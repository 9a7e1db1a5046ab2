"""Addresses of servers, as settings name them.

Worked example::

    is_url("Qwen/Qwen3-0.6B")                   # False: a model
    pool_url("http://127.0.0.1:8000/v1/")       # "http://127.0.0.1:8000"

Test it alone: ``pytest tests/engines/servers/test_transport.py tests/engines/servers/test_client.py``
"""

from __future__ import annotations

from urllib.parse import urlsplit


def is_url(name: str) -> bool:
    """Whether a setting names servers rather than a model or an engine."""
    return name.startswith(("http://", "https://"))


def checked_url(url: str) -> str:
    """The address of a server without a slash at its end.

    Raises:
        ValueError: it is none, or holds a password, a query or a fragment.
    """
    url = url.strip().rstrip("/")
    try:
        parts = urlsplit(url)
        whole = bool(parts.hostname) and parts.port != 0 and not (parts.query or parts.fragment)
        fits = whole and parts.scheme in ("http", "https") and "@" not in parts.netloc
    except ValueError:  # the port or the brackets of IPv6
        fits = False
    if not fits or any(not "!" <= character <= "~" for character in url):
        raise ValueError(f"{url!r} is no URL of a server; it looks like http://HOST:8000")
    return url


def pool_url(url: str) -> str:
    """The address of a vLLM server without a path.

    Raises:
        ValueError: it is none, or has another path than ``/v1``.
    """
    url = checked_url(url).removesuffix("/v1")
    if urlsplit(url).path:
        raise ValueError(f"{url!r} is no URL of a vLLM server; it looks like http://HOST:8000")
    return url
