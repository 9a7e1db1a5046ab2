"""A real vLLM server of the packaged student: started, waited for, killed. Needs vLLM."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from opd_env.engines.models import PACKAGED
from opd_env.engines.servers.client import HttpClient
from tests.ports import kept_port


class Server:
    """``vllm serve`` of the packaged student."""

    def __init__(self, log: Path) -> None:
        self._kept = contextlib.ExitStack()
        self.port = self._kept.enter_context(kept_port())
        self.url, self.log = f"http://127.0.0.1:{self.port}", log

    def start(self) -> None:
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(PACKAGED / "student"),
            "--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(self.port),
            "--max-model-len", "512", "--block-size", "32",
        ]  # fmt: skip
        environment = os.environ | {
            "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }  # fmt: skip
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def wait(self) -> None:
        client = HttpClient([self.url])
        for _ in range(600):
            if self.process.poll() is not None:
                break
            try:
                client.ask(self.url, "/health", timeout_s=2)
            except Exception:
                time.sleep(0.5)
            else:
                return
        raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
