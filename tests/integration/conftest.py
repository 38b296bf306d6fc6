"""Session fixtures: a case, and the outputs of an undisturbed run of it. Tests must not change them."""

from __future__ import annotations

import pytest

from tests.integration.chaos import Case, Reference, make_case, undisturbed


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="session")
def reference(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return undisturbed(case, tmp_path_factory.mktemp("undisturbed") / "out")
