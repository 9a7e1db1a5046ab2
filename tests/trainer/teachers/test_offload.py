"""Offloaded teachers: weights rest in CPU memory, are on the accelerator while they are read, one teacher at a time."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from opd_env.errors import TrainingError
from opd_env.evaluation.read_run import read_metrics
from opd_env.trainer.run.loop import OPDTrainer
from opd_env.trainer.teachers import base
from opd_env.trainer.teachers.base import LocalTeacher, on_device
from opd_env.trainer.teachers.many import LocalMixture
from tests.tiny import tiny_tokenizer
from tests.trainer.toy import loaded, made_trajectory, toy_config

TOKENS = len(tiny_tokenizer())
EPISODES = [made_trajectory(seed, prompt=3 + seed, turns=(1 + seed, 2)) for seed in range(4)]
CPU = torch.device("cpu")


class Accelerator:
    """Stands for a device: copies are noted, and what rests outside it is NaN, so that any use of that shows."""

    def __init__(self) -> None:
        self.true: dict[int, Tensor] = {}
        self.moves: list[str] = []
        self.names: dict[int, str] = {}

    def hold(self, module: torch.nn.Module, name: str) -> None:
        for tensor in base._tensors(module):
            resting = tensor.data
            tensor.data = torch.full_like(resting, torch.nan)
            self.true[tensor.data.data_ptr()] = resting
            self.names[tensor.data.data_ptr()] = name

    def copied(self, data: Tensor, device: torch.device) -> Tensor:
        if data.data_ptr() not in self.true:
            return data  # it is there already
        if not self.moves or self.moves[-1] != self.names[data.data_ptr()]:
            self.moves.append(self.names[data.data_ptr()])
        return self.true[data.data_ptr()].clone()


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    one = Accelerator()
    monkeypatch.setattr(base, "_copied", one.copied)
    return one


def resting(teacher: LocalTeacher) -> bool:
    return all(bool(tensor.isnan().all()) for tensor in base._tensors(teacher.loaded.model))


def make(seed: int, **config: Any) -> LocalTeacher:
    return LocalTeacher(loaded(seed, f"t{seed}", spread=0.5, **config), vocab_size=TOKENS, tokens_per_microbatch=20)


@pytest.mark.parametrize("tied", [False, True])
def test_scores_are_the_same_and_weights_move_once_for_all_micro_batches(accelerator: Accelerator, tied: bool) -> None:
    teacher = make(5, tie_word_embeddings=tied)
    expected_N, expected = teacher.score(EPISODES), teacher.score_topk(EPISODES, 4)
    accelerator.hold(teacher.loaded.model, "t5")
    assert torch.equal(teacher.score(EPISODES), expected_N)
    assert torch.equal(teacher.score_topk(EPISODES, 4).topk_logprobs_NK, expected.topk_logprobs_NK)
    assert resting(teacher)


def test_copies_of_one_phase_are_as_many_as_the_weights(accelerator: Accelerator, monkeypatch: Any) -> None:
    teacher = make(5)
    accelerator.hold(teacher.loaded.model, "t5")
    copies: list[int] = []
    monkeypatch.setattr(
        base, "_copied", lambda data, device: copies.append(data.data_ptr()) or accelerator.copied(data, device)
    )
    teacher.score(EPISODES)
    tensors = len(base._tensors(teacher.loaded.model))
    assert len(copies) == tensors + 1  # all, for the hidden states; then the head again, for the logits


def test_an_error_leaves_the_weights_where_they_rest(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = make(5)
    accelerator.hold(teacher.loaded.model, "t5")
    with pytest.raises(IndexError), teacher.head():
        raise IndexError
    assert resting(teacher)
    monkeypatch.setattr(teacher._policy, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        teacher.score(EPISODES)
    assert resting(teacher)


def test_a_copy_that_fails_half_way_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Linear(3, 3)
    before = [tensor.data_ptr() for tensor in module.parameters()]
    given: list[Tensor] = []

    def full(data: Tensor, device: torch.device) -> Tensor:
        if given:
            raise torch.OutOfMemoryError("no room")
        given.append(data.clone())
        return given[0]

    monkeypatch.setattr(base, "_copied", full)
    with pytest.raises(torch.OutOfMemoryError), on_device(module, CPU):
        pytest.fail("not reached")
    assert [tensor.data_ptr() for tensor in module.parameters()] == before


def test_of_a_mixture_one_member_at_a_time_is_read_and_then_the_heads_alone(accelerator: Accelerator) -> None:
    ones = [make(5), make(6)]
    mixture = LocalMixture(ones, (0.5, 0.5), device=CPU, vocab_size=TOKENS)
    expected = mixture.score_topk(EPISODES, 4)
    for one in ones:
        accelerator.hold(one.loaded.model, one.name)
    seen: list[list[bool]] = []
    for one in ones:
        one._policy.register_forward_pre_hook(lambda *_: seen.append([resting(each) for each in ones]))
    assert torch.equal(mixture.score_topk(EPISODES, 4).topk_logprobs_NK, expected.topk_logprobs_NK)
    assert {tuple(states) for states in seen} == {(False, True), (True, False)}
    assert accelerator.moves == ["t5", "t6", "t5", "t6"]
    assert all(resting(one) for one in ones)


@pytest.mark.parametrize("settings", [{}, {"estimator": "sampled"}, {"estimator": "topk", "topk_tokens": 8}])
def test_a_run_with_offload_is_bit_for_bit_the_run_without(
    tmp_path: Path, accelerator: Accelerator, settings: dict[str, Any]
) -> None:
    runs = []
    for name in ("held", "offloaded"):
        config = toy_config(tmp_path / name, steps=2, teacher_offload=name == "offloaded", **settings)
        teacher = loaded(2, "teacher", spread=0.3)
        run = OPDTrainer(config, student=loaded(1, "student"), teacher=teacher, console=Console(file=StringIO()))
        if name == "offloaded":
            accelerator.hold(teacher.model, "teacher")
            update = run.updater.update

            def watched(*arguments: Any, update: Any = update, teacher: Any = teacher) -> Any:
                """While the student learns, of the teacher at most the head is there."""
                head = teacher.model.get_output_embeddings().weight
                there = [t for t in base._tensors(teacher.model) if not bool(t.isnan().all())]
                assert [id(one) for one in there] == ([] if settings else [id(head)])
                return update(*arguments)

            run.updater.update = watched  # type: ignore[method-assign]
        run.train()
        if name == "offloaded":
            assert all(bool(t.isnan().all()) for t in base._tensors(teacher.model))
        runs.append(run)
    one, other = (run.updater.parameters for run in runs)
    assert all(torch.equal(other[name], value) for name, value in one.items())
    kls = [[row["teacher/kl"] for row in read_metrics(run.folder.path / "metrics.jsonl")] for run in runs]
    assert kls[0] == kls[1]
    assert runs[0].config.config_hash == runs[1].config.config_hash


def test_a_failed_update_lets_the_head_go(tmp_path: Path, accelerator: Accelerator) -> None:
    teacher = loaded(2, "teacher", spread=0.3)
    run = OPDTrainer(
        toy_config(tmp_path, teacher_offload=True), student=loaded(1, "student"), teacher=teacher,
        console=Console(file=StringIO()),
    )  # fmt: skip
    accelerator.hold(teacher.model, "teacher")
    run.updater.update = lambda *_: (_ for _ in ()).throw(ValueError("no"))  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="step 1: no"):
        run.train()
    assert all(bool(tensor.isnan().all()) for tensor in base._tensors(teacher.model))
