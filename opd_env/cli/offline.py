"""Without network, the hub's client retries for a minute before it fails: notice it first.

Test it alone: ``pytest tests/cli/test_cli.py``
"""

from __future__ import annotations

import os
import socket
import threading

_SECONDS = 3.0


def go_offline_without_network() -> None:
    """Sets ``HF_HUB_OFFLINE`` when the hub's name does not resolve, so that only the cache is looked at.

    To be called before ``huggingface_hub`` is imported. With a proxy, or when the user has set the variable,
    nothing is done.
    """
    from urllib.parse import urlparse
    from urllib.request import getproxies

    if "HF_HUB_OFFLINE" in os.environ or getproxies():
        return
    host = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or ""
    answers: list[bool] = []

    def resolve() -> None:
        try:
            socket.getaddrinfo(host, 443)
            answers.append(True)
        except OSError:
            answers.append(False)

    thread = threading.Thread(target=resolve, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    if answers != [True]:
        os.environ["HF_HUB_OFFLINE"] = "1"
