"""Prompt paths: round trips over the Hub, and the base model that must be the right one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from . import clients
from .processes import Client
from .server import Hub

TIMM_NAME = 'test_resnet.r160_in1k'


def _timm_repo(hub: Hub, client: Client) -> None:
    """Put a pretrained model where timm expects it."""
    client.run(_push_as_timm)
    hub.repos['timm/' + TIMM_NAME] = hub.repos.pop('alice/base')


def _push_as_timm() -> None:
    import timm_dfpt.hub

    timm_dfpt.hub.push_student(clients.make_model('test_resnet', num_classes=1000), 'alice/base')


@pytest.fixture
def base(hub: Hub, client: Client) -> str:
    """A teacher that was published under its own name."""
    client.run(clients.push_model, 'alice/teacher', 'test_resnet', label_names=clients.LABELS)
    return 'hf-hub:alice/teacher'


@pytest.fixture
def reader(hub: Hub, tmp_path: Path) -> Client:
    """Somebody else, with an empty cache."""
    return Client(hub.endpoint, tmp_path / 'reader', token=None)


@pytest.mark.parametrize('variant', ['dfpt', 'dfpt+'])
def test_round_trip_on_a_base_of_the_hub(hub: Hub, client: Client, reader: Client, base: str, variant: str) -> None:
    expected = client.run(clients.push_teacher, 'alice/prompt', base, variant)
    files = hub.files('alice/prompt')
    assert sorted(files) == ['.gitattributes', 'README.md', 'prompt_config.json', 'prompt_path.safetensors']
    config = json.loads(files['prompt_config.json'])
    assert config['base_model'] == base
    assert config['base_revision'] == hub.repos['alice/teacher'].at('main').oid
    assert config['label_names'] == clients.LABELS
    loaded = reader.run(clients.load_any, 'alice/prompt')
    assert loaded == {'type': 'DualForwardPathTeacher', **expected}
    assert expected['original'] != expected['prompt']


def test_round_trip_on_a_timm_name(hub: Hub, client: Client, reader: Client) -> None:
    _timm_repo(hub, client)
    expected = client.run(clients.push_teacher, 'alice/prompt', TIMM_NAME)
    config = json.loads(hub.files('alice/prompt')['prompt_config.json'])
    assert config['base_model'] == TIMM_NAME
    assert config['base_revision'] == hub.repos['timm/' + TIMM_NAME].at('main').oid
    hub.requests.clear()
    assert reader.run(clients.load_any, 'alice/prompt') == {'type': 'DualForwardPathTeacher', **expected}
    assert not [line for line in hub.requests if '.bin' in line or '.pth' in line]


def _push_twice(repo_id: str, base: str) -> tuple[Any, Any, str]:
    """Through the methods of the class."""
    from timm_dfpt import DualForwardPathTeacher

    teacher = clients.make_teacher(base, 'dfpt', num_classes=3)
    teacher.push_to_hub(repo_id, private=True, license='mit')
    loaded = DualForwardPathTeacher.from_pretrained(repo_id)
    loaded.save_pretrained('again')
    again = DualForwardPathTeacher.from_pretrained('again')
    return clients.outputs(teacher), clients.outputs(again), loaded.model.pretrained_cfg['hf_hub_id']


def test_methods_and_own_number_of_classes(hub: Hub, client: Client, base: str) -> None:
    pushed, again, origin = client.run(_push_twice, 'alice/prompt', base)
    assert pushed == again
    assert len(pushed['prompt'][0]) == 3
    assert origin == 'alice/teacher@' + hub.repos['alice/teacher'].at('main').oid
    config = json.loads((client.cwd / 'again' / 'prompt_config.json').read_text())
    assert config['base_revision'] == hub.repos['alice/teacher'].at('main').oid
    assert config['stages'] == json.loads(hub.files('alice/prompt')['prompt_config.json'])['stages']


def test_base_stays_at_its_commit_when_it_moves_on(hub: Hub, client: Client, reader: Client, base: str) -> None:
    expected = client.run(clients.push_teacher, 'alice/prompt', base)
    client.run(clients.push_model, 'alice/teacher', 'test_resnet', model={'seed': 9}, force=True)
    assert reader.run(clients.load_any, 'alice/prompt')['prompt'] == expected['prompt']


def _push_unpublished(repo_id: str, base: str, **kwargs: Any) -> dict[str, Any]:
    """A teacher whose weights are not those of the repository that it started from."""
    import timm_dfpt.hub

    teacher = clients.make_teacher(base)
    teacher.model.fc.weight.data.add_(1)
    timm_dfpt.hub.push_prompt_path(teacher, repo_id, **kwargs)
    return clients.outputs(teacher)


def _load_on(repo_id: str, name: str, seed: int) -> dict[str, Any]:
    from timm_dfpt import DualForwardPathTeacher

    return clients.outputs(DualForwardPathTeacher.from_pretrained(repo_id, model=clients.make_model(name, seed)))


def _load_on_changed(repo_id: str, base: str) -> dict[str, Any]:
    import timm

    import timm_dfpt.hub

    model = timm.create_model(base, pretrained=True)
    model.fc.weight.data.add_(1)
    return clients.outputs(timm_dfpt.hub.from_pretrained(repo_id, model=model))


def test_wrong_base_is_refused_with_both_fingerprints(hub: Hub, client: Client, reader: Client, base: str) -> None:
    unpublished = client.fail(_push_unpublished, 'alice/prompt', base)
    assert unpublished.causes[0] == 'ValueError'
    assert 'not the teacher that it was tuned on. Publish that teacher' in unpublished.error
    assert 'alice/prompt' not in hub.repos

    expected = client.run(_push_unpublished, 'alice/prompt', base, base_model='')
    nothing = reader.fail(clients.load_any, 'alice/prompt')
    assert nothing.causes[0] == 'ValueError'
    assert "pass that model, load_teacher('alice/prompt', model=...)" in nothing.error
    assert reader.run(_load_on_changed, 'alice/prompt', base) == expected

    weights = reader.fail(_load_on, 'alice/prompt', 'test_resnet', 5)
    assert weights.causes[0] == 'ValueError'
    found = json.loads(hub.files('alice/prompt')['prompt_config.json'])['base_fingerprint']
    assert 'Expected test_resnet:' in weights.error
    assert f'weights {found["weights"][:12]}' in weights.error
    assert 'Same architecture, other weights' in weights.error
    other = reader.fail(_load_on, 'alice/prompt', 'test_efficientnet', 5)
    assert 'Another architecture' in other.error


def _load_kinds() -> list[str]:
    from timm_dfpt.hub import from_pretrained, load_teacher

    errors = []
    for load, name in (
        (load_teacher, 'alice/teacher'),
        (from_pretrained, 'bob/peft'),
        (from_pretrained, 'bob/bert'),
        (from_pretrained, 'bob/empty'),
        (from_pretrained, 'bob/pickle'),
        (from_pretrained, 'not/a/repo'),
        (from_pretrained, './nowhere'),
    ):
        try:
            load(name)
        except (ValueError, OSError) as error:
            errors.append(f'{type(error).__name__}: {error}')
    return errors


def test_third_kinds_are_refused_by_name(hub: Hub, client: Client, base: str) -> None:
    hub.add_repo('bob/peft', {'adapter_config.json': b'{}', 'adapter_model.safetensors': b'x'})
    hub.add_repo('bob/bert', {'config.json': b'{"model_type": "bert"}', 'model.safetensors': b'x'})
    hub.add_repo('bob/empty')
    config = hub.files('alice/teacher')['config.json']
    hub.add_repo('bob/pickle', {'config.json': config, 'pytorch_model.bin': b'never read'})
    hub.requests.clear()
    teacher, peft, bert, empty, pickled, malformed, nowhere = client.run(_load_kinds)
    assert 'is a student, not a prompt path' in teacher
    assert 'a PEFT adapter (adapter_config.json)' in peft
    assert "a transformers model of type 'bert'" in bert
    assert "neither a prompt path (prompt_config.json) nor a timm model" in empty
    assert 'pytorch_model.bin, a pickle' in pickled
    assert not [line for line in hub.requests if line.endswith('.bin')]
    assert malformed.startswith('ValueError')
    assert 'user/name' in malformed
    assert nowhere.startswith('FileNotFoundError')


def _load_from(name: str, **kwargs: Any) -> dict[str, Any]:
    return clients.load_any(name, **kwargs)


def test_subfolder_revision_and_local_copy(hub: Hub, client: Client, reader: Client, base: str) -> None:
    expected = client.run(clients.push_teacher, 'alice/prompt', base, revision='v1')
    assert 'prompt_config.json' not in hub.files('alice/prompt')
    assert reader.run(clients.load_any, 'alice/prompt', revision='v1')['prompt'] == expected['prompt']
    assert reader.run(clients.load_any, 'hf-hub:alice/prompt@v1')['prompt'] == expected['prompt']
    missing = reader.fail(clients.load_any, 'alice/prompt', revision='v2')
    assert missing.causes[0] == 'HubError'
    assert 'no such revision' in missing.error
    files = hub.files('alice/prompt', 'v1')
    hub.add_repo('alice/many', {f'prompts/a/{name}': data for name, data in files.items()})
    assert reader.run(clients.load_any, 'alice/many', subfolder='prompts/a')['prompt'] == expected['prompt']
    outside = reader.fail(clients.load_any, 'alice/many', subfolder='../a')
    assert outside.causes[0] == 'ValueError'
    assert 'subfolder' in outside.error
    for name, data in files.items():
        (reader.cwd / name).write_bytes(data)
    assert reader.run(clients.load_any, '.')['prompt'] == expected['prompt']
    hub.requests.clear()
    assert reader.run(clients.load_any, '.', local_files_only=True)['prompt'] == expected['prompt']
    assert not hub.requests
