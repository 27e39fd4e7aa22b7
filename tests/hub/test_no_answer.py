"""Models that cannot be fetched: what is here under a similar name, and how weights are named that one has."""
from __future__ import annotations

from pathlib import Path

import pytest

from timm_dfpt.hub.repo import open_source
from timm_dfpt.hub.timm_models import ModelSource
from timm_dfpt.training.models import load_prompt_path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the folder of a student; nothing listens where the Hub should be."""
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', 'http://127.0.0.1:9')
    (tmp_path / 'runs' / 'student').mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize('option', ['teacher', 'student'])
@pytest.mark.parametrize('name', ['resnet18', 'hf-hub:user/name'])
def test_weights_that_one_has_are_the_remedy(option: str, name: str, folder: Path) -> None:
    remedy = r'are loaded as local-dir:FOLDER \(with config'
    with pytest.raises(ValueError, match=f'^{option}=.* no answer from .*{remedy}'):
        ModelSource(name, option).create(pretrained=True)


@pytest.mark.parametrize(
    ('name', 'hint'),
    [
        ('local-dir:runs/studnet', r"no such folder \(did you mean 'runs/student'\?\)"),
        ('local-dir:runs/other', r"no such folder \(the folder 'runs' has no 'other'\)"),
        ('runs', 'is not a timm model. For the folder of this name write local-dir:runs'),
        ('runz', r'is not a timm model\. See timm.list_models'),
    ],
)
def test_mistyped_folders_of_models(name: str, hint: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=hint):
        ModelSource(name, 'teacher')


def test_mistyped_folders_of_published_models(folder: Path) -> None:
    for name in ('runs/studnet', './runs/studnet', str(folder / 'runs' / 'studnet'), 'local-dir:runs/studnet'):
        with pytest.raises(OSError, match=r"\(did you mean '.*runs/student'\?\)"):
            open_source(name)
    with pytest.raises(OSError, match='Loading runs/studnet failed'):
        open_source('hf-hub:runs/studnet')
    with pytest.raises(ValueError, match="prompt_path='user/name' .*no answer.* is loaded from its folder"):
        load_prompt_path('user/name')
