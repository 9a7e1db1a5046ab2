"""Several processes: shared servers get each step's weights once, and an error of one process ends them all."""

import json
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from opd_env.configuration import ConfigError
from opd_env.models import load_model
from opd_env.trainer.processes import on_each
from opd_env.trainer.setup import make_accelerator
from tests.core.fake_vllm import FakeVLLM
from tests.trainer.test_distributed import launch, launcher_environment
from tests.trainer.test_loop import trainer_of
from tests.trainer.toy import toy_config

_CPU = {"ACCELERATE_USE_CPU": "true"}


def served_run(folder, url, **changes):
    settings = {"steps": 2, "estimator": "sampled", "episodes_per_step": 6, "learning_rate": 1e-4, **changes}
    return toy_config(folder, engine=url, **settings)


_RUN = """
import sys
from tests.trainer.distributed_updates import accelerator_of
from tests.trainer.test_loop import trainer_of
from tests.trainer.test_processes import served_run

accelerator_of(sys.argv[3])
trainer_of(served_run(sys.argv[1], sys.argv[2])).train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_on_shared_servers_learn_what_one_learns_with_one_reload_per_update(tmp_path, kind):
    script = tmp_path / "script.py"
    script.write_text(_RUN)
    sharding = {name: value for name, value in launcher_environment("fsdp2.yaml").items() if "FSDP" in name}
    with FakeVLLM() as server, FakeVLLM() as other:
        running = launch(2, script, tmp_path / "two", server.url, kind, environment={**sharding, **_CPU})
        trainer = trainer_of(served_run(tmp_path / "one", other.url))
        before = {name: value.detach().clone() for name, value in trainer.updater.parameters.items()}
        trainer.train()
        assert running.wait(timeout=200) == 0
        assert server.loads == other.loads == 4  # at the start, after the warm start, after each step
        asked = [sorted(json.dumps(body["prompt"]) for body in one.requests) for one in (server, other)]
        assert asked[0] == asked[1]
    model = load_model(str(tmp_path / "two" / "model")).model
    for name, value in model.named_parameters():
        # AdamW blows up the rounding of gradients near 0, in proportion to the learning rate.
        torch.testing.assert_close(value, trainer.updater.parameters[name], rtol=0, atol=1e-6, msg=name)
        assert (value - before[name]).abs().max() > 1e-4
    assert not list((tmp_path / "two" / "engine_weights").iterdir())


_FAILING = """
import os, sys, time
from pathlib import Path
from opd_env.trainer.checkpoint import Checkpoints
from tests.trainer.test_loop import trainer_of
from tests.trainer.toy import toy_config

folder, kind, rank = Path(sys.argv[1]), sys.argv[2], int(os.environ["RANK"])
trainer = trainer_of(toy_config(folder))
if kind == "save":
    Path(f"{folder}.file").touch()
    trainer.checkpoints = Checkpoints(Path(f"{folder}.file") / "checkpoints")
elif rank == 1:
    trainer.engine.submit = None
try:
    trainer.train()
except Exception as error:
    Path(f"{folder}.{rank}").write_text(f"{type(error).__name__}: {error}")
    while kind == "save" and not Path(f"{folder}.{1 - rank}").exists():
        time.sleep(0.05)
    raise
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["save", "alone"])
def test_an_error_of_one_process_ends_both_with_its_message(tmp_path, kind):
    """A checkpoint that cannot be written; an error in one rollout. Collectives time out in 30 minutes."""
    script, run = tmp_path / "script.py", tmp_path / "run"
    script.write_text(_FAILING)
    with launch(2, script, run, kind, environment=_CPU, stderr=subprocess.PIPE) as running:
        _, text = running.communicate(timeout=120)
    assert running.returncode != 0
    if kind == "save":
        assert b"CheckpointError: the checkpoint of step 1 cannot be written" in text
        assert (tmp_path / "run.0").read_text().startswith("CheckpointError: the checkpoint of step 1")
        told = (tmp_path / "run.1").read_text()
        assert told.startswith("TrainingError: the main process failed: CheckpointError: the checkpoint of step 1")
    else:
        assert b"'NoneType' object is not callable" in text


def test_what_each_process_does_is_known_to_all_and_so_is_an_error_of_one(monkeypatch):
    meet, outcomes = threading.Barrier(2), {}

    def gathered(mine):
        outcomes[threading.get_ident()] = mine
        meet.wait(10)
        found = [outcomes[one] for one in threads]
        meet.wait(10)
        return [one for theirs in found for one in theirs]

    def run(rank, fails):
        threads[rank] = threading.get_ident()
        meet.wait(10)
        try:
            return on_each(lambda: rank if rank not in fails else 1 // 0)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    monkeypatch.setattr("opd_env.trainer.processes.gather_object", gathered)
    threads = [0, 0]
    division = "ZeroDivisionError: integer division or modulo by zero"
    with ThreadPoolExecutor(2) as pool:
        for fails, expected in (
            ((), [[0, 1], [0, 1]]),
            ((1,), [f"TrainingError: process 1 failed: {division}", division]),
            ((0,), [division, f"TrainingError: the main process failed: {division}"]),
            ((0, 1), [division, division]),
        ):
            assert list(pool.map(run, (0, 1), (fails, fails))) == expected


def test_one_vllm_over_several_processes_is_refused_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 2)
    for settings in ({"engine": "vllm"}, {"teacher_engine": "vllm"}):
        config = toy_config(tmp_path / "run", estimator="sampled", **settings)
        make_accelerator(config)
        config = replace(config, vllm_options={"tensor_parallel_size": 2})
        with pytest.raises(ConfigError, match=r"tensor_parallel_size=2, but each training process has a vLLM of its"):
            make_accelerator(config)
