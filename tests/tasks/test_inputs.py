"""The input contract, against torchvision's own normalisation and a plain resize."""
import contextlib

import pytest
import timm
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import normalize

from timm_dfpt.tasks import DFPTDistillationTask, LogitLossTask
from timm_dfpt.tasks.inputs import InputAdapter

IMAGENET = {'input_size': (3, 32, 32), 'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
INCEPTION = {'input_size': (3, 32, 32), 'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)}


@pytest.fixture
def pixels():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_renormalises_as_if_the_teacher_had_loaded_the_image_itself(pixels):
    student_input = normalize(pixels, INCEPTION['mean'], INCEPTION['std'])
    teacher_input = normalize(pixels, IMAGENET['mean'], IMAGENET['std'])
    adapted = InputAdapter(INCEPTION, IMAGENET)(student_input)
    torch.testing.assert_close(adapted, teacher_input)
    assert not torch.allclose(student_input, teacher_input)


def test_resizes_to_what_the_teacher_was_trained_on(pixels):
    target = {**IMAGENET, 'input_size': (3, 48, 40)}
    adapted = InputAdapter(INCEPTION, target)(normalize(pixels, INCEPTION['mean'], INCEPTION['std']))
    expected = F.interpolate(
        normalize(pixels, IMAGENET['mean'], IMAGENET['std']), (48, 40), mode='bicubic', antialias=True
    )
    assert adapted.shape == (4, 3, 48, 40)
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-4)


def test_gives_a_grey_image_to_a_teacher_of_three_channels(pixels):
    grey = {'input_size': (1, 32, 32), 'mean': (0.3,), 'std': (0.4,)}
    adapted = InputAdapter(grey, IMAGENET)(normalize(pixels[:, :1], grey['mean'], grey['std']))
    expected = normalize(pixels[:, :1].expand(-1, 3, -1, -1), IMAGENET['mean'], IMAGENET['std'])
    torch.testing.assert_close(adapted, expected)


def test_equal_contracts_pass_the_very_tensor_through(pixels):
    assert InputAdapter(IMAGENET, dict(IMAGENET))(pixels) is pixels


def test_bfloat16_stays_bfloat16(pixels):
    assert InputAdapter(INCEPTION, IMAGENET)(pixels.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize('target_channels', [1, 4])
def test_channels_that_cannot_be_converted_are_refused(target_channels):
    target = {'input_size': (target_channels, 32, 32), 'mean': (0.5,), 'std': (0.5,)}
    with pytest.raises(ValueError, match=f'teacher takes {target_channels}.*in_chans={target_channels}'):
        InputAdapter(IMAGENET, target)


def test_a_mean_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match=r'mean=\(0.5, 0.5\) of the images must have one value, or 3.*input_config'):
        InputAdapter({**IMAGENET, 'mean': (0.5, 0.5)}, IMAGENET)


def network(channels, **cfg):
    model = timm.create_model('test_resnet', in_chans=channels, num_classes=3)
    model.pretrained_cfg = {**model.pretrained_cfg, **cfg}
    return model


THREE, FOUR = {'mean': (0.1, 0.2, 0.3)}, {'mean': (0.1, 0.2, 0.3, 0.4), 'std': (0.5, 0.5, 0.5, 0.5)}


@pytest.mark.parametrize('task', [DFPTDistillationTask, LogitLossTask])
@pytest.mark.parametrize(
    ('student', 'teacher', 'message'),
    [
        ((4, {}), (4, {}), None),  # nothing to convert: both see the images as they are
        ((4, FOUR), (4, {'mean': (0.5,), 'std': (0.5,)}), None),
        ((4, THREE), (4, {}), r'mean=\(0.1, 0.2, 0.3\) of the images must have one value, or 4'),
        ((4, FOUR), (4, THREE), r'of the teacher must have one value, or 4.*teacher_input_config'),
        ((1, {}), (1, THREE), None),
        ((1, {}), (3, THREE), None),
        ((3, {}), (1, {}), 'loaded with 3 channels, but the teacher takes 1'),
        ((1, {}), (4, {}), 'loaded with 1 channels, but the teacher takes 4'),
        ((3, {}), (4, {}), 'loaded with 3 channels, but the teacher takes 4'),
        ((4, {}), (3, {}), 'loaded with 4 channels, but the teacher takes 3'),
    ],
)
def test_channels_and_means_fit_or_are_refused_when_the_task_is_built(task, student, teacher, message):
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        built = task(network(student[0], **student[1]), network(teacher[0], **teacher[1]), verbose=False)
    if not message:
        x = torch.randn(2, student[0], 32, 32)
        assert built(x, torch.tensor([0, 1]))['loss'].isfinite()
        source, target = ({'mean': (0.5,), 'std': (0.5,), **config} for _, config in (student, teacher))
        mean, std = ([torch.tensor(c[key]).view(-1, 1, 1) for c in (source, target)] for key in ('mean', 'std'))
        if student[0] == 1:
            mean[1] = mean[1].mean() if teacher[0] == 1 else mean[1]
        expected = (x * std[0] + mean[0] - mean[1]) / std[1]
        assert built.adapter(x).shape[1] == teacher[0]
        torch.testing.assert_close(built.adapter(x), expected)


@pytest.mark.parametrize('task', [DFPTDistillationTask, LogitLossTask])
def test_a_configuration_of_other_channels_than_the_model_takes_is_refused(task):
    for key, name in (('input_config', 'student'), ('teacher_input_config', 'teacher')):
        config = {'input_size': (1, 32, 32), 'mean': (0.5,), 'std': (0.5,)}
        with pytest.raises(ValueError, match=rf'^{key} has 1 channels.*but the {name} takes 3'):
            task(network(3), network(3), **{key: config}, verbose=False)
