"""Any number of processes, whole or sharded weights, kept or recomputed activations: the same update."""

import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin

from opd_env.engines.models import load_model
from opd_env.evaluation.read_run import read_metrics
from opd_env.settings.fields import ConfigError
from opd_env.trainer.run.checkpoint import Checkpoints, restore
from opd_env.trainer.run.setup import make_accelerator
from tests.trainer.learn import distributed_updates
from tests.trainer.learn.distributed_updates import KINDS, TRAJECTORIES, accelerator_of, train, updater_of
from tests.trainer.run.test_loop import trainer_of
from tests.trainer.together import CONFIGS, ends, launcher_environment, together
from tests.trainer.toy import toy_config

ROOT = Path(__file__).parents[3]


def updates_in_all(rank, folder):
    distributed_updates.main(folder)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_every_kind_of_parallelism_gives_the_weights_of_one_process(tmp_path, sharding, processes):
    """Seven episodes in different numbers of micro-batches on every process, five updates: equal to 1e-9."""
    with together(processes, tmp_path, updates_in_all, tmp_path, environment=sharding) as lives:
        alone = {}
        for kind in KINDS:
            updater = updater_of(kind, Accelerator(cpu=True))
            alone[kind] = train(updater, 5), updater.parameters
        assert ends(lives, within=250) == [0] * processes
    found = json.loads((tmp_path / "found.json").read_text())
    for kind, (update, parameters) in alone.items():
        assert found[kind]["tokens"] == update.num_tokens == sum(one.num_sampled for one in TRAJECTORIES)
        assert found[kind]["loss"] == pytest.approx(update.loss, rel=1e-6), kind
        assert found[kind]["grad_norm"] == pytest.approx(update.grad_norm, rel=1e-6), kind
        assert found[kind]["shards"] == (["DTensor"] if "fsdp2" in kind else ["Parameter"])
        weights = torch.load(tmp_path / f"{kind}.pt")
        assert weights.keys() == parameters.keys()
        for name, value in parameters.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-9, atol=1e-10, msg=f"{kind} {name}")
    for one, other in (("ddp", "ddp-recomputed"), ("fsdp2", "fsdp2-recomputed")):
        assert found[one] == found[other]
    # A checkpoint of sharded weights continues on any number of processes.
    updater = updater_of("ddp", Accelerator(cpu=True), seed=99)
    assert restore(updater, Checkpoints(tmp_path / "checkpoints").newest()).updates == 2
    train(updater, 3)
    for name, value in updater.parameters.items():
        torch.testing.assert_close(value, alone["ddp"][1][name], rtol=1e-9, atol=1e-10, msg=name)


def test_the_shipped_fsdp2_configuration_shards_and_keeps_full_precision(sharding, monkeypatch):
    for name, value in sharding.items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is False
    assert plugin.activation_checkpointing is False
    assert plugin.mixed_precision_policy is None
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_accelerate_understands_every_shipped_configuration(name):
    environment = launcher_environment(name)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"


def test_recomputing_layers_changes_no_bit_of_the_update_and_really_happens():
    weights, passes = [], []
    for kind in ("ddp", "ddp-recomputed"):
        updater = updater_of(kind, Accelerator(cpu=True))
        seen = []
        updater.parallel.policy.model.model.layers[0].mlp.register_forward_pre_hook(
            lambda *_, seen=seen: seen.append(1)
        )
        train(updater, 3)
        passes.append(len(seen))
        weights.append({name: value.detach().clone() for name, value in updater.parameters.items()})
    assert passes[1] == 2 * passes[0]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not any(module.training for module in updater.parallel.policy.modules())


def test_bf16_computes_in_bf16_and_keeps_the_weights_in_float32():
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        updater = updater_of("ddp", Accelerator(cpu=True, mixed_precision="bf16"))
        updater.parallel.policy.float()
        update = train(updater, 1)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert {value.dtype for value in updater.parameters.values()} == {torch.float32}
    reference = train(updater_of("ddp", Accelerator(cpu=True)), 1)
    assert update.loss == pytest.approx(reference.loss, rel=1e-2)
    assert abs(update.loss - reference.loss) > 1e-6


def run_in_two(rank, folder, kind, changes):
    accelerator_of(kind)
    trainer_of(small_run(folder, **changes)).train()


def small_run(folder, **changes):
    return toy_config(
        folder, estimator="sampled", updates_per_step=2, episodes_per_step=6, evaluation_every=2, **changes
    )


def steps_of(folder):
    return [row for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row]


_AHEAD = {"rollout_ahead": True, "ratio_policy": "current", "learning_rate": 1e-4}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes", "apart"),
    [("ddp", {}, 5e-6), ("fsdp2", {}, 5e-6), ("ddp", _AHEAD, 1e-6), ("fsdp2", _AHEAD, 1e-6)],
)
def test_a_run_on_two_processes_learns_what_one_learns(tmp_path, sharding, kind, changes, apart):
    """Rollouts, in turn with training or one step ahead, teacher scores, two updates per step, evaluations, a model."""
    two, one = tmp_path / "two", tmp_path / "one"
    with together(2, tmp_path, run_in_two, two, kind, changes, environment=sharding) as lives:
        trainer = trainer_of(small_run(one, **changes))
        trainer.train()
        assert ends(lives, within=240) == [0, 0]
    model = load_model(str(two / "model")).model
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, trainer.updater.parameters[name], rtol=0, atol=apart, msg=name)
    for left, right in zip(steps_of(one), steps_of(two), strict=True):
        for name in ("teacher/kl", "train/loss", "train/grad_norm", "rollout/sampled_tokens"):
            assert left[name] == pytest.approx(right[name], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"distributed_type": "FSDP", "is_fsdp2": False}, "set up for FSDP1, which does not fit"),
        ({"mixed_precision": "fp16"}, "mixed precision fp16; expected no or bf16"),
        ({"zero_stage": 0}, "zero_stage=0; expected 1, 2 or 3"),
        ({"zero3_init_flag": True}, "zero3_init_flag .* set it to false"),
        ({"offload_optimizer_device": "cpu"}, "offloading to cpu is not supported"),
    ],
)
def test_what_accelerate_cannot_do_right_here_is_refused(tmp_path, monkeypatch, changes, reason):
    plugin = {"zero_stage": 3, "zero3_init_flag": False, "offload_optimizer_device": "none"}
    plugin |= {"offload_param_device": "none"}
    made = {"distributed_type": "DEEPSPEED", "is_fsdp2": False, "mixed_precision": "no", "num_processes": 2}
    plugin, made = ({name: changes.get(name, value) for name, value in one.items()} for one in (plugin, made))
    made = SimpleNamespace(**made, state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(**plugin)))
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: made)
    with pytest.raises(ConfigError, match=reason):
        make_accelerator(toy_config(tmp_path / "run"))


def stopped(rank, folder):
    try:
        trainer_of(small_run(folder, steps=200)).train()
    except KeyboardInterrupt:
        return 130


def test_ctrl_c_stops_all_processes_at_the_same_step_with_a_checkpoint(tmp_path):
    """The signal reaches one process in its rollout and the other in its update: neither waits for ever."""
    run = tmp_path / "run"
    with together(2, tmp_path, stopped, run) as lives:
        deadline = time.monotonic() + 150
        while not (run / "metrics.jsonl").exists() or len(steps_of(run)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for life in lives:
            life.signal(signal.SIGINT)
            time.sleep(0.05)
        assert ends(lives, within=100) == [130, 130]
    assert Checkpoints(run / "checkpoints").newest().step == steps_of(run)[-1]["step"] < 200
