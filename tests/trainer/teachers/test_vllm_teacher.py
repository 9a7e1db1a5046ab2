"""vLLM in this process, as far as a fake one can tell: teachers that score in batches, engines that are probed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from opd_env.cli.play import run
from opd_env.engines.vllm import VLLMEngine
from opd_env.episode.limits import RolloutLimits
from opd_env.episode.store import load_trajectories
from opd_env.errors import UserError
from opd_env.evaluation.read_run import read_metrics
from opd_env.formats import get_format
from opd_env.settings.fields import ConfigError
from opd_env.trainer.run import loop
from opd_env.trainer.run.loop import OPDTrainer
from opd_env.trainer.teachers.base import LocalTeacher, TopKTeacher
from opd_env.trainer.teachers.served import VLLMTeacher
from tests.engines.fake_vllm import FakeLLM, fake_module
from tests.tiny import tiny_tokenizer
from tests.trainer.toy import loaded, made_trajectory, toy_config

CHAT = get_format(tiny_tokenizer())
EPISODES = [made_trajectory(seed, turns=turns) for seed, turns in enumerate([(3, 2), (4,), (1, 1, 5), (2, 2)])]


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeLLM]]:
    monkeypatch.setitem(sys.modules, "vllm", fake_module())
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    yield FakeLLM
    FakeLLM.made.clear()


def saved(folder: Path, seed: int, spread: float = 0.3) -> str:
    one = loaded(seed, spread=spread)
    one.model.save_pretrained(folder)
    one.tokenizer.save_pretrained(folder)
    return str(folder)


def teacher_of(name: str, prompt: Any = None, **options: Any) -> VLLMTeacher:
    engine = VLLMEngine(name, CHAT.stop_token_ids, CHAT.vocab_size, max_context=200, **options)
    return VLLMTeacher(engine, vocab_size=CHAT.vocab_size, prompt=prompt)


def test_scores_equal_those_of_transformers_and_a_step_is_one_batch(tmp_path: Path, vllm: type[FakeLLM]) -> None:
    teacher = teacher_of(saved(tmp_path, 5), max_logprobs=25)
    local = LocalTeacher(loaded(5, spread=0.3), vocab_size=CHAT.vocab_size)
    assert isinstance(teacher, TopKTeacher)
    torch.testing.assert_close(teacher.score(EPISODES), local.score(EPISODES), atol=1e-4, rtol=1e-4)
    ours, theirs = local.score_topk(EPISODES, 25), teacher.score_topk(EPISODES, 25)
    assert torch.equal(theirs.topk_ids_NK, ours.topk_ids_NK)
    torch.testing.assert_close(theirs.topk_logprobs_NK, ours.topk_logprobs_NK, atol=1e-4, rtol=1e-4)
    assert vllm.made[0].batches == [len(EPISODES)] * 2
    assert teacher.score([]).shape == (0,)
    assert teacher.score_topk([], 5).topk_ids_NK.shape == (0, 5)


def test_another_prompt_is_read_and_rows_without_a_sampled_token_are_left_out(tmp_path: Path) -> None:
    def prompt(trajectory: Any) -> list[list[int]]:
        return [[9, 8, 7, *trajectory.token_ids[:5].tolist()]]

    local = LocalTeacher(loaded(5, spread=0.3), vocab_size=CHAT.vocab_size, prompt=prompt)
    teacher = teacher_of(saved(tmp_path, 5), prompt)
    torch.testing.assert_close(teacher.score(EPISODES), local.score(EPISODES), atol=1e-4, rtol=1e-4)
    scores = teacher._engine.score([([1, 2, 3], []), ([1, 2, 3], [2])], 2)
    assert [one.topk_ids_NK.shape for one in scores] == [(0, 2), (1, 2)]


def test_a_row_that_leaves_no_room_for_the_token_that_vllm_samples_is_refused(tmp_path: Path) -> None:
    engine = teacher_of(saved(tmp_path, 5))._engine
    row = [1] * 200
    assert len(engine.score([(row, [198])])[0].logprobs_N) == 1  # what stands behind it is not sent
    with pytest.raises(UserError, match="has 200 tokens, but vLLM scores 199 at most"):
        engine.score([(row, [199])])


# In a run.


def trainer(folder: Path, given: Any = None, **changes: Any) -> OPDTrainer:
    config = toy_config(folder, **{"steps": 1, "estimator": "sampled", "learning_rate": 0.05, **changes})
    return OPDTrainer(config, student=loaded(1, "student"), teacher=given, console=Console(file=StringIO()))


def test_vllm_is_closed_before_the_group_of_processes_that_it_shares_is_left(
    tmp_path: Path, vllm: type[FakeLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[list[bool]] = []
    monkeypatch.setattr(loop, "leave", lambda accelerator: left.append([one.closed for one in vllm.made]))
    name = saved(tmp_path / "teacher", 2)
    route = saved(tmp_path / "route", 7)
    run = trainer(tmp_path / "run", teacher=name, teacher_engine="vllm", teacher_routes={"toy_sums": route})
    run.train()
    again = trainer(tmp_path / "again", teacher=name, teacher_engine="vllm")
    monkeypatch.setattr(again, "_learn", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        again.train()
    assert left == [[True] * 2, [True] * 3]


@pytest.mark.parametrize("settings", [{}, {"estimator": "topk", "topk_tokens": 30}])
def test_a_teacher_in_vllm_teaches_what_the_same_local_one_does(
    tmp_path: Path, vllm: type[FakeLLM], settings: dict[str, Any]
) -> None:
    name, found = saved(tmp_path / "teacher", 2), []
    for engine in ("local", "vllm"):
        folder = tmp_path / engine
        options = {"enforce_eager": True}
        results = trainer(folder, teacher=name, teacher_engine=engine, vllm_options=options, **settings).train()
        found.append(read_metrics(folder / "metrics.jsonl")[0] | {"teacher": results["teacher"]["accuracy"]})
    for metric in ("teacher/kl", "train/loss", "train/grad_norm", "teacher"):
        assert found[0][metric] == pytest.approx(found[1][metric], rel=1e-3), metric
    (one,) = vllm.made
    assert one.options["enforce_eager"] is True
    assert one.model_config.max_model_len == 161


def test_student_and_teacher_in_vllm_and_weights_that_follow(tmp_path: Path, vllm: type[FakeLLM]) -> None:
    names = {"student": saved(tmp_path / "student", 9), "teacher": saved(tmp_path / "teacher", 2)}
    folder = tmp_path / "run"
    config = toy_config(folder, steps=2, estimator="sampled", engine="vllm", teacher_engine="vllm", **names)
    OPDTrainer(config, console=Console(file=StringIO())).train()
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "train/logprob_gap" in row]
    assert len(rows) == 2
    assert all(row["train/logprob_gap"] < 1e-4 for row in rows)
    assert [one.closed for one in vllm.made] == [True, True]


def test_stale_scores_in_this_process_are_found_out_before_the_first_step(tmp_path: Path, vllm: type[FakeLLM]) -> None:
    vllm.stale = True
    name = saved(tmp_path / "teacher", 2)
    with pytest.raises(UserError, match=r"vLLM in this process would bias training: scores of the same tokens.*42019"):
        trainer(tmp_path / "run", teacher=name, teacher_engine="vllm")


def test_a_teacher_of_another_tokenizer_or_too_short_a_context_is_refused_before_vllm_starts(
    tmp_path: Path, vllm: type[FakeLLM]
) -> None:
    other = loaded(2, spread=0.3)
    other.model.save_pretrained(tmp_path / "other")
    tiny_tokenizer(tags_are_tokens=False).save_pretrained(tmp_path / "other")
    for name, limits, message in (
        (
            str(tmp_path / "other"),
            RolloutLimits(max_turn_tokens=8, max_tokens=160),
            "the student's token '<tool_call>'",
        ),
        (saved(tmp_path / "fits", 2), RolloutLimits(max_tokens=1024), "reads 1024 tokens at most"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path / "run", teacher=name, teacher_engine="vllm", limits=limits)
    assert not vllm.made


def test_a_loaded_model_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="loads the teacher by its name"):
        trainer(tmp_path, loaded(2, "teacher"), teacher_engine="vllm")


def test_a_vllm_beside_others_takes_over_their_group_and_one_alone_does_not(
    tmp_path: Path, vllm: type[FakeLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = saved(tmp_path, 5)
    teacher_of(name)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    teacher_of(name)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    teacher_of(name)
    backends = [one.options.get("distributed_executor_backend") for one in vllm.made]
    assert backends == [None, None, "external_launcher"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimator": "full"}, "estimator=full needs the teacher's logits, and vLLM gives"),
        ({"temperature": 0.8}, "temperature=0.8"),
        ({"evaluation_temperature": 0.6}, "evaluation.temperature=0.6"),
        ({"teacher_cache": "cache"}, "teacher.cache needs a teacher in this process that transformers runs"),
        ({"cross_tokenizer": True}, "cross_tokenizer needs a teacher in this process that transformers runs"),
        ({"teacher_offload": True}, "teacher.offload is for teachers of teacher.engine=local"),
        (
            {"teacher_mixture": {"teacher": 0.5, "b": 0.5}, "estimator": "topk"},
            "estimator=topk needs the whole distribution",
        ),
        (
            {"engine": "vllm", "rollout_ahead": True, "ratio_policy": "current"},
            "two vLLM at once in one process",
        ),
        ({"teacher_engine": "vlm"}, "teacher.engine"),
    ],
)
def test_what_vllm_cannot_do_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        toy_config(tmp_path, **{"estimator": "sampled", "teacher_engine": "vllm", **changes})


# Evaluation.


def test_an_evaluation_by_vllm_equals_the_local_one(
    tmp_path: Path, vllm: type[FakeLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    name = saved(tmp_path / "model", 5)
    played = []
    for engine in ("local", "vllm"):
        arguments = ["--model", name, "--task", "toy_sums", "--problems", "4", "--engine", engine]
        arguments += ["--limits.max_turn_tokens", "8", "--limits.max_tokens", "160", "--output", str(tmp_path / engine)]
        assert run("eval", arguments) == 0
        (file,) = (tmp_path / engine).glob("*/*/trajectories.parquet")
        played.append([one.token_ids.tolist() for one in load_trajectories(file)])
    assert played[0] == played[1]
    assert len(vllm.made) == 1
    assert "toy_sums" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="engine='vlm' is unknown"):
        run("eval", ["--model", name, "--task", "toy_sums", "--engine", "vlm"])
