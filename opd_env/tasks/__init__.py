"""What a student is asked: the Task contract, the registry of tasks, and the graders.

Worked example::

    from opd_env.tasks import grade_number, list_tasks, load_task

    list_tasks()                                  # ['arithmetic', 'country_search', 'gsm8k', …]
    task = load_task("country_search", split="test", levels=[2])
    task[0].messages[-1]["content"]               # 'By how many square kilometres is the land area of …?'
    grade_number("So the answer is 1,234.", "1234").correct   # True

Importing this package is cheap: no task's module, no data set and no model library is loaded before
``load_task`` asks for it.

Stands on ``tools`` and ``messages``; it knows no model and no tokens.
Read first: ``base``, the contract; then ``arithmetic``. ``data``, ``graders``, ``countries`` and ``function_calls`` are
rooms in it. Who may change it: a newcomer may add a task; a change of text, answers or grades needs a new ``version``.

Test it alone: ``pytest tests/tasks``
"""

from opd_env.tasks.base import Example, Grade, Task, prompt_hash, require_trainable
from opd_env.tasks.graders.answers import grade_number
from opd_env.tasks.registry import get_task, list_tasks, load_task, register_task

__all__ = [
    "Example",
    "Grade",
    "Task",
    "get_task",
    "grade_number",
    "list_tasks",
    "load_task",
    "prompt_hash",
    "register_task",
    "require_trainable",
]
