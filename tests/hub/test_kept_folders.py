"""Folders that an earlier version wrote stay readable, and give the logits that they gave then.

`kept/v1` was written at commit 64cf510, which had format_version 1: a student of 3,641 parameters, and prompt paths on
it as their base; `logits.safetensors` has an input `[2, 3, 32, 32]` and what each of them returned for it in
float64.
"""
from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import timm_dfpt
from timm_dfpt.hub.config import FORMAT_VERSION

KEPT = Path(__file__).parent / 'kept' / 'v1'
PROMPT_PATHS = sorted(path.parent.name for path in KEPT.glob('*/prompt_config.json'))
LAST = 'layer4.0'


def make_base() -> nn.Module:
    return timm.create_model(f'local-dir:{KEPT / "student"}', pretrained=True)


def assert_same_logits(logits: torch.Tensor, name: str) -> None:
    """Compare up to rounding, since processors round differently."""
    torch.testing.assert_close(logits, load_file(KEPT / 'logits.safetensors')[name], rtol=1e-6, atol=1e-9)


def assert_works(folder: Path, name: str) -> timm_dfpt.DualForwardPathTeacher:
    teacher = timm_dfpt.DualForwardPathTeacher.from_pretrained(folder, make_base())
    with torch.no_grad():
        out = copy.deepcopy(teacher).double()(load_file(KEPT / 'logits.safetensors')['input'].double())
    assert_same_logits(out.original, f'{name}.original')
    assert_same_logits(out.prompt, f'{name}.prompt')
    return teacher


def test_student() -> None:
    student = timm_dfpt.from_pretrained(KEPT / 'student').double()
    with torch.no_grad():
        assert_same_logits(student(load_file(KEPT / 'logits.safetensors')['input'].double()), 'student')


@pytest.mark.parametrize('name', PROMPT_PATHS)
def test_prompt_path_and_what_is_saved_of_it(name: str, tmp_path: Path) -> None:
    teacher = assert_works(KEPT / name, name)
    # Blocks behind every stage that has one in the file, the last one among them.
    assert (LAST in [stage.module for stage in teacher.stages]) == (name == 'dfpt-ablated')
    teacher.save_pretrained(tmp_path, base_model='')
    assert json.loads((tmp_path / 'prompt_config.json').read_text())['format_version'] == FORMAT_VERSION
    assert assert_works(tmp_path, name).config == teacher.config


def test_every_value_of_the_old_format_has_its_new_name() -> None:
    config = timm_dfpt.DualForwardPathTeacher.from_pretrained(KEPT / 'dfpt-ablated', make_base()).config
    assert config == timm_dfpt.PromptConfig(
        rd_ratio=4, partial_ratio=0.25, kernel_sizes=(3,), norm_layer='layernorm2d', act_layer='gelu',
        fusion='depthwise', new_head=False,
    )  # fmt: skip
    own_head = timm_dfpt.DualForwardPathTeacher.from_pretrained(KEPT / 'dfpt-head', make_base()).config
    assert own_head == timm_dfpt.PromptConfig(block=False, new_head=True)


@pytest.mark.parametrize(('key', 'value'), [('arrangement', 'sequential'), ('arrangement', 0), ('fusion', 'none')])
def test_ablations_that_cannot_be_built_any_more_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    shutil.copytree(KEPT / 'dfpt', tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / 'prompt_config.json').read_text())
    config['prompt'][key] = value
    (tmp_path / 'prompt_config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='were ablations of format 1'):
        timm_dfpt.from_pretrained(tmp_path, make_base())
