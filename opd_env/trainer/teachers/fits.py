"""Does a teacher read the student's tokens as the student does? Refused before the first step, with what differs.

Worked example::

    require_compatible(student, teacher, max_tokens=2048)      # silent, or one sentence on the first difference

Test it alone: ``pytest tests/trainer/teachers/test_base.py``
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opd_env.engines.models import LoadedModel
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
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    for token, index in sorted(ours.items(), key=lambda entry: entry[1]):
        if theirs.get(token) != index:
            found = "does not know it" if token not in theirs else f"gives it id {theirs[token]}"
            raise ValueError(f"{where}: the student's token {token!r} has id {index}, the teacher {found}; {advice}")
    for name in ("eos_token", "bos_token"):
        if getattr(student.tokenizer, name) != getattr(teacher.tokenizer, name):
            raise ValueError(
                f"{where}: {name} is {getattr(student.tokenizer, name)!r} for the student and "
                f"{getattr(teacher.tokenizer, name)!r} for the teacher; {advice}"
            )
    _require_equal_templates(student.tokenizer, teacher.tokenizer, where)
    chat, teacher_chat = (get_format(one.tokenizer, chat_format) for one in (student, teacher))
    _require_equal_tool_texts(chat, teacher_chat, where)
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


def _require_equal_tool_texts(student: TemplateFormat, teacher: TemplateFormat, where: str) -> None:
    """Tools, their results and calls: what the messages of ``_PROBES`` do not show."""
    texts = [
        chat.decode(
            [
                *chat.render_prompt(OPENING, [SCHEMA]),
                *chat.render_assistant(assistant("", [CALL])),
                *chat.render_tool_results([tool_message(CALL.name, "42")]),
            ]
        )
        for chat in (student, teacher)
    ]
    _require_equal(texts, where)


def _require_equal_templates(student: Any, teacher: Any, where: str) -> None:
    for messages in _PROBES:
        texts = [
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            for tokenizer in (student, teacher)
        ]
        _require_equal(texts, where)


def _require_equal(texts: Sequence[str], where: str) -> None:
    """Refuses when the student's text, the first, is not the teacher's, the second."""
    ours, theirs = texts
    if ours != theirs:
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        shown = [text[max(0, at - 20) : at + 20] for text in (ours, theirs)]
        raise ValueError(
            f"{where}: their chat templates differ; around character {at} the student's writes {shown[0]!r}, "
            f"the teacher's {shown[1]!r}; give both models the same template"
        )
