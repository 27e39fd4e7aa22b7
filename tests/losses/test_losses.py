"""The losses against their papers' formulas in plain Python floats, and against timm's own distillation task."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import statistics
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.task import LogitDistillationTask

from timm_dfpt.losses import (
    DFPTWeights,
    KDLoss,
    dfpt_losses,
    dist_loss,
    dkd_loss,
    kd_loss,
    logit_std_loss,
    ttm_loss,
)
from timm_dfpt.tasks.methods import KD_LOSSES

STUDENT = [
    [1.5, -0.3, 0.2, 2.0, -1.0],
    [0.1, 0.4, -2.2, 0.7, 1.3],
    [3.0, -1.0, 0.0, 0.5, -0.5],
    [0.0, 1.0, 2.0, 3.0, 4.0],
]
TEACHER = [
    [2.5, 0.1, -0.7, 1.0, 0.3],
    [-1.1, 0.9, 0.2, 0.7, 2.3],
    [-0.5, 4.0, 0.6, 0.2, -2.5],
    [0.5, 1.0, 2.5, 3.5, 6.0],
]
PROMPT = [[2.0, 0.3, -0.9, 1.4, 0.0], [-0.4, 1.2, 0.3, 0.1, 1.9], [0.8, 2.0, 0.4, 0.3, -1.5], [0.2, 0.9, 2.2, 3.1, 5.0]]
TARGET = [3, 4, 1, 4]

Rows = list[list[float]]


def tensor(rows: Rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def leaf(rows: Rows) -> torch.Tensor:
    return tensor(rows).requires_grad_()


def softmax(row: list[float], temperature: float) -> list[float]:
    exps = [math.exp(z / temperature) for z in row]
    return [e / math.fsum(exps) for e in exps]


def kl(p: list[float], q: list[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def kd_reference(student: Rows, teacher: Rows, target: list[int], temperature: float) -> float:
    rows = zip(student, teacher, strict=True)
    return temperature**2 * mean([kl(softmax(t, temperature), softmax(s, temperature)) for s, t in rows])


def dkd_reference(
    student: Rows, teacher: Rows, target: list[int], temperature: float, alpha: float = 1.0, beta: float = 8.0
) -> float:
    losses = []
    for s, t, y in zip(student, teacher, target, strict=True):
        p_s, p_t = softmax(s, temperature)[y], softmax(t, temperature)[y]
        tckd = kl([p_t, 1 - p_t], [p_s, 1 - p_s])
        nckd = kl(softmax(t[:y] + t[y + 1 :], temperature), softmax(s[:y] + s[y + 1 :], temperature))
        losses.append(alpha * tckd + beta * nckd)
    return temperature**2 * mean(losses)


def dist_reference(
    student: Rows, teacher: Rows, target: list[int], temperature: float, beta: float = 1.0, gamma: float = 1.0
) -> float:
    p_s = [softmax(row, temperature) for row in student]
    p_t = [softmax(row, temperature) for row in teacher]
    inter = mean([1 - statistics.correlation(a, b) for a, b in zip(p_s, p_t, strict=True)])
    columns = zip(zip(*p_s, strict=True), zip(*p_t, strict=True), strict=True)
    intra = mean([1 - statistics.correlation(a, b) for a, b in columns])
    return temperature**2 * (beta * inter + gamma * intra)


def logit_std_reference(student: Rows, teacher: Rows, target: list[int], temperature: float) -> float:
    def standardize(rows: Rows) -> Rows:
        return [[(z - statistics.fmean(row)) / statistics.pstdev(row) for z in row] for row in rows]

    return kd_reference(standardize(student), standardize(teacher), target, temperature)


def ttm_reference(student: Rows, teacher: Rows, target: list[int], temperature: float, weighted: bool = False) -> float:
    losses = []
    for s, t in zip(student, teacher, strict=True):
        powers = [p ** (1 / temperature) for p in softmax(t, 1.0)]
        power_sum = math.fsum(powers)
        losses.append((power_sum if weighted else 1.0) * kl([p / power_sum for p in powers], softmax(s, 1.0)))
    return mean(losses)


REFERENCES = {
    'kd': kd_reference,
    'dkd': dkd_reference,
    'dist': dist_reference,
    'logit-std': logit_std_reference,
    'ttm': ttm_reference,
    'wttm': partial(ttm_reference, weighted=True),
}


@pytest.mark.parametrize('temperature', [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize('name', KD_LOSSES)
def test_golden_value(name: str, temperature: float) -> None:
    loss = KD_LOSSES[name](tensor(STUDENT), tensor(TEACHER), torch.tensor(TARGET), temperature)
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(REFERENCES[name](STUDENT, TEACHER, TARGET, temperature), rel=1e-12)


def test_golden_value_other_weights() -> None:
    student, teacher, target = tensor(STUDENT), tensor(TEACHER), torch.tensor(TARGET)
    assert dkd_loss(student, teacher, target, 3.0, alpha=0.3, beta=2.5).item() == pytest.approx(
        dkd_reference(STUDENT, TEACHER, TARGET, 3.0, alpha=0.3, beta=2.5), rel=1e-12
    )
    assert dist_loss(student, teacher, 3.0, beta=0.3, gamma=2.5).item() == pytest.approx(
        dist_reference(STUDENT, TEACHER, TARGET, 3.0, beta=0.3, gamma=2.5), rel=1e-12
    )


def test_default_arguments_are_the_papers() -> None:
    student, teacher, target = tensor(STUDENT), tensor(TEACHER), torch.tensor(TARGET)
    assert kd_loss(student, teacher).item() == pytest.approx(kd_reference(STUDENT, TEACHER, TARGET, 4.0))
    assert dkd_loss(student, teacher, target).item() == pytest.approx(
        dkd_reference(STUDENT, TEACHER, TARGET, 4.0, alpha=1.0, beta=8.0)
    )
    assert dist_loss(student, teacher).item() == pytest.approx(dist_reference(STUDENT, TEACHER, TARGET, 1.0))
    assert logit_std_loss(student, teacher).item() == pytest.approx(logit_std_reference(STUDENT, TEACHER, TARGET, 2.0))
    assert ttm_loss(student, teacher).item() == pytest.approx(ttm_reference(STUDENT, TEACHER, TARGET, 10.0))


def test_logit_std_toy_case_of_the_paper() -> None:
    # Figure 2 of arXiv 2403.01427 prints these standard scores (of the K - 1 kind) and their divergence, 0.0995, and
    # 0 for the student whose logits are the teacher's in another size.
    first, teacher = tensor([[-1.320, 0.660, 0.880, -0.220]]), tensor([[-1.162, 1.162, 0.387, -0.387]])
    temperature = math.sqrt(4 / 3)
    assert logit_std_loss(first, teacher, temperature).item() / temperature**2 == pytest.approx(0.0995, abs=1e-4)
    assert logit_std_loss(7.0 * teacher + 3.0, teacher, temperature).item() == pytest.approx(0.0, abs=1e-14)


def test_kd_gradient_is_the_analytic_one() -> None:
    student, temperature = leaf(STUDENT), 3.0
    kd_loss(student, tensor(TEACHER), temperature).backward()
    expected = [
        [temperature * (p_s - p_t) / len(STUDENT) for p_s, p_t in zip(softmax(s, 3.0), softmax(t, 3.0), strict=True)]
        for s, t in zip(STUDENT, TEACHER, strict=True)
    ]
    torch.testing.assert_close(student.grad, tensor(expected), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize('row', range(4))
def test_dkd_is_a_decomposition_of_kd(row: int) -> None:
    # What the DKD paper starts from: KD = TCKD + (1 - p_t[target]) NCKD, sample by sample.
    student, teacher, target = tensor(STUDENT[row : row + 1]), tensor(TEACHER[row : row + 1]), TARGET[row]
    beta = 1 - softmax(TEACHER[row], 4.0)[target]
    decoupled = dkd_loss(student, teacher, torch.tensor([target]), 4.0, alpha=1.0, beta=beta)
    torch.testing.assert_close(decoupled, kd_loss(student, teacher, 4.0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize('name', KD_LOSSES)
def test_teacher_gets_no_gradient(name: str) -> None:
    student, teacher = leaf(STUDENT), leaf(TEACHER)
    KD_LOSSES[name](student, teacher, torch.tensor(TARGET), 2.0).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().max() > 1e-3


@pytest.mark.parametrize('name', KD_LOSSES)
def test_learned_temperature_gets_the_full_gradient(name: str) -> None:
    temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    KD_LOSSES[name](tensor(STUDENT), tensor(TEACHER), torch.tensor(TARGET), temperature).backward()
    step, reference = 1e-5, REFERENCES[name]
    slope = reference(STUDENT, TEACHER, TARGET, 2.0 + step) - reference(STUDENT, TEACHER, TARGET, 2.0 - step)
    assert temperature.grad is not None
    assert temperature.grad.item() == pytest.approx(slope / (2 * step), rel=1e-6)


def test_registry_survives_pickling() -> None:
    student, teacher, target = tensor(STUDENT), tensor(TEACHER), torch.tensor(TARGET)
    for name, loss in pickle.loads(pickle.dumps(KD_LOSSES)).items():
        assert loss(student, teacher, target, 2.0) == KD_LOSSES[name](student, teacher, target, 2.0)


@pytest.mark.parametrize('name', KD_LOSSES)
def test_soft_targets(name: str) -> None:
    soft = torch.full((4, 5), 0.2, dtype=torch.float64)
    if name == 'dkd':
        with pytest.raises(ValueError, match='class indices.*mixup'):
            KD_LOSSES[name](tensor(STUDENT), tensor(TEACHER), soft, 2.0)
    else:
        loss = KD_LOSSES[name](tensor(STUDENT), tensor(TEACHER), soft, 2.0)
        assert loss == KD_LOSSES[name](tensor(STUDENT), tensor(TEACHER), torch.tensor(TARGET), 2.0)


@pytest.mark.parametrize('value', [0.0, 0.1, -7.3])
@pytest.mark.parametrize('classes', [1, 5, 7, 100, 1000])
@pytest.mark.parametrize('loss', [dist_loss, logit_std_loss])
def test_constant_student_gets_no_exploding_gradient(
    loss: Callable[..., torch.Tensor], classes: int, value: float
) -> None:
    # A zero-initialised head: the correlation or the standard score does not exist, and rounding must not invent one.
    student = torch.full((4, classes), value, requires_grad=True)
    loss(student, torch.randn(4, classes, generator=torch.Generator().manual_seed(0)), 4.0).backward()
    assert student.grad is not None
    assert not student.grad.any()


def cross_entropy_reference(rows: Rows, target: list[int]) -> float:
    return mean([-math.log(softmax(row, 1.0)[y]) for row, y in zip(rows, target, strict=True)])


def test_dfpt_golden_values() -> None:
    weights = DFPTWeights(0.9, 0.3, 1.7, 0.6, prompt_task=0.8, student_task=1.2)
    out = dfpt_losses(
        leaf(STUDENT), leaf(PROMPT), tensor(TEACHER), torch.tensor(TARGET), temperature=3.0, weights=weights
    )
    expected = {
        'student_task_loss': cross_entropy_reference(STUDENT, TARGET),
        'student_teacher_loss': kd_reference(STUDENT, TEACHER, TARGET, 3.0),
        'student_prompt_loss': kd_reference(STUDENT, PROMPT, TARGET, 3.0),
        'prompt_task_loss': cross_entropy_reference(PROMPT, TARGET),
        'prompt_teacher_loss': kd_reference(PROMPT, TEACHER, TARGET, 3.0),
        'prompt_student_loss': kd_reference(PROMPT, STUDENT, TARGET, 3.0),
    }
    expected['loss'] = math.fsum(getattr(weights, k.removesuffix('_loss')) * v for k, v in expected.items())
    assert {k: v.item() for k, v in out.items()} == pytest.approx(expected, rel=1e-12)


def test_dfpt_default_weights_and_temperature() -> None:
    args = tensor(STUDENT), tensor(PROMPT), tensor(TEACHER), torch.tensor(TARGET)
    expected = dfpt_losses(*args, temperature=4.0, weights=DFPTWeights(1.0, 0.25, 1.0, 1.0, 1.0, 1.0))
    assert dfpt_losses(*args) == expected


def squared_error(
    learner: torch.Tensor, source: torch.Tensor, target: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Stand for a user's loss, which leaves the detaches to us."""
    return F.mse_loss(learner, source)


@pytest.mark.parametrize('kd_fn', [None, squared_error, *KD_LOSSES.values()], ids=['default', 'own', *KD_LOSSES])
def test_dfpt_directions_are_apart(kd_fn: KDLoss | None) -> None:
    student, prompt, teacher, target = leaf(STUDENT), leaf(PROMPT), leaf(TEACHER), torch.tensor(TARGET)
    out = dfpt_losses(student, prompt, teacher, target, kd_fn=kd_fn)
    for name in (field.name for field in dataclasses.fields(DFPTWeights)):
        grads = torch.autograd.grad(
            out[f'{name}_loss'], (student, prompt, teacher), retain_graph=True, allow_unused=True
        )
        trained = [grad is not None and bool(grad.any()) for grad in grads]
        assert trained == [name.startswith('student'), name.startswith('prompt'), False], name


@pytest.mark.parametrize('kd_name', [None, *KD_LOSSES])
def test_dfpt_one_backward_equals_two_separate_ones(kd_name: str | None) -> None:
    temperature, target = 3.0, torch.tensor(TARGET)
    weights = DFPTWeights(0.9, 0.3, 1.7, 0.6, prompt_task=0.8, student_task=1.2)
    kd_fn = KD_LOSSES[kd_name or 'kd']
    student, prompt, teacher = leaf(STUDENT), leaf(PROMPT), tensor(TEACHER)
    out = dfpt_losses(
        student,
        prompt,
        teacher,
        target,
        temperature=temperature,
        weights=weights,
        kd_fn=KD_LOSSES[kd_name] if kd_name else None,
    )
    out['loss'].backward()

    alone = leaf(STUDENT)
    (
        1.2 * F.cross_entropy(alone, target)
        + 1.7 * kd_fn(alone, teacher, target, temperature)
        + 0.6 * kd_fn(alone, tensor(PROMPT), target, temperature)
    ).backward()
    torch.testing.assert_close(student.grad, alone.grad, rtol=1e-12, atol=1e-14)
    alone = leaf(PROMPT)
    (
        0.8 * F.cross_entropy(alone, target)
        + 0.9 * kd_fn(alone, teacher, target, temperature)
        + 0.3 * kd_fn(alone, tensor(STUDENT), target, temperature)
    ).backward()
    torch.testing.assert_close(prompt.grad, alone.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize('name', [field.name for field in dataclasses.fields(DFPTWeights)])
def test_dfpt_zero_weight_reports_but_does_not_train(name: str) -> None:
    args = leaf(STUDENT), leaf(PROMPT), tensor(TEACHER), torch.tensor(TARGET)
    full = dfpt_losses(*args)
    out = dfpt_losses(*args, weights=dataclasses.replace(DFPTWeights(), **{name: 0.0}))
    assert {k: v.requires_grad for k, v in out.items()} == {k: k != f'{name}_loss' for k in out}
    assert {k: v.item() for k, v in out.items() if k != 'loss'} == {k: v.item() for k, v in full.items() if k != 'loss'}
    dropped = getattr(DFPTWeights(), name) * full[f'{name}_loss']
    torch.testing.assert_close(out['loss'], full['loss'] - dropped, rtol=1e-12, atol=0.0)


def test_dfpt_term_with_zero_weight_cannot_spoil_the_sum() -> None:
    prompt = torch.full((4, 5), math.nan, dtype=torch.float64)
    only_student = DFPTWeights(0.0, 0.0, 1.0, 0.0, prompt_task=0.0)
    out = dfpt_losses(leaf(STUDENT), prompt, tensor(TEACHER), torch.tensor(TARGET), weights=only_student)
    assert out['loss'].isfinite()
    assert out['prompt_task_loss'].isnan()


@pytest.mark.parametrize('criterion', [SoftTargetCrossEntropy(), BinaryCrossEntropy(), F.cross_entropy])
def test_dfpt_soft_targets(criterion: Callable[..., torch.Tensor]) -> None:
    target = 0.9 * F.one_hot(torch.tensor(TARGET), 5).double() + 0.02
    out = dfpt_losses(leaf(STUDENT), leaf(PROMPT), tensor(TEACHER), target, criterion=criterion)
    assert out['student_task_loss'] == criterion(tensor(STUDENT), target)
    assert out['prompt_task_loss'] == criterion(tensor(PROMPT), target)
    with pytest.raises(ValueError, match='dkd_loss needs class indices'):
        dfpt_losses(leaf(STUDENT), leaf(PROMPT), tensor(TEACHER), target, kd_fn=KD_LOSSES['dkd'])


def same_weights_students() -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    student = timm.create_model('test_resnet', num_classes=7)
    teacher = timm.create_model('test_vit2', num_classes=7, img_size=32).eval()
    # Fresh timm heads are close to zero; a teacher with an opinion makes the distillation terms large.
    torch.nn.init.normal_(teacher.get_classifier().weight, std=0.5)
    return student, copy.deepcopy(student), teacher


@pytest.mark.parametrize(('student_teacher', 'student_prompt'), [(1.0, 1.0), (0.35, 0.35), (2.0, 0.0)])
def test_dfpt_with_the_teacher_as_prompt_path_is_timm_distillation_bit_for_bit(
    student_teacher: float, student_prompt: float
) -> None:
    ours, theirs, teacher = same_weights_students()
    for model in (ours, theirs, teacher):
        # One normalisation for all, so that timm's task gives the teacher the very images.
        model.pretrained_cfg.update(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    task = LogitDistillationTask(
        theirs,
        copy.deepcopy(teacher),
        criterion=torch.nn.CrossEntropyLoss(),
        distill_loss_weight=student_teacher + student_prompt,
        task_loss_weight=1.0,
        temperature=4.0,
        verbose=False,
    )
    ours.train()
    task.train()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (ours, theirs)]
    weights = DFPTWeights(student_teacher=student_teacher, student_prompt=student_prompt)
    student_only = dataclasses.replace(weights, prompt_teacher=0.0, prompt_student=0.0, prompt_task=0.0)
    generator = torch.Generator().manual_seed(1)
    first = None
    for _ in range(25):
        images = torch.randn(4, 3, 32, 32, generator=generator)
        target = torch.randint(7, (4,), generator=generator)
        with torch.no_grad():
            z_t = teacher(images)
        z_p = z_t.clone().requires_grad_()
        z_s = ours(images)
        out = dfpt_losses(z_s, z_p, z_t, target, temperature=4.0, weights=weights)
        reference = task(images, target)
        # The sum above trains the prompt path too; the student's share of it is what timm computes.
        assert torch.equal(
            dfpt_losses(z_s, z_p, z_t, target, temperature=4.0, weights=student_only)['loss'], reference['loss']
        )
        assert torch.equal(out['student_teacher_loss'], reference['kd_loss'])
        for optimizer, loss in zip(optimizers, (out['loss'], reference['loss']), strict=True):
            optimizer.zero_grad()
            loss.backward()
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(mine.grad, other.grad)
        assert z_p.grad is not None
        assert z_p.grad.any()
        for optimizer in optimizers:
            optimizer.step()
        first = first if first is not None else reference['loss'].item()
    assert reference['loss'].item() != first
    state = theirs.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())
