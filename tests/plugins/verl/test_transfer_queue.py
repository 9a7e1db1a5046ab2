"""verl's newer trainer, which takes episodes one by one from a queue: what it gets, and that a failure is told."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("verl", reason="needs verl: make test-verl")

from verl.trainer.ppo.v1 import agent_loop_tq
from verl.utils import tensordict_utils
from verl.utils.dataset.rl_dataset import collate_fn

from opd_env.plugins.verl.examples import example_rows
from tests.plugins.verl.verl_worker import TASK, Server, expected, verl_config

ROWS = [dict(row) for row in example_rows(TASK)[:4]]
ROWS[2]["extra_info"] = {**ROWS[2]["extra_info"], "version": "another"}


def test_finished_episodes_are_queued_and_a_failed_one_is_told(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    queued: dict[str, Any] = {}
    tags: dict[str, str] = {}

    async def put(key: str, partition_id: str, tag: dict[str, str]) -> None:
        tags[key] = tag["status"]

    async def put_batch(keys: list[str], fields: Any, tags: Any, partition_id: str) -> None:
        queued.update({key: fields[number] for number, key in enumerate(keys)})

    queue = SimpleNamespace(init=lambda: None, async_kv_put=put, async_kv_batch_put=put_batch)
    monkeypatch.setattr(agent_loop_tq, "tq", queue)
    worker_class = agent_loop_tq.AgentLoopWorkerTQ.__ray_metadata__.modified_class
    items = [{**row, "raw_prompt": row["prompt"], "index": row["extra_info"]["index"]} for row in ROWS]
    values = collate_fn(items) | {"uid": np.array([f"row{number}" for number in range(len(ROWS))], dtype=object)}
    batch = tensordict_utils.get_tensordict(values, {"global_steps": 1})
    config = verl_config(tmp_path, "actor_rollout_ref.rollout.n=2")

    async def run() -> None:
        worker = worker_class(config, Server())
        await worker.generate_sequences(batch)
        await asyncio.gather(*worker.background_tasks)

    asyncio.run(run())
    assert tags == {"row0": "finished", "row1": "finished", "row2": "failure", "row3": "finished"}
    assert {*queued} == {f"row{row}_{sample}_0" for row in (0, 1, 3) for sample in (0, 1)}
    for key, fields in queued.items():
        trajectory = expected(int(key[3]))
        start = trajectory.turns[0].start
        assert fields["input_ids"].tolist() == trajectory.token_ids.tolist()
        assert fields["responses"].tolist() == trajectory.token_ids[start:].tolist()
        assert fields["response_mask"].tolist() == fields["loss_mask"].tolist() == trajectory.sampled[start:].tolist()
        assert fields["rollout_log_probs"].tolist() == trajectory.logprobs[start:].tolist()
        assert fields["rm_scores"].tolist() == [0.0] * (len(trajectory.token_ids) - start - 1) + [trajectory.correct]
