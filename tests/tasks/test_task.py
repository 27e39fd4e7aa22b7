"""DFPTDistillationTask against plain torch steps, timm's own task, and timm's way of using a task."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.task import LogitDistillationTask, TrainingTask
from torch import nn

import timm_dfpt
from timm_dfpt.losses import DFPTWeights
from timm_dfpt.tasks.dfpt import DFPTDistillationTask

NUM_CLASSES = 7
SIZE = 64


def make_student(seed=0):
    torch.manual_seed(seed)
    return timm.create_model('test_resnet', num_classes=NUM_CLASSES)


def make_teacher_model(name='test_resnet', seed=1):
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=NUM_CLASSES).eval()


def make_batch(seed=2, size=SIZE):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(6, 3, size, size, generator=generator)
    return images, torch.randint(NUM_CLASSES, (6,), generator=generator)


def make_task(variant='dfpt', size=SIZE, student=None, teacher=None, **kwargs):
    teacher = timm_dfpt.wrap(teacher or make_teacher_model(), variant=variant)
    config = {'input_size': (3, size, size), 'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
    kwargs = {'input_config': config, 'teacher_input_config': config, 'verbose': False, **kwargs}
    return DFPTDistillationTask(student or make_student(), teacher, **kwargs)


def perturb(module, seed=3):
    """Move every trainable parameter away from its start, where zeros hide gradients."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in module.parameters():
            if param.requires_grad:
                param.add_(0.02 * torch.randn(param.shape, generator=generator))


def plain_kl(p_logits, q_logits, temperature):
    """T^2 KL(softmax(p/T) || softmax(q/T)), written out."""
    p = torch.softmax(p_logits / temperature, dim=1)
    q = torch.softmax(q_logits / temperature, dim=1)
    return temperature**2 * (p * (p.log() - q.log())).sum(dim=1).mean()


@pytest.mark.parametrize('variant', ['dfpt', 'dfpt+'])
def test_a_step_equals_a_hand_written_one(variant):
    task = make_task(variant, temperature=3.0, weights=DFPTWeights(0.7, 0.3, 1.1, 0.9))
    perturb(task.teacher.prompt_path)
    reference = copy.deepcopy(task)
    images, target = make_batch()

    task.get_trainable_module().train()
    result = task(images, target)
    result['loss'].backward()

    student, teacher = reference.get_eval_model(), reference.teacher
    student.train()
    teacher.prompt_path.train()
    with torch.no_grad():
        z_t = teacher.model(images)
    z_p, z_s = teacher.prompt_path(images), student(images)
    prompt_loss = (
        F.cross_entropy(z_p, target)
        + 0.7 * plain_kl(z_t, z_p, 3.0)
        + 0.3 * plain_kl(z_s.detach(), z_p, 3.0)
    )
    student_loss = (
        F.cross_entropy(z_s, target)
        + 1.1 * plain_kl(z_t, z_s, 3.0)
        + 0.9 * plain_kl(z_p.detach(), z_s, 3.0)
    )
    # Two separate backwards: the two losses must not mix.
    student_loss.backward()
    prompt_loss.backward()

    torch.testing.assert_close(result['loss'], student_loss + prompt_loss)
    pairs = list(zip(task.named_parameters(), reference.named_parameters(), strict=True))
    trained = [(name, a, b) for (name, a), (_, b) in pairs if b.grad is not None]
    assert len(trained) > 80
    for name, a, b in trained:
        assert a.grad is not None, name
        torch.testing.assert_close(a.grad, b.grad, rtol=2e-4, atol=1e-6, msg=lambda m, n=name: f'{n}: {m}')
    assert all(a.grad is None for (_, a), (_, b) in pairs if b.grad is None)


def test_every_trainable_parameter_moves_and_no_frozen_one_does():
    task = make_task()
    perturb(task.trainable_module)
    frozen = copy.deepcopy(task.teacher.model.state_dict())
    module = task.get_trainable_module()
    module.train()
    task.teacher.model.train()  # what a careless loop does
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    images, target = make_batch()
    for _ in range(2):
        task(images, target)['loss'].backward()
        for name, param in module.named_parameters():
            assert param.grad is not None, name
            assert param.grad.isfinite().all(), name
            assert param.grad.abs().sum() > 0, name
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(before[name], p) for name, p in module.named_parameters())
    for name, value in task.teacher.model.state_dict().items():
        assert torch.equal(value, frozen[name]), name
    assert all(p.grad is None for p in task.teacher.model.parameters())


@pytest.mark.parametrize(
    ('weights', 'silent'),
    [
        (DFPTWeights(0, 0, 1, 1, prompt_task=0), 'prompt_path'),
        (DFPTWeights(1, 1, 0, 0, student_task=0), 'student'),
    ],
)
def test_one_sides_terms_give_the_other_no_gradient(weights, silent):
    task = make_task(weights=weights)
    perturb(task.teacher.prompt_path)
    module = task.get_trainable_module().train()
    task(*make_batch())['loss'].backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    heard = [name for name, grad in grads.items() if grad is not None and grad.abs().sum() > 0]
    assert heard
    assert not any(name.startswith(silent) for name in heard)


def test_a_prompt_path_that_does_not_learn_is_timms_distillation_bit_for_bit():
    student, twin = make_student(), make_student()
    ours = make_task(student=student, temperature=4.0)
    theirs = LogitDistillationTask(
        twin, make_teacher_model(), temperature=4.0, distill_loss_weight=2.0, task_loss_weight=1.0, verbose=False
    )
    theirs.student_mean, theirs.student_std = theirs.teacher.mean_kd, theirs.teacher.std_kd
    module = ours.get_trainable_module().train()
    twin.train()
    optimizers = [
        torch.optim.SGD(
            [{'params': student.parameters()}, {'params': module.prompt_path.parameters(), 'lr': 0.0}],
            lr=0.1,
            momentum=0.9,
        ),
        torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9),
    ]
    for step in range(6):
        batch = make_batch(seed=step)
        for task, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            task(*batch)['loss'].backward()
            optimizer.step()
    for (name, a), b in zip(student.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_teacher_sees_what_it_was_trained_on():
    """A student of other statistics and another size than the teacher's."""
    teacher = make_teacher_model('test_vit')
    student = make_student()
    student.pretrained_cfg = {
        **student.pretrained_cfg, 'input_size': (3, 48, 48), 'mean': (0.1, 0.2, 0.3), 'std': (0.6, 0.5, 0.4)
    }  # fmt: skip
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, 'mean': (0.5, 0.4, 0.3), 'std': (0.2, 0.3, 0.4)}
    task = DFPTDistillationTask(student, timm_dfpt.wrap(teacher), verbose=False)
    pixels = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))

    def normalized(mean, std):
        return (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)

    result = task(normalized((0.1, 0.2, 0.3), (0.6, 0.5, 0.4)), torch.zeros(2, dtype=torch.int64))
    expected = teacher(
        F.interpolate(normalized((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), (160, 160), mode='bicubic', antialias=True)
    )
    torch.testing.assert_close(result['teacher_output'], expected, rtol=1e-3, atol=1e-4)


def test_known_teacher_logits_change_nothing():
    task = make_task()
    perturb(task.teacher.prompt_path)
    twin = copy.deepcopy(task)
    images, target = make_batch()
    a = task(images, target)
    b = twin(images, target, teacher_logits=a['teacher_output'])
    a['loss'].backward()
    b['loss'].backward()
    for (name, p), q in zip(task.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name


def test_result_names_terms_and_agreement():
    task = make_task()
    result = task(*make_batch())
    assert isinstance(task, TrainingTask)
    assert {'loss', 'output', 'prompt_output', 'teacher_output', 'agree_student_prompt'} <= set(result)
    same = (result['output'].argmax(1) == result['prompt_output'].argmax(1)).float().mean()
    assert result['agree_student_prompt'] == same
    assert result['agree_prompt_teacher'] == 1.0  # untrained, the prompt path is the teacher


def test_state_dict_is_the_students_and_task_state_the_prompt_paths():
    task = make_task()
    perturb(task.teacher.prompt_path)
    task.setup_ema(decay=0.5)
    state = task.get_checkpoint_state()
    assert list(state['state_dict']) == list(make_student().state_dict())
    assert set(state['task_state']['prompt_path']) == set(task.teacher.prompt_path.state_dict())
    fresh = make_task(student=make_student(seed=9))
    fresh.load_checkpoint_state(state['state_dict'], state['task_state'])
    images, target = make_batch()
    assert torch.equal(fresh(images, target)['loss'], task(images, target)['loss'])


def test_ema_averages_the_student_alone():
    task = make_task()
    start = copy.deepcopy(task.get_eval_model().state_dict())
    task.setup_ema(decay=0.75)
    perturb(task.get_eval_model())
    task.update_ema(step=2)  # timm's average starts with the second update
    average = task.get_eval_model(ema=True).module.state_dict()
    assert list(average) == list(start)
    for name, value in task.get_eval_model().state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(average[name], 0.75 * start[name] + 0.25 * value)


# A compiled training of the whole job is among the default tests, in test_options.py.
@pytest.mark.slow
def test_compiled_task_computes_the_same():
    task, twin = make_task(), make_task()
    twin.compile(backend='aot_eager', fullgraph=True)
    images, target = make_batch()
    for module in (task, twin):
        module.get_trainable_module().train()
    a, b = task(images, target), twin(images, target)
    torch.testing.assert_close(a['loss'], b['loss'])
    torch.testing.assert_close(twin.eval_model.eval()(images), task.get_eval_model().eval()(images))


def test_distributed_data_parallel_sees_only_what_is_trained(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        task, twin = make_task(), make_task()
        task.prepare_distributed()
        names = {name.removeprefix('module.') for name, _ in task.trainable_module.named_parameters()}
        assert all(name.startswith(('student.', 'prompt_path.')) for name in names)
        assert len(names) == len(list(twin.trainable_module.parameters()))
        images, target = make_batch()
        for module in (task, twin):
            module.get_trainable_module().train()
            module(images, target)['loss'].backward()
        for p, q in zip(task.trainable_module.parameters(), twin.trainable_module.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        assert list(task.get_checkpoint_state()['state_dict']) == list(make_student().state_dict())
    finally:
        torch.distributed.destroy_process_group()


def test_accepts_a_bare_model_as_timm_does():
    task = DFPTDistillationTask(make_student(), make_teacher_model(), nn.CrossEntropyLoss(), verbose=False)
    assert isinstance(task.teacher, timm_dfpt.DualForwardPathTeacher)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'temperature': 0.0}, 'temperature'),
        ({'temperature': -1.0}, 'temperature'),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_task(**kwargs)


def test_the_name_of_a_loss_is_not_a_loss():
    with pytest.raises(TypeError, match=r"kd_loss must be a function .*dkd_loss, got 'dkd'"):
        make_task(kd_loss='dkd')


def test_a_frozen_prompt_path_stays_in_evaluation():
    task = make_task(teacher=make_teacher_model())
    assert task.get_trainable_module().train().prompt_path.training
    assert task.prompt_param_groups()
    task.teacher.prompt_path.requires_grad_(False)
    module = task.get_trainable_module().train()
    assert module.student.training
    assert not any(each.training for each in module.prompt_path.modules())
    assert task.prompt_param_groups() == []


def test_the_weight_of_the_prompt_path_changes_linearly():
    task = make_task(weights=DFPTWeights(student_prompt=0.5), student_prompt_weight_end=2.0)
    seen = []
    for update in range(4):
        task.set_progress(0, update, 4)
        seen.append(task.weights.student_prompt)
    assert seen == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert task.weights.student_teacher == 1.0


def test_the_backbone_copy_has_a_learning_rate_of_its_own():
    groups = make_task('dfpt+', backbone_lr_scale=0.2).prompt_param_groups()
    assert [group.get('lr_scale') for group in groups] == [None, None, 0.2]


def test_what_is_evaluated():
    task = make_task()
    perturb(task.teacher.prompt_path)
    images, _ = make_batch()
    with torch.no_grad():
        student = task.get_student().eval()
        paths = task.teacher(images)
        outputs = task.eval_outputs(images)
        known = task.eval_outputs(images, paths.original)
        assert list(outputs) == list(known) == ['student', 'prompt_path', 'teacher']
        assert torch.equal(outputs['student'], student(images))
        for each in (outputs, known):
            assert torch.equal(each['teacher'], paths.original)
            assert torch.equal(each['prompt_path'], paths.prompt)
        assert torch.equal(task.teacher_logits(images), task.get_teacher()(images))


def test_an_original_path_that_nobody_learns_from_is_not_run():
    alone = DFPTWeights(prompt_teacher=0.0, student_teacher=0.0)
    task, calls = make_task(weights=alone), []
    task.get_teacher().register_forward_hook(lambda *_: calls.append(1))
    images, target = make_batch()
    result = task(images, target)
    # Whether somebody else knows the logits must not decide what is shown.
    given = task(images, target, teacher_logits=torch.zeros_like(result['output']))
    assert result.keys() == given.keys()
    assert not [key for key in result if 'teacher' in key]
    assert not calls
    assert list(task.eval().eval_outputs(images)) == ['student', 'prompt_path']
    assert not calls
    assert list(task.eval_outputs(images, task.teacher_logits(images)))[2:] == ['teacher']
    assert task.shows_teacher


@pytest.mark.parametrize('weights', [{}, {'prompt_teacher': 0.0}, {'student_teacher': 0.0}])
def test_a_teacher_of_other_classes_teaches_through_its_prompt_path_alone(weights):
    teacher = timm_dfpt.wrap(timm.create_model('test_resnet', num_classes=9), num_classes=7)
    student = make_student()
    with pytest.raises(ValueError, match=r"'teacher': 9.*are 0\.$"):
        DFPTDistillationTask(student, teacher, weights=DFPTWeights(**weights))
    alone = DFPTWeights(prompt_teacher=0.0, student_teacher=0.0)
    task = DFPTDistillationTask(student, teacher, weights=alone, verbose=False)
    assert task(*make_batch())['loss'].isfinite()
    assert not task.shows_teacher


def test_other_classes_are_refused():
    with pytest.raises(ValueError, match=r"'student': 5.*'teacher': 7|num_classes"):
        make_task(student=timm.create_model('test_resnet', num_classes=5))
