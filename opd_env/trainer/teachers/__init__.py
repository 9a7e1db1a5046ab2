"""Teachers: they score every token that the student sampled, in the context that the student had.

What it is: a local model, a server, several by task or in a mixture, one with other prompts or another tokenizer, and
a cache of scores.
Stands on: ``trainer.batch``, ``engines``, ``formats``.
Read first: ``base``; then ``make``, which opens the teachers that the settings name.
Who may change it: with an exact test of the shift: a log-prob that is off by one position distils noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd_env._lazy import lazy_face

if TYPE_CHECKING:
    from opd_env.trainer.teachers.base import LocalTeacher as LocalTeacher
    from opd_env.trainer.teachers.base import LogitsTeacher as LogitsTeacher
    from opd_env.trainer.teachers.base import Teacher as Teacher
    from opd_env.trainer.teachers.base import TopKTeacher as TopKTeacher
    from opd_env.trainer.teachers.make import Teachers as Teachers
    from opd_env.trainer.teachers.make import make_teachers as make_teachers

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "base": ("LocalTeacher", "LogitsTeacher", "Teacher", "TopKTeacher"),
        "make": ("Teachers", "make_teachers"),
    },
)
