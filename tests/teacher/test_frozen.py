"""Frozen means frozen, whatever is called on teacher, model or optimizer; and what can be wrapped at all."""
from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

import timm_dfpt

Teacher = timm_dfpt.DualForwardPathTeacher


def make_model(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', **{'num_classes': 5, **kwargs})
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 1.5)
    return model


def images(seed: int = 1) -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(images())


def set_requires_grad(params: Any) -> None:
    for param in params:
        param.requires_grad = True


def backward_of(model: nn.Module) -> None:
    """What a user may try on the frozen model itself."""
    model.requires_grad_(True).train()
    out = model(images())
    if out.requires_grad:
        out.sum().backward()


def trainable_state(module: nn.Module) -> dict[str, torch.Tensor]:
    names = {name for name, _ in module.named_parameters()}
    return {k: v.clone().requires_grad_(k in names) for k, v in module.state_dict().items()}


ATTEMPTS: dict[str, Callable[[Teacher, Any], object]] = {
    'nothing': lambda teacher, model: None,
    'teacher.requires_grad_': lambda teacher, model: teacher.requires_grad_(True),
    'model.requires_grad_': lambda teacher, model: model.requires_grad_(True),
    'a stage': lambda teacher, model: model.layer1.requires_grad_(True).train(),
    'parameters of the teacher': lambda teacher, model: set_requires_grad(teacher.parameters()),
    'parameters of the prompt path': lambda teacher, model: set_requires_grad(teacher.prompt_path.model.parameters()),
    'modes': lambda teacher, model: [m.train() for m in (teacher, model, model.bn1, teacher.prompt_path)],
    'modes of the prompt path': lambda teacher, model: teacher.prompt_path.model.train(),
    'requires_grad_ of the prompt path': lambda teacher, model: teacher.prompt_path.model.requires_grad_(True),
    'backward through the model': lambda teacher, model: backward_of(model),
    'gradients': lambda teacher, model: [setattr(p, 'grad', torch.ones_like(p)) for p in model.parameters()],
    'load_state_dict': lambda teacher, model: teacher.load_state_dict(trainable_state(teacher), assign=True),
    'load_state_dict of the model': lambda teacher, model: model.load_state_dict(trainable_state(model), assign=True),
    'conversion of the model': lambda teacher, model: model.double().float(),
}


@pytest.mark.parametrize('variant', ['dfpt', 'dfpt+'])
def test_the_original_path_never_moves(variant: str) -> None:
    model, x = make_model(), images()
    model(x).sum().backward()  # gradients from before
    before, state = logits_of(model), copy.deepcopy(model.state_dict())
    teacher = timm_dfpt.wrap(model, variant=variant)
    for name, attempt in ATTEMPTS.items():
        start = [p.detach().clone() for p in teacher.prompt_path.parameters()]
        optimizer = torch.optim.SGD(teacher.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        attempt(teacher, model)
        (teacher(x).prompt.square().sum() + teacher.prompt(x).sum()).backward()
        optimizer.step()
        attempt(teacher, model)
        teacher.model(x)
        optimizer.step()
        optimizer.zero_grad()
        teacher.zero_grad()
        assert torch.equal(teacher.original(x), before), name
        for key, value in model.state_dict().items():
            assert torch.equal(value, state[key]), f'{name}: {key}'
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters()), name
        if name != 'load_state_dict':  # whose new tensors the optimizer does not know
            moved = [not torch.equal(a, b) for a, b in zip(start, teacher.prompt_path.parameters(), strict=True)]
            assert any(moved), name
        # And both paths still run on one set of weights.
        teacher.prompt(x)
        if variant == 'dfpt':
            twin = teacher.prompt_path.model
            assert twin.conv1[0].weight is model.conv1[0].weight, name
            assert twin.bn1.running_mean is model.bn1.running_mean, name


def test_requires_grad_reaches_what_is_trained_alone() -> None:
    for kwargs in ({}, {'variant': 'dfpt+'}, {'variant': 'dfpt+', 'prompt': timm_dfpt.PromptConfig(new_head=False)}):
        teacher = timm_dfpt.wrap(make_model(), **kwargs)
        flags = {name: param.requires_grad for name, param in teacher.named_parameters()}
        assert teacher.requires_grad_(False) is teacher
        assert not any(p.requires_grad for p in teacher.parameters())
        teacher.requires_grad_(True)
        assert {name: param.requires_grad for name, param in teacher.named_parameters()} == flags


def test_a_compiled_teacher_stays_frozen() -> None:
    # Two layers, because most of what compiling costs it costs for each.
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.LazyLinear(2))
    model(images())
    model[1].running_mean.normal_()
    statistics = model[1].running_mean.clone()
    teacher = timm_dfpt.wrap(model, stages=['1', '2'], classifier='4').eval()
    torch._dynamo.reset()
    compiled = torch.compile(teacher, backend='eager')
    for _ in range(2):
        compiled(images()).prompt.sum().backward()
        model.requires_grad_(True).train()
    compiled(images()).prompt.sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model[1].running_mean, statistics)


def test_unwrap_gives_back_gradients_modes_and_compiled_modules() -> None:
    model = make_model().train()
    model.layer1.eval()
    model.fc.requires_grad_(False)
    model.layer2.compile(backend='eager')
    model(images()).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    flags = [(m.training, m._compiled_call_impl) for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    teacher = timm_dfpt.wrap(model)
    assert all(p.grad is None for p in model.parameters())
    teacher(images()).prompt.sum().backward()
    assert teacher.unwrap() is model
    assert all(p.grad is grads[name] for name, p in model.named_parameters())
    assert [(m.training, m._compiled_call_impl) for m in model.modules()] == flags
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert not model.fc.weight.requires_grad
    assert model.conv1[0].weight.requires_grad
    # What is given back is no longer frozen by anybody.
    with pytest.raises(RuntimeError, match=r'unwrap\(\) and can no longer be used'):
        teacher(images())
    teacher.eval()
    model.train()
    model(images()).sum().backward()
    assert model.conv1[0].weight.requires_grad
    assert model.bn1.training
    assert teacher.unwrap() is model


def test_gradients_come_back_to_a_model_that_was_converted() -> None:
    model = make_model()
    model(images()).sum().backward()
    grad = model.fc.bias.grad.clone()
    teacher = timm_dfpt.wrap(model).double()
    assert torch.equal(teacher.unwrap().fc.bias.grad, grad.double())


def test_a_copy_of_the_model_alone_is_free() -> None:
    model = make_model()
    teacher = timm_dfpt.wrap(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.requires_grad_(True).train()
        other(images()).sum().backward()
        assert other.training
        assert other.fc.weight.grad is not None
        assert timm_dfpt.wrap(other).unwrap() is other
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in other.modules())
    # A copy of the teacher is as frozen as the teacher.
    for again in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        again.model.requires_grad_(True).train()
        again.model(images())
        assert not again.model.training
        assert not again.model.fc.weight.requires_grad
        again.unwrap()
    assert teacher.model is model


def test_a_part_or_a_whole_of_a_wrapped_model_is_refused() -> None:
    model = make_model()
    teacher = timm_dfpt.wrap(model)
    for again, kwargs in (
        (nn.Sequential(model), {'stages': ['0.layer1', '0.layer2'], 'classifier': '0.fc'}),
        (model.layer1, {'stages': ['0.conv1', '0.conv2'], 'classifier': '0.conv3'}),
    ):
        with pytest.raises(ValueError, match='wrapped already'):
            timm_dfpt.wrap(again, **kwargs)
    with pytest.raises(ValueError, match='has prompt blocks already'):
        timm_dfpt.wrap(teacher.prompt_path.model)
    with pytest.raises(ValueError, match='DualForwardPathTeacher already'):
        timm_dfpt.wrap(nn.Sequential(teacher))


@pytest.mark.parametrize('variant', ['dfpt', 'dfpt+'])
def test_teachers_of_one_model_are_counted(variant: str) -> None:
    model = make_model().train()
    model(images()).sum().backward()
    grad, expected = model.fc.weight.grad, logits_of(model)
    first = timm_dfpt.wrap(model)
    second = timm_dfpt.wrap(torch.compile(first.model), variant=variant)
    third = copy.deepcopy(second)
    with torch.no_grad():
        for param in (*first.prompt_path.parameters(), *second.prompt_path.parameters()):
            param.add_(0.05 * torch.randn(param.shape))
    for teacher in (first, second):
        model.requires_grad_(True).train()
        out = teacher.eval()(images())
        assert torch.equal(out.original, expected)
        assert torch.equal(out.prompt, teacher.prompt(images()))
        out.prompt.sum().backward()
        assert all(p.grad is not None for p in teacher.prompt_path.parameters() if p.requires_grad)
    assert not torch.equal(first(images()).prompt, second(images()).prompt)
    # Frozen until the last of them is unwrapped.
    first.unwrap()
    model.requires_grad_(True).train()
    assert torch.equal(second(images()).original, expected)
    assert not model.training
    assert second.unwrap() is model
    assert model.training
    assert model.fc.weight.grad is grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    third.model.requires_grad_(True)
    third(images())
    assert not third.model.fc.weight.requires_grad


def test_a_teacher_that_nobody_has_any_more_takes_nothing_with_it() -> None:
    model = make_model().train()
    timm_dfpt.wrap(model)
    assert timm_dfpt.wrap(model).unwrap() is model
    assert model.training
    assert model.fc.weight.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    timm_dfpt.wrap(model)
    model.requires_grad_(True)
    assert not timm_dfpt.wrap(model).unwrap().training


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    'torch.compile': torch.compile,
    'DataParallel': nn.DataParallel,
    'ModelEmaV3': ModelEmaV3,
    'AveragedModel': AveragedModel,
    'both': lambda model: torch.compile(nn.DataParallel(model)),
}


@pytest.mark.parametrize('name', WRAPPERS)
def test_wrappers_are_looked_through(name: str) -> None:
    model = make_model()
    expected = logits_of(model)
    wrapped = WRAPPERS[name](model)
    assert len(timm_dfpt.find_stages(wrapped)) == 4
    teacher = timm_dfpt.wrap(wrapped)
    assert type(teacher.unwrap()) is type(model)
    assert torch.equal(timm_dfpt.wrap(wrapped)(images()).original, expected)


def test_a_model_compiled_in_place_is_calibrated_as_it_is() -> None:
    model = make_model().eval()
    model.compile(backend='eager')
    model.layer1.compile(backend='eager')
    expected = model(images())
    out = timm_dfpt.wrap(model)(images())
    torch.testing.assert_close(out.original, expected)


class _WithAPartCalledModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = make_model(num_classes=0)
        self.head = nn.Linear(self.module.num_features, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.module(x))


def test_a_part_that_is_called_module_is_not_a_wrapper() -> None:
    model = _WithAPartCalledModule()
    teacher = timm_dfpt.wrap(model, stages=['module.layer1', 'module.layer2'], classifier='head')
    assert teacher.model is model
    assert teacher.num_classes == 3


@pytest.mark.parametrize('classes', [1000, 0])
def test_a_head_put_on_by_hand_counts(classes: int) -> None:
    model = make_model(num_classes=classes)
    model.fc = nn.Linear(model.num_features, 4)
    teacher = timm_dfpt.wrap(model)
    assert teacher(images()).prompt.shape == (2, 4)
    assert teacher.num_classes == teacher.prompt_path.num_classes == 4
    other = timm_dfpt.wrap(teacher.unwrap(), num_classes=6)
    assert (other.num_classes, other.prompt_path.num_classes) == (4, 6)


def test_models_that_cannot_teach_are_refused() -> None:
    for value in (float('nan'), float('inf')):
        model = make_model()
        with torch.no_grad():
            model.layer3[0].conv1.weight[0, 0] = value
        with pytest.raises(ValueError, match=r'not finite.*layer3\.0\.conv1\.weight'):
            timm_dfpt.wrap(model)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model = make_model()
    model.bn1.running_var.fill_(float('nan'))
    with pytest.raises(ValueError, match=r'not finite.*bn1\.running_var'):
        timm_dfpt.wrap(model, num_classes=3)
    with torch.inference_mode():
        model = make_model()
    with pytest.raises(ValueError, match='inference_mode'):
        timm_dfpt.wrap(model)
    with pytest.raises(ValueError, match=r'torch\.jit'):
        timm_dfpt.wrap(torch.jit.trace(make_model().eval(), images()))
