"""The examples run as their first lines say, and what they save is loaded by timm."""
from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / 'examples'
SCRIPTS = sorted(EXAMPLES.glob('*.py'))
NOTEBOOK = EXAMPLES / 'quickstart.ipynb'
LAUNCH = [sys.executable, '-m', 'accelerate.commands.launch']
TWO_PROCESSES = [*LAUNCH, '--config_file', ROOT / 'train/accelerate/multi_cpu.yaml']
# Far above a guess (10 and 4 percent), and below what they reach.
LEAST = 60
CHANNELS = {'torchvision_model': 3}


def run(script: Path, folder: Path, launcher: list[str | Path]) -> str:
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'HF_HUB_OFFLINE': '1', 'CUDA_VISIBLE_DEVICES': ''}
    done = subprocess.run([*launcher, script], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.stem)
def test_first_lines(script: Path) -> None:
    lines = ast.get_docstring(ast.parse(script.read_text()))
    assert lines is not None
    shows, how, prints = lines.splitlines()
    assert shows.startswith('Show ')
    assert how.startswith('Run it with `')
    assert f'examples/{script.name}`' in how
    assert prints.startswith('Prints ')


def test_all_are_listed() -> None:
    listed = set(re.findall(r'\]\(([\w.]+)\)', (EXAMPLES / 'README.md').read_text()))
    assert listed == {path.name for path in EXAMPLES.iterdir() if path.is_file()} - {'README.md'}


def test_patch_is_what_runs() -> None:
    """What is added to timm's script is in the example that runs, line by line, but for what only timm's has."""
    patch = (EXAMPLES / 'timm_train.patch').read_text()
    added = {line[1:].strip() for line in patch.splitlines() if line.startswith('+') and not line.startswith('+++')}
    code = {line.partition('  #')[0].strip() for line in (EXAMPLES / 'timm_train.py').read_text().splitlines()}
    missing = {line for line in added - code if not re.match(r'(parser|verbose|help|if args|parameters,)', line)}
    assert not missing


@pytest.mark.slow
@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.stem)
def test_example(script: Path, tmp_path: Path) -> None:
    two = script.stem == 'distill_accelerate'
    printed = run(script, tmp_path, TWO_PROCESSES if two else [sys.executable])
    if two:
        assert '2 processes' in printed
    reached = re.findall(r'(?:student: |Acc@1: )([\d.]+)', printed)
    assert float(reached[-1]) > LEAST
    if script.stem == 'timm_train':
        return
    folder = tmp_path / 'output' / script.stem
    student = timm.create_model(f'local-dir:{folder}/student', pretrained=True).eval()
    assert student(torch.zeros(1, CHANNELS.get(script.stem, 1), 32, 32)).isfinite().all()
    assert (folder / 'prompt_path' / 'prompt_path.safetensors').is_file()


@pytest.mark.slow
def test_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip('nbformat')
    nbclient = pytest.importorskip('nbclient')
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    # It looks for the data in the folder above the one it runs in.
    (tmp_path / 'train').symlink_to(ROOT / 'train')
    (tmp_path / 'examples').mkdir()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {'metadata': {'path': str(tmp_path / 'examples')}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    plots = [out for cell in notebook.cells for out in cell.get('outputs', ()) if 'image/png' in out.get('data', ())]
    assert len(plots) == 3
    assert timm.create_model(f'local-dir:{tmp_path}/examples/output/quickstart/student', pretrained=True)


def test_notebook_is_small_and_has_plots() -> None:
    text = NOTEBOOK.read_text()
    assert len(text) < 300_000
    assert text.count('"image/png"') == 3
