"""Whole runs of the command line with the weights shared out: killed, continued, and as good as one process's."""

import importlib.util
import signal
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import opd_env.trainer
import opd_env.trainer.run.config
from opd_env.cli import main
from opd_env.trainer.run.learner import read_metrics
from opd_env.trainer.run.loop import OPDTrainer
from tests.trainer.learn.distributed_updates import accelerator_of
from tests.trainer.run.test_loop import trainer_of
from tests.trainer.together import ends, together
from tests.trainer.toy import loaded, toy_config

needs_deepspeed = pytest.mark.skipif(
    not importlib.util.find_spec("deepspeed"), reason="needs deepspeed: make test-deepspeed"
)


def small_run(folder):
    return toy_config(folder, steps=4, episodes_per_step=6, learning_rate=1e-4)


def work(rank, folder, kind):
    """``opd-env train`` with tiny models under a kind of parallelism that ``accelerate`` prepares for GPUs only."""
    if kind == "fsdp2":
        accelerator_of("fsdp2")
    else:
        from tests.plugins.deepspeed import deepspeed_updates

        deepspeed_updates.accelerator_of(int(kind[-1]))
    models = {"student": loaded(1, "student"), "teacher": loaded(2, "teacher", spread=0.3)}
    opd_env.trainer.run.config.load_config = lambda _: small_run(folder)
    opd_env.trainer.OPDTrainer = lambda config: OPDTrainer(config, **models)
    return main(["train"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["fsdp2", pytest.param("zero2", marks=needs_deepspeed), pytest.param("zero3", marks=needs_deepspeed)]
)
def test_a_sharded_run_that_was_killed_gives_the_model_of_one_process_and_transformers_loads_it(
    tmp_path, sharding, kind
):
    run = tmp_path / "run"
    variables = sharding if kind == "fsdp2" else {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false"}
    with together(2, tmp_path / "killed", work, run, kind, environment=variables) as lives:
        deadline = time.monotonic() + 200
        while len(read_metrics(run / "metrics.jsonl")) < 2:
            assert time.monotonic() < deadline, lives[0].text()
            time.sleep(0.005)
        lives[1].signal(signal.SIGKILL)
        assert ends(lives, within=30)[0] == 2
    with together(2, tmp_path / "continued", work, run, kind, environment=variables) as lives:
        assert ends(lives, within=200) == [0, 0], lives[0].text()
        assert "continuing after step" in lives[0].text()
    trainer = trainer_of(small_run(tmp_path / "one"))
    trainer.train()
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert len(AutoTokenizer.from_pretrained(run / "model")) <= model.config.vocab_size
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, trainer.updater.parameters[name], rtol=0, atol=1e-6, msg=name)
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row] == [1, 2, 3, 4]
