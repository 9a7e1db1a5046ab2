"""The folder of a run: settings, results, metrics, trajectories, checkpoints, and the trained model.

::

    runs/demo/
        config.yaml             every setting, with versions, git state and seed in its head
        metrics.jsonl           one line per step
        results.json            before, after, teacher; seconds, seed, versions
        trajectories/           every episode that was trained on, one Parquet file per step
        evaluations/before/ …   every evaluation, its episodes included
        checkpoints/            to continue from
        trackers/               TensorBoard and the like
        model/                  the trained student, as ``save_pretrained`` writes it
        report.html

Test it alone: ``pytest tests/trainer/run/test_folder.py``
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from opd_env.episode.files import UNFINISHED, explained, remove_unfinished, write_whole
from opd_env.evaluation.result import installed_versions
from opd_env.settings.fields import ConfigError, build, flat_dict, read_yaml, to_yaml
from opd_env.trainer.run.config import UNHASHED, OPDConfig, Resume


class RunFolder:
    """Where one run writes. Nothing is made before ``open``.

    Raises:
        ConfigError: the folder holds another run, or something that is no run.
    """

    def __init__(self, config: OPDConfig) -> None:
        self.path = Path(config.run.output).expanduser()
        self._config = config
        self._check()

    def open(self) -> None:
        """Makes the folder and writes the settings; with ``resume: never`` an earlier run is removed first.

        Raises:
            StoreError: the disk is full or the folder cannot be written.
        """
        if self._config.run.resume is Resume.NEVER and self.path.exists():
            self._remove_run()
        with explained(self.path):
            remove_unfinished(self.path)
        head = [
            f"# config_hash: {self._config.config_hash}",
            *(f"# {name}: {value}" for name, value in installed_versions().items()),
            *(f"# {name}: {value}" for name, value in git_state().items()),
        ]
        write_whole(self.path / "config.yaml", "\n".join(head) + "\n" + to_yaml(self._config))

    def forget_episodes(self, last_step: int) -> None:
        """Removes the stored episodes of steps after ``last_step``: a run that continues there plays them again."""
        with explained(self.path / "trajectories"):
            for path in (self.path / "trajectories").glob("step_*"):
                if int(path.name.split(".")[0].split("_")[1]) > last_step:
                    path.unlink()

    def read_results(self) -> dict[str, Any]:
        """What ``results.json`` holds; empty when there is none."""
        file = self.path / "results.json"
        if not file.exists():
            return {}
        with explained(file):
            text = file.read_text(encoding="utf-8")
        try:
            results: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise ConfigError(
                f"{file} is not JSON ({error}); remove it, or start anew with --run.resume never"
            ) from error
        return results

    def write_json(self, name: str, value: Mapping[str, Any], indent: int | None = 2) -> None:
        """Replaces a file of the folder in one step."""
        write_whole(self.path / name, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")

    def save_model(self, save: Callable[[Path], Any]) -> None:
        """Replaces ``model/`` by what ``save`` writes into the folder that it is given.

        Raises:
            StoreError: the disk is full or the folder cannot be written; the former model is kept.
        """
        final, unfinished = self.path / "model", self.path / f".model{UNFINISHED}"
        with explained(final):
            try:
                unfinished.mkdir()
                save(unfinished)
                shutil.rmtree(final, ignore_errors=True)
                unfinished.rename(final)
            except SafetensorError as error:
                raise OSError(str(error)) from error
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)

    def _remove_run(self) -> None:
        """``config.yaml`` goes last: a run that a kill left half-removed is still known to be one."""
        with explained(self.path):
            for path in sorted(self.path.iterdir(), key=lambda path: path.name == "config.yaml"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _check(self) -> None:
        if not self.path.exists():
            return
        if self.path.is_dir() and all(path.name.endswith(UNFINISHED) for path in self.path.iterdir()):
            return  # empty, or its process was killed at once
        file = self.path / "config.yaml"
        if not file.is_file():
            raise ConfigError(
                f"output {str(self.path)!r} exists and holds no run (no config.yaml); set another --run.output"
            )
        if self._config.run.resume is Resume.NEVER:
            return
        there = flat_dict(build(OPDConfig, read_yaml(file), source=str(file)))
        ours = flat_dict(self._config)
        names = [name for name in dict.fromkeys([*ours, *there]) if name not in UNHASHED]
        changed = [name for name in names if there.get(name) != ours.get(name)]
        if changed:
            shown = ", ".join(f"{name} was {there.get(name)!r}, now {ours.get(name)!r}" for name in changed[:3])
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise ConfigError(
                f"{str(self.path)!r} holds a run with other settings ({shown}{more}); set another --run.output, or "
                "replace that run with --run.resume never"
            )


def git_state() -> dict[str, str]:
    """Commit of the working directory and whether it has changes; empty outside a repository."""
    command = ["git", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}
    commit = lines[0].removeprefix("# branch.oid ")
    changed = not all(line.startswith("#") for line in lines)
    return {} if commit == "(initial)" else {"git_commit": commit, "git_changes": "yes" if changed else "no"}
