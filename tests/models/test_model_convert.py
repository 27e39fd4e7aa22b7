import argparse
import importlib.util
import json
from pathlib import Path

import community_networks
import pytest
import timm
import torch
from safetensors.torch import load_file

from timm_dfpt.models import convert_state_dict

_SCRIPT = Path(__file__).parents[2] / 'train' / 'convert_checkpoint.py'


@pytest.fixture(scope='module')
def script():
    spec = importlib.util.spec_from_file_location('convert_checkpoint', _SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def resnet8():
    return community_networks.run('cifar_resnet8', torch.randn(1, 3, 32, 32, dtype=torch.float64))[1]


@pytest.mark.parametrize('name', community_networks.NETWORKS)
def test_converted_weights_give_the_logits_of_the_definition(name):
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected, weights = community_networks.run(name, x)
    model = timm.create_model(name, device='meta').eval()
    converted = convert_state_dict(weights, name)

    assert list(converted) != list(weights)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in model.state_dict().items()}
    model.load_state_dict(converted, assign=True)
    with torch.no_grad():
        logits = model(x)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-11 * expected.abs().max().item())


def test_every_registered_network_has_a_definition():
    assert set(community_networks.NETWORKS) == set(timm.list_models('cifar_*'))


@pytest.mark.parametrize('wrap', ['bare', 'repdistiller', 'mdistiller', 'data_parallel'])
def test_containers_of_both_projects(resnet8, wrap):
    checkpoint = {
        'bare': resnet8,
        'repdistiller': {'epoch': 240, 'model': resnet8, 'best_acc': torch.tensor(72.3), 'optimizer': {'state': {}}},
        'mdistiller': {'model': resnet8},
        'data_parallel': {'model': {f'module.{k}': v for k, v in resnet8.items()}},
    }[wrap]
    converted = convert_state_dict(checkpoint, 'cifar_resnet8')
    assert converted['stages.2.0.downsample.0.weight'] is resnet8['layer3.0.downsample.0.weight']
    assert len(converted) == len(resnet8)


def test_any_number_of_classes(resnet8):
    weights = {**resnet8, 'fc.weight': torch.zeros(10, 64), 'fc.bias': torch.zeros(10)}
    assert convert_state_dict(weights, 'cifar_resnet8')['head.fc.weight'].shape == (10, 64)


@pytest.mark.parametrize('name', ['resnet18', 'cifar_resnet21', 'cifar_resnet', ''])
def test_refuses_other_models(resnet8, name):
    with pytest.raises(ValueError, match='choose one of cifar_mobilenetv2_050, .*cifar_wrn_40_2'):
        convert_state_dict(resnet8, name)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda w: {f'module.student.{k}': v for k, v in w.items()}, "'student.conv1.weight' is not .*student_best"),
        (lambda w: {**w, 'layer4.0.conv1.weight': torch.zeros(1)}, r'stages\.3\.0\.conv1\.weight'),
        (lambda w: {k: v for k, v in w.items() if k != 'bn1.bias'}, r'stem\.bn\.bias'),
        (lambda w: {k: v for k, v in w.items() if k != 'fc.bias'}, 'classifier of 0 classes'),
        (lambda w: {**w, 'conv1.weight': torch.zeros(16, 1, 3, 3)}, r'stem\.conv\.weight.*\(16, 1, 3, 3\)'),
        (lambda w: {'model': [1, 2]}, 'holds no weights'),
        (lambda w: {'epoch': 3}, 'holds no weights'),
    ],
)
def test_refuses_weights_that_do_not_fit(resnet8, change, message):
    with pytest.raises(ValueError, match=message):
        convert_state_dict(change(resnet8), 'cifar_resnet8')


def test_refuses_the_weights_of_another_depth(resnet8):
    with pytest.raises(ValueError, match=r'do not fit cifar_resnet14.*stages\.0\.1'):
        convert_state_dict(resnet8, 'cifar_resnet14')


@pytest.mark.parametrize(('name', 'num_classes'), [('cifar_wrn_16_1', 100), ('cifar_mobilenetv2_050', 10)])
def test_script_writes_a_folder_that_timm_loads(script, tmp_path, name, num_classes):
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected, weights = community_networks.run(name, x, num_classes=num_classes)
    weights = {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
    source, output = tmp_path / 'ckpt_epoch_240.pth', tmp_path / 'out' / name
    torch.save({'epoch': 240, 'model': weights, 'accuracy': torch.tensor(70.0), 'optimizer': {'state': {}}}, source)

    script.main([str(source), '--model', name, '--output', str(output)])

    assert sorted(path.name for path in output.iterdir()) == ['config.json', 'distillation.json', 'model.safetensors']
    assert load_file(output / 'model.safetensors').keys() == convert_state_dict(weights, name).keys()
    assert 'num_classes' not in json.loads((output / 'config.json').read_text()).get('model_args', {})
    model = timm.create_model(f'local-dir:{output}', pretrained=True).eval()
    assert model.num_classes == num_classes
    assert model.pretrained_cfg['mean'] == [0.5071, 0.4867, 0.4408]
    with torch.no_grad():
        logits = model(x.float())
    torch.testing.assert_close(logits.double(), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ({'opt': argparse.Namespace(lr=0.05), 'model': {}}, 'ckpt_epoch_'),
        ([torch.zeros(1)], 'holds a list'),
        ({'model': {'conv1.weight': torch.zeros(16, 3, 3, 3)}}, 'do not fit cifar_resnet8'),
    ],
)
def test_script_refuses_bad_files(script, tmp_path, capsys, content, message):
    source = tmp_path / 'model.pth'
    torch.save(content, source)
    with pytest.raises(SystemExit):
        script.main([str(source), '--model', 'cifar_resnet8', '--output', str(tmp_path / 'out')])
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_script_refuses_a_missing_file_and_a_used_folder(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main([str(tmp_path / 'no.pth'), '--model', 'cifar_resnet8', '--output', str(tmp_path / 'out')])
    assert 'does not exist' in capsys.readouterr().err

    (tmp_path / 'model.safetensors').write_bytes(b'mine')
    source = tmp_path / 'model.pth'
    torch.save({}, source)
    with pytest.raises(SystemExit):
        script.main([str(source), '--model', 'cifar_resnet8', '--output', str(tmp_path)])
    assert 'name another folder' in capsys.readouterr().err
    assert (tmp_path / 'model.safetensors').read_bytes() == b'mine'
