"""Exported files say what timm says, and a run that exports loses nothing when that fails."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.utils import reparameterize_model

import timm_dfpt
from tests.tiny import CLASSES, DATA_CONFIG, RESNET, TinyJob
from timm_dfpt.deploy import measure, onnx_files
from timm_dfpt.deploy.form import deployed_form, has_deployed_form
from timm_dfpt.training import report
from timm_dfpt.training.run import main

onnxruntime = pytest.importorskip('onnxruntime', reason="the extra 'onnx' is not installed")
onnx = pytest.importorskip('onnx', reason="the extra 'onnx' is not installed")
pytest.importorskip('onnxscript', reason="the extra 'onnx' is not installed")


def trained_like(model: torch.nn.Module) -> torch.nn.Module:
    """A model whose BatchNorms have statistics of their own."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def outputs(path: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: images})[0])


def facts_of(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def difference(found: np.ndarray, expected: torch.Tensor) -> float:
    return float(np.abs(found - expected.numpy()).max() / expected.abs().max())


@pytest.fixture(scope='module')
def exported(tiny: TinyJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp('exported') / 'run'
    argv = tiny.argv(output, '--epochs', '1', '--method', 'kd', '--export', 'onnx', '--include-preprocessing')
    assert main(argv) == 0
    return output


def test_files_of_a_run_take_pixels_and_say_what_timm_says(exported: Path, tiny: TinyJob) -> None:
    """Of the very images on disk, whose pixels need no resizing."""
    from PIL import Image  # as anybody who has the file would

    student = timm.create_model(f'local-dir:{exported / "student"}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(student))
    files = sorted((tiny.data / 'val').rglob('*.png'))
    images = [Image.open(file).convert('RGB') for file in files]
    pixels = np.stack([np.asarray(image).transpose(2, 0, 1) for image in images])
    with torch.no_grad():
        expected = student(torch.stack([transform(image) for image in images]))
    labels = np.array([CLASSES.index(file.parent.name) for file in files])
    rows = {row['format']: row for row in json.loads((exported / 'summary.json').read_text())['exports']}
    bounds = {'ONNX float32': 1e-4, 'ONNX float16': 2e-2, 'ONNX int8': 0.3}
    assert set(rows) == {'timm', *bounds}
    for name, bound in bounds.items():
        row, path = rows[name], exported / rows[name]['file']
        # A batch of one, too: its dimension is free.
        found = np.concatenate([outputs(path, pixels[:1]), outputs(path, pixels[1:])])
        assert row['largest_difference'] == pytest.approx(difference(found, expected), rel=0.2, abs=1e-6)
        assert row['largest_difference'] < bound
        assert row['top1'] == pytest.approx(100 * (found.argmax(1) == labels).mean())
        assert row['agreement'] == pytest.approx(100 * (found.argmax(1) == expected.argmax(1).numpy()).mean())
        assert row['bytes'] == path.stat().st_size
        facts = facts_of(path)
        assert json.loads(facts['class_names']) == list(CLASSES)
        assert json.loads(facts['std']) == [0.25] * 3
        assert facts['preprocessing'] == 'included'
    kinds = {node.op_type for node in onnx.load(exported / rows['ONNX int8']['file']).graph.node}
    assert {'QuantizeLinear', 'DequantizeLinear'} <= kinds


def test_a_failed_export_is_a_row_and_loses_nothing(exported, tiny, tmp_path, monkeypatch, caplog, capsys) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError('Unsupported:\noperator')

    monkeypatch.setattr(measure, 'to_float16', broken)
    monkeypatch.setattr(measure, 'to_int8', broken)
    argv = tiny.argv(exported, '--epochs', '1', '--method', 'kd', '--export', 'onnx', '--resume')
    assert main(argv) == 0
    rows = {row['format']: row for row in json.loads((exported / 'summary.json').read_text())['exports']}
    assert rows['ONNX float16'] == {
        'format': 'ONNX float16', 'file': None, 'note': 'failed: RuntimeError: Unsupported: operator'
    }  # fmt: skip
    assert rows['ONNX float32']['agreement'] == 100
    assert not (exported / 'exported' / 'model_fp16.onnx').exists()
    assert facts_of(exported / 'exported' / 'model.onnx')['preprocessing'] == 'described'
    assert '| ONNX float16 | -' in capsys.readouterr().out


def test_without_the_extra_nothing_is_trained(tiny, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(onnx_files.importlib.util, 'find_spec', lambda name: None if name == 'onnx' else object())
    assert main(tiny.argv(tmp_path / 'run', '--export', 'onnx')) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: export=onnx needs onnx: pip install 'timm_dfpt[onnx]'"
    )
    assert not (tmp_path / 'run' / 'metrics.jsonl').exists()


def test_arguments_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = timm.create_model('resnet18', **RESNET).eval()
    with pytest.raises(ValueError, match="precision must be 'float32'"):
        timm_dfpt.export_onnx(model, tmp_path / 'x.onnx', precision='int4')
    with pytest.raises(ValueError, match='precision=int8 needs calibration='):
        timm_dfpt.export_onnx(model, tmp_path / 'x.onnx', precision='int8')
    assert not list(tmp_path.iterdir())


def test_form_that_is_deployed() -> None:
    """timm's own folding is the reference."""
    model = trained_like(timm.create_model('mobileone_s0', num_classes=3))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, found = model(images), deployed_form(model)(images)
    assert difference(found.numpy(), expected) < 1e-5
    count = sum(p.numel() for p in deployed_form(model).parameters())
    assert count == sum(p.numel() for p in reparameterize_model(model).parameters())
    assert count < sum(p.numel() for p in model.parameters()) / 2
    assert has_deployed_form(model)
    assert not has_deployed_form(timm.create_model('resnet18', **RESNET))


@pytest.mark.slow
@pytest.mark.parametrize('precision', ['float32', 'float16', 'int8', 'pt2'])
@pytest.mark.parametrize(
    'name',
    ['test_vit', 'test_convnext', 'test_efficientnet', 'test_byobnet', 'test_nfnet', 'mobileone_s0', 'repvit_m0_9',
     'levit_128s', 'mobilenetv3_small_050', 'cifar_resnet8'],
)  # fmt: skip
def test_families(name: str, precision: str, tmp_path: Path) -> None:
    model = trained_like(timm.create_model(name, num_classes=7))
    images = torch.randn(32, *timm.data.resolve_model_data_config(model)['input_size'])
    path = tmp_path / 'model.onnx'
    with torch.no_grad():
        expected = model(images[:3])
    if precision == 'pt2':
        timm_dfpt.export_pt2(model, path.with_suffix('.pt2'))
        found = torch.export.load(path.with_suffix('.pt2')).module()(images[:3]).detach().numpy()
    else:
        timm_dfpt.export_onnx(model, path, precision=precision, calibration=images)
        found = outputs(path, images[:3].numpy())
    bounds = {'float32': 1e-4, 'float16': 1e-2, 'int8': 0.25, 'pt2': 1e-4}
    assert difference(found, expected) < bounds[precision]


@pytest.mark.slow
def test_tables_show_both_forms(tiny: TinyJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = tiny.common(tmp_path / 'run')
    argv = ['--dataset', str(tiny.data), '--method', 'supervised', '--student', 'repvgg_a0', *common[:-2]]
    assert main([*argv, '--epochs', '1', '--export', 'onnx', 'pt2']) == 0
    summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
    student = summary['models']['student']
    saved = timm.create_model(f'local-dir:{tmp_path / "run" / "student"}', pretrained=True)
    folded = reparameterize_model(saved.eval())
    assert student['cost']['params'] == sum(p.numel() for p in folded.parameters())
    assert student['cost_as_trained']['params'] == sum(p.numel() for p in saved.parameters())
    assert student['cost']['size_bytes'] < student['cost_as_trained']['size_bytes']
    table = report.closing_table(summary)
    assert 'student (repvgg_a0), deployed' in table
    assert 'student, as trained' in table
    rows = {row['format']: row for row in summary['exports']}
    assert rows['torch.export']['largest_difference'] < 1e-4
    assert rows['ONNX float32']['bytes'] < rows['timm']['bytes']


@pytest.mark.slow
def test_defaults_are_of_the_model(tmp_path: Path) -> None:
    model = trained_like(timm.create_model('resnet18', num_classes=3, in_chans=1, **RESNET))
    model.pretrained_cfg['label_names'] = ['ä', '<b>', '"']
    config = {**DATA_CONFIG, 'input_size': (1, 28, 28), 'mean': (0.3,), 'std': (0.4,)}
    timm_dfpt.export_onnx(model, tmp_path / 'x.onnx', data_config=config)
    images = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        assert difference(outputs(tmp_path / 'x.onnx', images.numpy()), model(images)) < 1e-4
    facts = facts_of(tmp_path / 'x.onnx')
    assert json.loads(facts['class_names']) == ['ä', '<b>', '"']
    assert json.loads(facts['input_size']) == [1, 28, 28]
