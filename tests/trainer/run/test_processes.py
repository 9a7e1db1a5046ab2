"""Several processes: shared servers get each step's weights once, and what one does is known to all."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from opd_env.engines.models import load_model
from opd_env.settings.fields import ConfigError
from opd_env.trainer.run.processes import on_each
from opd_env.trainer.run.setup import make_accelerator
from tests.engines.fake_vllm import FakeVLLM
from tests.trainer.learn.distributed_updates import accelerator_of
from tests.trainer.run.test_loop import trainer_of
from tests.trainer.settings import changed_by
from tests.trainer.together import ends, together
from tests.trainer.toy import toy_config


def served_run(folder, url, **changes):
    settings = {"steps": 2, "estimator": "sampled", "episodes_per_step": 6, "learning_rate": 1e-4, **changes}
    return toy_config(folder, engine=url, **settings)


def served_in_two(rank, folder, url, kind):
    accelerator_of(kind)
    trainer_of(served_run(folder, url)).train()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_on_shared_servers_learn_what_one_learns_with_one_reload_per_update(tmp_path, kind, sharding):
    with FakeVLLM() as server, FakeVLLM() as other:
        with together(2, tmp_path, served_in_two, tmp_path / "two", server.url, kind, environment=sharding) as lives:
            trainer = trainer_of(served_run(tmp_path / "one", other.url))
            before = {name: value.detach().clone() for name, value in trainer.updater.parameters.items()}
            trainer.train()
            assert ends(lives, within=200) == [0, 0]
        assert server.loads == other.loads == 4  # at the start, after the warm start, after each step
        asked = [sorted(json.dumps(body["prompt"]) for body in one.requests) for one in (server, other)]
        assert asked[0] == asked[1]
    model = load_model(str(tmp_path / "two" / "model")).model
    for name, value in model.named_parameters():
        # AdamW blows up the rounding of gradients near 0, in proportion to the learning rate.
        torch.testing.assert_close(value, trainer.updater.parameters[name], rtol=0, atol=1e-6, msg=name)
        assert (value - before[name]).abs().max() > 1e-4
    assert not list((tmp_path / "two" / "engine_weights").iterdir())


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

    monkeypatch.setattr("opd_env.trainer.run.processes.gather_object", gathered)
    threads = [0, 0]
    division = "ZeroDivisionError: integer division or modulo by zero"
    with ThreadPoolExecutor(2) as pool:
        for fails, expected in (
            ((), [[0, 1], [0, 1]]),
            ((1,), [f"AnotherFailed: process 1 failed: {division}", division]),
            ((0,), [division, f"AnotherFailed: the main process failed: {division}"]),
            ((0, 1), [division, division]),
        ):
            assert list(pool.map(run, (0, 1), (fails, fails))) == expected


def test_one_vllm_over_several_processes_is_refused_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 2)
    for settings in ({"engine": "vllm"}, {"teacher_engine": "vllm"}):
        config = toy_config(tmp_path / "run", estimator="sampled", **settings)
        make_accelerator(config)
        config = changed_by(config, vllm_options={"tensor_parallel_size": 2})
        with pytest.raises(ConfigError, match=r"tensor_parallel_size=2, but each training process has a vLLM of its"):
            make_accelerator(config)


def test_processes_that_accelerate_takes_for_runs_of_their_own_are_refused(tmp_path, monkeypatch):
    """``torchrun`` on a CPU, unless accelerate is told: each would write into the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    make_accelerator(toy_config(tmp_path / "run"))  # by itself it tells nothing of processes on this machine
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ConfigError, match=r"2 processes were started, but accelerate takes each .*USE_CPU=true"):
        make_accelerator(toy_config(tmp_path / "run"))
