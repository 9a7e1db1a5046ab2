"""Samples turns on vLLM servers, token ids in and out.

Worked example::

    client = HttpClient(["http://127.0.0.1:8000", "http://127.0.0.1:8001"])
    engine = HttpEngine(client, chat.stop_token_ids, chat.vocab_size)
    probe_servers(client, chat)                     # once: refuse a server that would bias training
    rollout(task, engine, chat)

Of several processes that sample from the same servers, one gives them new weights and the others follow::

    with engine.held():                 # in all of them
        ...                             # one: engine.update_weights(model); the others get its engine.served
        engine.follow(served)

A turn is one request; all open turns are under way at once and the servers batch them. An episode stays with the
server whose prefix cache knows it. A turn that no server can sample ends its episode as a counted failure; no server
at all ends the rollout.

Test it alone: ``pytest tests/engines/servers/test_engine.py``
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_env.engines.base import AskingEngine, Completion, Request
from opd_env.engines.models import save_plain
from opd_env.engines.servers.client import HttpClient, RequestFailed, RequestRefused
from opd_env.engines.servers.protocol import read_completion, require_samplable, sampling_body, served_model
from opd_env.errors import UserError


@dataclass(frozen=True)
class ServedWeights:
    """What ``update_weights`` gave to the servers."""

    folder: Path
    away: dict[str, str]
    """Servers that have not taken them yet, and why."""


class HttpEngine(AskingEngine):
    """Samples with a pool of vLLM servers.

    Args:
        client: the servers. With its first weights the engine sets ``on_return``.
        stop_token_ids: any of these ends a turn; a format's ``stop_token_ids``.
        vocab_size: a sampled id beyond it is a fault of the server; a format's ``vocab_size``.
        weights_folder: where ``update_weights`` leaves the weights for the servers, which must see it under the same
            path; by default a temporary folder of this machine.

    Raises:
        UserError: see ``served_model``.
    """

    def __init__(
        self, client: HttpClient, stop_token_ids: Sequence[int], vocab_size: int, weights_folder: Path | None = None
    ) -> None:
        super().__init__()
        self.client = client
        self._model = served_model(client)
        self.max_context = self._model.max_context
        self.capacity = 2 * client.concurrency  # while some episodes wait for tools, others keep the servers busy
        self._stop = tuple(stop_token_ids)
        self._vocab_size = vocab_size
        self._folder = weights_folder
        self.served: ServedWeights | None = None
        """The newest weights, once there are some."""
        self._written: Path | None = None
        self._version = 0
        self._restoring = threading.RLock()
        self._run = secrets.token_hex(4)  # a server may still hold what an earlier run called weights 1

    def submit(self, request: Request) -> None:
        require_samplable(request, self.max_context)
        body = sampling_body(request, self._model.name, self._stop) | {
            "cache_salt": self.served.folder.name if self.served else f"weights-{self._run}-0"
        }
        self._begin(request.episode, lambda: self._sample(request, body), self.client.run)

    def update_weights(self, model: Any) -> None:
        """Writes the weights to the folder and makes all servers load them; see ``Engine``.

        A server that is away gets them when it is back, before it samples again.

        Raises:
            UserError: no server took them, or one cannot take any.
        """
        if self.busy:
            raise RuntimeError("weights cannot change while turns are under way")
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="opd-env-weights-"))
        old, version = self._written, self._version + 1
        folder = (self._folder / f"weights-{self._run}-{version}").resolve()
        away: dict[str, str] = {}
        with self._restoring:
            self._written = folder
            save_plain(model, folder)
            self._version, self.served = version, ServedWeights(folder, away)
            self.client.on_return = self._restore
            for url in self.client.urls:
                try:
                    self._restore(url)
                except RequestFailed as error:
                    away[url] = str(error)
                    self.client.suspect(url, str(error))
        if len(away) == len(self.client.urls):
            raise UserError(f"no server took the new weights: {'; '.join(away.values())}; start it (again)")
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within, no server that is back gets the weights of before: another process is changing them."""
        with self._restoring:
            yield

    def follow(self, served: ServedWeights) -> None:
        """Samples from weights that another process has given to the same servers."""
        if self.busy:
            raise RuntimeError("weights cannot change while turns are under way")
        with self._restoring:
            self.served, self.client.on_return = served, self._restore
            for url, reason in served.away.items():
                self.client.suspect(url, reason)

    def close(self) -> None:
        """Ends all requests and removes the weights that it left for servers."""
        self.client.close()
        if self._written is not None:
            shutil.rmtree(self._written, ignore_errors=True)

    def _restore(self, url: str) -> None:
        """Gives a server the current weights, unless it says that it has them."""
        with self._restoring:
            if self.served is None:
                return
            folder = self.served.folder
            try:
                if self.client.ask(url, "/weight_info", timeout_s=30) == {"weight_version": folder.name}:
                    return
                body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
                self.client.ask(url, "/collective_rpc", body)
                self.client.ask(url, "/update_weight_version", {"new_version": folder.name})
            except RequestRefused as error:
                raise UserError(
                    f"{url} does not take new weights ({error}); start the server with VLLM_SERVER_DEV_MODE=1, and let "
                    f"it see {folder} under this path"
                ) from error

    def _sample(self, request: Request, body: dict[str, Any]) -> Completion:
        """Runs in a thread of the client."""

        def read(answer: Any) -> Completion:
            return read_completion(answer, request, self._stop, self._vocab_size)

        try:
            return self.client.post("/v1/completions", body, read, request.episode)
        except RequestFailed as error:
            return Completion(request.episode, [], [], truncated=True, error=str(error))
