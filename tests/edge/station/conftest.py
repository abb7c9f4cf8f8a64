"""The state file of a service that runs in the test's folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from rbc_edge.station.state_file import StateFile


@pytest.fixture
def file(tmp_path: Path) -> Iterator[StateFile]:
    file = StateFile(tmp_path)
    yield file
    file.close()
