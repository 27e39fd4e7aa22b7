"""The test Hub must be a Hub to the real client before anything else is proven with it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from . import clients
from .processes import Client
from .server import Hub


def _life_of_a_repo(folder: str) -> dict[str, Any]:
    from huggingface_hub import HfApi, ModelCard, hf_hub_download

    api = HfApi()
    seen: dict[str, Any] = {'me': api.whoami()['name']}
    seen['url'] = str(api.create_repo('alice/life', private=True))
    api.create_repo('alice/life', exist_ok=True)
    commit = api.upload_folder(repo_id='alice/life', folder_path=folder, commit_message='first')
    seen['files'] = sorted(api.list_repo_files('alice/life'))
    seen['again'] = api.upload_folder(repo_id='alice/life', folder_path=folder).oid == commit.oid
    api.create_branch('alice/life', branch='exp/1')
    api.create_tag('alice/life', tag='v1.0')
    (Path(folder) / 'config.json').write_text('{"a": 2}')
    pull = api.upload_folder(repo_id='alice/life', folder_path=folder, create_pr=True)
    seen['pr'] = pull.pr_revision
    api.upload_folder(
        repo_id='alice/life', folder_path=folder, revision='exp/1', ignore_patterns='notes/*', delete_patterns='notes/*'
    )
    refs = api.list_repo_refs('alice/life')
    seen['refs'] = sorted(r.name for r in refs.branches + refs.tags)
    seen['configs'] = [
        Path(hf_hub_download('alice/life', 'config.json', revision=r)).read_text()
        for r in ('main', 'exp/1', 'v1.0', pull.pr_revision, commit.oid)
    ]
    info = api.model_info('alice/life', files_metadata=True)
    seen['lfs'] = {s.rfilename: s.lfs.sha256 for s in info.siblings or [] if s.lfs}
    seen['private'] = info.private
    seen['exists'] = [api.file_exists('alice/life', f, revision='exp/1') for f in ('config.json', 'notes/a.txt')]
    seen['titles'] = [c.title for c in api.list_repo_commits('alice/life')]
    seen['verified'] = not api.verify_repo_checksums('alice/life').mismatches
    clients.validate_card(str(ModelCard.load('alice/life')))
    api.delete_repo('alice/life')
    seen['gone'] = api.repo_exists('alice/life')
    return seen


def test_real_client_lives_with_it(client: Client, tmp_path: Path) -> None:
    folder = tmp_path / 'folder'
    (folder / 'notes').mkdir(parents=True)
    weights = bytes(range(256)) * 5000
    (folder / 'model.safetensors').write_bytes(weights)
    (folder / 'config.json').write_text('{"a": 1}')
    (folder / 'notes' / 'a.txt').write_text('')
    (folder / 'README.md').write_text('---\nlicense: mit\n---\n# x\n')
    seen = client.run(_life_of_a_repo, str(folder))
    files = ['.gitattributes', 'README.md', 'config.json', 'model.safetensors', 'notes/a.txt']
    assert seen == {
        'me': 'alice',
        'url': f'{client.endpoint}/alice/life',
        'files': files,
        'again': True,
        'pr': 'refs/pr/1',
        'refs': ['exp/1', 'main', 'v1.0'],
        'configs': ['{"a": 1}', '{"a": 2}', '{"a": 1}', '{"a": 2}', '{"a": 1}'],
        'lfs': {'model.safetensors': hashlib.sha256(weights).hexdigest()},
        'private': True,
        'exists': [True, False],
        'titles': seen['titles'],
        'verified': True,
        'gone': False,
    }
    assert 'first' in seen['titles']


def _info_and_file(repo_id: str) -> str:
    from huggingface_hub import hf_hub_download, model_info

    model_info(repo_id)
    return Path(hf_hub_download(repo_id, 'config.json')).read_text()


def test_tokens_private_and_gated(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo('alice/secret', {'config.json': b'1'}, private=True)
    hub.add_repo('alice/gated', {'config.json': b'2'}, gated=True)
    alice, bob, nobody, wrong = (
        Client(hub.endpoint, tmp_path / str(token), token) for token in ('hf_alice_read', 'hf_bob', None, 'hf_wrong')
    )
    assert alice.run(_info_and_file, 'alice/secret') == '1'
    assert bob.fail(_info_and_file, 'alice/secret').causes[0] == 'RepositoryNotFoundError'
    assert nobody.fail(_info_and_file, 'alice/secret').causes[0] == 'RepositoryNotFoundError'
    assert bob.fail(_info_and_file, 'alice/gated').causes[0] == 'GatedRepoError'
    assert '401' in wrong.fail(_info_and_file, 'alice/gated').error
    hub.allowed.add(('bob', 'alice/gated'))
    assert bob.run(_info_and_file, 'alice/gated') == '2'
