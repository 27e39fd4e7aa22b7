"""The input contract, against torchvision's own normalisation and a plain resize."""
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import normalize

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
    with pytest.raises(ValueError, match=r'mean=\(0.5, 0.5\) must have one value or 3'):
        InputAdapter({**IMAGENET, 'mean': (0.5, 0.5)}, IMAGENET)
