"""Does a teacher fit the student: does it read the same tokens, and are its scores those of the student's tokens?

A teacher with another template, whose scores are shifted by one token, or that is not the model one believes it to be,
trains the student towards noise without any error. The tokenizers tell a part before the first step; a first batch of
episodes tells the rest.

Worked example::

    require_compatible(student, teacher, max_tokens=2048)      # silent, or one sentence on the first difference
    require_aligned(teacher.name, trajectories, teacher.score(trajectories), same_model=False)

Test it alone: ``pytest tests/trainer/teachers/test_base.py tests/trainer/teachers/test_shift.py``
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from opd_env.engines.models import LoadedModel
from opd_env.episode.trajectory import Trajectory
from opd_env.formats import TemplateFormat, get_format
from opd_env.formats.chat_template import CALL, OPENING, SCHEMA
from opd_env.messages import assistant, system, tool_message, user


def context_length(loaded: LoadedModel) -> int:
    """Tokens that the model can read."""
    config = loaded.model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)


def require_compatible(
    student: LoadedModel,
    teacher: LoadedModel,
    *,
    max_tokens: int,
    teacher_extra_tokens: int = 0,
    chat_format: str | None = None,
) -> None:
    """Refuses a teacher that would read the student's tokens as something else.

    Args:
        student, teacher: with their tokenizers.
        max_tokens: longest episode.
        teacher_extra_tokens: by how much the teacher's prompt may be longer than the student's.
        chat_format: name of the format of both; None finds each by its tokenizer.

    Raises:
        ValueError: the token ids, an end-of-turn token, the chat template, the size of a vocabulary or a context
            does not fit; the message shows the first difference.
    """
    where = f"the teacher {teacher.name} does not fit the student {student.name}"
    advice = "distil from a teacher of the student's own model family, or set cross_tokenizer"
    known = teacher.tokenizer.get_vocab()
    for token, index in sorted(student.tokenizer.get_vocab().items(), key=lambda entry: entry[1]):
        if known.get(token) != index:
            found = "does not know it" if token not in known else f"gives it id {known[token]}"
            raise ValueError(f"{where}: the student's token {token!r} has id {index}, the teacher {found}; {advice}")
    for name in ("eos_token", "bos_token"):
        if getattr(student.tokenizer, name) != getattr(teacher.tokenizer, name):
            raise ValueError(
                f"{where}: {name} is {getattr(student.tokenizer, name)!r} for the student and "
                f"{getattr(teacher.tokenizer, name)!r} for the teacher; {advice}"
            )
    _require_equal_templates(student.tokenizer, teacher.tokenizer, where)
    chat, teacher_chat = (get_format(one.tokenizer, chat_format) for one in (student, teacher))
    _require_equal(_tool_text(chat), _tool_text(teacher_chat), where)
    ends, teacher_ends = chat.stop_token_ids, teacher_chat.stop_token_ids
    if ends != teacher_ends:
        raise ValueError(f"{where}: turns end with token {ends} for the student, {teacher_ends} for the teacher")
    for role, loaded, extra in (("student", student, 0), ("teacher", teacher, teacher_extra_tokens)):
        rows = loaded.model.get_input_embeddings().num_embeddings
        if rows < len(student.tokenizer):
            raise ValueError(
                f"{where}: the {role}'s embedding has {rows} rows, fewer than the {len(student.tokenizer)} tokens of "
                "the student's tokenizer; use the tokenizer that the model was trained with"
            )
        if context_length(loaded) < max_tokens + extra:
            raise ValueError(
                f"{where}: the {role} reads {context_length(loaded)} tokens at most, its episodes may have "
                f"{max_tokens + extra}; lower sampling.limits.max_tokens"
                + (" or teacher.demonstrations" if extra else "")
            )


_PROBES = (
    [user("What is 6 * 7?")],
    [system("Be brief."), user("What is 6 * 7?"), assistant("42."), user("And 7 * 8?")],
)


def _require_equal_templates(student: Any, teacher: Any, where: str) -> None:
    for messages in _PROBES:
        text, other = (
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            for tokenizer in (student, teacher)
        )
        _require_equal(text, other, where)


def _tool_text(chat: TemplateFormat) -> str:
    """Tools, their results and calls: what the messages of ``_PROBES`` do not show."""
    asked, called = chat.render_prompt(OPENING, [SCHEMA]), chat.render_assistant(assistant("", [CALL]))
    return chat.decode([*asked, *called, *chat.render_tool_results([tool_message(CALL.name, "42")])])


def _require_equal(student: str, teacher: str, where: str) -> None:
    if student != teacher:
        pairs = enumerate(zip(student, teacher, strict=False))
        at = next((place for place, (a, b) in pairs if a != b), min(len(student), len(teacher)))
        shown = [text[max(0, at - 20) : at + 20] for text in (student, teacher)]
        raise ValueError(
            f"{where}: their chat templates differ; around character {at} the student's writes {shown[0]!r}, "
            f"the teacher's {shown[1]!r}; give both models the same template"
        )


_SAME = 0.1
"""Nats: the mean difference that other kernels and half precision leave between two copies of one model."""
_SURE = 5.0
"""Standard errors by which a shifted reading must fit better."""
_CLEARLY = 0.25
"""Correlation by which it must fit better, too."""
_ENOUGH = 100
"""Pairs of tokens below which nothing is concluded."""


def require_aligned(
    name: str, trajectories: Sequence[Trajectory], teacher_logprobs_N: Tensor, *, same_model: bool = False
) -> None:
    """Refuses scores that are shifted against the student's tokens, and a copy of the student that is none.

    Tokens that surprise one language model tend to surprise another. So if the teacher's log-probs follow the student's
    clearly better when they are read one token later or earlier (Fisher's z of the rank correlations, within turns),
    then they are shifted. By ranks, because after a slip of the student the teacher is surprised at what follows, and a
    few such tokens would decide the correlation of the values. Where the student is certain of every token (greedy
    sampling), or there are few tokens, nothing can be told.

    Args:
        name: of the teacher, for messages.
        trajectories: episodes that the student sampled.
        teacher_logprobs_N: of their sampled tokens, as ``Teacher.score`` gives them.
        same_model: the teacher is the student as it sampled, with the same prompt.

    Raises:
        ValueError: the scores do not fit; the message says in which way.
    """
    if not trajectories:
        return
    student_N = np.concatenate([played.logprobs[played.sampled] for played in trajectories]).astype(np.float64)
    # A number for each turn of the batch: no episode has 100,000 turns.
    turns = [
        played.turn[played.sampled].astype(np.int64) + 100_000 * number for number, played in enumerate(trajectories)
    ]
    teacher_N = teacher_logprobs_N.double().numpy().clip(min=-99.0)  # a token that the teacher forbids is -inf
    if same_model and (off := float(np.abs(teacher_N - student_N).mean())) > _SAME:
        raise ValueError(
            f"the teacher {name} is the student itself, but scores its tokens {off:.3f} nats off on average: the "
            "engine that samples and the teacher do not hold the same weights, or do not read the same tokens"
        )
    follows_N = np.concatenate(turns)
    inside = follows_N[1:] == follows_N[:-1]  # both tokens of a pair are of one turn
    straight, count = _correlation(student_N, teacher_N)
    for shift, student, teacher in (
        ("later", student_N[:-1], teacher_N[1:]),
        ("earlier", student_N[1:], teacher_N[:-1]),
    ):
        shifted, pairs = _correlation(student[inside], teacher[inside])
        error = np.sqrt(1 / max(count - 3, 1) + 1 / max(pairs - 3, 1))
        if pairs >= _ENOUGH and shifted > straight + _CLEARLY and _fisher(shifted) > _fisher(straight) + _SURE * error:
            raise ValueError(
                f"the scores of the teacher {name} are shifted by one token: they follow the student's log-probs with "
                f"a rank correlation of {shifted:.2f} when read one token {shift}, of {straight:.2f} as they are "
                f"({pairs} tokens)"
            )


def _correlation(student: NDArray[np.float64], teacher: NDArray[np.float64]) -> tuple[float, int]:
    """Spearman's rank correlation, 0 where one side does not vary; and the number of pairs."""
    if len(student) < 2 or np.ptp(student) == 0 or np.ptp(teacher) == 0:
        return 0.0, len(student)
    return float(np.corrcoef(_ranks(student), _ranks(teacher))[0, 1]), len(student)


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Place of each value in their order; equal ones share the mean of their places."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    mean: NDArray[np.float64] = np.cumsum(count) - (count - 1) / 2
    return mean[place]


def _fisher(correlation: float) -> float:
    """Fisher's z, whose standard error is 1/sqrt(n - 3)."""
    return float(np.arctanh(min(0.999999, max(-0.999999, correlation))))
