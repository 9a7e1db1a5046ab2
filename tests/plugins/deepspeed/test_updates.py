"""Two processes under every stage of DeepSpeed's ZeRO take the updates of one plain process."""

import importlib.util
import json

import pytest
import torch
from accelerate import Accelerator

from opd_env.trainer.run.checkpoint import Checkpoints, restore
from tests.plugins.deepspeed import deepspeed_updates
from tests.plugins.deepspeed.deepspeed_updates import KINDS
from tests.trainer.learn.distributed_updates import TRAJECTORIES, train, updater_of
from tests.trainer.together import ends, together

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="needs deepspeed: make test-deepspeed"),
]


def updates_in_all(rank, folder, stage):
    deepspeed_updates.main(folder, stage)


def alone(kind):
    """What one process without DeepSpeed does: the updater, its first update and its last."""
    updater = updater_of(kind, Accelerator(cpu=True), dtype=torch.float32)
    first = train(updater, 1)
    if kind == "forgotten":
        updater.forget()
    return updater, first, train(updater, 4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_gives_the_weights_of_one_process(tmp_path, stage):
    """Micro-batches that differ in number between processes, clipped gradients, five updates in float32."""
    settings = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false"}
    with together(2, tmp_path, updates_in_all, tmp_path, stage, environment=settings) as lives:
        assert ends(lives, within=250) == [0, 0]
    found = json.loads((tmp_path / "found.json").read_text())
    for kind in KINDS:
        updater, first, last = alone(kind)
        one = found[kind]
        close = 2e-2 if kind == "bf16" else 1e-5
        assert one["tokens"] == last.num_tokens == sum(one.num_sampled for one in TRAJECTORIES)
        assert one["loss"] == pytest.approx(last.loss, rel=close), kind
        if kind != "continued":
            assert one["grad_norm"] == pytest.approx(first.grad_norm, rel=close), kind
        weights = torch.load(tmp_path / f"{kind}.pt")
        assert weights.keys() == updater.parameters.keys()
        for name, value in updater.parameters.items():
            # AdamW's first steps blow up the rounding of gradients near 0: of adapters, or twice in a run.
            apart = {"bf16": 5e-2, "lora": 1e-4, "forgotten": 1e-4}.get(kind, 1e-6)
            torch.testing.assert_close(weights[name], value, rtol=0, atol=apart, msg=lambda m, k=kind: f"{k}: {m}")
    # A checkpoint that ZeRO wrote continues without it.
    updater = updater_of("full", Accelerator(cpu=True), dtype=torch.float32, seed=99)
    assert restore(updater, Checkpoints(tmp_path / "checkpoints").newest()).updates == 2
    train(updater, 3)
    full = torch.load(tmp_path / "full.pt")
    for name, value in updater.parameters.items():
        torch.testing.assert_close(value, full[name], rtol=0, atol=1e-6, msg=name)
