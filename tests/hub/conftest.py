from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from . import clients, runs
from .processes import Client
from .server import Hub


@pytest.fixture(scope='session')
def server() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture
def hub(server: Hub) -> Hub:
    """The Hub on 127.0.0.1, empty."""
    server.reset()
    return server


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    """A machine of user `alice` with an empty cache."""
    return Client(hub.endpoint, tmp_path / 'alice')


@pytest.fixture(scope='session')
def student_folder(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved student."""
    maker = Client(server.endpoint, tmp_path_factory.mktemp('maker'))
    maker.run(clients.save_model, 'student')
    return maker.cwd / 'student'


@pytest.fixture(scope='session')
def finished_run(server: Hub, student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run whose teacher is alice/teacher, the student of `student_folder`."""
    server.reset()
    server.add_repo('alice/teacher', {path.name: path.read_bytes() for path in student_folder.iterdir()})
    trainer = Client(server.endpoint, tmp_path_factory.mktemp('trainer'))
    outcome = trainer.start(runs.make_run, timeout=240).outcome()
    assert outcome.value == 0, outcome
    return trainer.cwd / 'run'
