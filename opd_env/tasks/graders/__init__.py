"""Graders: whether an answer is right, by numbers, by text, or by mathematical value.

Stands on: ``tasks.base``. Read first: ``answers``. Who may change it: with a list of hacks that must not pass.
"""

from opd_env.tasks.graders.answers import grade_number, grade_text

__all__ = ["grade_number", "grade_text"]
