"""What cannot work is refused: one error that names the option and the remedy, a code that is not 0, nothing written.

Images, labels and splits that are refused, or trained on where that is sensible, are in test_data_*.py.
"""
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from tests.forked import CONTEXT
from tests.jobs import Job
from timm_dfpt.hub.student import save_student
from timm_dfpt.training.run import main

NAMES = ('ash', 'birch', 'cedar')
RESNET = {'layers': [1, 1, 1, 1], 'channels': [8, 8, 16, 16], 'stem_type': 'deep', 'stem_width': 4}


def teacher(folder, names=NAMES, classes=3, **kwargs):
    model = timm.create_model('resnet18', num_classes=classes, **RESNET, **kwargs)
    config = {'input_size': (kwargs.get('in_chans', 3), 16, 16), 'mean': (0.5,), 'std': (0.25,)}
    save_student(model, folder, label_names=names, data_config=config)
    return ['--teacher', f'local-dir:{folder}']


def recipe(folder, text):
    (folder / 'recipe.yaml').write_text(text)
    return ['--config', str(folder / 'recipe.yaml')]


def weights(folder, name, content=None):
    path = folder / name
    if content is None:
        save_file(timm.create_model('resnet18', num_classes=3, **RESNET).state_dict(), path)
    else:
        path.write_bytes(content)
    return ['--teacher', 'resnet18', '--teacher-kwargs', *(f'{k}={v}' for k, v in RESNET.items()),
            '--teacher-checkpoint', str(path)]  # fmt: skip


def other_weights(folder):
    arguments = weights(folder, 'other.safetensors')
    save_file(timm.create_model('test_resnet', num_classes=3).state_dict(), folder / 'other.safetensors')
    return arguments


def damaged_folder(folder):
    teacher(folder / 'damaged')
    with open(folder / 'damaged' / 'model.safetensors', 'r+b') as file:
        file.truncate(1000)
    return ['--teacher', f'local-dir:{folder / "damaged"}']


def without_weights(folder):
    teacher(folder / 'empty')
    (folder / 'empty' / 'model.safetensors').unlink()
    return ['--teacher', f'local-dir:{folder / "empty"}']


def grey(folder):
    for name in NAMES:
        (folder / 'one' / name).mkdir(parents=True)
        Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / 'one' / name / 'a.png')
    return ['--dataset', str(folder / 'one')]


def file(path):
    path.write_text('no folder')
    return path


def photos(folder):
    (folder / 'photos' / 'a').mkdir(parents=True)
    return folder / 'photos'


def linked(folder):
    (folder / 'link').symlink_to(photos(folder))
    return []


def in_use(folder):
    (folder / 'run').mkdir()
    (folder / 'run' / 'thesis.tex').write_text('last copy')
    return []


# Name: arguments, or a function of a folder that makes them; and what the error must say.
CASES = {
    # options
    'flag that is none': (
        ['--temprature', '3'], "unrecognized arguments: --temprature 3. Did you mean '--temperature'"
    ),
    'flag that is none, with its value': (['--batchsize=3'], "arguments: --batchsize=3. Did you mean '--batch-size'"),
    'flag abbreviated': (['--temp', '3'], 'unrecognized arguments: --temp'),
    'flag without value': (['--lr'], '--lr: expected one argument'),
    'word for a number': (['--lr', 'high'], "--lr: invalid float value: 'high'"),
    'no patience': (['--patience', '0'], 'patience must be at least 1, got 0'),
    'weights of no epoch': (['--export-weights', 'first'], "--export-weights: invalid choice: 'first'"),
    'method unknown': (['--method', 'dfkd'], "--method: invalid choice: 'dfkd'"),
    'loss unknown': (['--kd-loss', 'mse'], "--kd-loss: invalid choice: 'mse'"),
    'baseline unknown': (['--baselines', 'crd'], "--baselines: invalid choice: 'crd'"),
    'recipe with unknown key': (lambda f: recipe(f, 'temprature: 3'), "'temprature'. Did you mean 'temperature'"),
    'recipe with another unknown key': (lambda f: recipe(f, 'learning_rate: 3'), "unknown option 'learning_rate'"),
    'recipe that is a list': (lambda f: recipe(f, '- epochs'), 'must hold a mapping'),
    'recipe that is empty': (lambda f: recipe(f, ''), 'must hold a mapping'),
    'recipe that is not YAML': (lambda f: recipe(f, 'a: [1'), 'not valid YAML'),
    'recipe that is not there': (['--config', 'nowhere.yaml'], "the file 'nowhere.yaml' does not exist"),
    'recipe with a word for a number': (lambda f: recipe(f, 'workers: many'), "workers must be int, got 'many'"),
    'recipe with yes for a number': (lambda f: recipe(f, 'workers: yes'), 'workers must be int, got True'),
    'recipe with an unknown choice': (lambda f: recipe(f, 'kd_loss: dkdd'), "Did you mean 'dkd'"),
    'recipe with code': (lambda f: recipe(f, 'epochs: !!python/object/apply:os.getcwd []'), 'not valid YAML'),
    **{
        f'recipe of {name}': (
            lambda f, text=text: recipe(f, text), f"config: '.*recipe.yaml' is not valid YAML: .*{words}"
        )
        for name, (text, words) in {
            'aliases of aliases': (
                'student_kwargs:\n  a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n'
                + ''.join(f'  a{i}: &a{i} [{", ".join([f"*a{i - 1}"] * 10)}]\n' for i in range(1, 10)),
                'more than 10,000 values .* aliases',
            ),
            'merged aliases': (
                'a0: &a0 {x: 1, y: 2}\n' + ''.join(
                    f'a{i}: &a{i} {{<<: [{", ".join([f"*a{i - 1}"] * 10)}]}}\n' for i in range(1, 10)
                ), 'more than 10,000 values .* aliases',
            ),
            'an alias that holds itself': ('student_kwargs: &a {b: *a}', 'an alias that stands for a value around it'),
            'many levels': ('student_kwargs: ' + '{a: ' * 60 + '}' * 60, '32 levels'),
            'very many levels': ('student_kwargs: ' + '[' * 9000, 'nested too deep'),
            'much text': ('student_kwargs: {a: ' + 'x' * 200_000 + '}', '200,021 characters'),
            'a long number': ('epochs: ' + '9' * 9000, 'digits'),
            'a long hexadecimal number': ('epochs: 0x' + 'f' * 9000, 'more than 64 bits'),
            'a long number of minutes': ('epochs: ' + '59:' * 9000 + '1', 'more than 64 bits'),
        }.items()
    },
    'recipe with a long value': (lambda f: recipe(f, 'opt: ' + 'x' * 90_000), r'opt must be .{0,2500}$'),
    'aliases on the command line': (
        ['--student-kwargs', 'a=[&a [*a]]'], 'student-kwargs: the value of a is not valid YAML: .*alias'
    ),
    'long value on the command line': (['--lr', 'x' * 90_000], '--lr: invalid float value: .*characters left out'),
    # ranges
    'temperature 0': (['--temperature', '0'], 'temperature must be greater than 0, got 0.0'),
    'temperature below 0': (['--temperature=-2'], 'temperature must be greater than 0, got -2.0'),
    'temperature nan': (['--temperature', 'nan'], 'temperature must be a finite number'),
    'temperature inf': (['--temperature', 'inf'], 'temperature must be a finite number'),
    **{
        f'{name} below 0': ([f'--{name}=-1'], f'{name.replace("-", "_")} must be at least 0')
        for name in (
            'student-task-weight', 'prompt-task-weight', 'prompt-teacher-weight', 'prompt-student-weight',
            'student-teacher-weight', 'student-prompt-weight', 'task-loss-weight', 'distill-loss-weight',
            'weight-decay', 'prompt-lr', 'mixup', 'cutmix', 'workers', 'warmup-epochs', 'checkpoint-steps', 'momentum',
        )  # fmt: skip
    },
    'lr 0': (['--lr', '0'], 'lr must be greater than 0'),
    'too many workers': (['--workers', '100000'], 'workers must be at least 0 and at most 256, got 100000'),
    **{
        f'{name} 0': ([f'--{name}', '0'], f'{name.replace("-", "_")} must be at least 1')
        for name in (
            'batch-size', 'validation-batch-size', 'epochs', 'grad-accum-steps', 'checkpoint-hist', 'log-interval'
        )  # fmt: skip
    },
    'flip above 1': (['--hflip', '1.5'], 'hflip must be at least 0 and at most 1, got 1.5'),
    'smoothing 1': (['--smoothing', '1'], 'smoothing must be at least 0 and less than 1'),
    'validation share 1': (['--val-fraction', '1'], 'val_fraction must be greater than 0 and less than 1'),
    'validation batch below 0': (['--validation-batch-size=-3'], 'validation_batch_size must be at least 1, got -3'),
    **{
        f'crop share {value}': ([f'--crop-pct={value}'], f'crop_pct must be greater than 0 and at most 1, got {value}')
        for value in ('0.0', '3.0', '-1.0')
    },
    'warm-up longer than the run': (['--warmup-epochs', '4'], 'warmup_epochs must be at most epochs=3, got 4'),
    'lr that ends higher': (['--min-lr', '0.1'], 'min_lr must be at most lr=0.05, got 0.1'),
    'momentum 5': (['--momentum', '5'], 'momentum must be at least 0 and less than 1, got 5.0'),
    'all dropped': (['--drop', '1'], 'drop must be at least 0 and less than 1, got 1.0'),
    'more than all paths dropped': (['--drop-path', '2'], 'drop_path must be at least 0 and less than 1, got 2.0'),
    'no spread': (['--std', '0'], 'std must be greater than 0 and at most 1, got 0.0'),
    'mean of bytes': (['--mean', '123.7'], 'mean must be at least 0 and at most 1, got 123.7'),
    'no spread in one channel': (['--std', '1', '0', '1'], 'std must be greater than 0 and at most 1, got 0.0'),
    'seed below 0': (['--seed=-1'], 'seed must be at least 0 and at most 2147483647, got -1'),
    'clipping to 0': (['--clip-grad', '0'], 'clip_grad must be greater than 0'),
    'input of two numbers': (['--input-size', '16', '16'], 'input_size must be C H W'),
    'input of 0': (['--input-size', '3', '0', '16'], 'input_size must be at least 1, got 0'),
    'input of 2 channels': (['--input-size', '2', '16', '16'], r'input_size=\(2, 16, 16\) must be \(1 or 3 channels'),
    'two means': (['--mean', '0.5', '0.5'], 'mean=.* must have 3 values'),
    # contradictions
    'supervised with a teacher': (['--method', 'supervised'], 'supervised trains without a teacher'),
    'a mode of what is not compiled': (
        ['--compile-mode', 'reduce-overhead'], 'compile_mode=reduce-overhead .*--compile'
    ),
    'method twice': (['--baselines', 'dfpt'], 'names a method twice'),
    'supervised with weights of a teacher': (
        ['--method', 'supervised', '--teacher', '', '--teacher-checkpoint', 'x.safetensors'],
        r"teacher_checkpoint='x.safetensors' has the weights of --teacher, .*leave --teacher-checkpoint out",
    ),
    'loss of dfpt with kd': (
        ['--method', 'kd', '--kd-loss', 'dkd'], "kd_loss='dkd' has no effect with method=kd: .*choose --method dfpt"
    ),
    'norm of prompt blocks with kd': (
        ['--method', 'kd', '--prompt-norm', 'layer'], "prompt_norm='layer' has no effect with method=kd: .*Leave it out"
    ),
    'weight of dfpt with two others': (
        ['--method', 'kd', '--baselines', 'dist', '--student-prompt-weight', '0.5'],
        'student_prompt_weight=0.5 has no effect with method=kd, dist: .*choose --method dfpt',
    ),
    'dfpt student without a teacher': (
        ['--student-task-weight', '0', '--student-teacher-weight', '0', '--student-prompt-weight', '0'],
        'student_task_weight, student_teacher_weight, student_prompt_weight are all 0.* Raise one',
    ),
    'kd student without a teacher': (
        ['--method', 'kd', '--task-loss-weight', '0', '--distill-loss-weight', '0'],
        'task_loss_weight, distill_loss_weight are all 0.* Raise one',
    ),
    'kd beside it without a teacher': (
        ['--baselines', 'kd', '--task-loss-weight', '0', '--distill-loss-weight', '0'],
        'task_loss_weight, distill_loss_weight are all 0.* Raise one',
    ),
    **{
        f'no augmentation and {name}': (
            ['--crop-padding', '0', '--no-aug', f'--{name}={value}'],
            f'no_aug and {name}={value} contradict each other: give one of them',
        )
        for name, value in (('aa', 'rand-m9'), ('hflip', '0.5'), ('vflip', '0.2'), ('reprob', '0.1'))
    },
    'no augmentation and crops': (['--no-aug'], 'no_aug and crop_padding=2 contradict each other'),
    'no augmentation and a recipe with some': (
        lambda f: [*recipe(f, 'reprob: 0.1'), '--crop-padding', '0', '--no-aug'], 'no_aug and reprob=0.1 contradict'
    ),
    'pairs of an odd batch': (
        ['--batch-size', '31', '--cutmix', '1'], 'batch_size=31 is 31 images per process, .*choose an even number'
    ),
    'one image for BatchNorm': (
        ['--batch-size', '1'], 'batch_size=1 is one image per process, and BatchNorm needs at least 2: choose a'
    ),
    'one image for the BatchNorm of prompt blocks': (
        ['--batch-size', '1', '--student', 'test_vit', '--student-kwargs', 'img_size=16', 'patch_size=4'],
        'batch_size=1 is one image per process, and BatchNorm needs at least 2: choose a',
    ),
    'frozen without prompt path': (['--freeze-prompt-path'], 'freeze_prompt_path needs a tuned prompt path'),
    'never tuned without prompt path': (['--prompt-epochs', '0'], 'prompt_epochs=0 needs a tuned .*--prompt-path'),
    'frozen and tuned': (
        ['--freeze-prompt-path', '--prompt-path', 'x', '--prompt-epochs', '2'],
        'freeze_prompt_path and prompt_epochs=2 contradict each other',
    ),
    'tuned without dfpt': (['--method', 'kd', '--prompt-epochs', '1'], 'prompt_epochs=.1. has no effect'),
    **{
        f'prompt path tuned for {value}': (
            ['--prompt-epochs', value], 'prompt_epochs must be a number of epochs up to epochs=.*25%, or all, got'
        )
        for value in ('half', '-1', '1.5', '999', '101%', '%', '1e1', '1/2')
    },
    'prompt path without dfpt': (
        ['--method', 'kd', '--prompt-path', 'x'], 'prompt_path options need a prompt path, .*--method dfpt'
    ),
    'dkd with mixup': (['--kd-loss', 'dkd', '--mixup', '0.2'], 'dkd needs class indices'),
    'two crops': (['--train-crop-mode', 'rrc'], 'contradict each other'),
    'cache with augmentation': (['--cache-images', 'on', '--aa', 'rand-m9'], "cache_images='on' does not work with"),
    'fp16 without a GPU': (['--mixed-precision', 'fp16'], 'mixed_precision=fp16 needs a GPU'),
    # models
    'student unknown': (['--student', 'resnet81'], "student='resnet81' is not a timm model.*list_models|Did you mean"),
    'student nearly right': (['--student', 'restnet18'], "='restnet18' is not a timm model. Did you mean.*resnet18"),
    'student of a folder that is not there': (['--student', 'local-dir:nowhere'], 'student=.*: there is no such'),
    'student argument unknown': (['--student-kwargs', 'depht=3'], "student='resnet18' cannot be created.*depht"),
    **{
        f'{option} with {name}': (
            [f'--{option}', f'{name}={value}'],
            f'^error: {option.replace("-", "_")}: {name} is not an allowed argument .*{remedy}',
        )
        for option in ('teacher-kwargs', 'student-kwargs')
        for name, value, remedy in (
            ('checkpoint_path', 'good.pth', 'give the weights of a teacher with --teacher-checkpoint'),
            ('pretrained', 'true', 'give --student-pretrained'), ('pretrained_cfg', '{file: x}', 'leave it out'),
            ('pretrained_cfg_overlay', '{file: x}', 'leave it out'), ('pretrained_strict', 'false', 'leave it out'),
            ('cache_dir', 'x', 'leave it out'), ('features_only', 'true', 'leave it out'), ('device', 'cuda', 'leave'),
            ('kwargs_filter', '[num_classes]', 'leave it out'), ('pretrained_filter_fn', 'x', 'leave it out'),
        )
    },
    'recipe with a checkpoint': (
        lambda f: recipe(f, 'method_options: {dfpt: {teacher_kwargs: {checkpoint_path: x}}}'),
        '^error: teacher_kwargs: checkpoint_path is not an allowed argument',
    ),
    'teacher with another head': (
        lambda f: [*teacher(f / 't', ('a', 'b', 'c', 'd'), 4), '--teacher-kwargs', 'num_classes=3'],
        r'^error: teacher=.* with teacher_kwargs \(num_classes=3\) .* fc.bias, fc.weight would be random: leave out',
    ),
    'teacher without a head': (
        lambda f: [*teacher(f / 't'), '--teacher-kwargs', 'num_classes=0'],
        '^error: teacher_kwargs: num_classes=0 would remove the head of the teacher',
    ),
    'teacher of maps': (
        lambda f: [*teacher(f / 't'), '--teacher-kwargs', "global_pool=''"],
        '^error: teacher=.* with teacher_kwargs=.*global_pool',
    ),
    'student of maps': (['--student-kwargs', "global_pool=''"], '^error: student=.* with student_kwargs=.*global_pool'),
    'checkpoint of other classes than asked for': (
        lambda f: [*weights(f, 'w.safetensors'), '--teacher-kwargs', 'num_classes=7'],
        '^error: teacher_kwargs: num_classes=7, but the weights have 3: leave it out',
    ),
    'teacher by a URL': (
        ['--teacher', 'https://huggingface.co/user/x'], "^error: teacher: 'https:.* Write 'hf-hub:user/x'"
    ),
    'teacher by a path': (['--teacher', './resnet18'], "^error: teacher: .*Use 'hf-hub:.*local-dir:./resnet18"),
    'data by a URL': (['--dataset', 'hf://datasets/user/x'], "^error: dataset: 'hf:.*Give user/name"),
    'student of other classes': (
        ['--student-kwargs', 'num_classes=7'], 'student_kwargs: num_classes=7 would be overridden .*leave it out'
    ),
    'student of other channels': (
        ['--student-kwargs', 'in_chans=1'], 'student_kwargs: in_chans=1 would be overridden .*give --input-size C H W'
    ),
    'student argument without value': (['--student-kwargs', 'depth'], 'must have the form key=value'),
    'ViT of another input size': (
        ['--student', 'test_vit', '--student-kwargs', 'patch_size=5', '--input-size', '3', '16', '17'],
        "student='test_vit' .*cannot take images of input_size=.*divisible by patch size",
    ),
    'teacher unknown': (['--teacher', 'resnet81'], "teacher='resnet81' is not a timm model"),
    'teacher of a folder that is not there': (['--teacher', 'local-dir:nowhere'], 'teacher=.*: there is no such'),
    'teacher without weights': (without_weights, 'has no model.safetensors'),
    'teacher damaged': (damaged_folder, 'cannot be created'),
    'teacher of other classes': (
        lambda f: [*teacher(f / 't', ('a', 'b', 'c', 'd'), 4), '--teacher-head', 'own'],
        'knows 4 classes and the data have 3.*--teacher-head fit.*--method supervised',
    ),
    'teacher of other names': (
        lambda f: [*teacher(f / 't', ('ash', 'birch', 'oak')), '--teacher-head', 'own'],
        "class 2 is 'oak' for the teacher",
    ),
    'teacher of grey images': (lambda f: teacher(f / 't', in_chans=1), 'with 3 channels, but the teacher takes 1'),
    'checkpoint not there': (
        ['--teacher', 'resnet18', '--teacher-checkpoint', 'nowhere.safetensors'], 'existing .safetensors file'
    ),
    'checkpoint pickled': (lambda f: weights(f, 'w.pth', b'x'), 'Pickled checkpoints are never loaded'),
    'checkpoint damaged': (lambda f: weights(f, 'w.safetensors', b'\xff' * 99), 'does not (fit|match)'),
    'checkpoint of another model': (other_weights, 'does not (fit|match)'),
    'prompt path not there': (
        ['--prompt-path', './nowhere'],
        "prompt_path='.*nowhere' cannot be loaded: The folder '.*nowhere' does not exist",
    ),
    'stages unknown': (
        ['--prompt-stages', 'layer1', 'layer9'],
        "^error: prompt_stages names 'layer9', which is not a module of resnet18.*See .*named_modules",
    ),
    'too many stages': (['--prompt-stages', '99'], '^error: prompt_stages=99 is more than the 5 stages that resnet18'),
    'even kernel': (['--prompt-kernel-sizes', '2'], r'^error: prompt_kernel_sizes must be .* integers .*got \(2,\)'),
    'norm unknown': (['--prompt-norm', 'group'], "argument --prompt-norm: invalid choice: 'group'"),
    'activation unknown': (
        ['--prompt-act', 'rleu'], "^error: prompt_act must be the name of a timm activation such as 'relu' .*got 'rleu'"
    ),
    'fusion unknown': (['--prompt-fusion', 'add'], "argument --prompt-fusion: invalid choice: 'add'"),
    'rank of a whole head': (['--prompt-head-rank', '9'], '^error: prompt_head_rank=9 saves nothing .*: at most 2, or'),
    'rank of no fusion': (
        ['--prompt-fusion', 'none', '--prompt-fusion-rank', '2'],
        "^error: prompt_fusion_rank=2 is of prompt_fusion='conv', not of prompt_fusion='none': leave one of them out",
    ),
    'rank of a new head': (
        ['--teacher-head', 'new', '--prompt-head-rank', '2'],
        '^error: prompt_head_rank=2 corrects the head that the teacher has, and teacher_head=new gives',
    ),
    'reduction 0': (['--prompt-reduction', '0'], 'prompt_reduction must be .*greater than 0.*got 0.0'),
    # optimisation
    'optimizer unknown': (['--opt', 'adamww'], "^error: opt must be .* got 'adamww'. Did you mean 'adamw'"),
    'prompt optimizer unknown': (
        ['--prompt-opt', 'adamww'], "^error: prompt_opt .* got 'adamww'. Did you mean 'adamw'"
    ),
    'optimizer far from any': (['--opt', 'qqq'], "opt must be .*, got 'qqq'. See timm.optim.list_optimizers()"),
    'optimizer not fused': (
        ['--opt-fused', '--prompt-opt', 'lion'], 'prompt_opt=lion cannot train with .*no fused .*leave --opt-fused out'
    ),
    **{
        f'{option} of second order': (
            [f'--{option}', 'Lookahead_Adahessian'], f'^error: {option.replace("-", "_")}=.* needs second derivatives'
        )
        for option in ('opt', 'prompt-opt')
    },
    'optimizer of a package that is not there': (
        ['--opt', 'fusedsgd'], '^error: opt=fusedsgd cannot train with .*(CUDA|apex).* Choose another'
    ),
    "Nesterov's without momentum": (
        ['--momentum', '0'], '^error: opt=sgd cannot train with lr=0.05, .*momentum=0: .*Use --opt momentum'
    ),
    'momentum of an optimizer without': (
        ['--opt', 'adamw', '--momentum', '0.8'], '^error: momentum=0.8 has no effect with opt=adamw: leave it out'
    ),
    'prompt optimizer that needs a learning rate': (
        ['--prompt-opt', 'adamc', '--prompt-lr', '0'], '^error: prompt_opt=adamc cannot train with prompt_lr=0, '
    ),
    'warm-up uphill': (['--warmup-lr=-1', '--warmup-epochs', '1'], '^error: warmup_lr must be at least 0, got -1.0'),
    'warm-up that is none': (['--warmup-lr', '0.1'], 'warmup_lr=0.1 has no effect with warmup_epochs=0: .*give --war'),
    'warm-up without a schedule': (
        ['--sched', 'none', '--warmup-epochs', '1'], '^error: warmup_epochs=1 has no effect with .*--sched constant'
    ),
    'warm-up and nothing else': (
        ['--sched', 'wsd', '--warmup-epochs', '3'], '^error: warmup_epochs=3 must be less than epochs=3 with sched=wsd'
    ),
    'decay longer than the run': (
        ['--sched', 'rsqrt', '--warmup-epochs', '1', '--decay-epochs', '3'],
        '^error: decay_epochs=3 must be at most the 2 epochs after the warm-up with sched=rsqrt',
    ),
    'decay of another schedule': (
        ['--decay-rate', '0.5'], '^error: decay_rate=0.5 has no effect with sched=cosine: .*choose --sched step'
    ),
    # What another option would have to switch on.
    'average without one': (
        ['--no-model-ema', '--model-ema-decay', '0.9'],
        '^error: model_ema_decay=0.9 has no effect without a moving average: leave it out, or give --model-ema.',
    ),
    'probability of no mixup': (['--mixup-prob', '0.5'], 'mixup_prob=0.5 has no effect .*give --mixup or --cutmix'),
    'folder of no cache': (['--teacher-cache-dir', 'x'], "teacher_cache_dir='x' has no effect .*--cache-teacher"),
    'private and not published': (
        ['--private'], 'private=True has no effect where nothing is published: .*--push-to-hub'
    ),
    'shape of a path that has one': (
        ['--prompt-path', 'x', '--prompt-reduction', '4'],
        'prompt_reduction=4.0 has no effect with --prompt-path, which brings its own',
    ),
    'learning rate of a frozen path': (
        ['--prompt-path', 'x', '--freeze-prompt-path', '--prompt-lr', '0.1'],
        'prompt_lr=0.1 has no effect on a prompt path that is not tuned: .*--prompt-epochs',
    ),
    'rate of a copy that is none': (
        ['--method', 'dfpt', '--prompt-backbone-lr-scale', '1'],
        'prompt_backbone_lr_scale=1.0 has no effect without a copy of the backbone: .*--method dfpt[+]',
    ),
    'weight of another method': (
        ['--method', 'dfpt', '--distill-loss-weight', '1'],
        'distill_loss_weight=1.0 has no effect with dfpt and dfpt[+]',
    ),
    # Licenses.
    'license that the Hub does not list': (['--license', 'other'], '^error: license=other needs license_name: give'),
    'license of no spelling': (['--license', 'Apache 2.0'], "^error: license='Apache 2.0' must be lowercase"),
    'name of a known license': (
        ['--license', 'mit', '--license-name', 'mine'],
        "license_name='mine' has no effect with license=mit: leave it out",
    ),
    'decay upwards': (['--sched', 'step', '--decay-rate', '3'], '^error: decay_rate=3 must be at most 1'),
    'decays in no order': (
        ['--sched', 'multistep', '--decay-milestones', '2', '1'], '^error: decay_milestones=.* in ascending order'
    ),
    'schedule unknown': (['--sched', 'cosin'], "--sched: invalid choice: 'cosin' .*choose from '?cosine"),
    'schedule that needs metrics': (
        ['--sched', 'plateau'], "--sched: invalid choice: 'plateau' .*choose from '?cosine"
    ),
    'policy with operations that Pillow refuses': (
        ['--aa', 'v0', '--crop-padding', '0'], "aa='v0' fails on some images .*choose another policy"
    ),
    'padding larger than the image': (['--crop-padding', '17'], 'crop_padding=17 must be at most 16'),
    'crops larger than the image': (
        ['--crop-padding', '0', '--scale', '0.5', '1.5'], 'scale must be greater than 0 and at most 1, got 1.5'
    ),
    'colour jitter below 0': (['--color-jitter=-1'], 'color_jitter must be at least 0, got -1.0'),
    'spread too small to export': (['--std', '1e-30'], r'std=.* must be from 1e-06 to 1000'),
    'input too large to export': (['--input-size', '3', '8000', '16'], 'input_size=.* sides up to 4096'),
    'background that is not a colour': (['--background', 'whitish'], "background='whitish' must be a color"),
    'policy unknown': (
        ['--aa', 'wild-m9', '--crop-padding', '0'], "aa='wild-m9'.*Unknown AutoAugment config"
    ),
    'interpolation unknown': (
        ['--interpolation', 'cubical'], "--interpolation: invalid choice: 'cubical' .*choose from .*bilinear"
    ),
    # data
    'data not there': (['--dataset', './nowhere'], "dataset='.*/nowhere': there is no such file or folder"),
    'batch larger than the data': (['--batch-size', '5000'], 'fewer than one batch of batch_size=5000.*--batch-size'),
    'one image a class': (grey, 'has a single image'),
    # the run folder
    'folder in use': (in_use, 'exists and is not empty'),
    'resumed folder is something else': (lambda f: [*in_use(f), '--resume'], 'is not empty and does not hold a run'),
    'output inside the data': (
        lambda f: ['--dataset', str(photos(f)), '--output', str(f / 'photos' / 'runs' / '1')],
        "output: '.*photos/runs/1' is inside the dataset .*outside with --output",
    ),
    'output inside the data by way of a link': (
        lambda f: [*linked(f), '--dataset', str(f / 'photos'), '--output', str(f / 'link' / 'run')],
        "output: '.*link/run' is inside the dataset .*outside with --output",
    ),
    'teacher cache inside the data': (
        lambda f: [
            '--dataset', str(photos(f)), '--cache-teacher', '--aug-cycle', '1', '--teacher-cache-dir',
            str(f / 'photos' / 'cache'),
        ],
        "teacher_cache_dir: '.*photos/cache' is inside the dataset .*outside with --teacher-cache-dir",
    ),
    'folder is a file': (
        lambda f: ['--output', str(file(f / 'notes'))], "output: '.*notes' exists .*name another folder"
    ),
    'folder in a file': (
        lambda f: ['--output', str(file(f / 'notes') / 'run')],
        "output: cannot create '.*run': '.*notes' is not a writable directory",
    ),
    'folder of too long a name': (lambda f: ['--output', str(f / ('x' * 300))], "File name too long: '.*/x{300}'"),
}  # fmt: skip


def refuse(argv, capsys):
    """Run the job; return the one error that it must end in."""
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr().err
    assert isinstance(code, int)
    assert code != 0
    assert 'Traceback' not in shown
    errors = [line for line in shown.splitlines() if line.startswith('error: ') or ': error: ' in line]
    assert len(errors) == 1, shown
    return shown[shown.index(errors[0]) :]


@pytest.mark.parametrize('name', CASES)
def test_refused(tiny, tmp_path, capsys, name):
    arguments, message = CASES[name]
    arguments = arguments(tmp_path) if callable(arguments) else arguments
    before = set(tmp_path.rglob('*'))
    error = refuse([*tiny.argv(tmp_path / 'run', '--mixup', '0'), *arguments], capsys)
    assert re.search(message, error, re.DOTALL), error
    assert set(tmp_path.rglob('*')) == before


def _main_as_nobody(argv, log):
    """root may write everywhere, so it has to become somebody else first."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    sys.exit(main(argv))


def test_folder_that_may_not_be_written(tiny, tmp_path):
    # Other users cannot come near pytest's own folders.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        argv, log = tiny.argv(Path(folder, 'run')), tmp_path / 'log'
        job = CONTEXT.Process(target=_main_as_nobody, args=(argv, str(log)))
        job.start()
        job.join()
        shown = log.read_text()
        assert job.exitcode == 1, shown
        assert shown == f"error: output: cannot create '{folder}/run': '{folder}' is not a writable directory.\n"
        os.chmod(folder, 0o755)


@pytest.fixture(scope='module')
def finished(tiny, tmp_path_factory):
    """Two short runs, of students of different width."""
    root = tmp_path_factory.mktemp('finished')
    for name, width in (('run', 4), ('other', 8)):
        kwargs = [f'{key}={value}' for key, value in {**RESNET, 'stem_width': width}.items()]
        job = Job(tiny.argv(root / name, *SHORT, '--student-kwargs', *kwargs), root / f'{name}.log')
        assert job.wait() == [0], job.output()
    return root


SHORT = ('--epochs', '1', '--method', 'kd')


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'exists and is not empty. Continue it with --resume'),
        (['--resume', '--lr', '0.3'], r'started with other options: lr=0.3 \(was 0.05\)'),
        (['--resume', '--epochs', '2', '--seed', '1'], r'epochs=2 \(was 1\), seed=1 \(was 42\)'),
        (['--resume', '--teacher', 'resnet18'], "teacher='resnet18'"),
        (
            ['--resume', '--epochs', '2', '--seed', '1', '--lr', '0.3', '--weight-decay', '0', '--opt', 'momentum'],
            r' and 2 more\. Give .*config\.yaml --resume has them all',
        ),
    ],
)
def test_run_of_other_options(tiny, finished, capsys, arguments, message):
    before = content(finished)
    error = refuse(tiny.argv(finished / 'run', *SHORT, *arguments), capsys)
    assert re.search(message, error), error
    assert content(finished) == before


def test_checkpoint_of_another_model(tiny, finished, tmp_path, capsys):
    shutil.copytree(finished / 'run', tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run' / 'checkpoints')
    shutil.copytree(finished / 'other' / 'checkpoints', tmp_path / 'run' / 'checkpoints')
    before = content(tmp_path)
    error = refuse(tiny.argv(tmp_path / 'run', *SHORT, '--resume'), capsys)
    assert 'does not fit the models of this run' in error
    assert content(tmp_path) == before


def test_loss_that_is_not_finite(tiny, tmp_path, capsys):
    """The only error that may come after training has begun; there is no student to be mistaken for one."""
    error = refuse(tiny.argv(tmp_path / 'run', '--lr', '1e30', '--log-interval', '1', '--mixup', '0'), capsys)
    assert re.search(r'dfpt: \w+ is (nan|inf) at step [23] \(epoch 1, training rows \d+, .*--lr', error), error
    assert {path.name for path in (tmp_path / 'run').iterdir()} == {'config.yaml', 'metrics.jsonl'}


def test_full_disk(tiny, tmp_path):
    """A checkpoint that finds no room: one error, nothing left of it; with room made, the run goes on."""
    argv = tiny.argv(tmp_path / 'run', *SHORT)
    job = Job(argv, tmp_path / 'full.log', file_bytes=30_000)
    assert job.wait() == [1], job.output()
    assert 'cannot be written' in job.output()
    assert 'Make room' in job.output()
    assert 'Traceback' not in job.output()
    assert not list((tmp_path / 'run').rglob('*.incomplete'))
    assert not list((tmp_path / 'run' / 'checkpoints').iterdir())
    job = Job([*argv, '--resume'], tmp_path / 'room.log')
    assert job.wait() == [0], job.output()
