"""A real vLLM on this machine: in process and as a server. Run by ``make test-vllm``; elsewhere skipped."""

from __future__ import annotations

import importlib.util
import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from opd_env.cli.play import run
from opd_env.engines.base import Engine
from opd_env.engines.models import PACKAGED, load_model
from opd_env.engines.probe import probe_servers, probe_vllm
from opd_env.engines.servers.client import HttpClient
from opd_env.engines.servers.engine import HttpEngine
from opd_env.engines.servers.protocol import score_tokens, served_model
from opd_env.episode.limits import RolloutLimits
from opd_env.episode.rollouts import RolloutResult, rollout
from opd_env.episode.store import load_trajectories
from opd_env.errors import UserError
from opd_env.evaluation.read_run import read_metrics
from opd_env.formats import get_format
from opd_env.tasks import load_task
from opd_env.trainer.run.loop import OPDTrainer
from tests.engines.vllm_server import Server
from tests.trainer.settings import changed_by, config_of

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; run make test-vllm"),
]
TOLERANCE = 1e-3
"""Nats. Both compute in float32; other orders of summation."""
OPTIONS = {"enforce_eager": True, "block_size": 32}
"""Blocks so short that prompts are found in the prefix cache, which must not outlive the weights."""


@pytest.fixture(scope="module")
def student() -> Any:
    return load_model("packaged:student")


def play(engine: Engine, chat: Any, seed: int = 1) -> RolloutResult:
    limits = RolloutLimits(max_turns=4, max_turn_tokens=64, max_tokens=400)
    result = rollout(load_task("arithmetic"), engine, chat, indices=range(8), limits=limits, seed=seed)
    assert not result.errors
    assert len(result.trajectories) == 8
    return result


def gap(model: Any, result: RolloutResult) -> float:
    """Largest difference of recorded and recomputed log-probs of sampled tokens."""
    found = 0.0
    for one in result.trajectories:
        with torch.no_grad():
            logprobs_TV = model(torch.from_numpy(one.token_ids)[None].long()).logits[0].log_softmax(-1)
        for place in np.flatnonzero(one.sampled):
            found = max(found, abs(float(logprobs_TV[place - 1, one.token_ids[place]]) - float(one.logprobs[place])))
    return found


def rows_of(result: RolloutResult) -> list[tuple[list[int], list[int]]]:
    """Token ids and the places of the sampled ones."""
    return [(one.token_ids.tolist(), np.flatnonzero(one.sampled).tolist()) for one in result.trajectories]


def moved(model: Any) -> Any:
    """The same model a large step later."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def test_in_process_samples_scores_and_takes_new_weights(student: Any) -> None:
    from opd_env.engines.vllm import VLLMEngine

    chat = get_format(student.tokenizer)
    engine = VLLMEngine(
        str(PACKAGED / "student"), chat.stop_token_ids, chat.vocab_size, capacity=8, max_context=512, **OPTIONS
    )
    probe_vllm(engine, chat, student.model)
    with pytest.raises(UserError, match="its log-probs and those of the model here differ"):
        probe_vllm(engine, chat, moved(load_model("packaged:student").model))
    first = play(engine, chat)
    assert gap(student.model, first) < TOLERANCE
    again = play(engine, chat)
    assert [one.token_ids.tolist() for one in first.trajectories] == [
        one.token_ids.tolist() for one in again.trajectories
    ]
    rows = rows_of(first)
    for one, scores in zip(first.trajectories, engine.score(rows, k=3), strict=True):
        np.testing.assert_allclose(scores.logprobs_N, one.logprobs[one.sampled], atol=TOLERANCE)
        assert scores.topk_ids_NK.shape == (one.num_sampled, 3)
    # Rows that share their beginning, in every company: a buffer that is not cleared would show another's values.
    in_order = [engine.score([row])[0].logprobs_N for row in rows]
    for shown in (engine.score(rows[::-1])[::-1], engine.score(rows + rows)[: len(rows)]):
        for alone, scores in zip(in_order, shown, strict=True):
            np.testing.assert_allclose(scores.logprobs_N, alone, atol=TOLERANCE)
    new = moved(load_model("packaged:student").model)
    engine.update_weights(new)
    after = play(engine, chat)
    assert gap(new, after) < TOLERANCE
    assert gap(student.model, after) > 0.1
    for one, scores in zip(after.trajectories, engine.score(rows_of(after)), strict=True):
        np.testing.assert_allclose(scores.logprobs_N, one.logprobs[one.sampled], atol=TOLERANCE)
    engine.close()


def test_student_and_teacher_in_this_process_learn_what_they_do_with_transformers(tmp_path: Path) -> None:
    found = []
    for engine in ("local", "vllm"):
        config = config_of(
            student="packaged:student", teacher="packaged:teacher", task="arithmetic", steps=2, episodes_per_step=8,
            estimator="topk", topk_tokens=24, engine=engine, teacher_engine=engine, evaluation_problems=4, trackers=(),
            vllm_options=OPTIONS, concurrent_episodes=8, output=str(tmp_path / engine),
            limits=RolloutLimits(max_turns=4, max_turn_tokens=64, max_tokens=400),
        )  # fmt: skip
        results = OPDTrainer(config, console=Console(file=StringIO())).train()
        found.append((results, read_metrics(tmp_path / engine / "metrics.jsonl")))
    (local, _), (results, rows) = found
    assert [row["train/logprob_gap"] < TOLERANCE for row in rows] == [True, True]
    assert results["before"]["accuracy"] == local["before"]["accuracy"]  # greedy
    assert results["teacher"]["accuracy"] == local["teacher"]["accuracy"]
    # The episodes that vLLM sampled, scored by transformers.
    trainer = OPDTrainer(
        changed_by(config, engine="local", teacher_engine="local", output=str(tmp_path / "check")),
        console=Console(file=StringIO()),
    )
    played = load_trajectories(next((tmp_path / "vllm" / "trajectories").glob("step_00000001*")))[:]
    trainer.learner.objective.begin(played)
    trainer.updater.update(trainer.learner.objective.rows, trainer.learner.objective, 0.0)
    assert float(trainer.learner.objective.tokens.kl_N.mean()) == pytest.approx(rows[0]["teacher/kl"], abs=TOLERANCE)


def test_an_evaluation_by_vllm_equals_the_local_one(tmp_path: Path) -> None:
    played = []
    for engine in ("local", "vllm"):
        output = tmp_path / engine
        arguments = ["--model", "packaged:teacher", "--task", "arithmetic", "--problems", "8", "--engine", engine]
        arguments += ["--vllm_options", json.dumps(OPTIONS), "--limits.max_tokens", "500", "--output", str(output)]
        assert run("eval", arguments) == 0
        stored = load_trajectories(next(output.glob("*/*/*.parquet")))
        played.append({one.example_id: one.token_ids.tolist() for one in stored})
    assert played[0] == played[1]


def test_a_server_passes_the_probe_and_samples_scores_and_takes_new_weights(
    vllm_server: Server, student: Any, tmp_path: Path
) -> None:
    chat = get_format(student.tokenizer)
    client = HttpClient([vllm_server.url], tries=20, patience_s=500)
    probe_servers(client, chat, student.model)
    engine = HttpEngine(client, chat.stop_token_ids, chat.vocab_size, tmp_path)
    first = play(engine, chat)
    assert gap(student.model, first) < TOLERANCE
    for one in first.trajectories:
        places = np.flatnonzero(one.sampled).tolist()
        scores = score_tokens(client, served_model(client), one.token_ids.tolist(), places, k=20)
        np.testing.assert_allclose(scores.logprobs_N, one.logprobs[places], atol=TOLERANCE)
        assert scores.topk_ids_NK.shape == (len(places), 20)
    new = moved(load_model("packaged:student").model)
    engine.update_weights(new)
    probe_servers(client, chat, new)
    assert gap(new, play(engine, chat)) < TOLERANCE
    # Killed and started again it has its first weights, and must get the new ones before it samples.
    vllm_server.kill()
    vllm_server.start()
    assert gap(new, play(engine, chat, seed=2)) < TOLERANCE
    engine.close()
