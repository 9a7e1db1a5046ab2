"""The data file of a task as verl's own data set reads it, and the entry point that brings the plug-in into verl."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import datasets
import pytest

pytest.importorskip("verl", reason="needs verl: make test-verl")

from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import OmegaConf
from verl import trainer
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.utils.dataset.rl_dataset import RLHFDataset

from opd_env.engines.models import load_tokenizer
from opd_env.episode.env import ToolEnv
from opd_env.episode.limits import RolloutLimits
from opd_env.episode.play import EpisodePlay
from opd_env.episode.rollouts import rollout
from opd_env.formats import get_format
from opd_env.plugins.verl import EpisodeLoop
from opd_env.plugins.verl.examples import main
from opd_env.settings.fields import ConfigError, build
from opd_env.tasks import load_task
from tests.plugins.verl.verl_worker import CHAT, TASK, PolicyEngine, Server, play, verl_config

ROOT = Path(__file__).parents[3]


def written(folder: Path, *arguments: str) -> Path:
    file = folder / "data.parquet"
    assert main(["--task", "arithmetic", "--output", str(file), *arguments]) == 0
    return file


def read(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RLHFDataset:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    config = OmegaConf.create({"cache_dir": str(tmp_path), "max_prompt_length": 400, "filter_overlong_prompts": True})
    return RLHFDataset(str(file), load_tokenizer("packaged:student"), config)


def test_verls_data_set_reads_it_and_its_worker_plays_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--split", "test", "--validation", "true", "--task_options={levels: [1], seed: 3}"]
    data = read(written(tmp_path, *options), tmp_path, monkeypatch)
    task = load_task("arithmetic", "test", levels=[1], seed=3)
    assert [item["extra_info"]["id"] for item in data] == [example.id for example in task]
    assert [item["raw_prompt"] for item in data] == [list(example.messages) for example in task]
    batch = play(verl_config(tmp_path / "model"), Server(), [data[row] for row in range(5)])
    expected = rollout(task, PolicyEngine(), CHAT, indices=range(5)).trajectories
    for row, trajectory in enumerate(expected):
        start = trajectory.turns[0].start
        assert batch.batch["prompts"][row, -start:].tolist() == trajectory.token_ids[:start].tolist()


def test_the_longest_prompt_is_counted_with_its_tools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, "--task", TASK, "--model", "packaged:student")
    task, chat = load_task(TASK), get_format(load_tokenizer("packaged:student"))
    lengths = [EpisodePlay(ToolEnv(task), chat, index).recorder.context_length for index in range(len(task))]
    assert len({*lengths}) > 1
    assert f"the longest prompt has {max(lengths)} tokens" in capsys.readouterr().out


def test_a_split_to_measure_with_is_written_to_validate_on_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="for evaluation only"):
        written(tmp_path, "--split", "test")
    assert not (tmp_path / "data.parquet").exists()
    written(tmp_path, "--split", "test", "--validation", "true")


def test_a_wrong_option_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean .*split"):
        written(tmp_path, "--splt", "test")


def test_verl_takes_the_documented_run() -> None:
    page = (ROOT / "docs/verl.md").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^python -m verl.trainer.main_ppo (.*)$", page, re.MULTILINE)
    with initialize_config_dir(str(Path(trainer.__file__).parent / "config"), version_base=None):
        config = compose("ppo_trainer", overrides=shlex.split(command))
    validate_config(config, need_reference_policy(config), need_critic(config))
    assert not need_critic(config)
    distillation = omega_conf_to_dataclass(config.distillation)
    assert distillation.teacher_models["default"].num_replicas == 1
    assert distillation.distillation_loss.loss_settings.use_estimator
    (file,) = re.findall(r"^(- name: opd_env\n(?:  .*\n)+)", page, re.MULTILINE)
    (loop,) = OmegaConf.create(file)
    assert get_class(loop._target_) is EpisodeLoop
    build(RolloutLimits, {**loop.limits, "max_tokens": 3072})


@pytest.mark.slow
def test_verl_finds_the_plug_in_by_its_entry_point(tmp_path: Path) -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    information = tmp_path / "plugged-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1\n")
    lines = [f"{name} = {value}\n" for name, value in groups["verl.plugins"].items()]
    (information / "entry_points.txt").write_text("[verl.plugins]\n" + "".join(lines))
    program = (
        "from verl.experimental.agent_loop.agent_loop import _agent_loop_registry as loops\n"
        "from verl.trainer.distillation.losses import DISTILLATION_LOSS_REGISTRY as losses\n"
        "from verl.trainer.ppo.core_algos import get_adv_estimator_fn\n"
        "get_adv_estimator_fn('opd_plus_centred_jsd')\n"
        "print('opd_env' in loops and 'opd_plus_jsd' in losses)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=250)
    assert done.stdout.splitlines()[-1:] == ["True"], done.stderr
