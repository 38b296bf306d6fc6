"""Storage modules import quickly: large packages only when they are needed."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["files", "steady_reader", "local_copies", "generations"])
def test_no_large_package_is_imported(module: str) -> None:
    code = (
        f"import sys, transforms.storage.{module}; "
        "print([name for name in ('apache_beam', 'google.cloud.storage', 'torch') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
