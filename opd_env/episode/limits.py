"""Budgets of an episode, and the order in which they are looked at.

After every turn of the student, first match wins:

1. the turn itself was cut → ``turn_length``, ``episode_length`` or ``time``; none of its calls is run
2. no call in the turn → ``answer``, unless the task's user speaks again: then 3 and 9 are looked at
3. ``max_seconds`` is over → ``time``; the calls are not run
4. the calls are run in order until ``max_seconds`` is over; those beyond ``max_tool_calls`` are answered with a budget
   error
5. a tool that ends the episode answered → ``stop_tool``
6. ``max_seconds`` is over → ``time``
7. a call was beyond ``max_tool_calls`` → ``max_tool_calls``
8. ``max_errors`` failed calls in a row → ``max_errors``
9. that was turn number ``max_turns`` → ``max_turns``
10. the tool results leave no room for another turn in ``max_tokens`` → ``episode_length``

``ToolEnv`` looks at 2 to 9; tokens (1 and 10) are known to the rollout only. It also has the engine end a turn that is
being sampled when ``max_seconds`` is over. So an episode outlives its time by one token, or by the ``timeout_s`` of one
tool call; with vLLM, which does not hand out half a turn, by the turn.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class RolloutLimits:
    """Budgets of one episode.

    Raises:
        ValueError: a limit is not positive.
    """

    max_turns: int = 8
    """Assistant turns."""
    max_tool_calls: int = 16
    """Tool calls, failed ones included."""
    max_errors: int = 4
    """Failed calls in a row."""
    max_turn_tokens: int = 256
    """Sampled tokens of one turn."""
    max_tokens: int = 2048
    """Tokens of the whole episode as the model reads it: prompt, sampled tokens and tool output. Where a new row begins
    because the chat template rewrites the conversation, those of that row count."""
    max_seconds: float = 300.0
    """Wall time of the episode, in seconds; what was sampled until then is kept and counts as truncated."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ValueError(f"{field.name}={value} must be positive")
        if self.max_turn_tokens > self.max_tokens:
            raise ValueError(
                f"max_turn_tokens={self.max_turn_tokens} is more than max_tokens={self.max_tokens} of the whole episode"
            )
