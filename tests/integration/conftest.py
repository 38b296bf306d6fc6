"""One case, and what a run of it leaves that nothing happens to, for all tests of a process: they change neither."""

from __future__ import annotations

import pytest

from tests.integration.chaos import Case, Reference, make_case, undisturbed


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="session")
def reference(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return undisturbed(case, tmp_path_factory.mktemp("undisturbed") / "out")
