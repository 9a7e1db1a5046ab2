"""Which sandbox is opened, and what is said where none works."""

import pytest

from opd_env.tools.sandbox import open_sandbox


def test_unknown_names_are_refused_with_a_suggestion():
    with pytest.raises(ValueError, match="Did you mean 'namespaces'"):
        open_sandbox("namespace")
    with pytest.raises(ValueError, match="min_level"):
        open_sandbox("auto", min_level="none")
