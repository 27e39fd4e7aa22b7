"""The license of what is published, and those of the models that it comes from, on cards and in files."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
from huggingface_hub import ModelCard

import timm_dfpt
from timm_dfpt.hub.cards import RunFacts, student_card
from timm_dfpt.hub.licenses import License

OTHER = {'license': 'other', 'license_name': 'my-license-1.0', 'license_link': 'https://example.org/terms'}


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / 'README.md')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'license': 'Apache 2.0'}, "^license='Apache 2.0' must be lowercase .* such as apache-2.0"),
        ({'license': 'other'}, '^license=other needs license_name: give --license-name and --license-link'),
        ({**OTHER, 'license_link': None}, '^license=other needs license_link'),
        ({**OTHER, 'license_name': 'My license'}, "^license_name='My license' must be lowercase"),
        ({**OTHER, 'license_link': 'LICENSE'}, "^license_link='LICENSE' must be the address"),
        ({**OTHER, 'license': 'mit'}, "^license_name='my-license-1.0' has no effect with license=mit: leave it out"),
        ({**OTHER, 'license': None}, 'has no effect with license=None: .* give --license other'),
    ],
)
def test_what_the_hub_would_refuse_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = timm.create_model('test_resnet', num_classes=2)
    with pytest.raises(ValueError, match=message):
        timm_dfpt.push_student(model, 'user/student', dry_run=tmp_path / 'dry', **options)
    assert not (tmp_path / 'dry' / 'README.md').exists()


def test_another_license_survives_folder_card_and_timm(tmp_path: Path) -> None:
    model = timm.create_model('test_resnet', num_classes=2)
    timm_dfpt.save_student(model, tmp_path / 'student', **OTHER)
    assert timm.create_model(f'local-dir:{tmp_path}/student', pretrained=True).pretrained_cfg['license'] == (
        'my-license-1.0'
    )
    timm_dfpt.push_student(tmp_path / 'student', 'user/student', dry_run=tmp_path / 'dry')
    card = card_of(tmp_path / 'dry')
    assert OTHER.items() <= card.data.to_dict().items()
    assert '| License | [my-license-1.0](https://example.org/terms) |' in card.text
    timm_dfpt.push_student(tmp_path / 'student', 'user/student', dry_run=tmp_path / 'mit', license='mit')
    data = card_of(tmp_path / 'mit').data.to_dict()
    assert data['license'] == 'mit'
    assert not {'license_name', 'license_link'} & set(data)


@pytest.mark.parametrize(
    ('license', 'row', 'warned'),
    [('dinov3-license', 'dinov3-license', True), ('Apache-2.0', 'apache-2.0', False), (None, 'not stated', False),
     ('unknown', 'not stated', False), ('a|<b>', r'a\|\<b\>', True)],
)  # fmt: skip
def test_prompt_path_names_the_license_of_its_teacher(
    license: str | None, row: str, warned: bool, tmp_path: Path
) -> None:
    model = timm.create_model('test_resnet', num_classes=2)
    model.pretrained_cfg = {**model.pretrained_cfg, 'license': license}
    teacher = timm_dfpt.wrap(model)
    timm_dfpt.push_prompt_path(teacher, 'user/prompt', base_model='', dry_run=tmp_path / 'dry', **OTHER)
    card = card_of(tmp_path / 'dry')
    assert f'| License of the teacher | {row} |' in card.text
    assert ('its terms may extend to this model' in ' '.join(card.text.split())) == warned
    assert OTHER.items() <= card.data.to_dict().items()


def test_student_names_the_licenses_it_comes_from() -> None:
    config = {'architecture': 'resnet18', 'num_classes': 2, 'pretrained_cfg': {'input_size': (3, 32, 32)}}
    licenses = {'teacher': 'nvidia-open-model-license', 'start': 'cc-by-nc-4.0'}
    run = RunFacts(method='dfpt', teacher='user/teacher', student_base='timm/start', licenses=licenses)
    text = student_card('user/s', config, params=1, run=run, license=License('mit')).text
    assert '| License of the teacher | nvidia-open-model-license |' in text
    assert '| License of the pretrained weights | cc-by-nc-4.0 |' in text
    assert (
        'The license of the teacher (`nvidia-open-model-license`) and that of the pretrained weights that training '
        'started from (`cc-by-nc-4.0`) is not one of the common permissive ones: its terms may extend to this model.'
    ) in text
    plain = student_card('user/s', config, params=1, run=RunFacts(method='kd', licenses={'teacher': 'mit'})).text
    assert '| License of the teacher | mit |' in plain
    assert 'terms may extend' not in plain
