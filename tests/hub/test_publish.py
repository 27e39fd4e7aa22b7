"""A finished run goes to the Hub whole, once, and with cards whose every claim and code block holds."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from . import clients
from .processes import Client
from .server import Hub

BLOCK = re.compile(r'```(\w+)\n(.*?)```', re.DOTALL)


def _publish_each(commands: list[tuple[str, ...]]) -> list[dict[str, Any]]:
    return [_publish(*args) for args in commands]


def _publish(*args: str) -> dict[str, Any]:
    """Publish from the command line."""
    import contextlib
    import io

    from timm_dfpt.training.publish import main

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = main([str(arg) for arg in args])
    return {'code': code, 'stderr': errors.getvalue()}


@pytest.fixture
def trainer(hub: Hub, client: Client, finished_run: Path, student_folder: Path) -> Client:
    """A user whose teacher is on the Hub, with a finished run in the working folder."""
    hub.add_repo('alice/teacher', {path.name: path.read_bytes() for path in student_folder.iterdir()})
    shutil.copytree(finished_run, client.cwd / 'run')
    return client


def _run_blocks(blocks: list[str]) -> list[str]:
    """Execute the code of a card, each block on its own, and return what they print."""
    import contextlib
    import io

    clients.picture()
    printed = []
    for block in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(block, 'card', 'exec'), {'__name__': 'card'})
        printed.append(out.getvalue())
    return printed


def _files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


BOTH = ('run', '--push-to-hub', 'alice/student', '--push-prompt-path', 'alice/prompt', '--license', 'mit')


def test_run_is_published_once_and_its_cards_hold(hub: Hub, trainer: Client, tmp_path: Path) -> None:
    before = _files_of(trainer.cwd / 'run')
    dry = trainer.run(_publish, *BOTH, '--dry-run', 'dry')
    assert dry['code'] == 0, dry
    assert set(hub.repos) == {'alice/teacher'}
    for _ in range(2):
        assert trainer.run(_publish, *BOTH)['code'] == 0
    assert _files_of(trainer.cwd / 'run') == before
    contents = {}
    for kind, repo in (('student', 'alice/student'), ('prompt_path', 'alice/prompt')):
        files = hub.files(repo)
        assert files.pop('.gitattributes')
        assert files == _files_of(trainer.cwd / 'dry' / kind)
        assert len(hub.repos[repo].commits) == 2
        for name, data in files.items():
            assert str(tmp_path).encode() not in data, name
        contents[kind] = files
    for files in contents.values():
        with Image.open(io.BytesIO(files['curves.png'])) as image:
            image.load()
    record = json.loads(contents['student']['distillation.json'])
    assert record['prompt_path'] == 'alice/prompt'
    assert record['teacher_revision'] == hub.repos['alice/teacher'].at('main').oid
    assert record['recipe']['student_prompt_weight'] == 1.0

    reader = Client(hub.endpoint, tmp_path / 'reader', token=None)
    cards = {kind: files['README.md'].decode() for kind, files in contents.items()}
    for card in cards.values():
        assert re.findall(r'.*(?:More Information|\{\{|\}\}|\bNone\b|TODO).*', card) == []
        reader.run(clients.validate_card, card)
    data = {kind: ModelCard(card).data.to_dict() for kind, card in cards.items()}
    assert data['student']['library_name'] == 'timm'
    assert data['student']['license'] == data['prompt_path']['license'] == 'mit'
    assert data['student']['pipeline_tag'] == 'image-classification'
    assert 'base_model' not in data['student']
    assert data['prompt_path']['base_model'] == 'alice/teacher'
    assert data['prompt_path']['base_model_relation'] == 'adapter'
    summary = json.loads(before['summary.json'])
    (entry,) = data['student']['model-index']
    (result,) = entry['results']
    assert result['dataset'] == {'name': 'images', 'type': 'images', 'split': 'val'}
    measured = {metric['type']: metric['value'] for metric in result['metrics']}
    assert measured['accuracy'] == pytest.approx(summary['models']['student']['metrics']['top1'] / 100)
    assert len(measured) == len(summary['models']['student']['metrics'])
    for role in ('teacher', 'prompt_path', 'student'):
        assert f'| {summary["models"][role]["metrics"]["top1"]:.2f} |' in cards['student']
    assert '| kd baseline |' in cards['student']

    blocks = {kind: BLOCK.findall(card) for kind, card in cards.items()}
    code = {kind: [text for language, text in found if language == 'python'] for kind, found in blocks.items()}
    printed = reader.run(_run_blocks, code['student'])
    assert any(label in printed[0] for label in clients.LABELS)
    assert all(label in printed[1] for label in clients.LABELS)
    assert len(printed) == 3
    assert reader.run(_run_blocks, code['student'][:2], without=('timm_dfpt',)) == printed[:2]
    assert 'tensor([' in reader.run(_run_blocks, code['prompt_path'])[0]
    command = next(text for language, text in blocks['prompt_path'] if language == 'bash' and '--prompt-path' in text)
    assert reader.run(_parse, command)['prompt_path'] == 'alice/prompt'


def _parse(command: str) -> dict[str, Any]:
    import dataclasses
    import shlex

    from timm_dfpt.job.cli import parse_config

    words = shlex.split(command)
    assert words[:3] == ['accelerate', 'launch', 'train/distill.py']
    return dataclasses.asdict(parse_config(words[3:]))


def test_failed_upload_says_how_to_try_again(hub: Hub, trainer: Client) -> None:
    before = _files_of(trainer.cwd / 'run')
    hub.fault('POST .*/alice/student/commit', 'status', status=503)
    failed = trainer.run(_publish, *BOTH)
    assert failed['code'] == 1
    assert _files_of(trainer.cwd / 'run') == before
    command = re.search(r'to try again: timm-dfpt (\S+) (.*)', failed['stderr'])
    assert command is not None, failed['stderr']
    assert command[1] == 'publish'
    hub.faults.clear()
    assert trainer.run(_publish, *command[2].split())['code'] == 0
    assert len(hub.repos['alice/student'].commits) == len(hub.repos['alice/prompt'].commits) == 2


def test_what_cannot_be_published_is_said_before_anything_is_sent(hub: Hub, trainer: Client) -> None:
    unfinished = trainer.cwd / 'unfinished'
    shutil.copytree(trainer.cwd / 'run', unfinished)
    (unfinished / 'summary.json').unlink()
    plain = trainer.cwd / 'plain'
    shutil.copytree(trainer.cwd / 'run', plain)
    shutil.rmtree(plain / 'prompt_path')
    hub.add_repo('alice/taken', {'README.md': b'# mine'})
    cases = [
        (('run',), 'Name what to publish'),
        (('unfinished', '--push-to-hub', 'alice/s'), 'the run is not finished'),
        (('plain', '--push-prompt-path', 'alice/p'), 'has no prompt_path'),
        (('run', '--push-to-hub', 'alice/s', '--push-prompt-path', 'alice/s'), 'a repository each'),
        (('run', '--push-to-hub', 'a/b/c'), 'push_to_hub must be'),
        (('run', '--push-prompt-path', 'alice/p', '--base-model', 'local-dir:teacher'), 'base_model must be'),
        (('run', '--push-to-hub', 'alice/taken'), '--force'),
    ]
    outcomes = trainer.run(_publish_each, [args for args, _ in cases])
    for (_, words), outcome in zip(cases, outcomes, strict=True):
        assert outcome['code'] == 1
        assert words in outcome['stderr'], outcome['stderr']
        assert outcome['stderr'].count('\n') == 1
    assert set(hub.repos) == {'alice/teacher', 'alice/taken'}
    assert hub.files('alice/taken')['README.md'] == b'# mine'


def _grey_and_own() -> dict[str, list[str]]:
    """Cards of a one-channel student and of one whose architecture is timm_dfpt's."""
    import timm_dfpt

    grey = clients.make_model('resnet18', **clients.GREY_ARGS)
    timm_dfpt.push_student(grey, 'alice/grey', label_names=clients.LABELS, data_config=clients.GREY_DATA)
    timm_dfpt.push_student(clients.make_model('cifar_resnet8'), 'alice/own', label_names=clients.LABELS)
    return {}


def test_blocks_of_unusual_students(hub: Hub, client: Client, tmp_path: Path) -> None:
    client.run(_grey_and_own)
    for repo in ('alice/grey', 'alice/own'):
        card = hub.files(repo)['README.md'].decode()
        first = card[card.index('\n# ') :].split('\n## ')[0]
        for promise in ('import timm_dfpt.models', 'transformers asks for a\nnewer timm'):
            assert (promise in first) == (repo == 'alice/own'), first
        code = [text for language, text in BLOCK.findall(card) if language == 'python']
        reader = Client(hub.endpoint, tmp_path / repo.replace('/', '-'), token=None)
        printed = reader.run(_run_blocks, code)
        assert any(label in printed[0] for label in clients.LABELS)
        assert all(label in printed[1] for label in clients.LABELS)


def _hostile_card() -> None:
    import timm_dfpt

    names = ['a|b', '`x`', '{{ 7 * 7 }}', '---\nlicense: evil', '<script>']
    timm_dfpt.push_student(clients.make_model('test_resnet'), 'alice/s', label_names=names, dry_run='dry')


def test_class_names_cannot_break_a_card(client: Client) -> None:
    client.run(_hostile_card)
    card = (client.cwd / 'dry' / 'README.md').read_text()
    assert 'license' not in ModelCard(card).data.to_dict()
    assert '{{ 7 * 7 }}' in card
    assert '<script>' not in card.replace('\\<script\\>', '')


def _script(*args: str) -> str:
    """Run train/publish.py as a script, in this process."""
    import contextlib
    import io
    import runpy

    script = Path(__file__).parents[2] / 'train' / 'publish.py'
    sys.argv = [str(script), *args]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        runpy.run_path(str(script), run_name='__main__')
    return out.getvalue()


def test_script(trainer: Client) -> None:
    shown = trainer.run(_script, '--help')
    for flag in ('--push-to-hub', '--push-prompt-path', '--private', '--license', '--dry-run', '--force'):
        assert flag in shown
    assert trainer.run(_script, 'run', '--push-to-hub', 'alice/s', '--dry-run', 'dry') == 'student: dry/student\n'


def _export(run: Path) -> None:
    """Export the student of a finished run, as `--export onnx` does at its end."""
    import timm_dfpt

    student = timm_dfpt.load_student(run / 'student')
    images = torch.randn(8, *student.pretrained_cfg['input_size'])
    (run / 'exported').mkdir()
    for name, precision in (('model', 'float32'), ('model_fp16', 'float16'), ('model_quantized', 'int8')):
        path = run / 'exported' / f'{name}.onnx'
        timm_dfpt.export_onnx(student, path, precision=precision, calibration=images)


@pytest.mark.slow
def test_files_for_browsers_leave_the_student_as_it_is(hub: Hub, trainer: Client, tmp_path: Path) -> None:
    """To the byte, and timm and transformers load it as before."""
    pytest.importorskip('onnxruntime', reason="the extra 'onnx' is not installed")
    student = ('run', '--push-to-hub', 'alice/student')
    assert trainer.run(_publish, *student)['code'] == 0
    before = hub.files('alice/student')
    _export(trainer.cwd / 'run')
    named = trainer.run(_publish, 'run', '--push-onnx', 'alice/student-ONNX')
    assert 'give that, too, with --push-to-hub' in named['stderr']
    for _ in range(2):
        assert trainer.run(_publish, *student, '--push-onnx', 'alice/student-ONNX')['code'] == 0
    assert hub.files('alice/student') == before
    assert len(hub.repos['alice/student'].commits) == len(hub.repos['alice/student-ONNX'].commits) == 2
    files = hub.files('alice/student-ONNX')
    assert set(files) == {
        '.gitattributes', 'README.md', 'config.json', 'preprocessor_config.json', 'onnx/model.onnx',
        'onnx/model_fp16.onnx', 'onnx/model_quantized.onnx',
    }  # fmt: skip
    assert not any(str(tmp_path).encode() in data for data in files.values())
    card = ModelCard(files['README.md'].decode()).data.to_dict()
    assert card['library_name'] == 'transformers.js'
    assert (card['base_model'], card['base_model_relation']) == ('alice/student', 'quantized')
    labels = json.loads(files['config.json'])['id2label']
    assert labels == {str(i): name for i, name in enumerate(sorted(clients.LABELS))}
    reader = Client(hub.endpoint, tmp_path / 'reader', token=None)
    logits = reader.run(clients.load_with_timm, 'hf-hub:alice/student')
    loaded = reader.run(clients.load_with_transformers, 'alice/student')
    assert loaded['same_weights']
    assert loaded['logits'][0] == pytest.approx(logits[0], abs=1e-5)
