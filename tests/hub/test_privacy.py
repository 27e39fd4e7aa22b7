"""Nothing but the last part of a path of somebody's machine is published, however the path is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from timm_dfpt.hub.privacy import public, public_command
from timm_dfpt.training.publish import publish_run

from . import clients

PATHS = [
    '../../home/alice/client/photos',
    './alice/photos',
    '~/alice/photos',
    '~alice/photos/',
    '/home/alice/my client/photos',
    '/home/alice/a=b,c/photos',
    'file:///home/alice/photos',
    'file:/home/alice/photos',
    'https://token@alice.example/client/photos?token=alice',
    's3://alice/client/photos',
    'C:\\Users\\alice\\photos',
    'D:/Users/alice/photos',
    '\\\\server\\alice\\photos',
    'alice\\photos',
    '..\\..\\alice\\photos',
    'client/alice/photos',
]
PUBLIC = ['user/name', 'hf-hub:user/name@refs/pr/1', 'resnet18.a1_in1k', 'rand-m9-mstd0.5', 'n/a', 'a / b', '1e-3', '~']


def test_only_the_last_part_of_a_path_is_public() -> None:
    for path in PATHS:
        name = 'photos'
        assert public(path) == name, path
        assert public(f'local-dir:{path}') == public(f'LOCAL-DIR:{path}') == 'local-dir:photos', path
        assert public({'a': [path, {'b': (path, 1)}]}) == {'a': [name, {'b': [name, 1]}]}
        words = public_command(f'train/distill.py --dataset "{path.replace(chr(92), chr(92) * 2)}" --lr=0.1', {})
        assert words == 'train/distill.py --dataset photos --lr=0.1', words
    for text in (f'{{a: {PATHS[0]}, b: ["{PATHS[4]}"]}}', f'a={PATHS[2]}', f"see '{PATHS[8]}'"):
        assert 'alice' not in public(text)
        assert 'photos' in public(text)
    assert public(Path('/home/alice/photos')) == 'photos'
    assert public(PUBLIC) == PUBLIC
    words = public_command('train/distill.py --dataset alice/photos --output=alice/x.yaml', {'alice/photos': 'photos'})
    assert words == 'train/distill.py --dataset photos --output=x.yaml'


def test_relative_folders_are_no_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path('alice/photos').mkdir(parents=True)
    assert public({'dataset': 'alice/photos', 'teacher': 'alice/name'}, local=True) == {
        'dataset': 'photos', 'teacher': 'alice/name',
    }  # fmt: skip


def _secret_run(run: Path) -> None:
    """Make a finished run one of a user whose folders are all called secret."""
    options = yaml.safe_load((run / 'config.yaml').read_text())
    options |= {
        'dataset': 'secret/images',
        'teacher': 'local-dir:/home/secret/teacher',
        'student_kwargs': {'a': '../secret/x', 'b': ['~/secret/y', {'c': 'C:\\secret\\z'}]},
        'teacher_checkpoint': 'secret/w.safetensors',
        'output': 'secret/run',
    }
    (run / 'config.yaml').write_text(yaml.safe_dump(options))
    summary = json.loads((run / 'summary.json').read_text())
    summary['dataset'] = 'secret/images'
    summary['models']['teacher']['name'] = 'local-dir:secret/teacher'
    summary['command'] = (
        'train/distill.py --config recipes/secret/a.yaml --dataset secret/images --teacher Local-Dir:../secret/teacher '
        "--student-kwargs 'a={p: /home/secret/x}' b=~/secret/y --output=secret/run --teacher-cache-dir /secret/cache"
    )
    (run / 'summary.json').write_text(json.dumps(summary))
    record_file = run / 'student' / 'distillation.json'
    record = json.loads(record_file.read_text())
    record['recipe'] |= {**options, 'dataset': 'images', 'output': None, 'teacher_cache_dir': '/secret/cache'}
    record |= {'dataset': 'images', 'note': ['see /home/secret/notes', {'more': '../secret/more'}]}
    record_file.write_text(json.dumps(record))


def test_published_files_name_no_folder(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / 'run'
    shutil.copytree(finished_run, run)
    _secret_run(run)
    publish_run(run, 'alice/student', dry_run=tmp_path / 'dry')
    dry = tmp_path / 'dry' / 'student'
    files = {path.name: path.read_bytes() for path in dry.iterdir()}
    assert len(files) == 7
    for name, data in files.items():
        assert b'secret' not in data, (name, data[max(0, data.find(b'secret') - 80) :][:160])
    card = files['README.md'].decode()
    assert '--dataset images --teacher local-dir:teacher' in card


def _push_with_paths() -> None:
    import timm_dfpt

    facts: dict[str, Any] = {'data': '../secret/photos', 'more': [{'x': '/home/secret/x'}]}
    base = clients.make_model('test_resnet')
    timm_dfpt.save_student(base, 'secret', label_names=['/n/a', *clients.LABELS[1:]], distillation=facts)
    timm_dfpt.push_student('secret', 'alice/folder', dry_run='folder')
    timm_dfpt.push_student(base, 'alice/model', dry_run='model', distillation=facts)
    import timm

    teacher = timm_dfpt.wrap(timm.create_model('local-dir:secret', pretrained=True))
    timm_dfpt.push_prompt_path(teacher, 'alice/prompt', dry_run='prompt', training=facts)
    timm_dfpt.save_prompt_path(teacher, 'secret-prompt', training=facts)
    timm_dfpt.push_prompt_path('secret-prompt', 'alice/prompt', dry_run='saved')


def test_facts_that_users_give_name_no_folder(client: Any) -> None:
    client.run(_push_with_paths)
    for name in ('folder', 'model', 'prompt', 'saved'):
        for path in (client.cwd / name).iterdir():
            assert b'secret' not in path.read_bytes(), path
    assert json.loads((client.cwd / 'folder/config.json').read_text())['label_names'][0] == '/n/a'
    assert json.loads((client.cwd / 'model/distillation.json').read_text())['data'] == 'photos'
    assert json.loads((client.cwd / 'saved/prompt_config.json').read_text())['training']['data'] == 'photos'
