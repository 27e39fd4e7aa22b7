"""Both kinds are saved, published and loaded the same two ways, and no option is ignored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import timm_dfpt


@pytest.fixture(scope='module')
def student() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model('test_resnet', num_classes=3).eval()


@pytest.fixture(scope='module')
def teacher(student: nn.Module) -> timm_dfpt.DualForwardPathTeacher:
    return timm_dfpt.wrap(student)


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_methods_of_the_teacher_are_the_functions(teacher: timm_dfpt.DualForwardPathTeacher, tmp_path: Path) -> None:
    timm_dfpt.save_prompt_path(teacher, tmp_path / 'a', label_names=['x', 'y', 'z'])
    teacher.save_pretrained(tmp_path / 'b', label_names=['x', 'y', 'z'])
    assert _content(tmp_path / 'a') == _content(tmp_path / 'b')
    timm_dfpt.push_prompt_path(teacher, 'user/prompt', base_model='', license='mit', dry_run=tmp_path / 'c')
    teacher.push_to_hub('user/prompt', base_model='', license='mit', dry_run=tmp_path / 'd')
    assert _content(tmp_path / 'c') == _content(tmp_path / 'd')
    loaded = timm_dfpt.DualForwardPathTeacher.from_pretrained(tmp_path / 'a', teacher.model)
    x = torch.randn(1, 3, 160, 160)
    assert torch.equal(loaded(x).prompt, teacher.eval()(x).prompt)


def test_each_kind_says_which_function_loads_it(
    student: nn.Module, teacher: timm_dfpt.DualForwardPathTeacher, tmp_path: Path
) -> None:
    timm_dfpt.save_student(student, tmp_path / 'student')
    timm_dfpt.save_prompt_path(teacher, tmp_path / 'prompt')
    with pytest.raises(ValueError, match=r'is a prompt path, not a student.*load_teacher\('):
        timm_dfpt.load_student(tmp_path / 'prompt')
    with pytest.raises(ValueError, match=r'is a student, not a prompt path.*load_student\('):
        timm_dfpt.load_teacher(tmp_path / 'student')
    x = torch.randn(1, 3, 160, 160)
    assert torch.equal(timm_dfpt.load_student(tmp_path / 'student')(x), student(x))


CALLS: dict[str, Callable[[Any, Any, Path], Any]] = {
    'save_student': lambda student, teacher, path: timm_dfpt.save_student(student, path, labels=[]),
    'save_prompt_path': lambda student, teacher, path: timm_dfpt.save_prompt_path(teacher, path, license='mit'),
    'push_student': lambda student, teacher, path: timm_dfpt.push_student(student, 'a/b', training={}, dry_run=path),
    'push_prompt_path': lambda student, teacher, path: timm_dfpt.push_prompt_path(teacher, 'a/b', branch='main'),
    'load_student': lambda student, teacher, path: timm_dfpt.load_student('a/b', revison='v1'),
    'load_teacher': lambda student, teacher, path: timm_dfpt.load_teacher('a/b', None, proxies={}),
    'from_pretrained': lambda student, teacher, path: timm_dfpt.from_pretrained('a/b', map_location='cpu'),
}


@pytest.mark.parametrize('name', CALLS)
def test_options_that_do_not_exist_are_refused(
    student: nn.Module, teacher: timm_dfpt.DualForwardPathTeacher, tmp_path: Path, name: str
) -> None:
    with pytest.raises(TypeError, match='unexpected keyword argument .*; the options are '):
        CALLS[name](student, teacher, tmp_path / 'folder')
    assert not (tmp_path / 'folder').exists()
