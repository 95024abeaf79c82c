"""What pytest is told where an option of ours cannot be had."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest


def test_programs_cannot_be_kept_without_pytests_cache(request):
    conftest = request.config.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))
    without_cache = SimpleNamespace(option=SimpleNamespace(markexpr="", keep_programs=True))
    with pytest.raises(pytest.UsageError, match="leave out -p no:cacheprovider"):
        conftest.pytest_configure(without_cache)
