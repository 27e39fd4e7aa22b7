"""The main job as a newcomer runs it: the embedded default, shortened, as a process of its own."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import timm_dfpt

ROOT = Path(__file__).parents[2]
SHORT = ['--epochs', '1', '--batch-size', '50']
RECIPE = ['--config', 'train/recipes/quickstart.yaml']
LAUNCH = [sys.executable, '-m', 'accelerate.commands.launch', '--cpu', 'train/distill.py', *RECIPE]

# Plain timm, Pillow and pyarrow: nothing of ours can be imported here.
EVALUATE = """
import io, json, sys
sys.modules['timm_dfpt'] = None
import pyarrow.parquet as pq, timm, torch
from PIL import Image
model = timm.create_model('local-dir:' + sys.argv[1], pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
rows = pq.read_table('train/quickstart/data/test-00000-of-00001.parquet').to_pylist()
images = torch.stack([transform(Image.open(io.BytesIO(row['image']['bytes'])).convert('L')) for row in rows])
labels = torch.tensor([row['label'] for row in rows])
with torch.no_grad():
    logits = torch.cat([model(chunk) for chunk in images.split(1000)])
torch.save({'logits': logits, 'images': images[:8]}, sys.argv[2])
print(json.dumps({'top1': 100 * (logits.argmax(1) == labels).double().mean().item(),
                  'names': list(model.pretrained_cfg['label_names'])}))
"""


def run_job(default_job, output):
    return subprocess.run(
        [*LAUNCH, *SHORT, '--output', str(output)], cwd=default_job, env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip


@pytest.fixture(scope='module')
def default_run(default_job, tmp_path_factory):
    folder = tmp_path_factory.mktemp('default_run') / 'run'
    process = run_job(default_job, folder)
    assert process.returncode == 0, process.stderr
    return folder, process.stdout


def test_leaves_everything_a_run_folder_should_hold(default_run):
    folder, stdout = default_run
    for name in (
        'student/config.json',
        'student/model.safetensors',
        'prompt_path/prompt_config.json',
        'prompt_path/prompt_path.safetensors',
        'metrics.jsonl',
        'summary.json',
        'config.yaml',
        'curves.svg',
        'baselines/kd/student/model.safetensors',
    ):
        assert (folder / name).stat().st_size > 0, name
    summary = json.loads((folder / 'summary.json').read_text())
    assert set(summary['models']) == {'teacher', 'prompt_path', 'student'}
    assert summary['models']['teacher']['cost']['params'] > 10 * summary['models']['student']['cost']['params']
    options = yaml.safe_load((folder / 'config.yaml').read_text())
    assert options['epochs'] == 1
    assert options['cpu'], 'as the launcher was asked'
    for role, model in summary['models'].items():
        assert f'{model["metrics"]["top1"]:.2f}' in stdout, role
    # The verdict is computed from what was measured, whichever way it falls.
    kd, dfpt = summary['baselines']['kd']['metrics']['top1'], summary['models']['student']['metrics']['top1']
    assert f'{dfpt:.2f} against {kd:.2f}, {dfpt - kd:+.2f} points' in stdout


def test_two_runs_of_one_seed_are_bit_identical(default_job, default_run, tmp_path):
    first, second = default_run[0], tmp_path / 'second'
    process = run_job(default_job, second)
    assert process.returncode == 0, process.stderr
    for name in (
        'student/model.safetensors',
        'prompt_path/prompt_path.safetensors',
        'baselines/kd/student/model.safetensors',
        'metrics.jsonl',
        'curves.svg',
    ):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_student_loads_with_timm_alone_and_scores_what_was_reported(default_job, default_run, tmp_path):
    folder, _ = default_run
    process = subprocess.run(
        [sys.executable, '-c', EVALUATE, str(folder / 'student'), str(tmp_path / 'logits.pt')],
        cwd=default_job, capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    found = json.loads(process.stdout.splitlines()[-1])
    summary = json.loads((folder / 'summary.json').read_text())
    assert found['top1'] == pytest.approx(summary['models']['student']['metrics']['top1'], abs=1e-9)
    assert found['names'] == summary['class_names']
    saved = torch.load(tmp_path / 'logits.pt', weights_only=True)
    student = timm_dfpt.from_pretrained(folder / 'student').eval()
    with torch.no_grad():
        # Eight images, and alone in their batch: as the other process computes them when it is asked so.
        torch.testing.assert_close(student(saved['images']), saved['logits'][:8], rtol=1e-5, atol=1e-5)


def test_original_path_is_still_the_teacher(default_run):
    import timm

    folder, _ = default_run
    source = f'local-dir:{ROOT / "train" / "quickstart" / "teacher"}'
    plain = timm.create_model(source, pretrained=True).eval()
    teacher = timm_dfpt.DualForwardPathTeacher.from_pretrained(
        folder / 'prompt_path', model=timm.create_model(source, pretrained=True)
    ).eval()
    x = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain(x)
        assert torch.equal(teacher(x).original, expected)
        assert not torch.equal(teacher(x).prompt, expected)


def test_an_existing_run_is_never_overwritten(default_job, default_run):
    folder, _ = default_run
    before = {p: p.stat().st_mtime_ns for p in folder.rglob('*')}
    process = run_job(default_job, folder)
    assert process.returncode != 0
    assert 'exists and is not empty' in process.stderr
    assert '--resume' in process.stderr
    assert {p: p.stat().st_mtime_ns for p in folder.rglob('*')} == before


def test_supervised_teacher_then_student_from_a_folder_of_images(tmp_path):
    """The README's two steps, on a folder of class folders, for DFPT-KD+."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for split, count in (('train', 20), ('val', 8)):
        for label, name in enumerate(('cats', 'dogs', 'héron')):
            folder = tmp_path / 'photos' / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = (torch.rand(40, 48, 3, generator=generator) * 120 + 60 * label).byte().numpy()
                Image.fromarray(pixels).save(folder / f'{i}.png')
    from timm_dfpt.training.run import main

    common = ['--dataset', str(tmp_path / 'photos'), '--input-size', '3', '32', '32', '--batch-size', '15', '--cpu']
    common += ['--epochs', '2', '--crop-padding', '2', '--lr', '0.01']
    teacher, student = tmp_path / 'teacher', tmp_path / 'student'
    assert main([*common, '--method', 'supervised', '--student', 'test_resnet', '--output', str(teacher)]) == 0
    dfpt = ['--method', 'dfpt+', '--teacher', f'local-dir:{teacher}/student', '--student', 'test_efficientnet']
    dfpt += ['--teacher-kwargs', 'drop_rate=0.0']
    assert main([*common, *dfpt, '--output', str(student)]) == 0
    summary = json.loads((student / 'summary.json').read_text())
    assert summary['class_names'] == ['cats', 'dogs', 'héron']
    assert summary['eval_split'] == 'val'
    assert timm_dfpt.from_pretrained(student / 'student').pretrained_cfg['label_names'] == ['cats', 'dogs', 'héron']
