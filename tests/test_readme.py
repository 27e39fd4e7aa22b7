"""What the README tells people to type works, but for weights that a test cannot download."""
import re
import shlex
from pathlib import Path

import torch

from timm_dfpt.job.cli import parse_config

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'```(\w*)\n(.*?)```', README, flags=re.DOTALL)
COMMANDS = [
    line
    for _, block in BLOCKS
    for line in block.replace('\\\n', ' ').splitlines()
    if line.startswith('accelerate launch train/distill.py')
]


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
    exec(code, names)
    assert names['fitted'](names['images']).shape == (4, 37)
    assert names['encoder'].num_classes == 0
    assert names['path'](names['images']).prompt.shape == (4, 37)
    assert names['out'].original.shape == names['out'].prompt.shape == (4, 1000)
    # One step has moved the prompt path away from the teacher.
    assert not torch.equal(names['out'].original, names['out'].prompt)
    assert (tmp_path / 'my-prompt-path' / 'prompt_path.safetensors').is_file()
    assert (tmp_path / 'my-student' / 'model.safetensors').is_file()


def test_commands_are_understood():
    assert COMMANDS
    for command in COMMANDS:
        config = parse_config(shlex.split(command, comments=True)[3:])
        assert config.dataset == 'photos' or Path(config.dataset).is_dir(), command
    assert any('--config' in command for command in COMMANDS)
