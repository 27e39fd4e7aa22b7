"""What somebody has who installs the wheel: every command, without the checkout and without a network."""
from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.training.test_offline import BLOCK, OFFLINE

ROOT = Path(__file__).parents[1]


def copy_of_checkout(target: Path) -> None:
    """Copy what git tracks."""
    names = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split('\0')):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name, follow_symlinks=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_alone(tmp_path: Path) -> None:
    copy_of_checkout(tmp_path / 'copy')
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '--quiet']
    build = ['wheel', '--no-deps', '--no-index', '--no-build-isolation', '-w', str(tmp_path), str(tmp_path / 'copy')]
    subprocess.run([*pip, *build], check=True)
    shutil.rmtree(tmp_path / 'copy')
    (wheel,) = tmp_path.glob('*.whl')
    assert wheel.stat().st_size < 15e6
    venv.create(tmp_path / 'venv')
    binaries = tmp_path / 'venv' / 'bin'
    python = str(binaries / 'python')
    subprocess.run([*pip, '--python', python, 'install', '--no-deps', '--no-index', str(wheel)], check=True)
    (packages,) = (tmp_path / 'venv' / 'lib').glob('python*/site-packages')
    # The packages that are installed here, but for what their own .pth files add, of which one may be this checkout.
    (packages / 'others.pth').write_text(sysconfig.get_path('purelib') + '\n')

    (tmp_path / 'block').mkdir()
    (tmp_path / 'block' / 'sitecustomize.py').write_text(BLOCK)
    environment = {key: value for key, value in os.environ.items() if key not in OFFLINE}
    environment |= {
        'PYTHONPATH': str(tmp_path / 'block'), 'TRIED': str(tmp_path / 'tried'), 'HF_HOME': str(tmp_path / 'cache'),
        'OMP_NUM_THREADS': '1',
    }  # fmt: skip
    (tmp_path / 'work').mkdir()

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=tmp_path / 'work', env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f'{words}\n{done.stdout}\n{done.stderr}'
        assert not (tmp_path / 'tried').exists(), (tmp_path / 'tried').read_text()
        return done.stdout

    def command(*words: str) -> str:
        return run(str(binaries / 'timm-dfpt'), *words)

    where = run(python, '-c', 'import timm_dfpt; print(timm_dfpt.__file__, timm_dfpt.__version__)').split()
    assert Path(where[0]).is_relative_to(packages)
    assert (packages / 'timm_dfpt' / 'py.typed').is_file()
    assert command('--version') == run(python, '-m', 'timm_dfpt', '--version') == f'timm-dfpt {where[1]}\n'
    command('distill', '--epochs', '1', '--baselines', '--output', 'run')
    summary = json.loads((tmp_path / 'work' / 'run' / 'summary.json').read_text())
    assert summary['command'] == 'timm-dfpt distill --epochs 1 --baselines --output run'
    command('evaluate', 'run', '--json', 'found.json')
    found = json.loads((tmp_path / 'work' / 'found.json').read_text())['splits']
    for role, model in summary['models'].items():
        assert found['test']['models'][role]['metrics'] == model['metrics']
        assert found['val']['models'][role]['metrics'] == model['val_metrics']
    assert '| ONNX int8 ' in command('export', 'run', '--formats', 'onnx', 'pt2')
    data = str(packages / 'timm_dfpt' / 'quickstart')
    tables = []
    for model in ('run', 'run/exported/model.onnx'):
        output = tmp_path / 'work' / f'{Path(model).stem}.csv'
        command('predict', model, data, '--split', 'validation', '--output', output.name)
        tables.append(list(csv.DictReader(output.open(newline=''))))
        command('evaluate', model, '--dataset', data, '--split', 'validation')
    assert [row['label_1'] for row in tables[0]] == [row['label_1'] for row in tables[1]]
    assert len(tables[0]) == summary['dataset_sizes']['val']
    assert command('report', 'run') == 'run/report.html\n'
    command('publish', 'run', '--push-to-hub', 'alice/student', '--push-prompt-path', 'alice/path', '--dry-run', 'dry')
    assert (tmp_path / 'work' / 'dry' / 'student' / 'README.md').is_file()
    new_classes = ['--config', 'quickstart_new_classes', '--epochs', '2']
    command('compare', *new_classes, '--methods', 'scratch', 'kd', '--seeds', '0', '--output', 'compared')
    assert (tmp_path / 'work' / 'compared' / 'report.html').is_file()
    config = str(ROOT / 'train' / 'accelerate' / 'multi_cpu.yaml')
    launch = [python, '-m', 'accelerate.commands.launch', '--config_file', config]
    run(*launch, '-m', 'timm_dfpt', 'distill', *new_classes, '--baselines', '--cpu', '--output', 'two')
    assert json.loads((tmp_path / 'work' / 'two' / 'summary.json').read_text())['processes'] == 2


def test_the_command_is_declared() -> None:
    tomllib = pytest.importorskip('tomllib', reason='Python 3.11 has it')
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))
    assert project['project']['scripts'] == {'timm-dfpt': 'timm_dfpt_cli:main'}
    assert 'timm_dfpt_cli' in project['tool']['setuptools']['py-modules']
    # Links in the checkout, copies in a wheel.
    for name in ('recipes/quickstart.yaml', 'quickstart/teacher/model.safetensors', 'quickstart/data'):
        assert (ROOT / 'timm_dfpt' / name).samefile(ROOT / 'train' / name)
