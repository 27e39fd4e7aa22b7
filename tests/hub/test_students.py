"""Students load with timm and with transformers where timm_dfpt is not installed, their weights to the last bit."""

from __future__ import annotations

import json
from typing import Any

import pytest

from . import clients
from .clients import DATA, GREY_ARGS, GREY_DATA, LABELS
from .processes import Client
from .server import Hub

NOT_INSTALLED = ('timm_dfpt',)
CASES: dict[str, dict[str, Any]] = {
    'resnet': {'name': 'test_resnet', 'data_config': DATA},
    'vit': {'name': 'test_vit', 'model': {'img_size': 64}},
    'grey, own widths': {'name': 'resnet18', 'model': GREY_ARGS, 'data_config': GREY_DATA},
}


@pytest.mark.parametrize('case', CASES, ids=str)
def test_round_trip_bit_identical_without_timm_dfpt(client: Client, hub: Hub, tmp_path: Any, case: str) -> None:
    options = CASES[case]
    channels = options.get('model', {}).get('in_chans', 3)
    logits = client.run(clients.push_model, 'alice/s', **options, label_names=LABELS, license='mit')
    files = hub.files('alice/s')
    assert sorted(files) == ['.gitattributes', 'README.md', 'config.json', 'distillation.json', 'model.safetensors']
    reader = Client(hub.endpoint, tmp_path / 'reader', token=None)
    assert reader.run(clients.load_with_timm, 'hf-hub:alice/s', channels, without=NOT_INSTALLED) == logits
    for name, data in files.items():
        (reader.cwd / name).write_bytes(data)
    assert reader.run(clients.load_with_timm, 'local-dir:.', channels, without=NOT_INSTALLED) == logits
    other = Client(hub.endpoint, tmp_path / 'other', token=None)
    seen = other.run(clients.load_with_transformers, 'alice/s', channels, without=NOT_INSTALLED)
    assert seen['same_weights']
    # It keeps weights at other addresses, where a kernel may round differently.
    assert sum(seen['logits'], []) == pytest.approx(sum(logits, []), abs=1e-5)
    assert seen['labels'] == LABELS
    assert seen['same_pixels']
    assert seen['answers'] == pytest.approx(seen['expected'], abs=1e-6)
    mine = Client(hub.endpoint, tmp_path / 'mine', token=None)
    assert mine.run(clients.load_any, 'alice/s', channels)['logits'] == logits


def test_preprocessing_and_names_are_those_of_the_run(client: Client, hub: Hub) -> None:
    client.run(clients.push_model, 'alice/s', 'test_resnet', label_names=LABELS, data_config=DATA, license='cc0-1.0')
    config = json.loads(hub.files('alice/s')['config.json'])
    recorded = {key: config['pretrained_cfg'][key] for key in DATA}
    assert recorded == json.loads(json.dumps(DATA))
    assert config['label_names'] == LABELS
    assert 'num_classes' not in config['model_args']
    assert config['pretrained_cfg']['license'] == 'cc0-1.0'


def test_nothing_is_inherited_from_an_imagenet_checkpoint(client: Client, hub: Hub) -> None:
    client.run(clients.push_model, 'alice/s', 'test_resnet.r160_in1k')
    files = hub.files('alice/s')
    config = json.loads(files['config.json'])
    assert not {'license', 'tag', 'url', 'hf_hub_id', 'origin_url', 'paper_ids'} & set(config['pretrained_cfg'])
    assert 'license:' not in files['README.md'].decode()
    assert config['label_names'] == [f'LABEL_{i}' for i in range(5)]


UNSAVABLE = {
    'names': ('ValueError', 'label_names has 3 names, but the model has 5 classes'),
    'nan': ('ValueError', 'not finite'),
    'changed': ('ValueError', 'changed after timm.create_model'),
    'size': ('ValueError', '1 input channels, but the model accepts 3'),
    'foreign': ('TypeError', 'timm.create_model'),
}


def _save_unsavable() -> dict[str, tuple[str, str]]:
    import torch

    from timm_dfpt import save_student

    nan, changed = clients.make_model('test_resnet'), clients.make_model('test_resnet')
    nan.fc.weight.data[0, 0] = float('nan')
    changed.conv1 = torch.nn.Conv2d(3, 16, 7)
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        'names': (clients.make_model('test_resnet'), {'label_names': LABELS[:3]}),
        'nan': (nan, {}),
        'changed': (changed, {}),
        'size': (clients.make_model('test_resnet'), {'data_config': {'input_size': (1, 64, 64)}}),
        'foreign': (torch.nn.Linear(2, 2), {}),
    }
    errors = {}
    for name, (model, options) in cases.items():
        try:
            save_student(model, name, **options)
        except (TypeError, ValueError) as error:
            errors[name] = (type(error).__name__, str(error))
    return errors


def test_what_cannot_be_loaded_is_not_saved(client: Client) -> None:
    errors = client.run(_save_unsavable)
    for name, (kind, words) in UNSAVABLE.items():
        assert errors[name][0] == kind
        assert words in errors[name][1]
        assert not list(client.cwd.glob(f'{name}/*'))


def _save_variants() -> dict[str, bool]:
    import timm
    import torch

    from timm_dfpt.hub import from_pretrained, save_student

    same = {}
    model = clients.make_model('test_resnet')
    expected = clients.logits_of(model)
    variants = {
        'channels_last': clients.make_model('test_resnet').to(memory_format=torch.channels_last),
        'compiled': torch.compile(model, backend='eager'),
        'ema': timm.utils.ModelEmaV3(model).module,
    }
    for name, variant in variants.items():
        save_student(variant, name)
        same[name] = clients.logits_of(timm.create_model(f'local-dir:{name}', pretrained=True)) == expected
    half = clients.make_model('test_resnet').bfloat16()
    save_student(half, 'half')
    loaded = from_pretrained('half')
    same['half'] = all(torch.equal(a, b) for a, b in zip(half.parameters(), loaded.parameters(), strict=True))
    same['half dtype'] = next(loaded.parameters()).dtype == torch.bfloat16
    same['eval'] = not loaded.training
    return same


def test_wrappers_and_memory_formats(client: Client) -> None:
    assert set(client.run(_save_variants).values()) == {True}


def test_thousand_classes_are_not_taken_for_imagenet(client: Client, hub: Hub) -> None:
    client.run(clients.push_model, 'alice/s', 'test_resnet', model={'num_classes': 1000})
    seen = client.run(clients.load_with_transformers, 'alice/s', without=NOT_INSTALLED)
    assert seen['labels'] == [f'LABEL_{i}' for i in range(1000)]
