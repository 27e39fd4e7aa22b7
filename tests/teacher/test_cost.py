"""What a step costs, counted: FLOPs against the floor of the arithmetic, and bytes kept for the backward pass."""
from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import timm_dfpt
from benchmarks.measure import count_flops, saved_bytes
from benchmarks.ways import Steps, count_floor, imagenet_pair
from timm_dfpt.tasks.baselines import LogitLossTask
from timm_dfpt.tasks.dfpt import DFPTDistillationTask
from timm_dfpt.teacher.frozen_layers import save_fewer_activations

# How far above the floor a step may be: attention computes its scores again in the backward pass.
PAIRS = [('resnet26', 1.0), ('convnext_atto', 1.0), ('vit_tiny_patch16_224', 1.03)]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module', params=PAIRS, ids=lambda p: p[0])
def counted(request):
    """FLOPs of every way, the floor, and how far above it a step may be."""
    name, tolerance = request.param
    pair = imagenet_pair(name, 'resnet18', batch=1, size=64)
    steps = Steps(pair, 'abcd')
    return {way: steps.flops(way) for way in 'abcd'}, count_floor(pair), tolerance


@pytest.mark.parametrize(
    'layer', [nn.Conv2d(4, 6, 3, stride=2, groups=g) for g in (1, 2)] + [nn.ConvTranspose2d(4, 6, 3, groups=2)], ids=str
)
def test_both_gradients_of_a_convolution_count_as_much_as_its_forward(layer):
    x = torch.randn(2, 4, 9, 9, requires_grad=True)
    forward = count_flops(lambda: layer(x))
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * forward
    assert count_flops(lambda: layer(x.detach()).sum().backward()) == 2 * forward


def test_step_costs_what_its_arithmetic_demands(counted):
    flops, floor, tolerance = counted
    assert flops['d'] <= tolerance * floor.dfpt
    assert flops['a'] <= floor.kd


def test_kd_costs_what_timms_task_costs(counted):
    flops, _, _ = counted
    assert flops['b'] == flops['a']


def test_sharing_saves_exactly_the_prefix(counted):
    flops, floor, _ = counted
    assert floor.prefix > 0.1 * floor.teacher
    assert flops['c'] - flops['d'] == floor.prefix


def _teacher_and_input(name, channels_last=False, save_memory=True):
    torch.manual_seed(0)
    teacher = timm_dfpt.wrap(timm.create_model(name, num_classes=5), save_memory=save_memory)
    for param in teacher.prompt_path.parameters():
        # Blocks that start at zero would hide a wrong gradient.
        nn.init.normal_(param, std=0.05)
    x = torch.randn(2, *teacher.model.pretrained_cfg['input_size'])
    return teacher, x.contiguous(memory_format=torch.channels_last) if channels_last else x


def _gradients(teacher, x):
    out = teacher(x).prompt
    out.float().square().sum().backward()
    return [out.detach(), *(p.grad for p in teacher.prompt_path.parameters() if p.requires_grad)]


FAMILIES = [
    'test_resnet', 'test_convnext', 'test_efficientnet', 'test_efficientnet_evos', 'test_byobnet', 'test_nfnet',
    'test_mambaout', 'test_vit', 'mobilenetv3_small_050',
]  # fmt: skip


@pytest.mark.parametrize('name', FAMILIES)
def test_frozen_layers_that_save_fewer_activations_give_the_same_bits(name):
    teacher, x = _teacher_and_input(name)
    plain, _ = _teacher_and_input(name, save_memory=False)
    for ours, theirs in zip(_gradients(teacher, x), _gradients(plain, x), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet'])
@pytest.mark.parametrize('channels_last', [False, True])
def test_the_same_bits_under_autocast(name, channels_last):
    teacher, x = _teacher_and_input(name, channels_last)
    plain, _ = _teacher_and_input(name, channels_last, save_memory=False)
    with torch.autocast('cpu', torch.bfloat16):
        pairs = list(zip(_gradients(teacher, x), _gradients(plain, x), strict=True))
    for ours, theirs in pairs:
        assert torch.equal(ours, theirs)


def test_the_same_bits_with_gradient_checkpointing():
    teacher, x = _teacher_and_input('test_resnet')
    expected = _gradients(copy.deepcopy(teacher), x)
    teacher.set_grad_checkpointing()
    for ours, theirs in zip(_gradients(teacher, x), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_frozen_resnet_keeps_no_input_of_batchnorm():
    teacher, x = _teacher_and_input('test_resnet')
    plain, _ = _teacher_and_input('test_resnet', save_memory=False)

    def kept(t):
        own = [x, *t.parameters(), *t.buffers(), *t.prompt_path.model.parameters(), *t.prompt_path.model.buffers()]
        return saved_bytes(lambda: t(x), iter(own))

    inputs = []
    for module in plain.prompt_path.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda m, args, out: inputs.append(args[0]))
    plain(x)
    needless = sum(t.numel() * t.element_size() for t in inputs if t.requires_grad)
    # And those of convolutions that are no output of an activation, whose backward needs them.
    assert kept(plain) - kept(teacher) >= needless > 0


def test_trained_layers_are_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding='same'), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    model[0].requires_grad_(False)
    plain = copy.deepcopy(model)
    save_fewer_activations(model)
    x = torch.randn(2, 3, 5, 5)
    for each in (model, plain):
        each(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)
    assert torch.equal(model[1].running_mean, plain[1].running_mean)


def test_frozen_weights_get_no_gradient_in_the_backward():
    teacher, x = _teacher_and_input('test_resnet')
    path = teacher.prompt_path
    forward = count_flops(lambda: teacher.prompt(x))
    with torch.no_grad():
        assert count_flops(lambda: teacher.prompt(x)) == forward
    both = count_flops(lambda: teacher.prompt(x).sum().backward())
    path.release()  # else they would be frozen again
    for param in path.model.parameters():
        param.requires_grad_(True)
    assert both < 0.85 * count_flops(lambda: teacher.prompt(x).sum().backward())


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_teacher_in_half_precision_trains_in_full(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).to(torch.bfloat16)
    size = model.pretrained_cfg['input_size']
    student = timm.create_model('test_resnet', num_classes=5)
    task = DFPTDistillationTask(student, timm_dfpt.wrap(model), verbose=False)
    result = task(torch.randn(2, *size), torch.tensor([0, 1]))
    result['loss'].backward()
    assert result['teacher_output'].dtype == torch.bfloat16
    trained = [p for group in task.teacher.parameter_groups() for p in group['params']]
    assert {p.dtype for p in (*trained, *student.parameters())} == {torch.float32}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    plain = LogitLossTask(student, model, verbose=False)(torch.randn(2, *size), torch.tensor([0, 1]))
    assert (plain['teacher_output'].dtype, plain['kd_loss'].dtype) == (torch.bfloat16, torch.float32)
