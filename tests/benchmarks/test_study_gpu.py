"""The study on a device: what is trained there is what a plain loop trains, and nothing is lost when it is cut off."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from timm.task import LogitDistillationTask

import timm_dfpt
from benchmarks.study.device import SPLITS, DeviceImages, create_device_loader, load_split, pack_data
from benchmarks.study.gpu import GPU_PLAN, Bench, choose_epochs, main
from benchmarks.study.plan import Plan
from timm_dfpt.job.devices import create_accelerator
from timm_dfpt.job.options import TrainConfig
from timm_dfpt.training.run_folder import RunFolder

SIZE, BATCH, EPOCHS = 8, 16, 2
NAMES = ['ash', 'birch', 'cedar']
NETWORK: dict[str, Any] = {'layers': [1, 1, 1, 1], 'channels': [4, 4, 8, 8]}
CPU = torch.device('cpu')
OPTIONS: dict[str, Any] = {
    'student': 'resnet18', 'batch_size': BATCH, 'opt': 'momentum', 'lr': 0.05, 'sched': 'constant', 'cpu': True,
}  # fmt: skip
DATA: dict[str, Any] = {
    'dataset': 'stripes.safetensors', 'input_size': [1, SIZE, SIZE], 'mean': [0.5], 'std': [0.3], 'crop_pct': 1.0,
}  # fmt: skip


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with a data set of stripes: 80 images to train on."""
    tensors = {}
    for seed, split in enumerate(SPLITS):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(3, (80 if split == 'train' else 20,), generator=generator)
        levels = torch.randint(8, (len(labels), SIZE, SIZE), generator=generator)
        for i, label in enumerate(labels.tolist()):
            levels[i, label::3] += 7
        levels = levels.to(torch.uint8)
        tensors[f'{split}.images'] = levels[..., ::2] * 16 + levels[..., 1::2]
        tensors[f'{split}.labels'] = labels.to(torch.int16)
    (tmp_path / 'data').mkdir()
    save_file(tensors, tmp_path / 'data' / 'stripes.safetensors', {'names': json.dumps(NAMES)})
    return tmp_path


@pytest.mark.slow
def test_packed_images_are_the_images_in_16_levels(tmp_path: Path) -> None:
    datasets = pytest.importorskip('datasets')
    features = datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=NAMES)})
    pixels = torch.randint(256, (5, SIZE, SIZE), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    rows = {'image': [Image.fromarray(each.numpy()) for each in pixels], 'label': [0, 1, 2, 0, 1]}
    for split in SPLITS:
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / 'data' / f'{split}-0.parquet')
    pack_data(tmp_path, tmp_path / 'packed.safetensors')
    images, labels, names = load_split(tmp_path / 'packed.safetensors', 'validation', CPU)
    assert (images.shape, images.dtype) == ((5, 1, SIZE, SIZE), torch.uint8)
    assert (labels.tolist(), names) == ([0, 1, 2, 0, 1], NAMES)
    assert int((images[:, 0].int() - pixels.int()).abs().max()) <= 8


def test_an_epoch_is_augmented_by_crops_and_flips_of_each_image() -> None:
    pixels = torch.arange(1, 1 + 40 * SIZE * SIZE).view(40, 1, SIZE, SIZE)
    images = DeviceImages(pixels, torch.arange(40), [0.0], [1.0], padding=2, hflip=0.5, seed=1)
    seen = []
    for epoch in (0, 1, 0):
        images.set_epoch(epoch)
        batch, labels, rows = images.__getitems__(torch.arange(40))
        assert torch.equal(labels, rows)
        seen.append(batch)
        for drawn, pixel in zip(batch * 255, pixels, strict=True):
            padded = torch.nn.functional.pad(pixel, (2, 2, 2, 2)).float()
            crops = [padded[:, y : y + SIZE, x : x + SIZE] for y in range(5) for x in range(5)]
            assert any(torch.allclose(drawn, crop, atol=0.01) for each in crops for crop in (each, each.flip(-1)))
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


def test_an_epoch_has_each_image_once() -> None:
    images = DeviceImages(torch.zeros(50, 1, 2, 2), torch.arange(50), [0.5], [0.5])
    orders = []
    for epoch in range(2):
        images.set_epoch(epoch)
        rows = [batch[2] for batch in create_device_loader(images, 16, True)]
        assert [len(each) for each in rows] == [16, 16, 16]
        orders.append(torch.cat(rows))
        assert len(orders[-1].unique()) == 48
    assert not torch.equal(*orders)
    assert [len(batch[2]) for batch in create_device_loader(images, 16, False)] == [16, 16, 16, 2]


def make_teacher(work: Path) -> str:
    torch.manual_seed(0)
    model = timm.create_model('resnet18', in_chans=1, num_classes=3, **NETWORK)
    config = {key: tuple(v) if isinstance(v, list) else v for key, v in DATA.items() if key != 'dataset'}
    config['interpolation'] = 'bilinear'
    timm_dfpt.save_student(model, work / 'teacher', label_names=NAMES, data_config=config)
    return f'local-dir:{work / "teacher"}'


@pytest.mark.slow
def test_students_side_by_side_are_those_of_a_plain_loop(work: Path, fresh_accelerate: Callable[[], None]) -> None:
    """timm's own task of plain distillation, and DFPT-KD's alone: one model, one optimizer each, batch by batch."""
    data = {**DATA, 'dataset': str(work / 'data' / 'stripes.safetensors'), 'no_aug': True, 'seed': 5}
    config = TrainConfig(
        **OPTIONS, **data, teacher=make_teacher(work), student_kwargs=NETWORK, epochs=EPOCHS, prompt_opt='adamw'
    )
    bench = Bench(Plan(GPU_PLAN, work), 'cpu', float('inf'))
    arms = {name: bench.config(config.for_method(name)) for name in ('dfpt', 'kd')}
    trained, found = bench.train(arms, RunFolder(work / 'run'))
    fresh_accelerate()
    start = {each.name: each for each in bench.learners(arms, create_accelerator(arms['kd']), 5)}
    images, labels, _ = load_split(Path(str(config.dataset)), 'train', CPU)
    order = DeviceImages(images, labels, config.mean, config.std, seed=config.seed)
    batches = []
    for epoch in range(EPOCHS):
        order.set_epoch(epoch)
        rows = [batch[2] for batch in create_device_loader(order, BATCH, True)]
        batches += [((images[each].float() / 255 - 0.5) / 0.3, labels[each]) for each in rows]
    assert len(batches) == 2 * 5
    weights = {'temperature': 4.0, 'distill_loss_weight': 2.0, 'task_loss_weight': 1.0}
    kd = LogitDistillationTask(start['kd'].student, start['kd'].teacher, **weights, verbose=False)
    for learner, task in zip(trained, (start['dfpt'].task, kd), strict=True):
        module: Any = task.get_trainable_module()
        module.train()
        student = start[learner.name].student
        sgd = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
        optimizers: list[torch.optim.Optimizer] = [sgd]
        if learner.name == 'dfpt':
            path = [p for p in module.prompt_path.parameters() if p.requires_grad]
            optimizers.append(torch.optim.AdamW(path, 1e-3, weight_decay=0.01))
        for x, y in batches:
            task(x, y)['loss'].backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        expected = student.state_dict()
        for name, ours in learner.student.state_dict().items():
            torch.testing.assert_close(ours, expected[name], rtol=1e-4, atol=1e-5)
    assert set(found) == {'seconds', 'dfpt', 'kd'}


def plan_file(work: Path, **common: Any) -> Path:
    plan = {
        'common': {**OPTIONS, 'checkpoint_hist': 1, **common},
        'data': {'stripes': {**DATA, 'crop_padding': 1, 'hflip': 0.0}},
        'models': {'tiny': NETWORK},
        'teachers': {'tiny': {'data': 'stripes', 'model': 'tiny', 'epochs': 1}},
        'arms': {name: {'method': name} for name in ('dfpt', 'kd')},
        'regimes': {'tiny': {
            'data': 'stripes', 'teacher': 'tiny', 'student': 'tiny', 'epochs': 2,
            'final': {'seeds': [1], 'arms': {'dfpt': {}, 'kd': {}, 'kd-time': {'method': 'kd', 'longer': 2.0}}},
        }},
    }  # fmt: skip
    file = work / 'plan.yaml'
    file.write_text(yaml.safe_dump(plan), encoding='utf-8')
    return file


@pytest.mark.slow
def test_a_plan_that_is_cut_off_goes_on_to_the_same_records(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ['--plan', str(plan_file(work)), '--work', str(work), '--device', 'cpu', '--plan-seconds', '1e6']
    whole, cut = work / 'whole.jsonl', work / 'cut.jsonl'
    assert main([*argv, '--out', str(whole)]) == 0
    codes = []
    while not codes or codes[-1] == 3:
        # No time at all: an epoch each, or less.
        codes.append(main([*argv, '--out', str(cut), '--budget-seconds', '0.05']))
        with cut.open('a', encoding='utf-8') as file:
            file.write('{"cut off')
        assert len(codes) < 30
    assert len(codes) > 3
    lines = [file.read_text().splitlines() for file in (whole, cut)]
    records = [[json.loads(line) for line in each if line.endswith('}')] for each in lines]
    assert len(records[0]) == 3
    for one, other in zip(*records, strict=True):
        for key in ('regime', 'arm', 'seed', 'epochs', 'val_top1', 'test_top1', 'train_top1', 'curve', 'metrics'):
            assert one[key] == other[key], key
    assert {record['arm']: record['epochs'] for record in records[0]} == {'dfpt': 2, 'kd': 2, 'kd-time': 4}
    capsys.readouterr()
    assert main([*argv, '--out', str(whole), '--report']) == 0
    assert '| tiny | dfpt - kd |' in capsys.readouterr().out


@pytest.mark.slow
def test_a_dry_run_takes_few_images_in_small_batches_and_leaves_no_teacher_to_others(work: Path) -> None:
    plan = plan_file(work, compile=True, compile_mode='reduce-overhead')
    argv = ['--plan', str(plan), '--work', str(work), '--device', 'cpu', '--plan-seconds', '1e6']
    out = work / 'try.jsonl'
    # The remedy where launches bind; without a GPU only what is around the steps.
    with torch.compiler.set_stance('force_eager'):
        assert main([*argv, '--out', str(out), '--limit', '8']) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(record['images'], record['batch_size']) for record in records} == {(8, 4)}
    with pytest.raises(ValueError, match='--limit 8: give a folder of its own'):
        main([*argv, '--out', str(work / 'whole.jsonl')])


def test_batches_of_a_dry_run_have_two_images(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(['--work', str(work), '--out', str(work / 'try.jsonl'), '--device', 'cpu', '--limit', '3'])
    assert '--limit 3' in capsys.readouterr().err


def test_epochs_follow_from_the_step() -> None:
    assert choose_epochs(60, step=0.02, steps_per_epoch=100, seconds=90) == 45
    assert choose_epochs(30, step=0.02, steps_per_epoch=100, seconds=90) == 30
    assert choose_epochs(60, step=2.0, steps_per_epoch=100, seconds=90) == 1


def test_every_cell_of_the_plan_is_a_valid_run(tmp_path: Path) -> None:
    plan = Plan(GPU_PLAN, tmp_path)
    for cell in plan.cells():
        arm, _ = plan.arm(cell)
        assert plan.config(cell, tmp_path).for_method(arm.method, **arm.changes).method == arm.method
    assert {cell.seed for cell in plan.cells()} == {300, 301, 302, 303, 304}
