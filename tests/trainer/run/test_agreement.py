"""Processes that differ in what decides a run are refused before the first step, with who and what."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from opd_env.settings.fields import ConfigError
from opd_env.trainer.run import agreement
from opd_env.trainer.run.agreement import facts_of, require_one_folder, require_same, weights_sample
from tests.tiny import tiny_llama
from tests.trainer.run.test_loop import trainer_of
from tests.trainer.settings import changed_by
from tests.trainer.together import ends, together
from tests.trainer.toy import ToySums, loaded, toy_config

TWO = SimpleNamespace(num_processes=2, is_main_process=True, wait_for_everyone=lambda: None)


def test_every_setting_version_model_and_problem_counts_but_not_the_path_of_the_folder(tmp_path):
    trainer = trainer_of(toy_config(tmp_path / "one"))
    config, parts = trainer.config, trainer.parts
    facts = facts_of(config, parts)

    def changed(config=config, **changes):
        other = facts_of(config, replace(parts, **changes))
        assert other.keys() == facts.keys()
        return [name for name in facts if facts[name] != other[name]]

    class More(ToySums):
        def __len__(self):
            return 13

    assert changed(changed_by(config, output="elsewhere")) == []
    assert changed(changed_by(config, steps=5)) == ["setting run.steps"]
    assert changed(student=loaded(3)) == ["student"]
    assert changed(eval_task=More("test")) == ["held-out problems"]
    assert {"version of torch", "teacher teacher", "task", "tokenizer"} <= facts.keys()


def test_one_changed_weight_of_those_looked_at_and_any_other_shape_or_type_is_another_model():
    model = tiny_llama(seed=1)
    before = weights_sample(model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    assert weights_sample(model) != before
    assert weights_sample(model.double()) != weights_sample(tiny_llama(seed=1))
    assert weights_sample(tiny_llama(seed=1)) == before


def test_who_differs_in_what_is_said(monkeypatch):
    other = "b", {"student": "2", "setting run.steps": "3"}
    monkeypatch.setattr(agreement, "on_each", lambda mine: [mine(), other])
    monkeypatch.setattr(agreement.socket, "gethostname", lambda: "a")
    with pytest.raises(
        ConfigError, match=r"process 1 on b has other student than process 0 on a \(student: 2, not 1\)"
    ):
        require_same(TWO, {"student": "1", "setting run.steps": "3"})
    require_same(TWO, {"student": "2", "setting run.steps": "3"})


def test_a_folder_that_another_process_does_not_see_is_refused_and_the_mark_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "on_main", lambda _, function: function())
    for others, fails in (([("b", True)], False), ([("b", False)], True)):
        monkeypatch.setattr(agreement, "on_each", lambda mine, others=others: [mine(), *others])
        if fails:
            with pytest.raises(ConfigError, match=r"of process 1 on b is not that of process 0 .* set output to"):
                require_one_folder(TWO, tmp_path)
        else:
            require_one_folder(TWO, tmp_path)
        assert not list(tmp_path.iterdir())


def differing(rank, folder, kind):
    agreement._PATIENCE_S = 0.5
    try:
        if kind == "folder":
            trainer_of(toy_config(Path(folder) / str(rank))).train()
        else:
            trainer_of(toy_config(folder, steps=4 + rank))
    except ConfigError as error:
        print(error)
        return 2


@pytest.mark.parametrize(
    ("kind", "said"),
    [("folder", "is not that of process 0 on"), ("settings", "has other setting run.steps than process 0")],
)
def test_two_processes_that_differ_end_before_the_first_step(tmp_path, kind, said):
    with together(2, tmp_path, differing, tmp_path / "run", kind) as lives:
        codes = ends(lives)
    assert 0 not in codes
    assert sum(said in life.text() for life in lives) >= 1
    assert not list((tmp_path / "run").rglob("trajectories"))
