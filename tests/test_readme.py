"""The code and the commands of the README work, except weights that a test cannot download."""
import re
import shlex
from pathlib import Path

import torch

import timm_dfpt_cli
from timm_dfpt.job.cli import DEFAULT_RECIPE, parse_config

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'```(\w*)\n(.*?)```', README, flags=re.DOTALL)
LINES = [line for _, block in BLOCKS for line in block.replace('\\\n', ' ').splitlines()]
# Commands of one line in the prose, too; what is a placeholder is no command.
SPANS = [' '.join(span.split()) for span in re.findall(r'`([^`]+)`', re.sub(r'```.*?```', '', README, flags=re.DOTALL))]
TYPED = [line.split('#')[0].strip() for line in (*LINES, *SPANS) if '...' not in line]
COMMANDS = [line for line in TYPED if line.startswith(('accelerate launch train/distill.py', 'timm-dfpt distill'))]
TARGETS = {line.split(' ', 1)[1] for line in TYPED if re.fullmatch(r'make \w+', line)}

# Small models in the place of those whose weights are on the Hub.
SMALL = {
    "'resnet50', pretrained=True": "'test_resnet'",
    "'resnet18'": "'test_resnet'",
    "'vit_small_patch14_dinov2.lvd142m', pretrained=True": "'test_vit', num_classes=0, img_size=64",
}


def test_python_in_ten_lines(tmp_path, monkeypatch):
    code = '\n'.join(block for language, block in BLOCKS if language == 'python' and 'timm_dfpt' in block)
    for name, small in SMALL.items():
        assert name in code
        code = code.replace(name, small)
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    names = {
        'images': torch.randn(4, 3, 64, 64, generator=generator),
        'target': torch.randint(1000, (4,), generator=generator),
        'names': [f'class {i}' for i in range(1000)],
    }
    names['loader'] = [(names['images'], names['target'] % 37)]
    exec(code, names)
    assert names['fitted'](names['images']).shape == (4, 37)
    assert names['encoder'].num_classes == 0
    assert names['path'](names['images']).prompt.shape == (4, 37)
    # One step has moved the prompt path away from the teacher, and the student from its start.
    out = names['teacher'](names['images'])
    assert out.original.shape == out.prompt.shape == (4, 1000)
    assert not torch.equal(out.original, out.prompt)
    held = [{id(p) for group in o.param_groups for p in group['params']} for o in names['optimizers']]
    trained = {id(p) for p in names['task'].get_trainable_module().parameters() if p.requires_grad}
    assert not held[0] & held[1]
    assert held[0] | held[1] == trained
    assert all(o.state for o in names['optimizers'])
    assert (tmp_path / 'my-prompt-path' / 'prompt_path.safetensors').is_file()
    assert (tmp_path / 'my-student' / 'model.safetensors').is_file()


def test_commands_are_understood():
    options = [command.split('distill', 1)[1].removeprefix('.py') for command in COMMANDS]
    configs = [parse_config(shlex.split(given), DEFAULT_RECIPE) for given in options]
    assert {'accelerate launch train/distill.py', 'timm-dfpt distill'} <= set(COMMANDS)
    assert 'photos' in [config.dataset for config in configs]
    for command, config in zip(COMMANDS, configs, strict=True):
        assert config.dataset == 'photos' or Path(config.dataset).is_dir(), command
    others = {line.split()[1] for line in TYPED if line.startswith('timm-dfpt ')}
    assert others == {'distill', 'predict', 'publish'} <= set(timm_dfpt_cli.COMMANDS)
    makefile = (ROOT / 'Makefile').read_text(encoding='utf-8')
    assert {'install', 'distill', 'test'} <= TARGETS
    assert all(re.search(rf'^{target}:', makefile, re.MULTILINE) for target in TARGETS)


def test_it_is_short():
    assert len(README.splitlines()) <= 120
    assert '\n<!-- does it help -->\n|' in README
