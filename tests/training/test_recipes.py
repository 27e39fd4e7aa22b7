"""Every recipe: its numbers are the literature's, and it trains on images of the right shape and class count."""
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Image, Sequence, Value
from PIL import Image as PILImage

import timm_dfpt
from timm_dfpt.hub.student import save_student
from timm_dfpt.job.cli import build_parser, load_recipe, resolve_config
from timm_dfpt.tasks.methods import METHODS
from timm_dfpt.training.run import main, set_up

RECIPES = Path(__file__).parents[2] / 'train' / 'recipes'
# RepDistiller's and MDistiller's tables: teacher, student, learning rate, and DKD's beta.
CIFAR_PAIRS = {
    'resnet56_resnet20': ('cifar_resnet56', 'cifar_resnet20', 0.05, 2.0),
    'resnet110_resnet20': ('cifar_resnet110', 'cifar_resnet20', 0.05, 8.0),
    'resnet110_resnet32': ('cifar_resnet110', 'cifar_resnet32', 0.05, 2.0),
    'resnet32x4_resnet8x4': ('cifar_resnet32x4', 'cifar_resnet8x4', 0.05, 8.0),
    'wrn_40_2_wrn_16_2': ('cifar_wrn_40_2', 'cifar_wrn_16_2', 0.05, 6.0),
    'wrn_40_2_wrn_40_1': ('cifar_wrn_40_2', 'cifar_wrn_40_1', 0.05, 6.0),
    'vgg13_vgg8': ('cifar_vgg13', 'cifar_vgg8', 0.05, 6.0),
    'resnet32x4_shufflenetv1': ('cifar_resnet32x4', 'cifar_shufflenetv1', 0.01, 8.0),
    'resnet32x4_shufflenetv2': ('cifar_resnet32x4', 'cifar_shufflenetv2', 0.01, 8.0),
    'wrn_40_2_shufflenetv1': ('cifar_wrn_40_2', 'cifar_shufflenetv1', 0.01, 8.0),
    'vgg13_mobilenetv2': ('cifar_vgg13', 'cifar_mobilenetv2_050', 0.01, 6.0),
    'resnet50_mobilenetv2': ('cifar_resnet50', 'cifar_mobilenetv2_050', 0.01, 8.0),
    'resnet50_vgg8': ('cifar_resnet50', 'cifar_vgg8', 0.05, 8.0),
}
CIFAR_TEACHERS = sorted({pair[0].removeprefix('cifar_') for pair in CIFAR_PAIRS.values()})
OTHER_PAIRS = {
    'imagenet_resnet34_resnet18': ('resnet34', 'resnet18'),
    'imagenet_resnet50_mobilenetv1_100': ('resnet50', 'mobilenetv1_100'),
    'cub200_resnet34_resnet18': ('resnet34', 'resnet18'),
}
TEACHER_RECIPES = [*(f'cifar100_{name}' for name in CIFAR_TEACHERS), 'cub200_resnet34']
PAIRS = {**{f'cifar100_{name}': pair[:2] for name, pair in CIFAR_PAIRS.items()}, **OTHER_PAIRS}
PAIR_RECIPES = list(PAIRS)
ALL = [*TEACHER_RECIPES, *PAIR_RECIPES]
CLASSES = {'cifar100': 100, 'imagenet': 1000, 'cub200': 200}


def config_of(recipe, *arguments):
    values = vars(build_parser('').parse_args(list(arguments)))
    values.pop('config')
    return resolve_config(values, str(RECIPES / f'{recipe}.yaml'), None)


def test_every_recipe_is_in_the_tables():
    new = 'quickstart_new_classes'
    embedded = {'quickstart', 'quickstart_teacher', new, f'{new}_teacher', f'{new}_fine_tuned'}
    assert {path.stem for path in RECIPES.glob('*.yaml')} == {*ALL, *embedded, 'related_images'}


@pytest.mark.parametrize('name', CIFAR_PAIRS)
def test_cifar_pairs_have_the_numbers_of_the_literature(name):
    teacher, student, lr, beta = CIFAR_PAIRS[name]
    config = config_of(f'cifar100_{name}', '--method', 'kd')
    assert config.student == student
    assert Path(config.teacher).parts[-2] == teacher.replace('cifar_', 'cifar100_')
    assert (config.epochs, config.batch_size, config.weight_decay) == (240, 64, 5e-4)
    assert (config.lr, config.sched, config.decay_rate) == (lr, 'multistep', 0.1)
    assert config.decay_milestones == [150, 180, 210]
    assert (config.mean, config.std) == ([0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761])
    assert (config.crop_padding, config.hflip) == (4, 0.5)
    assert (config.smoothing, config.mixup, config.cutmix, config.warmup_epochs) == (0, 0, 0, 0)
    assert (config.task_loss_weight, config.distill_loss_weight, config.temperature) == (0.1, 0.9, 4.0)
    dkd = config_of(f'cifar100_{name}', '--method', 'dkd')
    # 8 is the default of the loss.
    assert dkd.kd_loss_kwargs.get('beta', 8.0) == beta
    assert (dkd.task_loss_weight, dkd.distill_loss_weight, dkd.distill_warmup_epochs) == (1.0, 1.0, 20)
    assert dkd.temperature == 4.0


@pytest.mark.parametrize('name', PAIR_RECIPES)
@pytest.mark.parametrize('variant', ['dfpt', 'dfpt+'])
def test_dfpt_starts_as_the_kd_beside_it(name, variant):
    kd, dual = config_of(name, '--method', 'kd'), config_of(name, '--method', variant)
    assert dual.student_task_weight == kd.task_loss_weight
    assert dual.student_teacher_weight + dual.student_prompt_weight == pytest.approx(kd.distill_loss_weight)
    assert dual.temperature == kd.temperature


def test_related_images_is_what_the_study_measured():
    plan = yaml.safe_load((RECIPES.parents[1] / 'benchmarks' / 'foreign' / 'plan.yaml').read_text())
    (stage,) = plan['ways']['dfpt+']
    names = ('--dataset', 'photos', '--teacher', 'resnet50', '--student', 'resnet18')
    config = config_of('related_images', *names)
    assert config.teacher_head == 'auto'  # 'fit' where the classes are others
    # The path of `*-new-head`: the same as that of a new head, see test_teacher_heads.
    assert plan['regimes']['upright-new-head']['final']['arms']['dfpt+ new head']['options'] == {'teacher_head': 'new'}
    assert config.prompt_head_init_scale == 0
    for option, value in stage.items():
        if option != 'teacher_head':
            assert getattr(config, option) == value, option


@pytest.mark.parametrize('name', CIFAR_TEACHERS)
def test_teachers_are_where_the_pairs_look_for_them(name):
    config = config_of(f'cifar100_{name}')
    assert (config.method, config.teacher, config.student) == ('supervised', None, f'cifar_{name}')
    assert (config.epochs, config.lr, config.batch_size, config.weight_decay) == (240, 0.05, 64, 5e-4)
    output = Path(config.output).resolve()
    pairs = [p for p, values in CIFAR_PAIRS.items() if values[0] == f'cifar_{name}']
    for pair in pairs:
        recipe = load_recipe(RECIPES / f'cifar100_{pair}.yaml')
        assert Path(recipe['teacher'].removeprefix('local-dir:')).resolve() == output / 'student'
    # The early-stopped teacher of docs/ZOO.md.
    assert 120 in config.export_epochs


@pytest.mark.parametrize('name', ['imagenet_resnet34_resnet18', 'imagenet_resnet50_mobilenetv1_100'])
def test_imagenet_recipes_have_mdistillers_numbers(name):
    config = config_of(name, '--method', 'kd')
    assert (config.epochs, config.batch_size, config.lr, config.weight_decay) == (100, 512, 0.2, 1e-4)
    assert (config.decay_milestones, config.temperature) == ([30, 60, 90], 1.0)
    assert (config.task_loss_weight, config.distill_loss_weight) == (0.5, 0.5)
    # The teachers are torchvision's first weights.
    assert timm.get_pretrained_cfg(config.teacher).tag == 'tv_in1k'
    dkd = config_of(name, '--method', 'dkd')
    assert dkd.kd_loss_kwargs['beta'] == {'resnet18': 0.5, 'mobilenetv1_100': 2.0}[config.student]


@pytest.mark.parametrize('name', ALL)
def test_models_are_there_and_can_be_taught_by(name):
    """On the meta device: both know the classes, and the teacher has stages for the blocks."""
    config, classes = config_of(name), CLASSES[name.split('_')[0]]
    size = config.input_size or [3, 224, 224]
    with torch.device('meta'):
        student = timm.create_model(config.student, num_classes=classes).eval()
        assert student(torch.empty(2, *size)).shape == (2, classes)
        if config.method != 'supervised':
            model = timm.create_model(PAIRS[name][0], num_classes=classes)
            assert timm_dfpt.wrap(model, input_size=tuple(size))(torch.empty(2, *size)).prompt.shape == (2, classes)


# --- dry runs


def images(count, side, seed):
    rng = np.random.default_rng(seed)
    encoded = []
    for _ in range(count):
        buffer = io.BytesIO()
        PILImage.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, 'PNG')
        encoded.append({'bytes': buffer.getvalue(), 'path': None})
    return encoded


def write_split(folder, split, columns, features):
    Dataset.from_dict(columns, features=Features(features)).to_parquet(folder / f'{split}-00000-of-00001.parquet')


@pytest.fixture(scope='module')
def stand_ins(tmp_path_factory):
    """Few images in the columns, splits and classes of the datasets on the Hub, whose names lead here."""
    root = tmp_path_factory.mktemp('data')
    for family, classes in CLASSES.items():
        (root / family).mkdir()
        label = ClassLabel(names=[f'class {i}' for i in range(classes)])
        for number, (split, count) in enumerate({'train': 20, 'validation': 8, 'test': 8}.items()):
            if split == 'validation' and family != 'imagenet':
                continue
            # Not square, as photographs are.
            encoded = images(count, 32 if family == 'cifar100' else 72, number)
            labels = [i % 2 for i in range(count)]
            if family == 'cifar100':
                columns = {'img': encoded, 'fine_label': labels, 'coarse_label': labels}
                features = {'img': Image(), 'fine_label': label, 'coarse_label': ClassLabel(num_classes=20)}
            else:
                hidden = [-1] * count if family == 'imagenet' and split == 'test' else labels
                columns, features = {'image': encoded, 'label': hidden}, {'image': Image(), 'label': label}
            if family == 'cub200':
                columns['bbox'], features['bbox'] = [[0.0] * 4] * count, Sequence(Value('float32'))
            write_split(root / family, split, columns, features)
    return root


@pytest.fixture(scope='module')
def teacher_of(tmp_path_factory):
    root, made = tmp_path_factory.mktemp('teachers'), {}

    def make(architecture, family):
        folder = root / family / architecture
        if folder not in made:
            torch.manual_seed(0)
            model = timm.create_model(architecture, num_classes=CLASSES[family])
            data = {'input_size': (3, 32, 32), 'mean': (0.5,) * 3, 'std': (0.25,) * 3}
            save_student(model, folder, label_names=[f'class {i}' for i in range(CLASSES[family])], data_config=data)
            made[folder] = True
        return f'local-dir:{folder}'

    return make


def check_optimizer(optimizer, config):
    """All of them: torch's SGD with plain momentum, and the same decay for every weight, norms and biases too."""
    assert type(optimizer) is torch.optim.SGD
    (group,) = optimizer.param_groups
    assert (group['nesterov'], group['momentum'], group['dampening']) == (False, 0.9, 0)
    assert (group['lr'], group['weight_decay']) == (config.lr, config.weight_decay)
    assert config.weight_decay == (1e-4 if config.dataset.endswith('imagenet') else 5e-4)


def dry_run(recipe, stand_ins, teacher_of, tmp_path, side, batch_size, *more):
    """Two steps of the recipe with its own models, data columns, augmentation and optimizers."""
    family = recipe.split('_')[0]
    arguments = [
        '--dataset', str(stand_ins / family), '--batch-size', str(batch_size), '--workers', '0', '--cpu',
        '--no-student-pretrained', *more,
    ]  # fmt: skip
    if family != 'cifar100':
        arguments += ['--input-size', '3', str(side), str(side)]
    if recipe in PAIRS:
        arguments += ['--teacher', teacher_of(PAIRS[recipe][0], family)]
    config = dataclasses.replace(config_of(recipe, *arguments), output=str(tmp_path))
    setup = set_up(config)
    assert setup.data.num_classes == CLASSES[family]
    (learner,) = setup.create_learners({config.method: config})
    check_optimizer(learner.optimizers[0].optimizer, config)
    if family == 'cifar100':
        # Named by the recipe, not by chance: the dataset has 20 coarse labels too, and no column called image.
        assert (config.input_key, config.target_key) == ('img', 'fine_label')
    before = [p.detach().clone() for p in learner.student.parameters()]
    learner.train()
    losses = []
    for step, (input, target, _) in zip(range(2), setup.loaders['train'], strict=False):
        assert input.shape == (batch_size, 3, side, side)
        learner.set_progress(0, step)
        terms = learner.step(input, target, seed=step)
        losses.append(float(terms['loss']))
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert any(not torch.equal(a, b) for a, b in zip(before, learner.student.parameters(), strict=True))
    learner.eval()
    with torch.no_grad():
        outputs = learner.task.eval_outputs(input)
    assert {logits.shape for logits in outputs.values()} == {(batch_size, CLASSES[family])}
    assert set(outputs) == {'supervised': {'student'}}.get(config.method, {'student', 'prompt_path', 'teacher'})


# One for each dataset and kind of recipe; the others are among the slow tests.
QUICK = ('cifar100_resnet56_resnet20', 'imagenet_resnet34_resnet18', 'cub200_resnet34')


@pytest.mark.parametrize(
    'recipe', [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ALL]
)
def test_dry_run(recipe, stand_ins, teacher_of, tmp_path):
    # Photographs are 64 pixels wide here instead of 224, for time; the full size is among the slow tests.
    dry_run(recipe, stand_ins, teacher_of, tmp_path, 32 if recipe.startswith('cifar100') else 64, 4)


@pytest.mark.slow
@pytest.mark.parametrize('recipe', PAIR_RECIPES)
def test_dry_run_at_full_size(recipe, stand_ins, teacher_of, tmp_path):
    side = config_of(recipe).input_size[1]
    dry_run(recipe, stand_ins, teacher_of, tmp_path, side, 8, '--method', 'dfpt+')


# One for each kind of task; what the others differ by is a function of logits, which test_losses.py holds.
QUICK_METHODS = ('supervised', 'kd', 'ctkd', 'dfpt', 'dfpt+')


@pytest.mark.parametrize(
    'method', [pytest.param(name, marks=() if name in QUICK_METHODS else pytest.mark.slow) for name in METHODS]
)
def test_one_command_a_row(method, stand_ins, teacher_of, tmp_path):
    """The whole job, from the command line to the summary, for the smallest pair."""
    output = tmp_path / 'run'
    arguments = [
        '--config', str(RECIPES / 'cifar100_resnet56_resnet20.yaml'), '--method', method, '--output', str(output),
        '--dataset', str(stand_ins / 'cifar100'), '--batch-size', '4', '--epochs', '1', '--cpu',
    ]  # fmt: skip
    if method != 'supervised':
        # A small teacher: what is tested are the options of the recipe.
        arguments += ['--teacher', teacher_of('cifar_resnet8', 'cifar100')]
    assert main(arguments) == 0
    summary = json.loads((output / 'summary.json').read_text())
    assert summary['models']['student']['cost']['params'] == 278_324
    # As in the literature: all training images, and the test images for the curve.
    assert summary['dataset_sizes'] == {'train': 20, 'val': 8, 'test': 0}
