"""Tasks by name: built in, registered, from plug-ins; one clear sentence for every mistake."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from opd_env.tasks import Example, Grade, Task, get_task, list_tasks, load_task, register_task, registry

BUILT_IN = {
    "arithmetic", "bfcl", "bfcl_multi_turn", "country_search", "curriculum", "gsm8k", "hotpotqa", "math500",
    "mixture", "musique", "reasoning_gym", "svamp", "tooluse68",
}  # fmt: skip


class Empty(Task):
    version = "1"

    def __init__(self, split: str = "train", size: int = 0) -> None:
        super().__init__(split)
        self.size = size

    def __len__(self) -> int:
        return self.size

    def example(self, index: int) -> Example:
        return Example(id=str(index), messages=(), answer="1")

    def grade(self, example, answer, turns=()):
        return Grade(correct=False)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """Each test registers into a registry of its own, without the plug-ins of this machine."""
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(registry, "entry_points", lambda group: [])


def plug_in(monkeypatch, *plugins):
    entries = [EntryPoint(name, value, registry.ENTRY_POINT_GROUP) for name, value in plugins]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)


def test_a_registered_class_is_loaded_with_its_split_and_options():
    register_task("empty")(Empty)
    task = load_task("empty", split="test", size=3)
    assert (type(task), task.name, task.split, len(task)) == (Empty, "empty", "test", 3)


def test_a_function_that_returns_a_task_can_be_registered():
    @register_task("three")
    def three(split: str) -> Task:
        return Empty(split, size=3)

    task = load_task("three")
    assert (task.name, len(task)) == ("three", 3)


def test_the_built_in_tasks_are_listed_without_being_imported():
    assert set(list_tasks()) == BUILT_IN


def test_every_built_in_task_can_be_found():
    for name in BUILT_IN:
        assert issubclass(get_task(name), Task)


def test_an_unknown_task_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"no task is named 'gsmk8' \(did you mean 'gsm8k'\?\); known: arithmetic"):
        load_task("gsmk8")


def test_an_unknown_option_is_refused_with_the_nearest_name():
    register_task("empty")(Empty)
    with pytest.raises(ValueError, match=r"no option of task 'empty' is named 'sise' \(did you mean 'size'"):
        load_task("empty", sise=3)


def test_options_of_a_task_that_takes_none_are_refused_with_what_to_set():
    class Plain(Empty):
        def __init__(self, split="train"):
            super().__init__(split)

    register_task("plain")(Plain)
    with pytest.raises(ValueError, match=r"task 'plain' takes no options, got levels, seed; set task_options to \{\}"):
        load_task("plain", levels=[1], seed=2)
    assert load_task("plain").licence == "unknown", "nobody said under which one the problems are"


def test_an_unknown_split_is_refused():
    register_task("empty")(Empty)
    with pytest.raises(ValueError, match=r"no split of .* is named 'validation'; known: train, test"):
        load_task("empty", split="validation")


def test_a_name_belongs_to_its_first_owner():
    register_task("empty")(Empty)
    with pytest.raises(ValueError, match=r"the name 'empty' belongs to .*:Empty; register .*Other under another"):

        @register_task("empty")
        class Other(Empty):
            pass


def test_the_name_of_a_built_in_task_cannot_be_taken():
    with pytest.raises(ValueError, match=r"the name 'gsm8k' belongs to opd_env.tasks.gsm8k:GSM8K"):
        register_task("gsm8k")(Empty)


def test_the_same_class_may_be_registered_again():
    register_task("empty")(Empty)
    assert register_task("empty")(Empty) is Empty


@pytest.mark.parametrize("name", ["", " empty", "empty\n"])
def test_a_name_of_spaces_is_refused(name):
    with pytest.raises(ValueError, match="a task's name"):
        register_task(name)


def test_a_plug_in_task_is_listed_and_loaded(monkeypatch):
    plug_in(monkeypatch, ("counter", "collections:Counter"), ("plugged", "opd_env.tasks.gsm8k:GSM8K"))
    assert set(list_tasks()) == {*BUILT_IN, "counter", "plugged"}
    assert get_task("plugged").__name__ == "GSM8K"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("no_such_module:Task", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("collections:NoSuchTask", "cannot be imported: AttributeError"),
        ("string:digits", "is a str, expected a Task class or a function"),
    ],
)
def test_a_broken_plug_in_is_left_out_with_a_warning_and_refused_with_the_reason(monkeypatch, value, reason):
    plug_in(monkeypatch, ("broken", value))
    with pytest.warns(UserWarning, match=reason):
        assert set(list_tasks()) == BUILT_IN
    with pytest.raises(ImportError, match=reason):
        load_task("broken")
    assert load_task("arithmetic", split="test").name == "arithmetic"


def test_a_plug_in_does_not_replace_a_task(monkeypatch):
    plug_in(monkeypatch, ("gsm8k", "collections:Counter"))
    with pytest.warns(UserWarning, match="task 'gsm8k' of .* is ignored: the name is already taken"):
        assert set(list_tasks()) == BUILT_IN
    assert get_task("gsm8k").__name__ == "GSM8K"


def test_a_factory_that_returns_no_task_is_refused():
    register_task("wrong")(lambda split: [1, 2, 3])
    with pytest.raises(TypeError, match="task 'wrong' made a list, expected a Task"):
        load_task("wrong")
