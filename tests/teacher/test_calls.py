"""A call of a teacher depends on its own input alone: in any thread, in any order of forward and backward."""
from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from timm.layers import set_reentrant_ckpt, use_reentrant_ckpt
from torch import nn
from torch.utils.checkpoint import checkpoint

import timm_dfpt

Teacher = timm_dfpt.DualForwardPathTeacher


def make_teacher(name: str = 'test_vit', **kwargs: Any) -> Teacher:
    torch.manual_seed(0)
    teacher = timm_dfpt.wrap(timm.create_model(name, num_classes=5, **kwargs)).eval()
    with torch.no_grad():
        for param in teacher.prompt_path.parameters():
            param.add_(0.05 * torch.randn(param.shape))
    return teacher


def make_naflex() -> Teacher:
    return make_teacher('naflexvit_base_patch16_gap', embed_dim=32, depth=4, num_heads=2)


def image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed))


def patches(*grids: tuple[int, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """A NaFlex batch, with an image for each grid of patches."""
    length = max(height * width for height, width in grids)
    coord = torch.zeros(len(grids), length, 2, dtype=torch.long)
    valid = torch.zeros(len(grids), length, dtype=torch.bool)
    for i, (height, width) in enumerate(grids):
        coord[i, : height * width] = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        valid[i, : height * width] = True
    values = torch.randn(len(grids), length, 768, generator=torch.Generator().manual_seed(seed))
    return {'patches': values, 'patch_coord': coord, 'patch_valid': valid}


TEACHERS: dict[str, tuple[Callable[[], Teacher], list[Any]]] = {
    # As many tokens, so that nothing but their order is wrong with the state of another call.
    'dynamic sizes': (
        lambda: make_teacher('test_vit', dynamic_img_size=True),
        [image(64, 128), image(128, 64), image(96, 96), image(32, 256)],
    ),
    'naflex': (make_naflex, [patches((2, 6), (3, 4)), patches((4, 3), (6, 2)), patches((2, 2), (1, 3))]),
    'convolutions': (lambda: make_teacher('test_resnet'), [image(64, 64), image(64, 96)]),
}


def trained(teacher: Teacher) -> list[nn.Parameter]:
    return [param for group in teacher.parameter_groups() for param in group['params']]


def gradients(teacher: Teacher) -> list[torch.Tensor]:
    found = [param.grad.clone() for param in trained(teacher) if param.grad is not None]
    assert len(found) == len(trained(teacher))
    teacher.zero_grad()
    return found


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return logits.square().mean()


@pytest.fixture
def reentrant() -> Iterator[Callable[[bool], None]]:
    before = use_reentrant_ckpt()
    yield set_reentrant_ckpt
    set_reentrant_ckpt(before)


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ('kind', 'checkpointing'),
    [
        ('dynamic sizes', ''),
        ('dynamic sizes', 'plain'),
        ('dynamic sizes', 'reentrant'),
        ('naflex', 'plain'),
        ('convolutions', 'plain'),
    ],
)
def test_gradients_do_not_depend_on_what_runs_between_forward_and_backward(
    kind: str, checkpointing: str, reentrant: Callable[[bool], None]
) -> None:
    reentrant(checkpointing == 'reentrant')
    make, inputs = TEACHERS[kind]
    teacher = make()
    alone = []
    for x in inputs:
        loss_of(teacher.prompt(x)).backward()
        alone.append(gradients(teacher))
    if checkpointing:
        teacher.set_grad_checkpointing()
    first, second = inputs[:2]
    # A validation, of both paths.
    loss = loss_of(teacher.prompt(first))
    with torch.no_grad():
        teacher(second)
    teacher.original(second)
    loss.backward()
    assert_same(gradients(teacher), alone[0])
    # Crops of several sizes: one backward for all, and one for each in either order.
    sum(loss_of(teacher(x).prompt) for x in inputs).backward()
    assert_same(gradients(teacher), [sum(grads) for grads in zip(*alone, strict=True)])
    for order in (slice(None), slice(None, None, -1)):
        losses = [loss_of(teacher(x).prompt) for x in inputs]
        for part, expected in list(zip(losses, alone, strict=True))[order]:
            part.backward()
            assert_same(gradients(teacher), expected)
    # A call that fails leaves nothing behind.
    loss = loss_of(teacher.prompt(first))
    with pytest.raises((RuntimeError, AssertionError)):
        teacher(image(64, 64)[:, :2])
    loss.backward()
    assert_same(gradients(teacher), alone[0])


def test_a_call_that_the_user_recomputes() -> None:
    teacher = make_teacher('test_vit', dynamic_img_size=True)
    for checkpointing in (False, True):
        teacher.set_grad_checkpointing(checkpointing)
        loss_of(teacher.prompt(image(64, 128))).backward()
        expected = gradients(teacher)
        for reentrant in (False, True):
            x = image(64, 128).requires_grad_(reentrant)
            loss = loss_of(checkpoint(teacher.prompt, x, use_reentrant=reentrant))
            teacher(image(128, 64))
            loss.backward()
            assert_same(gradients(teacher), expected)


@pytest.mark.parametrize(
    ('kind', 'checkpointing'),
    [('dynamic sizes', False), ('dynamic sizes', True), ('naflex', False), ('convolutions', False)],
)
def test_threads_do_not_see_each_other(kind: str, checkpointing: bool) -> None:
    make, inputs = TEACHERS[kind]
    teacher = make()
    teacher.set_grad_checkpointing(checkpointing)
    params = trained(teacher)
    expected = []
    for x in inputs:
        out = teacher(x)
        expected.append([out.original, out.prompt, *torch.autograd.grad(loss_of(out.prompt), params)])
    wrong: list[str] = []
    start = threading.Barrier(8)

    def work(k: int) -> None:
        start.wait()
        for i in range(k, k + 3):
            x, reference = inputs[i % len(inputs)], expected[i % len(inputs)]
            try:
                if i % 2:
                    with torch.no_grad():
                        out = teacher(x)
                    found = [out.original, out.prompt]
                else:
                    out = teacher(x)
                    found = [out.original, out.prompt, *torch.autograd.grad(loss_of(out.prompt), params)]
                assert_same(found, reference[: len(found)])
            except Exception as error:
                wrong.append(f'{i}: {error}')

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_backward_in_another_thread_than_the_forward() -> None:
    make, (first, second, *_) = TEACHERS['naflex']
    teacher = make()
    loss_of(teacher.prompt(first)).backward()
    expected = gradients(teacher)
    teacher.set_grad_checkpointing()
    loss = loss_of(teacher.prompt(first))

    def elsewhere() -> None:
        # As the device threads of a backward pass, which have recomputed something else before.
        loss_of(teacher.prompt(second)).backward()
        gradients(teacher)
        loss.backward()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert_same(gradients(teacher), expected)


@pytest.mark.parametrize('as_dict', [False, True])
def test_an_input_that_asks_for_a_gradient_gets_it(as_dict: bool) -> None:
    teacher = make_naflex() if as_dict else make_teacher('test_resnet')
    x = patches((2, 6), (3, 4)) if as_dict else image(64, 64)
    grads = []
    for call in (lambda x: teacher(x).prompt, teacher.prompt):
        values = (x['patches'] if as_dict else x).clone().requires_grad_()
        loss_of(call({**x, 'patches': values} if as_dict else values)).backward()
        assert values.grad is not None
        grads.append(values.grad)
    assert torch.equal(*grads)
    assert grads[0].abs().max() > 0
    # Where none is asked for, the paths share their first layers all the same.
    seen: list[int] = []
    first = teacher.prompt_path.model.get_submodule(teacher.prefix[0][0])
    for child in first.modules():
        child.register_forward_hook(lambda *_: seen.append(1))
    teacher(x)
    with torch.no_grad():
        teacher(x if as_dict else x.clone().requires_grad_())
    assert len(seen) <= 2  # the module itself, which returns the record


def test_copies_run_calls_of_their_own() -> None:
    teacher = make_teacher('test_resnet')
    for other in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        assert other.prompt_path.calls is not teacher.prompt_path.calls
        assert other.shares_prefix
        assert torch.equal(other(image(64, 64)).prompt, teacher(image(64, 64)).prompt)


def test_tokens_outside_a_call_are_an_error() -> None:
    teacher = make_teacher('test_vit')
    with pytest.raises(RuntimeError, match=r'outside of the prompt path.*teacher\.prompt'):
        teacher.prompt_path.model(image(160, 160))


def test_checkpointing_is_seen_however_it_is_switched() -> None:
    teacher = make_teacher('test_vit', dynamic_img_size=True)
    assert teacher.shares_prefix
    teacher.prompt_path.model.set_grad_checkpointing(True)
    assert not teacher.shares_prefix


def test_data_parallel_is_refused_in_words() -> None:
    teacher = make_teacher('test_resnet')
    # What it calls on every module where there are two devices.
    for module in (teacher, teacher.prompt_path):
        with pytest.raises(RuntimeError, match='DataParallel.*DistributedDataParallel'):
            [part._replicate_for_data_parallel() for part in module.modules()]
