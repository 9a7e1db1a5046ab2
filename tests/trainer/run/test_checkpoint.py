"""A checkpoint is whole or not there; what is damaged is never used."""

import errno
import logging
import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from opd_env.trainer.batch import PolicyModule
from opd_env.trainer.learn.update import Updater
from opd_env.trainer.run import checkpoint as module
from opd_env.trainer.run.checkpoint import CheckpointError, Checkpoints, Progress, find_damage, restore, state_files
from opd_env.trainer.run.sft import supervised_objective
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainer.toy import made_trajectory, row_of

ROWS = [row_of(made_trajectory(seed)) for seed in range(3)]


def writer(text):
    return lambda path: path.write_text(text)


def files(text="x"):
    return {"a.txt": writer(text), "b.txt": writer(text * 1000)}


def test_what_was_saved_is_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.newest() is None
    checkpoints.save(3, files("three"))
    checkpoints.save(12, files("twelve"))
    newest = checkpoints.newest()
    assert newest.step == 12
    assert (newest.folder / "a.txt").read_text() == "twelve"


def test_only_the_last_ones_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 6):
        checkpoints.save(step, files())
    assert checkpoints.steps() == [4, 5]


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, files("old"))
    checkpoints.save(1, files("new"))
    assert (checkpoints.newest().folder / "a.txt").read_text() == "new"


def damage_cut(folder):
    content = (folder / "b.txt").read_bytes()
    (folder / "b.txt").write_bytes(content[:-1])


def damage_bit(folder):
    content = bytearray((folder / "b.txt").read_bytes())
    content[100] ^= 1
    (folder / "b.txt").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_cut, "b.txt has"),
        (damage_bit, "b.txt has another checksum"),
        (lambda folder: (folder / "a.txt").unlink(), "a.txt is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is not readable"),
        (lambda folder: (folder / "manifest.json").write_text("[1]"), "manifest.json is not readable"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\x00"), "manifest.json is not readable"),
    ],
)
def test_a_damaged_newest_one_is_passed_over_and_said_so(tmp_path, caplog, damage, reason):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, files())
    damage(checkpoints.save(2, files()).folder)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.newest().step == 1
    assert reason in caplog.text
    assert "the one before it is used" in caplog.text


def test_only_damaged_ones_are_an_error(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    damage_cut(checkpoints.save(1, files()).folder)
    with pytest.raises(
        CheckpointError, match=r"are damaged; remove the folder, or start anew with --run\.resume never"
    ):
        checkpoints.newest()


def full_disk(path):
    path.write_text("half")
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("broken", ["file", "sync", "rename"])
def test_a_full_disk_keeps_the_one_before(tmp_path, monkeypatch, broken):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, files())

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    given = files()
    if broken == "file":
        given["b.txt"] = full_disk
    else:
        monkeypatch.setattr(module.os, {"sync": "fsync", "rename": "rename"}[broken], fail)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.save(2, given)
    text = str(caught.value)
    assert "No space left on device; the one of step 1 is kept; free space" in text
    assert "\n" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert checkpoints.newest().step == 1


def test_what_a_kill_left_half_written_is_ignored_and_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, files())
    half = tmp_path / ".step_00000002.unfinished"
    half.mkdir()
    (half / "a.txt").write_text("half")
    assert checkpoints.newest().step == 1
    checkpoints.save(3, files())
    assert not half.exists()


def test_every_single_byte_counts(tmp_path):
    folder = Checkpoints(tmp_path).save(1, {"a.txt": writer("0123456789")}).folder
    assert find_damage(folder) is None
    for place in range(10):
        content = bytearray(b"0123456789")
        content[place] ^= 0x40
        (folder / "a.txt").write_bytes(content)
        assert find_damage(folder) == "a.txt has another checksum"


# The state of a run.


def make_updater(seed=3, **config):
    model = tiny_llama(seed=seed, **config)
    return Updater(PolicyModule(model, len(tiny_tokenizer())), Accelerator())


def test_training_goes_on_bit_for_bit_after_a_restore(tmp_path):
    straight = make_updater()
    for _ in range(4):
        straight.update(ROWS, supervised_objective, 1e-2)

    first = make_updater()
    for _ in range(2):
        first.update(ROWS, supervised_objective, 1e-2)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, state_files(first, Progress("hash", 2, first.updates, 1.5)))
    second = make_updater(seed=99)
    progress = restore(second, checkpoints.newest())
    assert progress == Progress("hash", 2, 2, 1.5)
    assert second.updates == 2
    for _ in range(2):
        second.update(ROWS, supervised_objective, 1e-2)
    for name, value in straight.parameters.items():
        assert torch.equal(value, second.parameters[name]), name


def test_random_numbers_go_on_where_they_were(tmp_path):
    updater = make_updater()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state_files(updater, Progress("hash", 1, 0, 0.0)))
    expected = random.random(), np.random.rand(), torch.rand(3).tolist()
    restore(updater, checkpoints.newest())
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == expected


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state_files(make_updater(), Progress("hash", 1, 0, 0.0)))
    with pytest.raises(CheckpointError, match="other parameters than the student has"):
        restore(make_updater(hidden=32), checkpoints.newest())
