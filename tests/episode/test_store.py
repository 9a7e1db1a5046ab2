"""Trajectories survive disks, kills and hostile text."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_env.episode.files import StoreError
from opd_env.episode.store import (
    TrajectoryWriter,
    arrow_schema,
    journal_line,
    load_trajectories,
    load_written,
    save_trajectories,
)
from opd_env.episode.trajectory import StopReason, Trajectory
from opd_env.tools import ToolErrorKind
from tests.episode.trajectory_samples import Call, make_trajectories, make_trajectory

ROOT = Path(__file__).parents[2]


def rows(trajectories: Sequence[Trajectory]) -> list[dict[str, object]]:
    return [trajectory.to_row() for trajectory in trajectories]


def awkward() -> Trajectory:
    """Every optional field empty or extreme."""
    call = Call(None, "{“\u202e\x00\U0001f9ee", "</script>\n\u2028é", ToolErrorKind.INVALID_JSON)
    return make_trajectory(
        turns=[[call, call], [], ["ok\r\n"]],
        question="",
        correct=False,
        stop_reason=StopReason.TIME,
        answer=None,
        scores={"strict": 1 / 3, "ünï": -2.5},
        seed=2**40,
        seconds=1e-9,
    )


def test_parquet_round_trip_is_exact(tmp_path: Path) -> None:
    made = [*make_trajectories(140, 0.5), awkward()]
    loaded = load_trajectories(save_trajectories(made, tmp_path / "deep" / "run.parquet"))
    assert rows(loaded) == rows(made)
    assert loaded[3].logprobs.dtype == np.float32
    assert np.array_equal(loaded[3].logprobs, made[3].logprobs)
    assert loaded[-1].scores == {"strict": 1 / 3, "ünï": -2.5}
    assert loaded[-1].calls[0].error is ToolErrorKind.INVALID_JSON


def test_an_open_journal_and_its_parquet_hold_the_same(tmp_path: Path) -> None:
    made = [*make_trajectories(5, 0.5), awkward()]
    writer = TrajectoryWriter(tmp_path, "after")
    for number, trajectory in enumerate(made, start=1):
        writer.append(trajectory)
        assert len(load_trajectories(writer.journal)) == number  # visible at once, before close
    assert rows(load_trajectories(tmp_path)) == rows(load_written(tmp_path, "after")) == rows(made)
    writer.close()
    writer.close()
    assert rows(load_written(tmp_path, "after")) == rows(made)
    assert load_written(tmp_path, "before") is None
    assert [file.name for file in tmp_path.iterdir()] == ["after.parquet"]
    assert rows(load_trajectories(tmp_path / "after.parquet")) == rows(made)


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30), logprob=st.floats(-100, 0, width=32)
)
def test_any_text_and_any_logprob_come_back(
    tmp_path_factory: pytest.TempPathFactory, text: str, logprob: float
) -> None:
    folder = tmp_path_factory.mktemp("any")
    one = make_trajectory(question="q", answer=text, grade_reason=text)
    one = replace(one, question=text, logprobs=np.where(one.sampled, np.float32(logprob), np.float32(0)))
    assert rows(load_trajectories(save_trajectories([one], folder / "one.parquet"))) == rows([one])
    with TrajectoryWriter(folder, "two") as writer:
        writer.append(one)
    assert rows(load_trajectories(folder / "two.parquet")) == rows([one])


def test_half_a_surrogate_pair_becomes_a_replacement_character_in_both_formats(tmp_path: Path) -> None:
    one = make_trajectory(question="q", grade_reason="\ud83d and 🧮")
    with TrajectoryWriter(tmp_path, "journalled") as writer:
        writer.append(one)
    save_trajectories([one], tmp_path / "saved.parquet")
    assert {one.grade_reason for one in load_trajectories(tmp_path)} == {"\ufffd and 🧮"}


def test_the_columns_are_the_fields_of_a_trajectory() -> None:
    assert arrow_schema().names == [field.name for field in fields(Trajectory)]


def test_datasets_reads_the_parquet_files(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = make_trajectories(3, 0.5)
    path = save_trajectories(made, tmp_path / "run.parquet")
    loaded = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert loaded["question"] == [one.question for one in made]
    assert loaded.features["logprobs"].feature.dtype == "float32"


def test_no_episodes_are_a_valid_file(tmp_path: Path) -> None:
    assert len(load_trajectories(save_trajectories([], tmp_path / "none.parquet"))) == 0
    TrajectoryWriter(tmp_path, "empty").close()
    assert list(load_trajectories(tmp_path)) == []


def test_files_from_before_retries_were_counted_are_read_and_continued(tmp_path: Path) -> None:
    one = make_trajectory(turns=[[Call("a", "{}", "1", retries=2)], ["1"]])
    path = save_trajectories([one], tmp_path / "run.parquet")
    assert load_trajectories(path)[0].calls[0].retries == 2
    old_rows, turns = pq.read_table(path).to_pylist(), arrow_schema().field("turns").type.value_type
    calls = turns.field("calls").type.value_type
    old_call = pa.struct([field for field in calls if field.name != "retries"])
    old_turn = pa.struct([field if field.name != "calls" else field.with_type(pa.list_(old_call)) for field in turns])
    index = arrow_schema().get_field_index("turns")
    old_schema = arrow_schema().set(index, pa.field("turns", pa.list_(old_turn)))
    pq.write_table(pa.Table.from_pylist(old_rows, schema=old_schema), path)
    with TrajectoryWriter(tmp_path, "run") as writer:
        writer.append(one)
    assert [stored.calls[0].retries for stored in load_trajectories(path)] == [0, 2]


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name, question in (("b", "third"), ("a", "first")):
        save_trajectories([make_trajectory(question=question)] * 2, tmp_path / f"{name}.parquet")
    open_writer = TrajectoryWriter(tmp_path, "c")
    open_writer.append(make_trajectory(question="last"))
    (tmp_path / "notes.txt").write_text("not ours")
    loaded = load_trajectories(tmp_path)
    assert [one.question for one in loaded] == ["first", "first", "third", "third", "last"]
    assert loaded[-1].question == "last"
    assert [one.question for one in loaded[1:3]] == ["first", "third"]
    with pytest.raises(IndexError, match="5 trajectories are stored, no number 5"):
        loaded[5]


def test_a_writer_continues_what_is_stored_unless_told_to_overwrite(tmp_path: Path) -> None:
    first, second, third = make_trajectories(3, 1.0)
    with TrajectoryWriter(tmp_path, "run") as writer:
        writer.append(first)
    with TrajectoryWriter(tmp_path, "run") as writer:
        writer.append(second)
    assert rows(load_trajectories(tmp_path)) == rows([first, second])
    with TrajectoryWriter(tmp_path, "run", overwrite=True) as writer:
        writer.append(third)
    assert rows(load_trajectories(tmp_path)) == rows([third])


def test_an_exception_keeps_the_journal_for_the_next_writer(tmp_path: Path) -> None:
    first, second = make_trajectories(2, 1.0)
    writer = TrajectoryWriter(tmp_path, "run")

    def interrupted() -> None:
        with writer:
            writer.append(first)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert writer.journal.exists()
    with pytest.raises(ValueError, match="closed"):
        writer.append(second)
    with TrajectoryWriter(tmp_path, "run") as writer:
        writer.append(second)
    assert rows(load_trajectories(tmp_path)) == rows([first, second])


def test_a_kill_between_parquet_and_journal_doubles_nothing(tmp_path: Path) -> None:
    made = make_trajectories(2, 1.0)
    with TrajectoryWriter(tmp_path, "run") as writer:
        for one in made:
            writer.append(one)
    writer.journal.write_bytes(b"".join(journal_line(one.to_row()) for one in made))  # as if not yet removed
    assert rows(load_trajectories(tmp_path)) == rows(made)
    TrajectoryWriter(tmp_path, "run").close()
    assert rows(load_trajectories(tmp_path)) == rows(made)
    assert not writer.journal.exists()


def test_a_cut_last_line_is_left_out_counted_and_dropped_by_the_next_writer(tmp_path: Path) -> None:
    made = make_trajectories(3, 1.0)
    lines = [journal_line(one.to_row()) for one in made]
    (tmp_path / "run.jsonl").write_bytes(lines[0] + lines[1] + lines[2][: len(lines[2]) // 2])
    loaded = load_trajectories(tmp_path)
    assert (len(loaded), loaded.cut_lines) == (2, 1)
    with TrajectoryWriter(tmp_path, "run") as writer:
        writer.append(made[2])
    loaded = load_trajectories(tmp_path)
    assert (rows(loaded), loaded.cut_lines) == (rows(made), 0)


@pytest.mark.parametrize("broken", [b'{"task": "a", \n', b"[1, 2]\n", b"\xff\xfe\n", b"\n"])
def test_a_broken_middle_line_is_refused_with_file_and_line(tmp_path: Path, broken: bytes) -> None:
    lines = [journal_line(one.to_row()) for one in make_trajectories(2, 1.0)]
    path = tmp_path / "run.jsonl"
    path.write_bytes(lines[0] + broken + lines[1])
    with pytest.raises(StoreError, match=r"run\.jsonl:2: no trajectory"):
        list(load_trajectories(path))
    with pytest.raises(StoreError, match=r"run\.jsonl:2: no trajectory"):
        TrajectoryWriter(tmp_path, "run").close()
    assert path.read_bytes() == lines[0] + broken + lines[1]
    assert [file.name for file in tmp_path.iterdir()] == ["run.jsonl"]


def test_what_is_no_store_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(StoreError, match=r"text\.parquet is no Parquet file"):
        load_trajectories(tmp_path / "text.parquet")
    with pytest.raises(StoreError, match="no trajectories at"):
        load_trajectories(tmp_path / "missing.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="no trajectories at"):
        load_trajectories(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"end the name with \.parquet"):
        save_trajectories([], tmp_path / "run.json")


def test_a_parquet_file_of_something_else_names_the_missing_columns(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"question": ["hi"]}), tmp_path / "other.parquet")
    with pytest.raises(StoreError, match="holds no trajectories: it lacks answer"):
        load_trajectories(tmp_path)


def test_two_writers_of_one_name_are_refused(tmp_path: Path) -> None:
    first = TrajectoryWriter(tmp_path, "run")
    with pytest.raises(StoreError, match="being written by another process"):
        TrajectoryWriter(tmp_path, "run")
    first.append(make_trajectory())
    first.close()
    assert len(load_trajectories(tmp_path)) == 1


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be used: Not a directory; free space or choose"):
        TrajectoryWriter(tmp_path / "file" / "runs", "run")
    with pytest.raises(StoreError, match="cannot be used"):
        save_trajectories([], tmp_path / "file" / "run.parquet")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="Permission denied"):
        TrajectoryWriter(tmp_path, "run")


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}"}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_full_disk_is_one_sentence_and_takes_the_half_line_back(tmp_path: Path) -> None:
    code = """
        import resource, signal, sys
        from tests.episode.trajectory_samples import make_trajectories
        from opd_env.episode.files import StoreError
        from opd_env.episode.store import TrajectoryWriter, save_trajectories

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)           # a write past the limit fails like a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        made, writer, stored = make_trajectories(40, 0.5), TrajectoryWriter(sys.argv[1], "run"), 0
        try:
            for one in made:
                writer.append(one)
                stored += 1
        except StoreError as error:
            print(stored, error)
        try:
            save_trajectories(made * 20, sys.argv[1] + "/all.parquet")
        except StoreError as error:
            print(error)
    """
    process = python(code, str(tmp_path))
    output, errors = process.communicate(timeout=60)
    first, second = output.splitlines()
    stored, sentence = first.split(" ", 1)
    assert 0 < int(stored) < 40
    assert "run.jsonl cannot be used: File too large; free space" in sentence
    assert "all.parquet cannot be used" in second, errors
    loaded = load_trajectories(tmp_path)
    assert (len(loaded), loaded.cut_lines) == (int(stored), 0)
    assert rows(loaded) == rows(make_trajectories(40, 0.5)[: int(stored)])
    assert [file.name for file in tmp_path.iterdir()] == ["run.jsonl"]


def test_a_killed_process_loses_no_finished_episode(tmp_path: Path) -> None:
    code = """
        import itertools, sys
        from tests.episode.trajectory_samples import make_trajectories
        from opd_env.episode.store import TrajectoryWriter

        writer = TrajectoryWriter(sys.argv[1], "run")
        for number, one in enumerate(itertools.cycle(make_trajectories(100, 0.5)), start=1):
            writer.append(one)
            print(number, flush=True)
    """
    process = python(code, str(tmp_path))
    assert process.stdout is not None
    for _ in range(50):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().splitlines()
    process.wait()
    finished = int(rest[-1]) if rest else 50
    assert finished >= 50
    loaded = load_trajectories(tmp_path)
    assert finished <= len(loaded) <= finished + 1  # stored, but killed before it could say so
    expected = rows(make_trajectories(100, 0.5))
    assert rows(loaded) == [expected[number % 100] for number in range(len(loaded))]


def test_ten_thousand_trajectories_open_without_being_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``benchmarks/open_trajectories.py`` tells what that costs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = make_trajectories(100, 0.5)
    table = pq.read_table(save_trajectories(made, tmp_path / "small.parquet"))
    parquet = tmp_path / "large.parquet"
    pq.write_table(pa.concat_tables([table] * 100), parquet, row_group_size=128)
    read: list[int] = []
    plain = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, i: read.append(i) or plain(self, i))
    loaded = load_trajectories(parquet)
    assert (len(loaded), read) == (10_000, [])
    assert loaded[7_777].question == made[77].question
    assert loaded[7_778].question == made[78].question
    assert read == [7_777 // 128]


def test_a_row_of_a_newer_kit_is_refused_rather_than_half_read(tmp_path: Path) -> None:
    row = make_trajectory().to_row() | {"mood": "good"}
    (tmp_path / "run.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(TypeError, match="mood"):
        load_trajectories(tmp_path)[0]


def test_importing_the_store_pulls_in_no_heavy_library() -> None:
    code = "import sys, opd_env.episode.store; print({'torch', 'pyarrow', 'datasets'} & set(sys.modules))"
    process = python(code)
    assert process.communicate(timeout=60)[0].strip() == "set()"
