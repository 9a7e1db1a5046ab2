"""verl's manager with workers in processes of their own, which have to find the agent loop by themselves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verl", reason="needs verl: make test-verl")

import ray
from ray import cloudpickle
from verl.experimental.agent_loop.agent_loop import AgentLoopManager

from opd_env.plugins.verl.examples import example_rows
from tests.plugins.verl import verl_worker
from tests.plugins.verl.verl_worker import Server, assert_same, batch_of, expected, verl_config

ROOT = str(Path(__file__).parents[3])


@pytest.mark.slow
def test_workers_in_processes_of_ray_play_the_kits_own_episodes(tmp_path: Any) -> None:
    variables = {"VERL_USE_EXTERNAL_MODULES": "opd_env.plugins.verl"}
    variables["PYTHONPATH"] = os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": variables}, object_store_memory=80_000_000)
    cloudpickle.register_pickle_by_value(verl_worker)  # the servers are no module that the processes could import
    try:
        config = verl_config(tmp_path, "actor_rollout_ref.rollout.agent.num_workers=2")
        manager = AgentLoopManager.create(config, llm_client=Server())
        batch = manager.generate_sequences(batch_of(example_rows("arithmetic")[:6]))
        for row in range(6):
            assert_same(batch, row, expected(row, task="arithmetic"))
        assert batch.meta_info["timing"]["agent_loop/num_preempted/max"] >= 1
    finally:
        cloudpickle.unregister_pickle_by_value(verl_worker)
        ray.shutdown()
