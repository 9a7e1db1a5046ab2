"""A tool and a task of one's own: converting lengths.

Try the tool, look at the task, and train on it::

    opd-env tools test convert --imports examples/units.py
    opd-env tasks lengths --imports examples/units.py
    opd-env train configs/demo.yaml --imports examples/units.py --task lengths --task_options {} \\
      --run.output runs/lengths

The packaged student knows nothing but its own word problems; for a real one name a model of yours with ``--student``.
"""

from opd_env import Example, Grade, Task, register_task, register_tool, tool
from opd_env.messages import Message, ToolCall, assistant, tool_message, user
from opd_env.tasks import grade_number

METRES = {"mm": 0.001, "cm": 0.01, "m": 1.0, "km": 1000.0}


@register_tool
@tool(timeout_s=1.0)
def convert(value: float, unit: str, to: str) -> float:
    """Converts a length from one unit to another.

    Args:
        value: the length, in ``unit``.
        unit: mm, cm, m or km.
        to: mm, cm, m or km.
    """
    return round(value * METRES[unit] / METRES[to], 6)


@register_task("lengths")
class Lengths(Task):
    """How many of one unit another length is."""

    version = "1"
    tools = ("convert",)

    def __len__(self) -> int:
        return 500

    def example(self, index: int) -> Example:
        """Training asks for even numbers, testing for odd ones."""
        metres = 2 * index + (self.split == "test")
        return Example(str(index), (user(f"How many cm are {metres} m?"),), str(100 * metres))

    def grade(self, example: Example, answer: str | None, turns: object = ()) -> Grade:
        """The last number of the answer must be the gold one."""
        return grade_number(answer, example.answer)

    def expert(self, example: Example) -> list[Message]:
        """What a perfect student would do; for supervised warm starts (``--sft_steps``)."""
        metres = int(example.answer) // 100
        call = ToolCall("convert", {"value": metres, "unit": "m", "to": "cm"})
        return [
            assistant("", [call]),
            tool_message("convert", f"{100.0 * metres}"),
            assistant(f"The answer is {example.answer}."),
        ]
