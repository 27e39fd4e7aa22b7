"""A model, a dataset or a repository is called by one name, however it is written; and its weights are used whole."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from timm_dfpt.hub import save_student
from timm_dfpt.hub.sources import canonical, parse_source, resolve_path
from timm_dfpt.hub.timm_models import ModelSource, check_takes
from timm_dfpt.job.options import TrainConfig

from . import clients, runs
from .processes import Client
from .server import Hub

SPELLINGS = {
    'resnet18': 'resnet18',
    ' resnet18.a1_in1k ': 'resnet18.a1_in1k',
    'hf-hub:user/x': 'hf-hub:user/x',
    'hf_hub:user/x': 'hf-hub:user/x',
    'HF-Hub:user/X': 'hf-hub:user/X',
    ' hf-hub: user/x/ ': 'hf-hub:user/x',
    'hf-hub:user/x@v1': 'hf-hub:user/x@v1',
    'HF_HUB:user/x@refs/pr/1': 'hf-hub:user/x@refs/pr/1',
    'local-dir:a b/c': 'local-dir:a b/c',
    'Local-Dir:/a:b@c': 'local-dir:/a:b@c',
    'local-dir:~/x': f'local-dir:{Path.home()}/x',
}
REFUSED = {
    'file:/x/y': 'Write local-dir:FOLDER',
    'file:///x': 'Write local-dir:FOLDER',
    'https://huggingface.co/user/x/tree/main': "Write 'hf-hub:user/x'",
    'http://host/x.pth': 'hf-hub:user/name',
    's3://bucket/x': 'local-dir:FOLDER',
    'hf:user/x': 'hf-hub:user/name',
    'timm/resnet18.a1_in1k': "Use 'hf-hub:timm/resnet18.a1_in1k'",
    './x': "'local-dir:./x'",
    '~/x': "'local-dir:~/x'",
    'C:\\x': 'local-dir:C:',
    'hf-hub:': 'no model id',
    'hf-hub://user/x': 'neither a folder nor a repository id',
    'hf-hub:a/b/c': 'neither a folder nor a repository id',
    'hf-hub:user/x@a@b': 'one revision',
}


def test_names_are_written_one_way() -> None:
    for source, name in SPELLINGS.items():
        assert str(parse_source(source)) == name, source
        assert str(parse_source(name)) == name
    for source, words in REFUSED.items():
        with pytest.raises(ValueError, match='^teacher: ') as error:
            canonical('teacher', source)
        assert words in str(error.value), error.value
        assert '\n' not in str(error.value)


def test_data_sets_and_prompt_paths_need_no_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path('images').mkdir()
    same = {'user/x': 'user/x', 'hf-hub:user/x': 'user/x', 'HF_HUB:user/x': 'user/x', 'local-dir:images': 'images'}
    assert {source: canonical('dataset', source) for source in same} == same
    for source, words in {
        'https://huggingface.co/datasets/user/x': "Give 'user/x'",
        'file:/x': 'the path of a folder',
        'hf-hub:user/x@v1': '--dataset-revision v1',
    }.items():
        with pytest.raises(ValueError, match='^dataset: ') as error:
            canonical('dataset', source)
        assert words in str(error.value)
    assert canonical('prompt_path', ' HF_HUB:user/x@v1') == 'hf-hub:user/x@v1'
    assert canonical('prompt_path', 'images') == 'images'


def test_relative_paths_are_no_architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path('resnet18').mkdir()
    assert resolve_path('Local-Dir:./resnet18', tmp_path) == 'local-dir:resnet18'
    assert resolve_path('./resnet18', tmp_path, bare=False) == './resnet18'
    with pytest.raises(ValueError, match="^student: .*'local-dir:./resnet18'"):
        TrainConfig(method='supervised', dataset='x', student='./resnet18')
    config = TrainConfig(method='supervised', dataset='x', student='resnet18', output='~/runs/x')
    assert config.output == f'{Path.home()}/runs/x'


# --- weights


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet and a ViT of five classes."""
    folder = tmp_path_factory.mktemp('models')
    for name in ('test_resnet', 'test_vit'):
        save_student(clients.make_model(name), folder / name, label_names=clients.LABELS)
    return folder


LOST: dict[str, tuple[str, dict[str, Any], str]] = {
    'another head': ('test_resnet', {'num_classes': 3}, r'num_classes=3.* fc.bias, fc.weight would be random'),
    'no head': ('test_resnet', {'num_classes': 0}, 'gives a tensor'),
    'maps for vectors': ('test_resnet', {'global_pool': ''}, 'cannot take|gives a tensor'),
    'other width': ('test_vit', {'embed_dim': 32}, 'cannot be created with .*embed_dim=32'),
    'less depth': ('test_vit', {'depth': 2}, 'cannot be created with .*depth=2'),
    'other pooling': ('test_vit', {'global_pool': 'avg'}, "cannot be created with .*global_pool='avg'"),
    'without class token': ('test_vit', {'class_token': False}, 'cannot be created with .*class_token=False'),
    'another head of a ViT': ('test_vit', {'num_classes': 7}, 'head.bias, head.weight would be random'),
    'blocks lost with the head': ('test_vit', {'num_classes': 7, 'depth': 2}, 'would be random'),
}


def test_no_argument_throws_weights_of_a_teacher_away(folder: Path) -> None:
    for what, (name, kwargs, words) in LOST.items():
        source = ModelSource(f'local-dir:{folder / name}', 'teacher')
        with pytest.raises(ValueError, match=words) as error:
            check_takes(source.create_teacher(**kwargs), (3, 160, 160), str(kwargs), 5)
        assert '\n' not in str(error.value), what
    kept = {'drop_rate': 0.1, 'num_classes': 5}
    teacher: Any = ModelSource(f'LOCAL-DIR:{folder / "test_resnet"}', 'teacher').create_teacher(**kept)
    assert {k: v.tolist() for k, v in teacher.state_dict().items()} == {
        k: v.tolist() for k, v in load_file(folder / 'test_resnet' / 'model.safetensors').items()
    }
    assert teacher.pretrained_cfg['label_names'] == clients.LABELS
    assert not teacher._load_state_dict_post_hooks


def test_pretrained_students_say_what_is_not_pretrained(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = ModelSource(f'local-dir:{folder / "test_vit"}', 'student')
    for pretrained, kwargs, words in (
        (True, {'num_classes': 3}, None),
        (True, {'num_classes': 3, 'global_pool': 'avg'}, 'fc_norm.* start from random values'),
        (True, {'num_classes': 3, 'depth': 2}, 'of its weights are not used'),
        (False, {'num_classes': 3}, 'names weights, but the student starts from random ones: give --student-pretrain'),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, 'timm_dfpt'):
            source.create_student(pretrained, **kwargs)
        said = [r.getMessage() for r in caplog.records if r.name.startswith('timm_dfpt')]
        assert len(said) == bool(words), said
        if words:
            assert re.search(words, said[0]), said
    caplog.clear()
    ModelSource('resnet18.a1_in1k', 'student').create_student(False, num_classes=3)
    assert 'names weights' in caplog.text
    caplog.clear()
    ModelSource('test_resnet', 'student').create_student(False, num_classes=3)
    assert 'names weights' not in caplog.text


@pytest.mark.parametrize('name', ['fc.weight', 'bn1.running_var'])
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_not_finite_are_refused(folder: Path, tmp_path: Path, name: str, value: float) -> None:
    """Also where the logits are finite, as after a BatchNorm that divides by infinity."""
    shutil.copytree(folder / 'test_resnet', tmp_path / 'model')
    weights = load_file(tmp_path / 'model' / 'model.safetensors')
    weights[name].view(-1)[0] = value
    save_file(weights, tmp_path / 'model' / 'model.safetensors')
    for option in ('teacher', 'student'):
        with pytest.raises(ValueError, match=f"^{option}=.* cannot be loaded: .*'{name}' holds values"):
            ModelSource(f'local-dir:{tmp_path / "model"}', option).create(True)


class _Odd(torch.nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: torch.Tensor) -> Any:
        return self.output


@pytest.mark.parametrize('output', [(torch.zeros(1, 3),), {'a': 1}, torch.zeros(1, 3, 1, 1), torch.zeros(3), None])
def test_only_logits_are_taken(output: Any) -> None:
    check_takes(_Odd(torch.zeros(1, 3)), (3, 8, 8), 'student', 3)
    with pytest.raises(ValueError, match=r'student gives a .* for one image, not logits \[1, 3\]'):
        check_takes(_Odd(output), (3, 8, 8), 'student', 3)


# --- from the Hub


def _jobs_of(names: list[str], option: str) -> dict[str, str]:
    return {name: runs.run_of(option, name) for name in names}


def test_no_spelling_fetches_a_pickle(hub: Hub, client: Client, student_folder: Path) -> None:
    weights = io.BytesIO()
    torch.save(load_file(student_folder / 'model.safetensors'), weights)
    config = (student_folder / 'config.json').read_bytes()
    hub.add_repo('bob/pickle', {'config.json': config, 'pytorch_model.bin': weights.getvalue()})
    hub.add_repo('timm/test_resnet.r160_in1k', {'pytorch_model.bin': weights.getvalue()})
    spellings = ['hf_hub:bob/pickle', 'HF-HUB:bob/pickle', ' hf-hub:bob/pickle/', 'Hf_Hub:bob/pickle@main']
    said = client.run(_jobs_of, [*spellings, 'test_resnet', 'vit_huge_patch14_gap_224.in1k_ijepa'], 'teacher')
    said |= client.run(_jobs_of, ['hf_hub:bob/pickle '], 'student')
    for error in said.values():
        assert 'cannot be loaded' in error
        assert 'a pickle' in error
        assert error.count('\n') == 1
    assert not [line for line in hub.requests if line.endswith(('.bin', '.pth'))]


def _load_timm_name(kwargs: dict[str, Any]) -> list[Any]:
    model: Any = ModelSource('test_resnet.r160_in1k', 'teacher').create_teacher(**kwargs)
    cfg = model.pretrained_cfg
    return [model.fc.bias.sum().item(), cfg['hf_hub_id'], cfg.get('file'), cfg['tag']]


def test_timm_names_are_loaded_from_safetensors(hub: Hub, client: Client) -> None:
    model = clients.make_model('test_resnet', num_classes=1000)
    made = client.cwd / 'made'
    save_student(model, made)
    repo = hub.add_repo('timm/test_resnet.r160_in1k', {'model.safetensors': (made / 'model.safetensors').read_bytes()})
    expected = [pytest.approx(model.fc.bias.sum().item()), f'{repo.repo_id}@{repo.at("main").oid}', None, 'r160_in1k']
    assert client.run(_load_timm_name, {}) == expected
    # Without a network, and without the listing of a repository that has no config.
    assert client.run(_load_timm_name, {}, env={'HF_ENDPOINT': 'http://127.0.0.1:9'})[0] == expected[0]
    assert 'would be random' in client.fail(_load_timm_name, {'num_classes': 5}).error


def test_configs_of_teachers_are_checked(hub: Hub, client: Client, student_folder: Path) -> None:
    files = {path.name: path.read_bytes() for path in student_folder.iterdir()}
    names = []
    for name, args in {'reads': {'pretrained_filter_fn': 'x'}, 'wide': {'channels': [10**6] * 4}}.items():
        config = json.loads(files['config.json'])
        config['model_args'] = args
        hub.add_repo(f'bob/{name}', {**files, 'config.json': json.dumps(config).encode()})
        names.append(f'hf-hub:bob/{name}')
    said = client.run(_jobs_of, names, 'teacher')
    assert 'model_args: pretrained_filter_fn is not an allowed argument' in said[names[0]]
    assert 'many more values than its weights have' in said[names[1]]


def test_old_folders_have_the_keys_at_the_top(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / 'test_resnet', tmp_path / 'old')
    config = json.loads((tmp_path / 'old' / 'config.json').read_text())
    old = {'architecture': 'test_resnet', **config['pretrained_cfg'], 'num_classes': 5}
    (tmp_path / 'old' / 'config.json').write_text(json.dumps(old))
    teacher: Any = ModelSource(f'local-dir:{tmp_path / "old"}', 'teacher').create_teacher()
    assert isinstance(timm.create_model(f'local-dir:{tmp_path / "old"}', pretrained=True), type(teacher))
    assert teacher.num_classes == 5
