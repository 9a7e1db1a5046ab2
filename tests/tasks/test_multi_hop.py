"""HotpotQA and MuSiQue: both published forms, search over all passages, short answers by exact match."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opd_env.episode.env import ToolEnv
from opd_env.tasks import load_task
from opd_env.tasks.multi_hop import HotpotQA

DATA = Path(__file__).parents[2] / ".." / "shared" / "data" / "hipporag"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the questions in ../shared/data/hipporag")

CONTEXT = [["Lilu", ["A lilu is a spirit.", " It is Akkadian."]], ["Gallu", ["Gallu were demons."]]]
ROW = {"_id": "1", "question": "Lilu is what?", "answer": "a spirit", "type": "bridge", "context": CONTEXT}
HUB_ROW = {
    **{key: ROW[key] for key in ("question", "answer", "type")},
    "id": "1",
    "context": {"title": [title for title, _ in CONTEXT], "sentences": [sentences for _, sentences in CONTEXT]},
}


def search(query):
    return f'<tool_call>\n{{"name": "search", "arguments": {{"query": "{query}"}}}}\n</tool_call>'


@pytest.mark.parametrize("row", [ROW, HUB_ROW], ids=["published", "hub"])
def test_both_forms_give_the_same_example_which_can_be_searched_and_answered(tmp_path, row):
    (tmp_path / "validation.jsonl").write_text(json.dumps(row) + "\n")
    task = load_task("hotpotqa", "validation", path=tmp_path)
    assert not task.train_allowed
    assert (task[0].id, task[0].difficulty, task[0].metadata["category"]) == ("1", 2, "bridge")
    env = ToolEnv(task)
    env.reset(options={"index": 0})
    assert env.step(search("lilu akkadian"))[0] == "[1] Lilu: A lilu is a spirit. It is Akkadian."
    *_, info = env.step("It is Akkadian.\nAnswer: Spirit.")
    assert info["grade"].correct


def test_rows_of_another_form_are_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"question": "?", "answer": "!"}\n')
    with pytest.raises(ValueError, match=r"holds rows of another form: KeyError\('context'\)"):
        HotpotQA(path=tmp_path)
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no rows; expected a JSON list of objects with 'question' and 'answer'"):
        HotpotQA(path=tmp_path / "train.json")


@needs_data
@pytest.mark.parametrize("name", ["hotpotqa", "musique"])
def test_published_questions_find_their_passages(name):
    task = load_task(name, "validation", path=DATA / f"{name}_train.json")
    assert len(task) == len({example.id for example in task}) == 100
    for example in task:
        assert task.grade(example, f"Because.\nAnswer: {example.answer}").correct
        assert not task.grade(example, "Answer: something else").correct
    assert "no results" not in task.tools[0](query=task[0].messages[0]["content"])


@needs_data
def test_aliases_are_accepted():
    task = load_task("musique", "validation", path=DATA / "musique_train.json")
    example = next(example for example in task if len(example.metadata["answers"]) > 1)
    assert task.grade(example, f"Answer: {example.metadata['answers'][-1]}").correct
    assert {example.difficulty for example in task} <= {2, 3, 4}
