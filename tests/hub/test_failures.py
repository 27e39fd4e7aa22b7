"""Every way in which a download can fail ends in success or in one clear error, with the cache intact.

`docs/HUB.md` has the same table for the reader.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from . import clients
from .processes import Client
from .server import Hub

OK = ''
INFO = 'GET /api/models/{repo}$'
HEAD = 'HEAD /{repo}/resolve/.*/model.safetensors'
GET = 'GET /{repo}/resolve/.*/model.safetensors'
CONFIG = 'GET /{repo}/resolve/.*/config.json'
# Name (as in the documentation), where, what, and words of the error; no words where loading succeeds.
FAULTS: list[tuple[str, str, dict[str, Any], str]] = [
    ('listing: 401', INFO, {'kind': 'status', 'status': 401}, 'the token is missing, wrong or expired'),
    ('listing: 403', INFO, {'kind': 'status', 'status': 403}, 'the token may not do this'),
    ('listing: 429', INFO, {'kind': 'status', 'status': 429, 'headers': {'Retry-After': '7'}}, 'Wait 7 seconds'),
    ('listing: 500', INFO, {'kind': 'status', 'status': 500}, 'the Hub is unavailable'),
    ('listing: 503', INFO, {'kind': 'status', 'status': 503}, 'the Hub is unavailable'),
    ('listing: dropped', INFO, {'kind': 'drop'}, 'Check the network'),
    ('listing: no answer', INFO, {'kind': 'stall'}, 'Check the network'),
    ('config: 503', CONFIG, {'kind': 'status', 'status': 503}, 'the Hub is unavailable'),
    ('config: flipped byte', CONFIG, {'kind': 'flip', 'after': 30}, 'force_download=True'),
    ('weights, first request: 503', HEAD, {'kind': 'status', 'status': 503}, 'answered 503'),
    ('weights, first request: dropped', HEAD, {'kind': 'drop'}, 'Check the network'),
    ('weights: 404', GET, {'kind': 'status', 'status': 404}, 'answered 404'),
    ('weights: 429, once', GET, {'kind': 'status', 'status': 429, 'times': 1}, OK),
    ('weights: 500', GET, {'kind': 'status', 'status': 500}, 'the Hub is unavailable'),
    ('weights: 503', GET, {'kind': 'status', 'status': 503}, 'the Hub is unavailable'),
    ('weights: dropped', GET, {'kind': 'drop'}, 'Check the network'),
    ('weights: cut short, once', GET, {'kind': 'truncate', 'after': 700_000, 'times': 1}, OK),
    ('weights: cut short, always', GET, {'kind': 'truncate', 'after': 700_000}, 'Check the network'),
    ('weights: connection reset', GET, {'kind': 'reset', 'after': 700_000}, 'Check the network'),
    ('weights: flipped byte', GET, {'kind': 'flip', 'after': 900_000}, 'force_download=True'),
]


@pytest.fixture
def files(student_folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in student_folder.iterdir()}


def _load_again_and_again(names: list[str]) -> dict[str, dict[str, Any]]:
    """Load while the Hub is in trouble, after it, and (for what the cache may hold damaged) as the error says."""
    import os
    import urllib.request

    import timm_dfpt.hub

    def load(name: str, **kwargs: Any) -> Any:
        try:
            return clients.load_any(name, **kwargs)
        except timm_dfpt.hub.HubError as error:
            return f'HubError: {error}'
        except Exception as error:
            raise AssertionError(name) from error

    seen: dict[str, dict[str, Any]] = {}
    for name in names:
        seen[name] = {'in trouble': load(name)}
        urllib.request.urlopen(f'{os.environ["HF_ENDPOINT"]}/mend/{name}').close()
        seen[name]['afterwards'] = load(name)
        if isinstance(seen[name]['afterwards'], str):
            seen[name]['forced'] = load(name, force_download=True)
            seen[name]['at last'] = load(name)
    return seen


def test_faults_on_a_cold_cache(hub: Hub, tmp_path: Path, files: dict[str, bytes]) -> None:
    # A pickle stands ready, and must not be taken in place of safetensors that are unavailable.
    for i, (_, where, fault, _) in enumerate(FAULTS):
        hub.add_repo(f'alice/fault{i:02}', {**files, 'pytorch_model.bin': b'never read'})
        hub.fault(where.format(repo=f'alice/fault{i:02}'), **fault)
    hub.add_repo('alice/sound', files)
    expected = Client(hub.endpoint, tmp_path / 'sound', token=None).run(clients.load_any, 'alice/sound')
    kinds = {f'alice/fault{i:02}': fault['kind'] for i, (_, _, fault, _) in enumerate(FAULTS)}
    waiting = [name for name, kind in kinds.items() if kind == 'stall']
    calm = [name for name in kinds if name not in waiting]
    # Several at a time: some wait for a Hub that does not answer.
    pending = [
        Client(hub.endpoint, tmp_path / group[0], token=None).start(_load_again_and_again, group, env=env, timeout=180)
        for group, env in ((waiting, {'HF_HUB_ETAG_TIMEOUT': '3'}), *((calm[i::5], {}) for i in range(5)))
    ]
    seen_of: dict[str, dict[str, Any]] = {}
    for process in pending:
        outcome = process.outcome()
        assert not outcome.errors, outcome.trace
        seen_of |= outcome.value
    assert seen_of.keys() == kinds.keys()
    for repo, (name, _, fault, words) in zip(kinds, FAULTS, strict=True):
        seen = seen_of[repo]
        if words == OK:
            assert seen['in trouble'] == expected, f'{name}: {seen}'
        else:
            assert words in seen['in trouble'], f'{name}: {seen}'
        if fault['kind'] == 'flip':
            assert 'force_download=True' in seen['afterwards']
            assert seen['forced'] == seen['at last'] == expected
        else:
            assert seen['afterwards'] == expected, f'{name}: {seen}'
    assert not [line for line in hub.requests if line.endswith('.bin')]


def test_who_may_load(hub: Hub, tmp_path: Path, files: dict[str, bytes]) -> None:
    hub.add_repo('alice/private', files, private=True)
    hub.add_repo('alice/gated', files, gated=True)
    alice, bob, nobody = (Client(hub.endpoint, tmp_path / str(t), t) for t in ('hf_alice', 'hf_bob', None))
    cases = [
        (nobody, 'alice/private', {}, 'the repository does not exist, or it is private'),
        (bob, 'alice/private', {}, 'the repository does not exist, or it is private'),
        (nobody, 'alice/missing', {}, 'the repository does not exist'),
        (bob, 'alice/gated', {}, 'the repository is gated. Ask for access'),
        (nobody, 'alice/gated', {'token': 'hf_wrong'}, 'the token is missing, wrong or expired'),
        (alice, 'alice/private', {'revision': 'v9'}, 'Loading alice/private@v9 failed: the repository has no such rev'),
        (alice, 'hf-hub:alice/private@v8', {}, 'Loading alice/private@v8 failed: the repository has no such revision'),
    ]
    for user, name, kwargs, words in cases:
        failed = user.fail(clients.load_any, name, **kwargs)
        assert failed.causes[0] == 'HubError', failed.trace
        assert words in failed.error, failed.error
        assert 'hf_' not in failed.error.replace('hf_hub', '')
    assert alice.run(clients.load_any, 'alice/private') == nobody.run(
        clients.load_any, 'alice/private', token='hf_alice_read'
    )


DOWN = {'HF_ENDPOINT': 'http://127.0.0.1:9'}
OFFLINE = {'HF_HUB_OFFLINE': '1'}


def test_without_network(hub: Hub, client: Client, tmp_path: Path, files: dict[str, bytes]) -> None:
    hub.add_repo('alice/s', files)
    cold = Client(hub.endpoint, tmp_path / 'cold', token=None)
    for env, kwargs, words in (
        (DOWN, {}, 'Check the network'),
        (OFFLINE, {}, 'HF_HUB_OFFLINE=1 forbids downloads'),
        ({}, {'local_files_only': True}, 'local_files_only=False'),
    ):
        failed = cold.fail(clients.load_any, 'alice/s', env=env, **kwargs)
        assert failed.causes[0] == 'HubError', failed.trace
        assert words in failed.error, failed.error
    expected = client.run(clients.load_any, 'alice/s')
    before = clients.cached_files(str(client.home))
    hub.requests.clear()
    assert client.run(clients.load_any, 'alice/s', env=OFFLINE) == expected
    assert client.run(clients.load_any, 'alice/s', local_files_only=True) == expected
    assert hub.requests == []
    warned = client.start(clients.load_any, 'alice/s', env=DOWN).outcome()
    assert warned.value == expected, warned.trace
    assert any('using the cached copy of alice/s' in line for line in warned.logs)
    hub.fault('.', 'status', status=503)
    busy = client.start(clients.load_any, 'alice/s').outcome()
    assert busy.value == expected, busy.trace
    assert any('503' in line and 'using the cached copy' in line for line in busy.logs)
    forced = client.fail(clients.load_any, 'alice/s', force_download=True)
    assert forced.causes[0] == 'HubError'
    assert clients.cached_files(str(client.home)) == before


def _flip_in_cache(home: str) -> None:
    for blob in Path(home).glob('hub/models--*/blobs/*'):
        data = bytearray(blob.read_bytes())
        data[len(data) // 2] ^= 0xFF
        blob.write_bytes(bytes(data))


def test_damaged_cache_is_noticed_offline_too(hub: Hub, client: Client, files: dict[str, bytes]) -> None:
    hub.add_repo('alice/s', files)
    expected = client.run(clients.load_any, 'alice/s')
    _flip_in_cache(str(client.home))
    for env in ({}, OFFLINE):
        damaged = client.fail(clients.load_any, 'alice/s', env=env)
        assert damaged.causes[0] == 'HubError'
        assert 'is damaged' in damaged.error
        assert 'force_download=True' in damaged.error
    assert client.run(clients.load_any, 'alice/s', force_download=True) == expected


def test_hub_that_changes_during_the_download(hub: Hub, client: Client, files: dict[str, bytes]) -> None:
    repo = hub.add_repo('alice/s', files)
    old = repo.at('main')
    repo.commit('refs/heads/main', old.files, 'newer', 'alice')
    hub.listed['alice/s'] = old.oid
    failed = client.fail(clients.load_any, 'alice/s')
    assert 'changed while it was being downloaded' in failed.error


def _load_as_nobody(name: str, writable: str) -> dict[str, Any]:
    """root may write everywhere, so it has to become somebody else first."""
    os.environ['HOME'] = writable
    # All that is imported late is imported now: the other user may not be able to read this environment.
    clients.load_any(name, cache_dir='warm')
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    return clients.load_any(name)


@pytest.fixture
def open_client(hub: Hub) -> Iterator[Client]:
    """A client whose folders other users can reach; pytest's own are closed to them."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    yield Client(hub.endpoint, root / 'user', token=None)
    for folder in (root, *(p for p in root.rglob('*') if p.is_dir())):
        folder.chmod(0o755)
    shutil.rmtree(root)


def _set_mode(root: Path, folders: int, files: int) -> None:
    for path in (*root.rglob('*'), root):
        if not path.is_symlink():
            path.chmod(folders if path.is_dir() else files)


def test_read_only_cache(hub: Hub, open_client: Client, files: dict[str, bytes]) -> None:
    hub.add_repo('alice/s', files)
    hub.add_repo('alice/other', files)
    expected = open_client.run(clients.load_any, 'alice/s')
    before = clients.cached_files(str(open_client.home))
    _set_mode(open_client.home, 0o555, 0o444)
    scratch = str(open_client.cwd)
    assert open_client.run(_load_as_nobody, 'alice/s', scratch) == expected
    cold = open_client.fail(_load_as_nobody, 'alice/other', scratch)
    assert cold.causes[0] == 'HubError', cold.trace
    assert 'the cache is not writable' in cold.error
    assert 'HF_HOME or cache_dir=' in cold.error
    assert clients.cached_files(str(open_client.home)) == before


def _load_with_small_files(name: str, most: int) -> dict[str, Any]:
    """A limit on the size of files is the full disk that needs no disk."""
    import resource
    import signal

    import timm_dfpt  # noqa: F401

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    return clients.load_any(name)


def test_full_disk(hub: Hub, client: Client, files: dict[str, bytes]) -> None:
    hub.add_repo('alice/s', files)
    full = client.fail(_load_with_small_files, 'alice/s', 500_000)
    assert full.causes[0] == 'HubError', full.trace
    assert 'the disk is full' in full.error
    assert not [path for path in client.home.rglob('*') if path.name.endswith('.incomplete')]
    expected = client.run(clients.load_any, 'alice/s')
    assert client.run(clients.load_any, 'alice/s', local_files_only=True) == expected


def _save_with_small_files(folder: str, most: int) -> None:
    import resource
    import signal

    import timm_dfpt

    model = clients.make_model('test_resnet', seed=1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    timm_dfpt.save_student(model, folder)


def test_full_disk_on_saving_keeps_what_was_there(client: Client, student_folder: Path) -> None:
    shutil.copytree(student_folder, client.cwd / 'student')
    before = {path.name: path.read_bytes() for path in student_folder.iterdir()}
    client.fail(_save_with_small_files, 'student', 500_000)
    assert {path.name: path.read_bytes() for path in (client.cwd / 'student').iterdir()} == before


def test_base_that_cannot_be_had(hub: Hub, client: Client, tmp_path: Path) -> None:
    client.run(clients.push_model, 'alice/teacher', 'test_resnet')
    expected = client.run(clients.push_teacher, 'alice/prompt', 'hf-hub:alice/teacher')
    reader = Client(hub.endpoint, tmp_path / 'reader', token=None)
    hub.fault('GET /alice/teacher/.*safetensors', 'status', status=503)
    failed = reader.fail(clients.load_any, 'alice/prompt')
    assert failed.causes[0] == 'HubError'
    assert re.search('alice/teacher@[0-9a-f]{40} failed: the Hub answered 503', failed.error), failed.error
    hub.faults.clear()
    hub.repos['alice/teacher'].private = True
    private = reader.fail(clients.load_any, 'alice/prompt')
    assert 'The base model of alice/prompt' in private.error
    hub.repos['alice/teacher'].private = False
    assert reader.run(clients.load_any, 'alice/prompt')['prompt'] == expected['prompt']
    assert reader.run(clients.load_any, 'alice/prompt', env=OFFLINE)['prompt'] == expected['prompt']
    assert reader.run(clients.load_any, 'alice/prompt', env=DOWN)['prompt'] == expected['prompt']


def test_documentation_tells_what_was_tried() -> None:
    text = (Path(__file__).parents[2] / 'docs' / 'HUB.md').read_text()
    for name, _, _, words in FAULTS:
        ends_in = re.search(rf'^\| {re.escape(name)} \| (loads|error)', text, re.MULTILINE)
        assert ends_in is not None, name
        assert (ends_in[1] == 'loads') == (words == OK), name
