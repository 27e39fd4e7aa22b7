"""The default job needs no network, and reports nothing about itself."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Loaded by Python before anything else: whatever is not this machine cannot be looked up or connected to.
BLOCK = """
import os, socket
_connect, _connect_ex, _lookup = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

def _check(address):
    host = address[0] if isinstance(address, tuple) else 'localhost'
    if host not in ('localhost', '127.0.0.1', '::1', None):
        with open(os.environ['TRIED'], 'a') as file:
            file.write(f'{address}\\n')
        raise OSError(f'the network is blocked: {address}')

def connect(self, address):
    _check(address)
    return _connect(self, address)

def connect_ex(self, address):
    _check(address)
    return _connect_ex(self, address)

def getaddrinfo(host, *args, **kwargs):
    _check((host, 0))
    return _lookup(host, *args, **kwargs)

socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo = connect, connect_ex, getaddrinfo
"""
OFFLINE = (
    'HF_DATASETS_CACHE', 'HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE', 'TRANSFORMERS_OFFLINE', 'HF_HUB_DISABLE_TELEMETRY',
    'DO_NOT_TRACK',
)  # fmt: skip


@pytest.mark.parametrize(
    ('recipe', 'baselines'),
    [
        (None, ['kd']),
        pytest.param('quickstart_new_classes', ['supervised', 'kd'], marks=pytest.mark.slow),
    ],
)
def test_embedded_job_without_network(recipe, baselines, default_job, tmp_path):
    (tmp_path / 'block').mkdir()
    (tmp_path / 'block' / 'sitecustomize.py').write_text(BLOCK)
    # Nor without being asked what takes longer to import than all that a run does at its end.
    (tmp_path / 'block' / 'matplotlib.py').write_text("import os; open(os.environ['TRIED'], 'w').write(__name__)")
    environment = {key: value for key, value in os.environ.items() if key not in OFFLINE}
    environment |= {
        'PYTHONPATH': f'{tmp_path / "block"}{os.pathsep}{ROOT}',
        'TRIED': str(tmp_path / 'tried'),
        # Nothing that an earlier run has left in a cache.
        'HF_HOME': str(tmp_path / 'cache'),
    }
    job = [sys.executable, str(default_job / 'train' / 'distill.py'), '--epochs', '1']
    if recipe is None:
        job += ['--config', str(default_job / 'train' / 'recipes' / 'quickstart.yaml')]
    else:
        # Two epochs, as many as the recipe warms up.
        job += ['--epochs', '2', '--config', str(ROOT / 'train' / 'recipes' / f'{recipe}.yaml')]
    process = subprocess.run(job, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert process.returncode == 0, process.stderr
    assert list(tmp_path.glob('output/*/student/model.safetensors'))
    for baseline in baselines:
        assert list(tmp_path.glob(f'output/*/baselines/{baseline}/student/model.safetensors'))
    assert not (tmp_path / 'tried').exists(), (tmp_path / 'tried').read_text()


def test_the_block_works(tmp_path):
    (tmp_path / 'sitecustomize.py').write_text(BLOCK)
    code = "import urllib.request; urllib.request.urlopen('http://example.org')"
    environment = {**os.environ, 'PYTHONPATH': str(tmp_path), 'TRIED': str(tmp_path / 'tried')}
    process = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, timeout=60)
    assert 'the network is blocked' in process.stderr
    assert (tmp_path / 'tried').exists()
