"""Reports: what a person sees of a run, an evaluation or a comparison.

What it is: self-contained HTML pages without scripts, transcripts, charts, the headline, the model card, and the
progress display of commands.
Stands on: ``evaluation`` and ``episode``. Everything a model wrote is text here, never markup.
Read first: ``page``.
Who may change it: anyone who looks at the page afterwards, light and dark, wide and narrow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd_env._lazy import lazy_face

if TYPE_CHECKING:
    from opd_env.report.comparison_page import write_comparison as write_comparison
    from opd_env.report.model_card import publish as publish
    from opd_env.report.page import write_report as write_report

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "comparison_page": ("write_comparison",),
        "model_card": ("publish",),
        "page": ("write_report",),
    },
)
