"""Training with servers: the same loop, weights that follow every step, refusals before the first one."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opd_env.errors import UserError
from opd_env.evaluation.read_run import read_metrics
from opd_env.settings.fields import ConfigError
from opd_env.trainer.run.loop import OPDTrainer
from tests.engines.fake_vllm import FakeVLLM
from tests.tiny import tiny_llama
from tests.trainer.toy import loaded, toy_config

URL = "http://127.0.0.1:9"


def trainer(folder: Path, **changes: Any) -> OPDTrainer:
    config = toy_config(folder, **{"steps": 2, "estimator": "sampled", "learning_rate": 0.05, **changes})
    teacher = None if str(changes.get("teacher", "")).startswith("http") else loaded(2, "teacher", spread=0.3)
    return OPDTrainer(config, student=loaded(1, "student"), teacher=teacher, console=Console(file=StringIO()))


def served(seed: int, spread: float = 0.02) -> FakeVLLM:
    return FakeVLLM(lambda: tiny_llama(seed=seed, initializer_range=spread))


def test_student_and_teacher_behind_servers_train_on_policy_at_every_step(tmp_path: Path) -> None:
    with served(9) as student, served(2, 0.3) as teacher:  # the student's server begins with another model
        results = trainer(tmp_path / "run", engine=student.url, teacher=teacher.url).train()
        metrics = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/logprob_gap" in row]
        assert len(metrics) == 2
        assert all(row["train/logprob_gap"] < 1e-4 for row in metrics)
        assert student.loads == 4  # at the start, after the warm start, after each step
        assert {"before", "after", "teacher"} <= set(results)
    assert not list((tmp_path / "run" / "engine_weights").iterdir())


def test_a_served_teacher_teaches_what_the_same_local_one_does(tmp_path: Path) -> None:
    found = []
    with served(2, 0.3) as teacher:
        for name in ("teacher", teacher.url):
            one = trainer(tmp_path / name[-5:], teacher=name, steps=1)
            one.train()
            found.append(read_metrics(tmp_path / name[-5:] / "metrics.jsonl")[0])
    for name in ("teacher/kl", "train/loss", "train/grad_norm"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-3), name


def test_a_server_that_takes_no_weights_is_refused_with_the_setting_that_helps(tmp_path: Path) -> None:
    with served(1) as server:
        answer = server.post

        def post(handler: Any) -> None:
            if handler.path == "/collective_rpc":
                handler.rfile.read(int(handler.headers["Content-Length"]))
                handler.answer(404, {})
            else:
                answer(handler)

        server.post = post  # type: ignore[method-assign]
        with pytest.raises(UserError, match="VLLM_SERVER_DEV_MODE=1"):
            trainer(tmp_path / "run", engine=server.url).train()


def test_a_server_whose_new_weights_take_no_effect_is_refused(tmp_path: Path) -> None:
    with served(9) as server:
        post = server.post

        def unmoved(handler: Any) -> None:
            model = server.model
            post(handler)
            if handler.path == "/collective_rpc":
                server.model = model

        server.post = unmoved  # type: ignore[method-assign]
        server.make_model = lambda: tiny_llama(seed=9, initializer_range=0.3)
        server.model = server.make_model()
        with pytest.raises(UserError, match="those of the model here differ"):
            trainer(tmp_path / "run", engine=server.url).train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "vlm"}, "sampling.engine='vlm' is unknown"),
        ({"engine": URL, "temperature": 0.8}, "temperature=0.8"),
        ({"teacher": URL, "temperature": 0.8}, "temperature=0.8"),
        ({"engine": URL, "evaluation_temperature": 0.6}, "evaluation.temperature=0.6"),
        ({"teacher": URL, "estimator": "full"}, "estimator=full needs the teacher's logits"),
        ({"teacher": URL, "teacher_cache": "cache"}, "teacher.cache needs a teacher in this process"),
    ],
)
def test_what_servers_cannot_give_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        toy_config(tmp_path, **{"estimator": "sampled", **changes})


def test_a_teacher_with_too_short_a_context_is_refused(tmp_path: Path) -> None:
    with FakeVLLM(max_model_len=160) as server, pytest.raises(ConfigError, match="context of 160"):
        trainer(tmp_path / "run", teacher=server.url)


def test_a_server_that_gives_fewer_likely_tokens_than_asked_for_is_refused_at_the_start(tmp_path: Path) -> None:
    with served(2, 0.3) as teacher:
        with pytest.raises(ConfigError, match=r"does not give objective.topk_tokens=21 .*--max-logprobs 21"):
            trainer(tmp_path / "run", teacher=teacher.url, estimator="topk", topk_tokens=21)
        trainer(tmp_path / "run", teacher=teacher.url, estimator="topk", topk_tokens=20)
