"""Pushing: one commit, nobody's content overwritten, and nothing lost when it fails."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from . import clients
from .processes import Client
from .server import Fault, Hub


@pytest.fixture
def saved(client: Client, student_folder: Path) -> Client:
    """A user with a saved student in the working folder."""
    shutil.copytree(student_folder, client.cwd / 'student')
    return client


def _push(repo_id: str = 'alice/s', model: str = 'student', **kwargs: Any) -> str:
    import timm_dfpt

    return timm_dfpt.push_student(model, repo_id, **kwargs)


def _push_model_again(repo_id: str) -> list[str]:
    """The same model twice, saved anew each time."""
    import timm_dfpt

    return [timm_dfpt.push_student(clients.make_model('test_resnet'), repo_id, license='mit') for _ in range(2)]


def test_the_same_again_makes_no_second_commit(hub: Hub, saved: Client) -> None:
    assert saved.run(_push) == f'{hub.endpoint}/alice/s'
    commits = [commit.title for commit in hub.repos['alice/s'].commits]
    assert commits == ['initial commit', 'Add model']
    saved.run(_push)
    saved.run(_push_model_again, 'alice/m')
    assert len(hub.repos['alice/s'].commits) == len(hub.repos['alice/m'].commits) == 2


def test_other_content_is_not_overwritten_without_force(hub: Hub, saved: Client) -> None:
    hub.add_repo('alice/s', {'README.md': b'# mine', 'notes.txt': b'kept'})
    refused = saved.fail(_push)
    assert refused.causes[0] == 'FileExistsError'
    assert 'README.md, notes.txt' in refused.error
    assert '--force' in refused.error
    assert hub.files('alice/s')['README.md'] == b'# mine'
    saved.run(_push, force=True)
    files = hub.files('alice/s')
    assert files['notes.txt'] == b'kept'
    assert b'How to load' in files['README.md']


def test_pull_request_branch_and_private(hub: Hub, saved: Client) -> None:
    hub.add_repo('alice/s', {'README.md': b'# mine'})
    assert saved.run(_push, create_pr=True).startswith(f'{hub.endpoint}/alice/s/discussions/')
    pull = next(ref for ref in hub.repos['alice/s'].refs if ref.startswith('refs/pr/'))
    assert 'model.safetensors' in hub.files('alice/s', pull)
    assert list(hub.files('alice/s')) == ['.gitattributes', 'README.md']
    saved.run(_push, 'alice/new', private=True, revision='exp/1')
    assert hub.repos['alice/new'].private
    assert 'model.safetensors' in hub.files('alice/new', 'exp/1')
    assert list(hub.files('alice/new')) == ['.gitattributes']


def test_dry_run_writes_the_exact_repository(hub: Hub, saved: Client) -> None:
    saved.run(_push, dry_run='dry')
    assert hub.requests == []
    written = {path.name: path.read_bytes() for path in (saved.cwd / 'dry').iterdir()}
    saved.run(_push)
    assert written == {name: data for name, data in hub.files('alice/s').items() if name != '.gitattributes'}
    assert saved.fail(_push, dry_run='dry').causes[0] == 'FileExistsError'


FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ('repos/create', {'kind': 'status', 'status': 500}, 'answered 500'),
    ('repos/create', {'kind': 'status', 'status': 429, 'headers': {'Retry-After': '7'}}, 'Wait 7 seconds'),
    ('repos/create', {'kind': 'drop'}, 'no answer'),
    ('validate-yaml', {'kind': 'status', 'status': 503}, 'answered 503'),
    ('POST .*/commit/', {'kind': 'status', 'status': 503}, 'answered 503'),
    ('POST .*/commit/', {'kind': 'status', 'status': 403}, 'answered 403'),
    ('POST .*/commit/', {'kind': 'status', 'status': 412}, 'changed in the meantime'),
    ('POST .*/commit/', {'kind': 'lost'}, 'no answer'),
]


def _push_again(count: int) -> list[str]:
    """Push while the Hub is in trouble, and again after it, with one trouble after the other."""
    import urllib.request

    from timm_dfpt.hub import HubError

    endpoint, errors = os.environ['HF_ENDPOINT'], []
    for i in range(count):
        urllib.request.urlopen(f'{endpoint}/worsen').close()
        try:
            errors.append(_push(f'alice/s{i}'))
        except HubError as error:
            errors.append(f'HubError: {error}')
        urllib.request.urlopen(f'{endpoint}/mend').close()
        _push(f'alice/s{i}')
    return errors


def test_failed_push_leaves_the_folder_and_a_second_try_finishes(hub: Hub, saved: Client) -> None:
    before = {path.name: path.read_bytes() for path in (saved.cwd / 'student').iterdir()}
    hub.next_faults = [Fault(where, **fault) for where, fault, _ in FAULTS]
    errors = saved.run(_push_again, len(FAULTS))
    assert {path.name: path.read_bytes() for path in (saved.cwd / 'student').iterdir()} == before
    for i, (_, _, words) in enumerate(FAULTS):
        assert f'Pushing to alice/s{i} failed' in errors[i]
        assert words in errors[i]
        assert 'model.safetensors' in hub.files(f'alice/s{i}')
        assert len(hub.repos[f'alice/s{i}'].commits) == 2


def _push_while_another_does(repo_id: str, after: str, **kwargs: Any) -> str:
    """Push, while somebody else's push lands after a certain request of ours."""
    from huggingface_hub import HfApi

    import timm_dfpt

    real, done = getattr(HfApi, after), []

    def late(self: Any, *args: Any, **options: Any) -> Any:
        answer = None if after == 'upload_folder' else real(self, *args, **options)
        if not done:
            done.append(1)
            _push(repo_id, license='apache-2.0', revision=kwargs.get('revision'))
        return real(self, *args, **options) if after == 'upload_folder' else answer

    setattr(HfApi, after, late)
    try:
        return timm_dfpt.push_student('student', repo_id, license='mit', **kwargs)
    except (timm_dfpt.hub.HubError, FileExistsError) as error:
        return f'{type(error).__name__}: {error}'


RACES: dict[str, tuple[str, dict[str, Any], str]] = {
    'before our commit': ('upload_folder', {}, 'HubError'),
    'before our commit, with force': ('upload_folder', {'force': True}, 'HubError'),
    'before our commit to a new branch': ('upload_folder', {'revision': 'exp'}, 'HubError'),
    'after the look': ('model_info', {}, 'HubError'),
    'before the look': ('create_repo', {}, 'FileExistsError'),
}


def _race_each() -> dict[str, str]:
    return {
        name: _push_while_another_does(f'alice/race{i}', after, **kwargs)
        for i, (name, (after, kwargs, _)) in enumerate(RACES.items())
    }


def test_a_push_at_the_same_time_is_not_replaced(hub: Hub, saved: Client) -> None:
    said = saved.run(_race_each)
    for i, (name, (_, kwargs, error)) in enumerate(RACES.items()):
        assert said[name].startswith(error), said[name]
        assert '\n' not in said[name]
        assert ('run the same again' if error == 'HubError' else '--force') in said[name]
        card = hub.files(f'alice/race{i}', kwargs.get('revision', 'main'))['README.md']
        assert b'license: apache-2.0' in card
        assert len(hub.repos[f'alice/race{i}'].commits) == 2


def test_storage_that_stumbles_is_retried(hub: Hub, saved: Client) -> None:
    hub.fault('PUT /lfs-store', 'status', times=1)
    hub.fault('POST .*preupload', 'drop', times=1)
    saved.run(_push)
    assert len(hub.repos['alice/s'].commits) == 2


def test_who_may_push(hub: Hub, saved: Client, tmp_path: Path) -> None:
    for token, words in ((None, 'answered 401'), ('hf_wrong', 'answered 401'), ('hf_alice_read', 'answered 403')):
        user = Client(hub.endpoint, tmp_path / str(token), token)
        failed = user.fail(_push, model=str(saved.cwd / 'student'))
        assert failed.causes[0] == 'HubError', failed.trace
        assert words in failed.error
        assert 'hf auth login' in failed.error
    foreign = saved.fail(_push, 'bob/s')
    assert foreign.causes[0] == 'HubError'
    assert 'answered 403' in foreign.error
    offline = saved.fail(_push, env={'HF_HUB_OFFLINE': '1'})
    assert offline.causes[0] == 'HubError'
    assert 'HF_HUB_OFFLINE=1' in offline.error
    malformed = saved.fail(_push, 'a/b/c')
    assert malformed.causes[0] == 'ValueError'
    assert 'repo_id must be' in malformed.error
    assert not hub.repos
