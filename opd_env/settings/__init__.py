"""Settings: from YAML files and the command line to frozen dataclasses, and back.

What it is: the one reader of every command's settings, and the checks of single fields.
Stands on: ``opd_env.errors`` alone. It knows no model, task or engine.
Read first: ``fields``, how a dataclass becomes settings; then ``read``, how files and options give its values.
Who may change it: anyone; every command reads through it, so run ``pytest tests/settings tests/cli``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd_env._lazy import lazy_face

if TYPE_CHECKING:
    from opd_env.settings.fields import ConfigError as ConfigError
    from opd_env.settings.fields import Settings as Settings
    from opd_env.settings.fields import build as build
    from opd_env.settings.fields import changed as changed
    from opd_env.settings.fields import import_files as import_files
    from opd_env.settings.fields import number as number
    from opd_env.settings.fields import read_yaml as read_yaml
    from opd_env.settings.fields import to_dict as to_dict
    from opd_env.settings.read import configure as configure

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "fields": ("ConfigError", "Settings", "build", "changed", "import_files", "number", "read_yaml", "to_dict"),
        "read": ("configure",),
    },
)
