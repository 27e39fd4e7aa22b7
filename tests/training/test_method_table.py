"""One table of methods: a new one is a function and a row, and no other file knows a name."""
import ast
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import timm_dfpt
from timm_dfpt.hub.cards import RunFacts, student_card
from timm_dfpt.tasks.methods import ALIASES, KD_LOSSES, METHODS, Method, register_method
from timm_dfpt.training import compare
from timm_dfpt.training.run import main

PACKAGE = Path(timm_dfpt.__file__).parent


def squared_error(student_logits, teacher_logits, target, temperature, scale=1.0):
    """A loss that nobody has published."""
    return scale * F.mse_loss(student_logits / temperature, teacher_logits / temperature)


@pytest.fixture
def toy():
    register_method(Method('toy', 'Toy KD', squared_error))
    yield 'toy'
    del METHODS['toy'], KD_LOSSES['toy']


def options(tiny, folder, method=()):
    return [
        *tiny.common(folder), '--dataset', str(tiny.data), '--teacher', f'local-dir:{tiny.teacher}', '--epochs', '1',
        '--student', 'resnet18', '--student-kwargs', 'layers=[1, 1, 1, 1]', 'channels=[8, 8, 16, 16]', *method,
    ]  # fmt: skip


def test_a_function_and_a_row_are_a_method(toy, tiny, tmp_path):
    assert main(options(tiny, tmp_path / 'toy', ['--method', toy, '--kd-loss-kwargs', 'scale=0.5'])) == 0
    summary = json.loads((tmp_path / 'toy' / 'summary.json').read_text())
    assert summary['method'] == toy
    line = json.loads((tmp_path / 'toy' / 'metrics.jsonl').read_text())[toy]['train']
    assert line['loss'] == pytest.approx(line['task_loss'] + 2 * line['kd_loss'], rel=1e-5)
    config = json.loads((tmp_path / 'toy' / 'student' / 'config.json').read_text())
    card = student_card('user/toy', config, params=1, run=RunFacts(method=toy, teacher='user/teacher'))
    assert 'distilled from `user/teacher` with Toy KD' in card.text


def test_it_is_compared_and_is_a_loss_of_the_prompt_path(toy, tiny, tmp_path, capsys):
    arms = ['--methods', 'kd', toy, '--arm', f'dfpt-{toy}=dfpt,kd_loss={toy}', '--seeds', '1']
    assert compare.main([*options(tiny, tmp_path / 'compared'), *arms]) == 0
    result = json.loads((tmp_path / 'compared' / 'compare.json').read_text())
    assert list(result['arms']) == ['kd', 'toy', 'dfpt-toy']
    assert '| toy |' in capsys.readouterr().out


def test_without_its_row_it_is_refused(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(options(tiny, tmp_path / 'toy', ['--method', 'toy']))
    assert "invalid choice: 'toy'" in capsys.readouterr().err


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="method 'kd' exists already"):
        register_method(Method('kd', 'KD', squared_error))


def test_a_row_says_what_a_loss_needs():
    """Every loss takes hard labels, and refuses soft ones if and only if its row says so."""
    logits, soft = torch.randn(4, 5), torch.full((4, 5), 0.2)
    for name, loss in KD_LOSSES.items():
        assert loss(logits, logits.flip(0), torch.tensor([0, 1, 2, 3]), 2.0).isfinite()
        if METHODS[name].needs_hard_labels:
            with pytest.raises(ValueError, match='class indices'):
                loss(logits, logits, soft, 2.0)
        else:
            assert loss(logits, logits, soft, 2.0).isfinite()


def test_no_other_file_knows_the_name_of_a_method():
    """The prompt path has two variants, which the teacher knows; methods are made of them in the table."""
    allowed = {'tasks/methods.py': set(METHODS) | set(ALIASES)}
    variants = {method.variant for method in METHODS.values() if method.variant}
    found = []
    for path in sorted(PACKAGE.rglob('*.py')):
        name = path.relative_to(PACKAGE).as_posix()
        known = allowed.get(name, variants if name.startswith('teacher/') else set())
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Constant) and node.value in {*METHODS, *ALIASES} - known:
                found.append(f'{name}:{node.lineno}: {node.value!r}')
    assert not found
