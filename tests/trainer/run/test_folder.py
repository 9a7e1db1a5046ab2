"""The run folder belongs to one run, is never half-written, and never takes another's place."""

import errno
import subprocess
from pathlib import Path

import pytest

from opd_env.episode.files import StoreError
from opd_env.settings.fields import ConfigError
from opd_env.trainer.run.config import load_config
from opd_env.trainer.run.folder import RunFolder, git_state
from tests.trainer.toy import toy_config


def test_nothing_is_made_before_it_is_opened(tmp_path):
    folder = RunFolder(toy_config(tmp_path / "run"))
    assert not folder.path.exists()
    folder.open()
    assert [path.name for path in folder.path.iterdir()] == ["config.yaml"]


def test_the_settings_can_be_read_back_and_their_head_tells_where_they_come_from(tmp_path):
    config = toy_config(tmp_path / "run")
    RunFolder(config).open()
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert load_config([str(tmp_path / "run" / "config.yaml")]) == config
    assert text.startswith(f"# config_hash: {config.config_hash}\n")
    assert "# torch: " in text
    assert "seed: 0" in text


def test_the_same_run_may_continue_with_other_places_and_cadences(tmp_path):
    RunFolder(toy_config(tmp_path / "run")).open()
    RunFolder(toy_config(tmp_path / "run", checkpoint_every=3, checkpoint_keep=5, trackers=("tensorboard",)))


def test_another_run_is_refused_with_what_differs(tmp_path):
    RunFolder(toy_config(tmp_path / "run")).open()
    with pytest.raises(ConfigError) as caught:
        RunFolder(toy_config(tmp_path / "run", steps=5, seed=1, divergence="jsd", mode="opd"))
    text = str(caught.value)
    assert "objective.divergence was 'reverse_kl', now 'jsd'" in text
    assert "and 1 more" in text
    assert "--run.resume never" in text


def test_results_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = RunFolder(toy_config(tmp_path / "run"))
    folder.open()
    assert folder.read_results() == {}
    folder.write_json("results.json", {"before": 1})

    def full(self, *args, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StoreError, match="No space left on device"):
        folder.write_json("results.json", {"before": 2})
    assert folder.read_results() == {"before": 1}
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.yaml", "results.json"]


def test_results_that_are_not_json_are_an_error(tmp_path):
    folder = RunFolder(toy_config(tmp_path / "run"))
    folder.open()
    (folder.path / "results.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        folder.read_results()


def test_a_model_that_cannot_be_written_leaves_the_one_before(tmp_path):
    folder = RunFolder(toy_config(tmp_path / "run"))
    folder.open()
    folder.save_model(lambda path: (path / "weights").write_text("first"))

    def broken(path):
        (path / "weights").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StoreError, match="No space left"):
        folder.save_model(broken)
    assert (folder.path / "model" / "weights").read_text() == "first"
    folder.save_model(lambda path: (path / "weights").write_text("second"))
    assert (folder.path / "model" / "weights").read_text() == "second"


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises((StoreError, ConfigError)) as caught:
        RunFolder(toy_config(tmp_path / "file" / "run")).open()
    assert "\n" not in str(caught.value)


def test_git_state_names_the_commit_and_whether_files_differ_from_it_or_nothing(tmp_path, monkeypatch):
    def git(*words):
        command = ["git", "-c", "user.name=n", "-c", "user.email=e", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state() == {}
    git("init")
    assert git_state() == {}  # no commit yet
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "first")
    (tmp_path / "other").write_text("not part of the repository")
    assert git_state() == {"git_commit": git("rev-parse", "HEAD"), "git_changes": "no"}
    (tmp_path / "file").write_text("two")
    assert git_state()["git_changes"] == "yes"
    monkeypatch.setenv("PATH", "")
    assert git_state() == {}
