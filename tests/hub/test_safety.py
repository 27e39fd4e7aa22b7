"""What comes from the Hub is not trusted: absurd, damaged and hostile files end in an error and nothing else."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from . import clients, runs
from .processes import Client
from .server import Hub

Change = Callable[[dict[str, Any]], Any]


def _set(*keys: Any, to: Any) -> Change:
    def change(config: dict[str, Any]) -> None:
        inner: Any = config
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to

    return change


def _drop(key: str) -> Change:
    return lambda config: config.pop(key)


HUGE = 10**9
PROMPT_CONFIGS: dict[str, tuple[Change, str]] = {
    'channels': (_set('stages', 0, 'features', 0, 'channels', to=HUGE), 'channels must be'),
    'stages': (lambda c: c.update(stages=c['stages'] * 10**4), 'stages must be'),
    'a million stages': (lambda c: c.update(stages=c['stages'] * 333_334), 'more than the limit'),
    'inner channels': (_set('prompt', 'rd_ratio', to=1e-9), 'does not fit the prompt path'),
    'some inner channels': (_set('prompt', 'rd_ratio', to=1e-3), 'many more values than its weights have'),
    'kernels': (_set('prompt', 'kernel_sizes', to=[1] * 10**6), 'kernel_sizes'),
    'kernel': (_set('prompt', 'kernel_sizes', to=[HUGE + 1]), 'kernel_sizes'),
    'classes': (_set('num_classes', to=HUGE), 'num_classes must be'),
    'some classes': (_set('num_classes', to=10**6), 'label_names has 5 names'),
    'many classes': (lambda c: c.update(num_classes=10**6, label_names=None), 'many more values than its weights have'),
    'NaN': (_set('prompt', 'partial_ratio', to=float('nan')), 'NaN is not allowed'),
    'infinity': (_set('data_config', 'mean', to=[float('inf')]), 'Infinity is not allowed'),
    'text for a number': (_set('num_classes', to='5'), 'num_classes must be'),
    'true for a number': (_set('num_classes', to=True), 'num_classes must be'),
    'list for text': (_set('variant', to=['dfpt']), 'variant must be'),
    'base is a path': (_set('base_model', to='local-dir:/etc'), 'base_model must be'),
    'base is a relative path': (_set('base_model', to='../../etc'), 'base_model must be'),
    'base is a URL': (_set('base_model', to='https://example.org/model'), 'base_model must be'),
    'base climbs': (_set('base_model', to='hf-hub:../../etc'), 'base_model must be'),
    'revision climbs': (_set('base_revision', to='../../../etc'), 'base_revision must be'),
    'module climbs': (_set('stages', 0, 'module', to='../x'), 'must be a module name'),
    'module is another': (_set('stages', 0, 'module', to='fc.nowhere'), 'not a module'),
    'base argument reads': (_set('base_model_args', 'checkpoint_path', to='/etc/passwd'), 'checkpoint_path is not'),
    'base argument is huge': (_set('base_model_args', 'width', to=HUGE), 'width must be a number'),
    'base argument is deep': (_set('base_model_args', 'layers', to=[10**6]), 'layers must be'),
    'base is wide': (_set('base_model_args', 'channels', to=[10**6] * 4), 'many more values than its weights have'),
    'base is unknown': (_set('base_architecture', to='no_such_net'), 'base_architecture must be'),
    'fingerprint': (_set('base_fingerprint', 'weights', to='0'), 'sha256'),
    'activation': (_set('prompt', 'act_layer', to='os.system'), 'act_layer'),
    'newer format': (_set('format_version', to=3), 'pip install -U timm_dfpt'),
    'lacks a key': (_drop('stages'), "lacks 'stages'"),
    'image size': (_set('data_config', 'input_size', to=[3, HUGE, HUGE]), 'input_size must be'),
    'standard deviation': (_set('data_config', 'std', to=[0]), 'data_config.std'),
}
STUDENT_CONFIGS: dict[str, tuple[Change, str]] = {
    'widths': (_set('model_args', 'channels', to=[10**6] * 4), 'The files do not belong to the same model'),
    'too wide': (_set('model_args', 'channels', to=[HUGE] * 4), 'a number up to'),
    'depth': (_set('model_args', 'layers', to=[4096] * 5), 'at most 16,384 in all'),
    'image side': (_set('model_args', 'img_size', to=10**5), 'integers up to 4,096'),
    'classes': (lambda c: c.update(num_classes=10**6, label_names=None), 'The files do not belong to the same model'),
    'no class': (_set('num_classes', to=-1), 'not the config of a timm model'),
    'names': (_set('label_names', to=['a']), 'label_names has 1 names'),
    'reads a file': (_set('model_args', 'pretrained_cfg', to={'file': '/etc/passwd'}), 'pretrained_cfg is not'),
    'other class': (_set('model_args', 'features_only', to=True), 'features_only is not'),
    'unknown argument': (_set('model_args', 'nonsense', to=1), 'The config cannot be built into a model'),
    'unknown model': (_set('architecture', to='no_such_net'), 'does not have'),
    'source': (_set('architecture', to='local-dir:/etc'), 'does not have'),
    'image size': (_set('pretrained_cfg', 'input_size', to=[3, HUGE, HUGE]), 'input_size must be'),
    'custom code': (_set('pretrained_cfg', 'nonsense', to='x'), 'The config cannot be built into a model'),
}


def _make() -> None:
    """Save a base, a prompt path on it, and a student."""
    import timm_dfpt

    base = clients.make_model('test_resnet')
    timm_dfpt.save_student(base, 'teacher', label_names=clients.LABELS)
    teacher = clients.make_teacher(base)
    teacher.save_pretrained('prompt', base_model='hf-hub:alice/teacher', label_names=clients.LABELS)
    timm_dfpt.save_student(clients.make_model('resnet18', **clients.GREY_ARGS), 'student', label_names=clients.LABELS)


@pytest.fixture(scope='module')
def saved(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    maker = Client(server.endpoint, tmp_path_factory.mktemp('maker'))
    maker.run(_make)
    return maker.cwd


def _load_all(folders: list[str]) -> dict[str, str]:
    """Load each folder with little memory left, so that taking what a config asks for would end in a MemoryError."""
    import resource

    import timm_dfpt

    used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
    errors = {}
    for folder in folders:
        try:
            timm_dfpt.from_pretrained(folder)
            errors[folder] = 'nothing'
        except Exception as error:
            errors[folder] = f'{type(error).__name__}: {error}'
    return errors


@pytest.mark.parametrize(
    ('kind', 'config_name', 'changes'),
    [('prompt', 'prompt_config.json', PROMPT_CONFIGS), ('student', 'config.json', STUDENT_CONFIGS)],
    ids=['prompt path', 'student'],
)
@pytest.mark.timeout(60, func_only=True)
def test_absurd_and_hostile_configs(
    saved: Path, hub: Hub, client: Client, kind: str, config_name: str, changes: dict[str, tuple[Change, str]]
) -> None:
    teacher = {path.name: path.read_bytes() for path in (saved / 'teacher').iterdir()}
    hub.add_repo('alice/teacher', teacher)
    weights = next((saved / kind).glob('*.safetensors'))
    for name, (change, _) in changes.items():
        folder = client.cwd / name
        folder.mkdir()
        (folder / weights.name).symlink_to(weights)
        config = json.loads((saved / kind / config_name).read_text())
        change(config)
        (folder / config_name).write_text(json.dumps(config))
    errors = client.run(_load_all, list(changes))
    for name, (_, words) in changes.items():
        assert errors[name].startswith('ValueError'), f'{name}: {errors[name]}'
        assert words in errors[name], f'{name}: {errors[name]}'
    assert not [line for line in hub.requests if line.startswith('GET') and line.endswith('.safetensors')]


def _spoil_tensors(path: Path, how: str) -> None:
    tensors = load_file(path)
    name = next(name for name, t in tensors.items() if t.is_floating_point() and t.ndim > 1)
    if how == 'NaN':
        tensors[name][0] = float('nan')
    elif how == 'infinite':
        tensors[name][0] = float('inf')
    elif how == 'missing':
        del tensors[name]
    elif how == 'extra':
        tensors['evil.weight'] = torch.ones(1)
    elif how == 'dtype':
        tensors[name] = tensors[name].double()
    elif how == 'shape':
        tensors[name] = tensors[name].flatten()
    path.unlink()
    save_file(tensors, path)


class _Harmful:
    """Leaves a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return open, ('harmed', 'w')


SPOILED = {
    'NaN': 'not finite',
    'infinite': 'not finite',
    'missing': '1 missing',
    'extra': '1 unexpected (evil.weight)',
    'dtype': 'torch.float64',
    'shape': 'has shape',
    'pickle': 'not a safetensors file',
    'cut short': 'not a safetensors file',
    'empty': 'not a safetensors file',
}


@pytest.mark.parametrize('kind', ['prompt', 'student'])
def test_weights_are_read_strictly_and_never_unpickled(saved: Path, hub: Hub, client: Client, kind: str) -> None:
    hub.add_repo('alice/teacher', {path.name: path.read_bytes() for path in (saved / 'teacher').iterdir()})
    for how in SPOILED:
        folder = client.cwd / how
        shutil.copytree(saved / kind, folder)
        weights = next(folder.glob('*.safetensors'))
        if how == 'pickle':
            weights.write_bytes(pickle.dumps(_Harmful()))
        elif how == 'cut short':
            weights.write_bytes(weights.read_bytes()[:-7])
        elif how == 'empty':
            weights.write_bytes(b'')
        else:
            _spoil_tensors(weights, how)
    errors = client.run(_load_all, list(SPOILED))
    for how, words in SPOILED.items():
        assert errors[how].startswith('ValueError'), errors[how]
        assert words in errors[how], errors[how]
    assert not (client.cwd / 'harmed').exists()


def test_the_main_job_takes_no_pickled_teacher(saved: Path, hub: Hub, client: Client) -> None:
    """timm by itself would read it."""
    weights = io.BytesIO()
    torch.save(load_file(saved / 'teacher' / 'model.safetensors'), weights)
    config = (saved / 'teacher' / 'config.json').read_bytes()
    hub.add_repo('bob/pickle', {'config.json': config, 'pytorch_model.bin': weights.getvalue()})
    said = client.run(runs.run_of_teacher, 'hf-hub:bob/pickle')
    assert "teacher='hf-hub:bob/pickle' cannot be loaded" in said
    assert 'pytorch_model.bin, a pickle' in said
    config = json.loads(config)
    config['pretrained_cfg']['hf_hub_filename'] = 'weights.pth'
    hub.add_repo('bob/named', {'config.json': json.dumps(config).encode(), 'weights.pth': weights.getvalue()})
    other = Client(hub.endpoint, client.root / 'other')
    assert 'has its weights in weights.pth' in other.run(runs.run_of_teacher, 'hf-hub:bob/named')
    assert not [line for line in hub.requests if line.endswith(('.bin', '.pth'))]
    assert not (client.cwd / 'run').exists()
    assert not (other.cwd / 'run').exists()


def _load_slow(folder: str) -> dict[str, str]:
    """Load configs of architectures whose constructors have no end, or hardly any."""
    import itertools
    import time

    from timm.models import register_model
    from torch import nn

    import timm_dfpt.hub
    from timm_dfpt.hub import build

    def registered(name: str, make: Callable[[int], nn.Module]) -> None:
        def entrypoint(pretrained: bool = False, n: int = 3, **kwargs: Any) -> nn.Module:
            return make(n)

        entrypoint.__name__ = entrypoint.__qualname__ = name
        entrypoint.__module__ = __name__
        register_model(entrypoint)

    class Loops(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            try:
                for a, b in itertools.product(range(n), range(n * n)):
                    self.last = a * b
            except Exception:
                self.last = 0

    class Buffer(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.register_buffer('index', torch.zeros(n**3, dtype=torch.long), persistent=False)

    class Parameters(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            for i in range(n**2):
                self.register_parameter(f'p{i}', nn.Parameter(torch.zeros(0)))

    registered('endless', Loops)
    registered('wide', Buffer)
    registered('many', Parameters)
    registered('deep', lambda n: nn.Sequential(*(nn.Identity() for _ in range(n**2))))
    usual, errors = build._SECONDS, {}
    for name in SLOW:
        build._SECONDS = 0.2 if name == 'endless' else usual
        config = json.loads((Path(folder) / 'config.json').read_text())
        config.update(architecture=name, model_args=SLOW[name][0])
        Path(name).mkdir()
        Path(name, 'config.json').write_text(json.dumps(config))
        Path(name, 'model.safetensors').symlink_to(Path(folder) / 'model.safetensors')
        began = time.thread_time()
        try:
            timm_dfpt.from_pretrained(name)
        except ValueError as error:
            errors[name] = str(error)
        assert time.thread_time() - began < 3, name
    timm_dfpt.from_pretrained(folder)
    return errors


SLOW: dict[str, tuple[dict[str, Any], str]] = {
    'endless': ({'n': 4000}, 'takes far longer than a model of so many weights'),
    'wide': ({'n': 4000}, 'many more values than its weights have'),
    'many': ({'n': 4000}, 'many more tensors than its weights have'),
    'deep': ({'n': 200}, 'many more modules than its weights have'),
    'tiny_vit_5m_224': ({'window_sizes': [7, 7, 400, 7]}, 'The files do not belong to the same model'),
    'swin_tiny_patch4_window7_224': ({'window_size': 4096}, 'The files do not belong to the same model'),
    'vit_tiny_patch16_224': ({'img_size': 4096, 'patch_size': 1}, 'The files do not belong to the same model'),
}


def test_what_a_config_may_cost_is_bounded_by_its_weights(saved: Path, client: Client) -> None:
    errors = client.run(_load_slow, str(saved / 'student'))
    for name, (_, words) in SLOW.items():
        assert words in errors[name], errors[name]
        assert '\n' not in errors[name]


BAD_JSON = {
    'nested': (b'{"a": ' * 40 + b'1' + b'}' * 40, 'more than 32 levels deep'),
    'deep': (b'[' * 10**6, 'not valid JSON'),
    'list': (b'[]', 'must hold a JSON object'),
    'binary': (b'\xff\xfe\x00', 'not valid JSON'),
    'large': (b' ' * (200 * 2**20), 'more than the limit'),
}


def test_large_and_malformed_json(hub: Hub, client: Client) -> None:
    for name, (data, _) in BAD_JSON.items():
        for config in ('prompt_config.json', 'config.json'):
            folder = client.cwd / name / config
            folder.mkdir(parents=True)
            (folder / config).write_bytes(data)
            (folder / 'model.safetensors').write_bytes(b'')
    names = [f'{name}/{config}' for name in BAD_JSON for config in ('prompt_config.json', 'config.json')]
    errors = client.run(_load_all, names)
    for name in names:
        assert errors[name].startswith('ValueError'), errors[name]
        assert BAD_JSON[name.split('/')[0]][1] in errors[name], errors[name]
    hub.add_repo('alice/large', {'prompt_config.json': BAD_JSON['large'][0]})
    hub.requests.clear()
    refused = client.fail(clients.load_any, 'alice/large')
    assert 'has 209,715,200 bytes' in refused.error
    assert hub.requests == ['GET /api/models/alice/large']


def _load_newer() -> list[str]:
    clients.load_any('.', model=clients.make_model('test_resnet'))
    return []


def test_unknown_key_is_warned_about(saved: Path, client: Client) -> None:
    for path in (saved / 'prompt').iterdir():
        shutil.copy(path, client.cwd)
    config = json.loads((client.cwd / 'prompt_config.json').read_text())
    config['from_the_future'] = 1
    config['prompt']['also_new'] = [2]
    (client.cwd / 'prompt_config.json').write_text(json.dumps(config))
    outcome = client.start(_load_newer).outcome()
    assert not outcome.errors, outcome.trace
    warnings = [line for line in outcome.logs if line.startswith('WARNING timm_dfpt')]
    assert any('from_the_future' in line for line in warnings)
    assert any('also_new' in line for line in warnings)
