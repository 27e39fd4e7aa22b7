"""Properties every logit loss must have, whatever the numbers."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_dfpt.losses import DFPTWeights, dfpt_losses, dist_loss, dkd_loss, kd_loss, logit_std_loss, ttm_loss
from timm_dfpt.tasks.methods import KD_LOSSES

settings.register_profile('losses', max_examples=40, deadline=None, derandomize=True)
pytestmark = pytest.mark.filterwarnings('error')

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

every_loss = pytest.mark.parametrize('name', KD_LOSSES)
check = settings(settings.get_profile('losses'))
temperatures = st.floats(0.1, 100.0)


@st.composite
def batches(draw: st.DrawFn, min_batch: int = 1, min_classes: int = 1, max_scale: float = 20.0) -> Batch:
    """Student and teacher logits [B, K] in float64, of sizes of their own, and class indices [B]."""
    shape = draw(st.integers(min_batch, 6)), draw(st.integers(min_classes, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    student, teacher = (
        torch.randn(shape, generator=generator, dtype=torch.float64) * draw(st.floats(0.1, max_scale)) for _ in range(2)
    )
    return student, teacher, torch.randint(shape[1], shape[:1], generator=generator)


@every_loss
@check
@given(batch=batches(), temperature=temperatures, shifts=st.tuples(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4)))
def test_shifting_the_logits_changes_nothing(
    name: str, batch: Batch, temperature: float, shifts: tuple[float, float]
) -> None:
    student, teacher, target = batch
    rows = torch.linspace(-1, 1, len(student), dtype=torch.float64).unsqueeze(1)
    shifted = KD_LOSSES[name](student + shifts[0] * rows, teacher + shifts[1] * rows, target, temperature)
    expected = KD_LOSSES[name](student, teacher, target, temperature)
    torch.testing.assert_close(shifted, expected, rtol=1e-6, atol=1e-8 * max(1.0, temperature**2))


@every_loss
@check
@given(batch=batches(), temperature=temperatures, seed=st.integers(0, 2**32))
def test_order_of_samples_and_classes_changes_nothing(name: str, batch: Batch, temperature: float, seed: int) -> None:
    student, teacher, target = batch
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(student.shape[0], generator=generator)
    columns = torch.randperm(student.shape[1], generator=generator)
    position = columns.argsort()
    permuted = KD_LOSSES[name](
        student[rows][:, columns], teacher[rows][:, columns], position[target[rows]], temperature
    )
    expected = KD_LOSSES[name](student, teacher, target, temperature)
    torch.testing.assert_close(permuted, expected, rtol=1e-9, atol=1e-12 * temperature**2)


@every_loss
@check
@given(batch=batches(), temperature=temperatures)
def test_never_negative(name: str, batch: Batch, temperature: float) -> None:
    # The bound is the rounding of log-probabilities in float64, scaled as the loss is.
    assert KD_LOSSES[name](*batch, temperature).item() >= -1e-13 * max(1.0, temperature**2)


@pytest.mark.parametrize('name', ['kd', 'dkd', 'dist', 'logit-std'])
@check
@given(batch=batches(min_batch=2, min_classes=2, max_scale=5.0), temperature=st.floats(0.5, 20.0))
def test_zero_at_equality(name: str, batch: Batch, temperature: float) -> None:
    _, teacher, target = batch
    student = teacher.clone().requires_grad_()
    loss = KD_LOSSES[name](student, teacher, target, temperature)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(0.0, abs=1e-12 * temperature**2)
    assert gradient.abs().max().item() == pytest.approx(0.0, abs=1e-12 * temperature**2)


@pytest.mark.parametrize('name', ['ttm', 'wttm'])
@check
@given(batch=batches(), temperature=temperatures)
def test_ttm_is_zero_where_the_student_is_the_tempered_teacher(name: str, batch: Batch, temperature: float) -> None:
    _, teacher, target = batch
    loss = KD_LOSSES[name](teacher / temperature + 1.0, teacher, target, temperature)
    assert loss.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize('name', ['kd', 'dkd', 'ttm', 'wttm'])
@check
@given(
    batch=batches(min_classes=3, max_scale=3.0),
    temperature=st.floats(0.5, 20.0),
    step=st.floats(1e-2, 2.0),
    where=st.integers(0, 2),
)
def test_above_zero_away_from_equality(name: str, batch: Batch, temperature: float, step: float, where: int) -> None:
    _, teacher, target = batch
    best = teacher / temperature if 'ttm' in name else teacher
    student = best.clone()
    student[:, where] += step
    loss = KD_LOSSES[name](student, teacher, target, temperature)
    assert loss.item() > KD_LOSSES[name](best, teacher, target, temperature).item() + 1e-12


@check
@given(batch=batches(min_classes=2), factor=st.floats(0.1, 10.0), temperature=temperatures)
def test_logit_std_ignores_the_size_of_the_logits(batch: Batch, factor: float, temperature: float) -> None:
    student, teacher, _ = batch
    expected = logit_std_loss(student, teacher, temperature)
    torch.testing.assert_close(logit_std_loss(factor * student, teacher, temperature), expected, rtol=1e-8, atol=1e-9)


@check
@given(batch=batches(), value=st.floats(-1e4, 1e4), temperature=temperatures)
def test_nckd_does_not_see_the_target_class(batch: Batch, value: float, temperature: float) -> None:
    student, teacher, target = batch
    other = student.scatter(1, target.unsqueeze(1), value)
    expected = dkd_loss(student, teacher, target, temperature, alpha=0.0)
    loss = dkd_loss(other.requires_grad_(), teacher, target, temperature, alpha=0.0)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-9, atol=1e-12 * temperature**2)
    (gradient,) = torch.autograd.grad(loss, other)
    assert not gradient.gather(1, target.unsqueeze(1)).any()


@every_loss
@check
@given(batch=batches(min_batch=2, min_classes=2, max_scale=2.0), temperature=st.floats(0.5, 10.0))
def test_gradient_against_finite_differences(name: str, batch: Batch, temperature: float) -> None:
    student, teacher, target = batch
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: KD_LOSSES[name](s, teacher, target, temperature), student, atol=1e-4)


@pytest.mark.parametrize('trained', ['student', 'prompt'])
@check
@given(batch=batches(max_scale=2.0), prompt_seed=st.integers(0, 2**32), temperature=st.floats(0.5, 10.0))
def test_dfpt_gradient_against_finite_differences(
    trained: str, batch: Batch, prompt_seed: int, temperature: float
) -> None:
    student, teacher, target = batch
    prompt = torch.randn(student.shape, generator=torch.Generator().manual_seed(prompt_seed), dtype=torch.float64)
    learner, other = (student, prompt) if trained == 'student' else (prompt, student)
    learner.requires_grad_()
    # Finite differences see through a detach, so only one direction may be in the sum.
    weights = (
        DFPTWeights(0.0, 0.0, 0.7, 1.3, prompt_task=0.0, student_task=0.9)
        if trained == 'student'
        else DFPTWeights(0.7, 1.3, 0.0, 0.0, prompt_task=0.9, student_task=0.0)
    )

    def loss(z: torch.Tensor) -> torch.Tensor:
        z_s, z_p = (z, other) if trained == 'student' else (other, z)
        return dfpt_losses(z_s, z_p, teacher, target, temperature=temperature, weights=weights)['loss']

    assert torch.autograd.gradcheck(loss, learner, atol=1e-4)


@check
@given(batch=batches(), seed=st.integers(0, 2**32), temperature=temperatures)
def test_dfpt_order_of_samples_only_orders_the_gradient(batch: Batch, seed: int, temperature: float) -> None:
    student, teacher, target = batch
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randn(student.shape, generator=generator, dtype=torch.float64)
    rows = torch.randperm(len(student), generator=generator)
    grads = []
    for order in (torch.arange(len(student)), rows):
        z_s, z_p = student[order].requires_grad_(), prompt[order].requires_grad_()
        loss = dfpt_losses(z_s, z_p, teacher[order], target[order], temperature=temperature)['loss']
        grads.append(torch.autograd.grad(loss, (z_s, z_p)))
    for plain, permuted in zip(*grads, strict=True):
        torch.testing.assert_close(permuted, plain[rows], rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Precision and extremes


def losses_and_gradients(
    student: torch.Tensor, prompt: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor, temperature: float
) -> dict[str, torch.Tensor]:
    """Every loss and gradient of the package on one batch, by name."""
    results = {}
    for name, loss_fn in KD_LOSSES.items():
        leaf = student.detach().requires_grad_()
        results[name] = loss_fn(leaf, teacher, target, temperature)
        (results[f'{name} gradient'],) = torch.autograd.grad(results[name], leaf)
    z_s, z_p = student.detach().requires_grad_(), prompt.detach().requires_grad_()
    out = dfpt_losses(z_s, z_p, teacher, target, temperature=temperature)
    results.update({f'dfpt {key}': value for key, value in out.items()})
    results['dfpt student gradient'], results['dfpt prompt gradient'] = torch.autograd.grad(out['loss'], (z_s, z_p))
    return {key: value.detach() for key, value in results.items()}


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32])
def test_computed_in_float32_whatever_the_autocast(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [(3 * torch.randn(5, 7, generator=generator)).to(dtype) for _ in range(3)]
    target = torch.randint(7, (5,), generator=generator)
    expected = losses_and_gradients(*(z.float() for z in logits), target, 4.0)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        results = losses_and_gradients(*logits, target, 4.0)
    assert results.keys() == expected.keys()
    for key, value in expected.items():
        if key.endswith('gradient'):
            # A gradient has the dtype of its logits, so it is rounded once, at the end.
            assert torch.equal(results[key], value.to(dtype)), key
        else:
            assert results[key].dtype == torch.float32, key
            assert torch.equal(results[key], value), key


def test_own_losses_are_computed_in_float32_under_autocast_too() -> None:
    # Matrix products are what autocast would take into half precision.
    generator = torch.Generator().manual_seed(0)
    student, prompt, teacher = torch.randn(3, 5, 7, generator=generator)
    costs = torch.rand(7, 7, generator=generator)
    dfpt = partial(
        dfpt_losses,
        *(student, prompt, teacher, torch.arange(5)),
        criterion=lambda logits, target: (logits.softmax(1) @ costs)[range(len(target)), target].mean(),
        kd_fn=lambda learner, source, target, temperature: ((learner - source) @ costs).square().mean(),
    )
    expected = dfpt()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert dfpt() == expected


def test_float64_stays_float64_under_autocast() -> None:
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.arange(5)
    expected = losses_and_gradients(*logits, target, 4.0)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        results = losses_and_gradients(*logits, target, 4.0)
    assert all(value.dtype == torch.float64 and torch.equal(value, expected[key]) for key, value in results.items())


@pytest.mark.parametrize('temperature', [0.1, 1.0, 100.0])
@pytest.mark.parametrize('scale', [1e-4, 1.0, 1e4])
@pytest.mark.parametrize('shape', [(1, 1), (5, 1), (1, 2), (4, 10), (1, 100_000), (2, 100_000)])
def test_extremes_stay_finite_and_close_to_float64(shape: tuple[int, int], scale: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [scale * torch.randn(shape, generator=generator) for _ in range(3)]
    target = torch.randint(shape[1], shape[:1], generator=generator)
    results = losses_and_gradients(*logits, target, temperature)
    expected = losses_and_gradients(*(z.double() for z in logits), target, temperature)
    for key, value in results.items():
        assert value.isfinite().all(), key
        if key.startswith('dist') and not 0.1 <= scale / temperature <= 10:
            continue  # nearly constant or underflowing probabilities have no correlation that float32 could tell
        exact = expected[key]
        # float32 knows a probability to 1e-7, a log-probability to 1e-7 of its size; T and T^2 scale the differences.
        if key.endswith('gradient'):
            rounding = max(1.0, temperature)
        else:
            size = math.log(shape[1]) + 2 * max(z.abs().max().item() for z in logits) / temperature
            rounding = (1 + size) * max(1.0, temperature**2)
        # The weight 8 of DKD scales it too, and so do the power sums of WTTM, which go up to K.
        rounding *= {'dkd': 8, 'wttm': shape[1]}.get(key.split()[0], 1)
        bound = 1e-3 * exact.abs().max().item() + 2e-6 * rounding
        assert (value.double() - exact).abs().max().item() <= bound, key


@pytest.mark.parametrize('offset', [-1e4, 1e3, 1e4])
def test_common_offset_of_large_logits(offset: float) -> None:
    # Multiples of 2^-6, so that adding the offset is exact in float32 and must not be felt.
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randint(-256, 257, (4, 10), generator=generator) / 64 for _ in range(3)]
    target = torch.randint(10, (4,), generator=generator)
    results = losses_and_gradients(*(z + offset for z in logits), target, 4.0)
    for key, value in losses_and_gradients(*logits, target, 4.0).items():
        torch.testing.assert_close(results[key], value, rtol=1e-3, atol=2e-3, msg=key)


def test_nothing_waits_for_the_device() -> None:
    # Tensors without values: a check or a branch on a value raises here, and would stall a GPU at every step.
    logits = torch.randn(3, 5, 7, device='meta')
    results = losses_and_gradients(*logits, torch.zeros(5, dtype=torch.int64, device='meta'), 4.0)
    assert all(value.is_meta for value in results.values())


def test_compiles_into_one_graph() -> None:
    generator = torch.Generator().manual_seed(0)
    student, prompt, teacher = (torch.randn(5, 7, generator=generator, requires_grad=True) for _ in range(3))
    target = torch.randint(7, (5,), generator=generator)
    losses = {
        'dfpt': partial(dfpt_losses, student, prompt, teacher, target),
        'kd': partial(kd_loss, student, teacher),
        'dist': partial(dist_loss, student, teacher),
        'ttm': partial(ttm_loss, student, teacher),
        'dkd': partial(dkd_loss, student, teacher, target),
    }
    for name, loss in losses.items():
        compiled = torch.compile(loss.func, backend='eager', fullgraph=True)(*loss.args)
        expected = loss()
        if isinstance(expected, dict):
            compiled, expected = compiled['loss'], expected['loss']
        assert torch.equal(compiled, expected), name
