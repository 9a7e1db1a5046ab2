"""A server that speaks the part of vLLM's API that the kit uses, with a tiny model, and misbehaves on demand.
``FakeLLM`` is the same in one process.

``with FakeVLLM() as server:`` listens on a free port; ``server.faults`` is a list of what to do wrong with the next
requests for completions, one entry each (see ``_misbehave``); ``server.kill()`` and ``server.start()`` are a crash
and a restart, after which it has its first weights again.
"""

from __future__ import annotations

import json
import socket
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from transformers import AutoModelForCausalLM

from tests.ports import kept_port
from tests.tiny import tiny_llama


class FakeVLLM:
    def __init__(self, make_model: Callable[[], Any] = tiny_llama, *, max_model_len: int = 1024) -> None:
        self.make_model, self.max_model_len = make_model, max_model_len
        self.faults: list[str] = []
        self.always: str | None = None
        """A fault of every request."""
        self.spoil: Callable[[dict[str, Any], dict[str, Any]], None] | None = None
        """Called with request and choice: changes an answer for the worse."""
        self.stale = False
        """Scores of positions that stand in the prefix cache come from the request before: vLLM issue 42019."""
        self.requests: list[dict[str, Any]] = []
        self.answered = 0
        self.most_at_once = self._now = 0
        self.delay_s = 0.0
        self.loads = 0
        self._kept = ExitStack()
        self.port = self._kept.enter_context(kept_port())  # its own while it is down, too
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.model, self.version = self.make_model(), "default"
        self._last_scores: list[Any] = []
        self._cached: set[tuple[int, ...]] = set()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: object) -> None:
                """Quiet."""

            def do_GET(self) -> None:
                fake.get(self)

            def do_POST(self) -> None:
                fake.post(self)

            def answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                for name, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
                    self.send_header(name, text)
                self.end_headers()
                self.wfile.write(data)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True
            request_queue_size = 128

            def process_request(self, request: Any, client_address: Any) -> None:
                fake._sockets.add(request)
                super().process_request(request, client_address)

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that has gone is no news."""

        self._server = Server(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def kill(self) -> None:
        """Ends at once, in the middle of answers."""
        self._server.shutdown()
        self._server.server_close()
        sockets, self._sockets = self._sockets, set()
        for one in sockets:
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    @contextmanager
    def crashing(self, after_s: float, away_s: float) -> Iterator[None]:
        """Is killed and restarted while the block runs."""

        def crash() -> None:
            time.sleep(after_s)
            self.kill()
            time.sleep(away_s)
            self.start()

        thread = threading.Thread(target=crash)
        thread.start()
        yield
        thread.join()

    def __enter__(self) -> FakeVLLM:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._kept.close()

    def get(self, handler: Any) -> None:
        if handler.path == "/v1/models":
            handler.answer(200, {"data": [{"id": "tiny", "max_model_len": self.max_model_len, "parent": None}]})
        elif handler.path == "/weight_info":
            handler.answer(200, {"weight_version": self.version})
        else:
            handler.answer(200 if handler.path == "/health" else 404, {})

    def post(self, handler: Any) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        if handler.path == "/collective_rpc":
            self.model = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"]).eval()
            self.loads += 1
            handler.answer(200, {"results": [None]})
        elif handler.path == "/update_weight_version":
            self.version = body["new_version"]
            handler.answer(200, {"success": True})
        elif handler.path == "/v1/completions":
            with self._lock:
                self._now += 1
                self.most_at_once = max(self.most_at_once, self._now)
                self.requests.append(body)
                fault = self.faults.pop(0) if self.faults else self.always
            time.sleep(self.delay_s)
            try:
                self._complete(handler, body, fault)
            finally:
                with self._lock:
                    self._now -= 1
        else:
            handler.answer(404, {})

    def _complete(self, handler: Any, body: dict[str, Any], fault: str | None) -> None:
        if fault and self._misbehave(handler, fault):
            return
        if (body.get("prompt_logprobs") or 0) > 20:
            handler.answer(400, {"error": {"message": "more than max_logprobs"}})
            return
        with self._lock:
            choice = self._choice(body)
        if self.spoil is not None:
            self.spoil(body, choice)
        data = {"choices": [choice]}
        if fault == "truncated":
            text = json.dumps(data).encode()
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(text)))
            handler.end_headers()
            handler.wfile.write(text[: len(text) // 2])
            return
        with self._lock:
            self.answered += 1  # before it is written: a client that has read it may look
        handler.answer(200, data)

    def _misbehave(self, handler: Any, fault: str) -> bool:
        """Whether that was the answer."""
        if fault.isdigit():
            handler.answer(int(fault), {"error": {"message": "no"}})
        elif ":" in fault:
            status, seconds = fault.split(":")
            handler.answer(int(status), {}, {"Retry-After": seconds})
        elif fault == "garbage":
            handler.answer(200, {"choices": "none"})
        elif fault == "not json":
            handler.send_response(200)
            handler.end_headers()
            handler.wfile.write(b"\xff<html>")
        elif fault == "reset":
            handler.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "slow":
            time.sleep(3.0)
            return False
        elif fault == "drip":
            handler.send_response(200)
            handler.end_headers()
            for _ in range(1200):
                handler.wfile.write(b" ")
                time.sleep(0.05)
        else:
            return False
        return True

    @torch.no_grad()
    def _choice(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt, ids, logprobs = body["prompt"], [], []
        generator = torch.Generator().manual_seed(body.get("seed", 0))
        reason = "length"
        for _ in range(body["max_tokens"]):
            found_V = self.model(torch.tensor([prompt + ids])).logits[0, -1].log_softmax(-1)
            token = (
                int(found_V.argmax())
                if body["temperature"] == 0
                else int(torch.multinomial(found_V.exp(), 1, generator=generator))
            )
            ids.append(token)
            logprobs.append(float(found_V[token]))
            if token in body.get("stop_token_ids", ()):
                reason = "stop"
                break
        scores = self._scores(prompt, body["prompt_logprobs"]) if body.get("prompt_logprobs") is not None else None
        return {
            "token_ids": ids, "prompt_token_ids": prompt, "logprobs": {"token_logprobs": logprobs},
            "finish_reason": reason, "prompt_logprobs": scores,
        }  # fmt: skip

    def _scores(self, prompt: list[int], k: int) -> list[Any]:
        logprobs_TV = self.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        found: list[Any] = [None]
        for position, token in enumerate(prompt[1:], start=1):
            before_V = logprobs_TV[position - 1]
            likely = before_V.topk(k).indices.tolist() if k else []
            entry = {str(one): {"logprob": max(-9999.0, float(before_V[one]))} for one in {*likely, token}}
            if self.stale and tuple(prompt[:16]) in self._cached and position < min(16, len(self._last_scores)):
                entry = {str(token): next(iter(self._last_scores[position].values()))}
            found.append(entry)
        self._cached.add(tuple(prompt[:16]))
        self._last_scores = found
        return found


class FakeLLM:
    """``vllm.LLM`` and its engine, as far as the kit uses them in its own process; see ``fake_module``."""

    stale = False
    """Scores as in vLLM issue 42019."""
    made: ClassVar[list[FakeLLM]] = []

    def __init__(self, model: str, *, max_model_len: int | None, **options: Any) -> None:
        self.calculator = FakeVLLM()
        self.calculator.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.calculator._last_scores, self.calculator._cached = [], set()
        self.calculator.stale = self.stale
        self.options = options
        self.llm_engine = self.engine_core = self
        self.model_config = SimpleNamespace(max_model_len=max_model_len or 1024)
        self.waiting: dict[str, tuple[list[int], SimpleNamespace]] = {}
        self.batches: list[int] = []
        self.closed = False
        self.made.append(self)

    def add_request(self, name: str, prompt: dict[str, Any], params: SimpleNamespace) -> None:
        self.waiting[name] = (prompt["prompt_token_ids"], params)

    def abort_request(self, names: list[str]) -> None:
        for name in names:
            del self.waiting[name]

    def step(self) -> list[Any]:
        waiting, self.waiting = self.waiting, {}
        return [self._output(name, prompt, params) for name, (prompt, params) in waiting.items()]

    def generate(self, prompts: list[dict[str, Any]], params: SimpleNamespace, *, use_tqdm: bool) -> list[Any]:
        self.batches.append(len(prompts))
        return [self._output("", prompt["prompt_token_ids"], params) for prompt in prompts]

    def _output(self, name: str, prompt: list[int], params: SimpleNamespace) -> Any:
        if len(prompt) + params.max_tokens > self.model_config.max_model_len:
            raise ValueError("too long")
        if (params.prompt_logprobs or 0) > self.options.get("max_logprobs", 20):
            raise ValueError("more log-probs than max_logprobs")
        choice = self.calculator._choice({"prompt": list(prompt), **vars(params)})
        pairs = zip(choice["token_ids"], choice["logprobs"]["token_logprobs"], strict=True)
        sampled = SimpleNamespace(
            token_ids=choice["token_ids"], finish_reason=choice["finish_reason"],
            logprobs=[{token: SimpleNamespace(logprob=logprob)} for token, logprob in pairs],
        )  # fmt: skip
        scores = choice["prompt_logprobs"] and [
            entry and {int(token): SimpleNamespace(logprob=one["logprob"]) for token, one in entry.items()}
            for entry in choice["prompt_logprobs"]
        ]
        return SimpleNamespace(
            request_id=name, finished=True, outputs=[sampled], prompt_token_ids=list(prompt), prompt_logprobs=scores
        )

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        if method != "reload_weights":
            raise ValueError(method)
        self.calculator.model.load_state_dict(dict(kwargs["weights_iterator"]))

    def reset_prefix_cache(self) -> bool:
        self.calculator._cached = set()
        return True

    def shutdown(self) -> None:
        self.closed = True


def fake_module() -> types.ModuleType:
    """Stands for the module ``vllm``: put it into ``sys.modules``."""
    module = types.ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    defaults = {"temperature": 1.0, "seed": 0, "stop_token_ids": (), "prompt_logprobs": None}
    module.LLM = FakeLLM  # type: ignore[attr-defined]
    module.TokensPrompt = dict  # type: ignore[attr-defined]
    module.SamplingParams = lambda **given: SimpleNamespace(**{**defaults, **given})  # type: ignore[attr-defined]
    FakeLLM.made, FakeLLM.stale = [], False
    return module
