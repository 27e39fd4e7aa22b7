"""The two paths of a teacher on the device: the original untouched, the prompt path starting as the original."""
from __future__ import annotations

import copy

import pytest
import torch
from gpu_cases import FAMILIES, PRECISIONS, computing, make_batch, make_model, skip_tf32_on_cpu, stir

import timm_dfpt
from benchmarks.measure import saved_bytes

pytestmark = pytest.mark.gpu

# Of the largest logit. In NCHW nothing but zeros is added; tokens go through another memory layout, with which
# another kernel may be chosen.
START = {'float32': 1e-5, 'tf32': 2e-3, 'bf16': 3e-2, 'fp16': 5e-3}


@pytest.mark.parametrize('precision', PRECISIONS)
@pytest.mark.parametrize('family', FAMILIES)
def test_the_original_path_is_the_unwrapped_model_to_the_last_bit(
    family: str, precision: str, device: torch.device
) -> None:
    skip_tf32_on_cpu(device, precision)
    model = make_model(family, device)
    plain = copy.deepcopy(model).eval()
    teacher = timm_dfpt.wrap(model).train()
    stir(teacher)
    x, _ = make_batch(device)
    with computing(device, precision):
        with torch.no_grad():
            expected = plain(x)
        assert torch.equal(teacher(x).original, expected)
        assert torch.equal(teacher.original(x), expected)


@pytest.mark.parametrize('precision', PRECISIONS)
@pytest.mark.parametrize('family', FAMILIES)
def test_the_prompt_path_starts_as_the_original(family: str, precision: str, device: torch.device) -> None:
    skip_tf32_on_cpu(device, precision)
    x, _ = make_batch(device)
    model = make_model(family, device)
    with computing(device, precision):
        with torch.autocast(device.type, enabled=False):
            teacher = timm_dfpt.wrap(model)
        out = teacher(x)
        error = (out.prompt - out.original).detach().abs().max() / out.original.abs().max()
        assert out.prompt.requires_grad
        assert float(error) <= (0 if family == 'resnet' else START[precision])


@pytest.mark.parametrize('precision', PRECISIONS)
@pytest.mark.parametrize('family', FAMILIES)
def test_a_path_with_norms_of_its_own_starts_as_the_original_and_leaves_it_alone(
    family: str, precision: str, device: torch.device
) -> None:
    skip_tf32_on_cpu(device, precision)
    x, _ = make_batch(device)
    teacher = timm_dfpt.wrap(make_model(family, device), prompt=timm_dfpt.PromptConfig(norms='own')).eval()
    with computing(device, precision):
        out = teacher(x)
        error = (out.prompt - out.original).detach().abs().max() / out.original.abs().max()
        assert float(error) <= (0 if family == 'resnet' else START[precision])
        teacher.train().prompt(x).float().square().sum().backward()
        assert all(p.grad is not None for group in teacher.parameter_groups() for p in group['params'])
        with torch.no_grad():
            for norm in teacher.prompt_path.norms:
                norm.weight.mul_(1.1)
        assert torch.equal(teacher.eval()(x).original, out.original)


@pytest.mark.parametrize('precision', ['float32', 'bf16'])
@pytest.mark.parametrize('family', FAMILIES)
def test_sharing_the_prefix_changes_no_bit(family: str, precision: str, device: torch.device) -> None:
    x, _ = make_batch(device)
    teacher = timm_dfpt.wrap(make_model(family, device)).train()
    stir(teacher)
    assert teacher.shares_prefix
    alone = copy.deepcopy(teacher)
    with computing(device, precision):
        shared, full = teacher(x).prompt, alone.prompt(x)
    assert torch.equal(shared, full)
    for logits in (shared, full):
        logits.float().square().sum().backward()
    for ours, theirs in zip(teacher.prompt_path.parameters(), alone.prompt_path.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize('channels_last', [False, True], ids=['contiguous', 'channels_last'])
@pytest.mark.parametrize('precision', PRECISIONS)
def test_frozen_layers_that_save_less_give_the_gradients_of_torchs_own(
    precision: str, channels_last: bool, device: torch.device
) -> None:
    skip_tf32_on_cpu(device, precision)
    x, _ = make_batch(device)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    logits, grads, kept = [], [], []
    for save_memory in (True, False):
        teacher = timm_dfpt.wrap(make_model('resnet', device), save_memory=save_memory).train()
        stir(teacher)
        if channels_last:
            teacher.to(memory_format=torch.channels_last)
        own = [x, *teacher.parameters(), *teacher.buffers()]
        with computing(device, precision):
            kept.append(saved_bytes(lambda teacher=teacher: teacher.prompt(x), iter(own)))
            logits.append(teacher.prompt(x))
        logits[-1].float().square().sum().backward()
        grads.append([p.grad for p in teacher.prompt_path.parameters() if p.requires_grad])
    assert torch.equal(logits[0], logits[1])
    for ours, torchs in zip(*grads, strict=True):
        assert torch.equal(ours, torchs)
    assert kept[0] < kept[1]


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_a_teacher_in_half_precision_trains_blocks_in_float32(dtype: str, device: torch.device) -> None:
    model = make_model('resnet', device).to(getattr(torch, dtype))
    plain = copy.deepcopy(model).eval()
    teacher = timm_dfpt.wrap(model).train()
    x, _ = make_batch(device)
    out = teacher(x)
    with torch.no_grad():
        assert torch.equal(out.original, plain(x.to(getattr(torch, dtype))))
    out.prompt.float().square().mean().backward()
    params = [p for p in teacher.prompt_path.parameters() if p.requires_grad]
    assert {p.dtype for p in params} == {torch.float32}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in params)


def test_data_parallel_is_refused(gpu: torch.device) -> None:
    """Its threads would share what the paths hand over to each other, and train copies that are thrown away."""
    teacher = timm_dfpt.wrap(make_model('resnet', gpu))
    with pytest.raises(RuntimeError, match='DistributedDataParallel'):
        torch.nn.parallel.replicate(teacher, [gpu, gpu])
