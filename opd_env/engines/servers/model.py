"""Which model a pool of vLLM servers serves.

Worked example::

    served_model(client)        # ServedModel(name="Qwen/Qwen3-0.6B", max_context=40960)

Test it alone: ``pytest tests/engines/servers/test_engine.py``
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any

from opd_env.engines.servers.client import HttpClient, RequestFailed, RequestRefused
from opd_env.errors import UserError


@dataclass(frozen=True)
class ServedModel:
    """What all servers of a pool serve."""

    name: str
    max_context: int
    """Tokens, the sampled ones included."""


def served_model(client: HttpClient) -> ServedModel:
    """What the servers serve.

    Raises:
        UserError: one cannot be reached, is no vLLM server, or serves something else than the others.
    """
    found: dict[str, ServedModel] = {}
    for url in client.urls:
        try:
            listed = client.ask(url, "/v1/models", timeout_s=30)["data"]
            models = [_read_model(one) for one in listed if not one.get("parent")]
        except (RequestFailed, RequestRefused) as error:
            raise UserError(
                f"no vLLM server answers at {url} ({error}); start one with `vllm serve MODEL`, and wait until "
                f"{url}/health answers"
            ) from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{url} does not list its model and its context as a vLLM server does ({error})") from error
        if len(models) != 1:
            raise UserError(f"{url} serves {len(models)} models; give each model its own server")
        found[url] = models[0]
    first = next(iter(found.values()))
    if any(model != first for model in found.values()):
        shown = "; ".join(f"{url}: {model.name}, {model.max_context} tokens" for url, model in found.items())
        raise UserError(f"the servers of one pool must serve the same model with the same context, but {shown}")
    return first


def _read_model(listed: Any) -> ServedModel:
    name, context = listed["id"], listed["max_model_len"]
    if not isinstance(name, str) or type(context) is not int or context < 2:
        raise ValueError(f"a model {reprlib.repr(name)} with a context of {reprlib.repr(context)}")
    return ServedModel(name, context)
