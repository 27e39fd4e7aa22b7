"""Training without labels: the same student whatever they are, a teacher with statistics of the images, features."""
import functools
import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.jobs import Job
from tests.tiny import RESNET, write_teacher
from timm_dfpt import DualForwardPathTeacher
from timm_dfpt.hub.cards import RunFacts, student_card
from timm_dfpt.training import compare
from timm_dfpt.training.run import main

STUDENT = ['--student', 'resnet18', '--student-kwargs', *(f'{key}={value}' for key, value in RESNET.items())]


def write_parquet(tiny, folder, labels):
    """The tiny images in one order, with labels that `labels` makes of the right ones."""
    folder.mkdir()
    for split, name in (('train', 'train'), ('val', 'validation')):
        files = sorted((tiny.data / split).rglob('*.png'))
        order = np.random.default_rng(0).permutation(len(files))
        names = labels([files[i].parent.name for i in order])
        columns = {'image': [{'bytes': files[i].read_bytes(), 'path': None} for i in order]}
        if names is not None:
            columns['label'] = names
        pq.write_table(pa.table(columns), folder / f'{name}.parquet')
    return folder


LABELS = {
    'right': lambda names: names,
    'permuted': lambda names: [names[i] for i in np.random.default_rng(1).permutation(len(names))],
    'other names': lambda names: [f'{name}s' for name in names],
    'none': lambda names: None,
}


METHODS = ['--method', 'kd', '--baselines', 'feature', '--model-ema', '--model-ema-decay', '0.9', '--mixup', '0.2']
SLOW = {'permuted', 'other names'}
CASES = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in LABELS]


def argv(tiny, data, output, *more):
    return [
        *tiny.common(output), '--dataset', str(data), '--teacher', f'local-dir:{tiny.teacher}', *STUDENT,
        '--epochs', '2', '--unlabelled', *more,
    ]  # fmt: skip


@pytest.fixture(scope='module')
def runs(tiny, tmp_path_factory):
    """The folders of runs by what their labels are, made when they are asked for."""
    root = tmp_path_factory.mktemp('unlabelled')

    @functools.cache
    def run(name):
        data = write_parquet(tiny, root / f'data {name}', LABELS[name])
        assert main(argv(tiny, data, root / name, *METHODS)) == 0
        return root / name

    return run


def summary(folder):
    return json.loads((folder / 'summary.json').read_text())


@pytest.mark.parametrize('labels', CASES[1:])
def test_labels_change_no_bit_of_a_student(labels, runs):
    for student in ('student', 'baselines/feature/student'):
        files = [runs(name) / student / 'model.safetensors' for name in ('right', labels)]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize('labels', CASES)
def test_labels_are_used_where_there_are_any_to_validate_on(labels, runs):
    lines = [json.loads(line) for line in (runs(labels) / 'metrics.jsonl').read_text().splitlines()]
    last, whole = lines[-1]['kd'], summary(runs(labels))
    assert last['train']['task_loss'] == 0
    assert last['train']['loss'] == pytest.approx(2 * last['train']['kd_loss'], rel=1e-5)
    for metrics in (last['val']['student'], whole['models']['student']['metrics']):
        assert ('top1' in metrics) is (labels in ('right', 'permuted'))
        assert 0 <= metrics['agreement'] <= 100
    assert 'top1' not in whole['baselines']['feature']['metrics']
    assert -100 <= whole['baselines']['feature']['metrics']['similarity'] <= 100


def test_the_classes_are_the_teachers(runs, tiny):
    known = json.loads((tiny.teacher / 'config.json').read_text())['label_names']
    assert json.loads((runs('none') / 'student' / 'config.json').read_text())['label_names'] == known


def test_its_teacher_has_the_statistics_of_the_images(runs, tiny):
    """Against the means of what its first layer sees, over the images in all of their augmentations."""
    kept = load_file(runs('none') / 'teacher_statistics.safetensors')
    teacher = timm.create_model(f'local-dir:{tiny.teacher}', pretrained=True)
    layers = [module for module in teacher.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(kept) == 3 * len(layers)
    files = pq.read_table(runs('none').with_name('data none') / 'train.parquet').column('image').to_pylist()
    pixels = [np.asarray(Image.open(io.BytesIO(file['bytes'])), dtype=np.float32) / 255 for file in files]
    padded = torch.nn.functional.pad(torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2), (2, 2, 2, 2))
    # All that padding, cropping and flipping may draw.
    crops = [padded[:, :, y : y + 16, x : x + 16] for y in range(5) for x in range(5)]
    images = (torch.cat([*crops, *(crop.flip(3) for crop in crops)]) - 0.5) / 0.25
    with torch.no_grad():
        out = teacher.conv1[0](images)
    assert kept['0.0.num_batches_tracked'] == len(files) // 32
    torch.testing.assert_close(kept['0.0.running_mean'], out.mean((0, 2, 3)), rtol=0.1, atol=0.05)
    torch.testing.assert_close(kept['0.0.running_var'], out.var((0, 2, 3)), rtol=0.1, atol=0.05)
    # The first layer of the teacher had others.
    assert not torch.allclose(kept['0.0.running_var'], layers[0].running_var, rtol=0.1)


@pytest.mark.slow
def test_a_resumed_run_has_the_same_statistics_and_student(runs, tiny, tmp_path):
    folder = tmp_path / 'run'
    shutil.copytree(runs('none'), folder)
    before = (folder / 'student' / 'model.safetensors').read_bytes()
    newest = sorted((folder / 'checkpoints').iterdir())[-1]
    for path in (newest, folder / 'student'):
        shutil.rmtree(path)
    assert main(argv(tiny, runs('none').with_name('data none'), folder, *METHODS, '--resume')) == 0
    assert (folder / 'student' / 'model.safetensors').read_bytes() == before


def test_features_first_and_then_labels(runs, tiny, tmp_path):
    """Two commands; the backbone loads without timm_dfpt, and its card says what it is."""
    backbone = runs('none') / 'baselines' / 'feature' / 'student'
    model = timm.create_model(f'local-dir:{backbone}', pretrained=True, num_classes=0).eval()
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, model.num_features)
    config = json.loads((backbone / 'config.json').read_text())
    card = student_card('user/backbone', config, params=1, run=RunFacts(method='feature', teacher='user/teacher'))
    assert 'a backbone without classes, distilled from `user/teacher` with feature distillation' in card.text
    assert 'softmax' not in card.text
    more = ['--method', 'supervised', '--student', f'local-dir:{backbone}', '--student-pretrained', '--epochs', '1']
    assert main([*tiny.common(tmp_path / 'run'), '--dataset', str(tiny.data), *more, '--lr', '1e-12']) == 0
    tuned, first = (load_file(folder / 'model.safetensors') for folder in (tmp_path / 'run' / 'student', backbone))
    assert tuned['fc.weight'].shape == (3, model.num_features)
    torch.testing.assert_close(tuned['layer1.0.conv1.weight'], first['layer1.0.conv1.weight'])


@pytest.mark.parametrize('variant', ['dfpt', pytest.param('dfpt+', marks=pytest.mark.slow)])
def test_a_path_of_other_statistics_teaches_what_such_a_teacher_does(variant, runs, tiny, tmp_path):
    """The prompt path and plain KD from the adapted teacher are two ways to one student; the path is saved."""
    data = runs('none').with_name('data none')
    assert main(argv(tiny, data, tmp_path / 'run', '--method', variant, *METHODS[4:])) == 0
    files = [folder / 'metrics.jsonl' for folder in (tmp_path / 'run', runs('none'))]
    lines = [json.loads(file.read_text().splitlines()[0]) for file in files]
    for key, value in lines[1]['kd']['val']['student'].items():
        assert lines[0][variant]['val']['student'][key] == pytest.approx(value, rel=1e-3), key
    published, model = (timm.create_model(f'local-dir:{tiny.teacher}', pretrained=True).eval() for _ in range(2))
    teacher = DualForwardPathTeacher.from_pretrained(tmp_path / 'run' / 'prompt_path', model=published)
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(teacher.original(x), model(x))
        kept = load_file(runs('none') / 'teacher_statistics.safetensors')
        layers = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        for number, layer in enumerate(layers):
            for name, buffer in layer.named_buffers():
                buffer.copy_(kept[f'0.{number}.{name}'])
        torch.testing.assert_close(teacher.prompt(x), model(x))
    if variant == 'dfpt':
        # Nothing but norm layers is its own.
        saved = load_file(tmp_path / 'run' / 'prompt_path' / 'prompt_path.safetensors')
        own = [value for layer in layers for value in layer.state_dict().values()]
        assert sum(map(torch.numel, saved.values())) == sum(map(torch.numel, own))


@pytest.mark.parametrize('norms', ['layer', 'none'])
def test_without_batch_norm_a_path_has_nothing_to_say(norms, tiny, tmp_path, capsys):
    if norms == 'none':
        write_teacher(tmp_path / 'teacher', 'test_nfnet')
    teacher = tmp_path / 'teacher' if norms == 'none' else tiny.vit_teacher
    more = ['--method', 'dfpt', '--teacher', f'local-dir:{teacher}']
    assert main(argv(tiny, tiny.data, tmp_path / 'out', *more)) == 1
    assert 'has no BatchNorm, whose statistics are all that a prompt path can learn' in capsys.readouterr().err


@pytest.mark.slow
def test_methods_are_compared_by_what_they_can_be_judged_by(tiny, runs, tmp_path):
    command = list(argv(tiny, runs('none').with_name('data none'), tmp_path / 'out', '--epochs', '1'))
    assert compare.main([*command, '--methods', 'kd', 'dist', 'feature', '--seeds', '1', '2']) == 0
    result = json.loads((tmp_path / 'out' / 'compare.json').read_text())
    assert [arm['val']['score'] for arm in result['arms'].values()] == ['agreement', 'agreement', 'similarity']
    assert 'difference' in result['arms']['dist']['val']
    assert 'difference' not in result['arms']['feature']['val']


@pytest.mark.slow
@pytest.mark.parametrize('val', [True, False])
def test_a_folder_of_images_is_enough(val, tiny, tmp_path, capsys):
    for split in ('train', 'val') if val else ('.',):
        (tmp_path / 'data' / split).mkdir(parents=True, exist_ok=True)
        for number, file in enumerate(sorted((tiny.data / 'train').rglob('*.png'))):
            shutil.copy(file, tmp_path / 'data' / split / f'{number}.png')
    more = ['--method', 'ctkd', '--epochs', '1', '--no-adapt-statistics']
    assert main(argv(tiny, tmp_path / 'data', tmp_path / 'out', *more)) == 0
    printed = capsys.readouterr().out
    assert 'no labels to validate on: instead of top-1, agreement' in printed
    assert 'the student learns what local-dir' in printed
    assert 'as it is' in printed
    assert '| model' in printed
    assert 'val agreement with the teacher %' in printed
    sizes = summary(tmp_path / 'out')['dataset_sizes']
    assert sizes == {'train': 216 if val else 194, 'val': 216 if val else 22, 'test': 0}


@pytest.mark.slow
def test_a_teacher_without_batch_norm_teaches_as_it_is(tiny, tmp_path, capsys):
    more = ['--method', 'kd', '--teacher', f'local-dir:{tiny.vit_teacher}', '--epochs', '1']
    assert main(argv(tiny, tiny.data, tmp_path / 'out', *more)) == 0
    assert 'has no BatchNorm to adapt, and is used as it is' in capsys.readouterr().out
    assert not (tmp_path / 'out' / 'teacher_statistics.safetensors').exists()


@pytest.mark.slow
def test_two_processes_have_one_teacher_and_end_as_one(tiny, tmp_path):
    folders = [tmp_path / '1', tmp_path / '2']
    for processes, folder in enumerate(folders, start=1):
        more = ['--unlabelled', '--method', 'dfpt', '--teacher', f'local-dir:{tiny.teacher}', '--epochs', '1']
        job = Job(tiny.vit_argv(folder, *more), tmp_path / f'{processes}.log', processes)
        assert job.wait() == [0] * processes, job.output()
    statistics, students = (
        [load_file(folder / name) for folder in folders]
        for name in ('teacher_statistics.safetensors', 'student/model.safetensors')
    )
    for name, value in statistics[0].items():
        assert torch.equal(value, statistics[1][name]), name
    for name, value in students[0].items():
        torch.testing.assert_close(value, students[1][name], rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (['--method', 'supervised'], 'supervised learns from labels and cannot be used with --unlabelled'),
        (['--method', 'kd', '--baselines', 'supervised'], 'supervised learns from labels'),
        (['--method', 'dkd'], 'dkd learns from labels'),
        (['--method', 'dfpt', '--kd-loss', 'dkd'], 'dkd learns from labels'),
        (['--method', 'kd', '--distill-loss-weight', '0'], 'unlabelled: the student learns from the teacher only'),
        (['--method', 'kd', '--smoothing', '0.1'], 'smoothing=0.1 has no effect with --unlabelled'),
        (['--method', 'kd', '--no-unlabelled', '--no-adapt-statistics'], 'no effect without --unlabelled'),
        (['--method', 'dfpt', '--no-adapt-statistics'], 'a new prompt path learns only BatchNorm statistics'),
        (['--method', 'dfpt', '--prompt-norms', 'teacher'], 'prompt_norms=teacher: without labels'),
        (['--method', 'dfpt', '--teacher-dtype', 'bfloat16'], 'teacher_dtype=bfloat16: without labels'),
        (['--method', 'dfpt', '--prompt-block'], 'prompt_block=True has no effect with --unlabelled'),
        (['--method', 'dfpt+', '--prompt-lr', '0.1'], 'prompt_lr=0.1 has no effect with --unlabelled'),
        (['--method', 'feature', '--cache-teacher', '--no-aug'], 'distills features'),
    ],
)
def test_what_needs_labels_is_refused_in_a_line(more, message, tiny, tmp_path, capsys):
    command = argv(tiny, tiny.data, tmp_path / 'out', *more)
    if '--crop-padding' in command and '--no-aug' in command:
        command[command.index('--crop-padding') + 1] = '0'
    if 'supervised' in more[:2]:
        command = [arg for i, arg in enumerate(command) if '--teacher' not in command[max(0, i - 1) : i + 1]]
    try:
        code = main(command)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code in (1, 2)
    assert message in error
    assert error.count('\n') == 1
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_an_encoder_teaches_features_only(tiny, tmp_path, capsys):
    encoder = tmp_path / 'encoder'
    shutil.copytree(tiny.teacher, encoder)
    config = json.loads((encoder / 'config.json').read_text())
    config |= {'num_classes': 0, 'label_names': []}
    (encoder / 'config.json').write_text(json.dumps(config))
    weights = load_file(encoder / 'model.safetensors')
    save_file({k: v for k, v in weights.items() if not k.startswith('fc.')}, encoder / 'model.safetensors')
    teacher = ['--teacher', f'local-dir:{encoder}', '--epochs', '1']
    assert main(argv(tiny, tiny.data, tmp_path / 'kd', '--method', 'kd', *teacher)) == 1
    assert 'has no classes, and without labels a head cannot be fitted' in capsys.readouterr().err
    labelled = [arg for arg in argv(tiny, tiny.data, tmp_path / 'feature', *teacher) if arg != '--unlabelled']
    assert main([*labelled, '--method', 'feature']) == 0
    assert 'top1' in summary(tmp_path / 'feature')['models']['student']['metrics']
