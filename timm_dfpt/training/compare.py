"""Several methods, several seeds: students side by side on the same batches, and their differences."""
from __future__ import annotations

import dataclasses
import re
import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from ..hub.files import parse_yaml
from ..job.cli import DEFAULT_RECIPE, build_parser, command_line, resolve_config
from ..job.devices import create_accelerator
from ..job.options import TrainConfig
from ..job.stopping import NonFiniteLossError, Preempted, exit_code
from ..reports.intervals import summarise
from ..tasks.evaluation import score_of
from ..tasks.methods import ALIASES, METHODS, REFERENCE_METHOD
from ..utils.flops import flop_counter
from .comparison_page import keep_arm_predictions, write_comparison_page
from .export import describe_models
from .learner import Learner
from .plots import plot_comparison
from .report import attempt, comparison_text
from .run import Setup, close, describe, example_batch, export_and_measure, set_up, train_side_by_side
from .run_folder import ComparisonFolder, RunFolder, claimed

__all__ = ['Arm', 'compare', 'main', 'parse_arm']

_TIMED_STEPS = 10
# Given by the arms and the seeds.
_NOT_OPTIONS = ('method', 'baselines', 'seed')
# Of one student that is shipped.
_OF_A_RUN = ('export', 'include_preprocessing', 'export_weights', 'patience')
# What an arm may change. All the rest is what makes the students comparable: data, batches, student, epochs.
_ARM_GROUPS = ('method', 'prompt path')
_ARM_OPTIONS = (
    'teacher', 'teacher_checkpoint', 'teacher_kwargs', 'opt', 'lr', 'momentum', 'weight_decay',
    'clip_grad', 'sched', 'warmup_epochs', 'warmup_lr', 'min_lr', 'decay_milestones', 'decay_rate',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train the student.

    Args:
        name: What to call it in tables and folders.
        method: One of `timm_dfpt.tasks.methods.METHODS`.
        changes: Options that differ from the recipe's.
    """

    name: str
    method: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r'[\w.+-]+', self.name) or self.name in ('epoch', 'updates', '.', '..'):
            raise ValueError(f'arm {self.name!r}: the name must be made of letters, digits, and any of _ . + -')
        groups = {field.name: field.metadata['group'] for field in dataclasses.fields(TrainConfig)}
        for key in self.changes:
            if key in (*_NOT_OPTIONS, 'method_options') or not (groups.get(key) in _ARM_GROUPS or key in _ARM_OPTIONS):
                raise ValueError(
                    f'arm {self.name!r}: {key!r} cannot differ between arms: leave it out of the arm and give it for '
                    'all. Arms may differ in options of the method, the prompt path, the teacher and the optimizer.'
                )


def parse_arm(text: str) -> Arm:
    """Read an arm from the command line: `dkd`, or `kd-T4=kd,temperature=4,distill_loss_weight=1`.

    Raises:
        ValueError: If it is of another form, or changes what is common to all arms.
    """
    name, separator, rest = text.partition('=')
    method, *pairs = (rest if separator else name).split(',')
    wrong = [pair for pair in pairs if '=' not in pair]
    if wrong or not method:
        raise ValueError(f'arm {text!r} must be a method, or of the form name=method,option=value,option=value')
    changes = {key: parse_yaml(value) for key, _, value in (pair.partition('=') for pair in pairs)}
    return Arm(name, ALIASES.get(method, method), changes)


def main(argv: Sequence[str] | None = None, program: str = 'timm-dfpt compare') -> int:
    """Compare methods from the command line. Without `--config` and `--dataset` it is on the quickstart's data.

    Args:
        argv: Arguments; `None` for those of the process.
        program: What the command was called as, for its help and for the record.

    Returns:
        The exit code, as of `timm_dfpt.training.run.main`.
    """
    parser = build_parser(
        'Compare distillation methods: for each seed the students train side by side on the same batches.',
        without=(*_NOT_OPTIONS, *_OF_A_RUN),
        program=program,
    )
    group = parser.add_argument_group('comparison')
    group.add_argument('--methods', nargs='*', default=[], metavar='METHOD', help='methods, or scratch for none')
    group.add_argument(
        '--arm', action='append', default=[], metavar='NAME=METHOD,OPTION=VALUE,...', help='a method with own options'
    )
    group.add_argument('--seeds', nargs='+', type=int, required=True, metavar='SEED', help='seeds, one run each')
    group.add_argument('--reference', metavar='ARM', help='arm that the others are compared with (default: kd)')
    command = command_line(program, argv)

    def job() -> None:
        values = vars(parser.parse_args(argv))
        methods, texts, seeds = values.pop('methods'), values.pop('arm'), values.pop('seeds')
        reference, recipe = values.pop('reference'), values.pop('config')
        config = resolve_config(values, recipe, DEFAULT_RECIPE)
        arms = [parse_arm(text) for text in (*methods, *texts)]
        config.check_given(values, [arm.method for arm in arms])
        compare(config, arms, seeds, reference, command)

    return exit_code(job, 'give the same command again')


def compare(
    config: TrainConfig, arms: Sequence[Arm], seeds: Sequence[int], reference: str | None = None, command: str = ''
) -> dict[str, Any]:
    """Train every arm with every seed and write `compare.md`, `compare.json` and `compare.png`.

    The students of one seed start from the same weights and see the same batches; the teacher's logits are computed
    once for all. Each student is the one, to the last bit on a CPU, that `run` trains alone with its options.

    Args:
        config: What is common to all arms; the folder is `output`, and `resume` continues what is there: finished
            seeds are left as they are, and new ones may be added.
        arms: What to compare.
        seeds: Seeds; each is a run in `output/seed-<n>`.
        reference: Name of the arm that the others are compared with; `kd` if there is one of that name, else the first.
        command: How the comparison was started, for the record.

    Returns:
        What `compare.json` holds.

    Raises:
        ValueError: If an argument does not fit another, or the folder holds another comparison.
    """
    names = [arm.name for arm in arms]
    if not arms or len(set(names)) < len(names):
        raise ValueError(f'methods: name at least one, and each once (--methods kd dfpt), got {names}.')
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f'seeds: name at least one, and each once, got {list(seeds)}.')
    reference = reference or (REFERENCE_METHOD if REFERENCE_METHOD in names else names[0])
    if reference not in names:
        raise ValueError(f'reference={reference!r} is not one of the arms {names}: name one of them.')
    if config.output is None:
        raise ValueError('output is not given: name the folder of the comparison with --output.')
    if config.mixed_precision == 'fp16' and len(arms) > 1:
        raise ValueError(
            'mixed_precision=fp16 has one loss scale, through which students trained together would affect each '
            'other: use --mixed-precision bf16.'
        )
    if config.patience is not None or config.export_weights != 'last':
        raise ValueError(
            'patience and export_weights=best are not for comparisons, whose students all have the weights of the last '
            'epoch: leave them out of the recipe.'
        )
    folder = ComparisonFolder(config.output)
    accelerator = create_accelerator(config)
    given = {arm.name: {'method': arm.method, **arm.changes} for arm in arms}
    with folder.opened(given, config.resume, accelerator):
        try:
            return _run_seeds(config, arms, seeds, reference, command, accelerator)
        except Preempted as stop:
            raise Preempted(stop.signum, f'continue with --output {shlex.quote(str(folder))} --resume') from stop
        except NonFiniteLossError as error:
            raise NonFiniteLossError(error.found, folder) from error


def _run_seeds(
    config: TrainConfig,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    reference: str,
    command: str,
    accelerator: Accelerator,
) -> dict[str, Any]:
    folder = ComparisonFolder(str(config.output))
    result: dict[str, Any] = {}
    for number, seed in enumerate(seeds, start=1):
        run_folder = folder.seed(seed)
        if not run_folder.summary.is_file():
            accelerator.print(f'seed {seed} ({number} of {len(seeds)})')
            resume = run_folder.config.is_file()
            common = dataclasses.replace(config, seed=seed, baselines=[], output=str(run_folder), resume=resume)
            with claimed(common, accelerator) as run_folder:
                _run_seed(run_folder.resumed(common), run_folder, arms, command)
        result = _collect(folder, [arm.name for arm in arms], seeds[:number], reference, command)
        if accelerator.is_main_process:
            _write(folder, result, config.report)
    accelerator.print(comparison_text(result))
    return result


def _in_training_order(arm: Arm) -> tuple[bool, str]:
    # The prompt path of DFPT-KD takes the most from the teacher's own pass, so it goes first and does that pass.
    method = METHODS.get(arm.method)
    variant = method.variant if method else None
    return variant is None, variant or ''


def _run_seed(config: TrainConfig, folder: RunFolder, arms: Sequence[Arm], command: str) -> None:
    options = {
        arm.name: config.for_method(arm.method, **arm.changes, output=str(folder.arm(arm.name)))
        for arm in sorted(arms, key=_in_training_order)
    }
    setup = set_up(config)
    learners, seconds = train_side_by_side(setup, options, folder, command)
    results = export_and_measure(setup, learners, folder, command, needed=True)
    if setup.accelerator.is_main_process:
        example = attempt('loading images to measure costs with', lambda: example_batch(setup))
        models = describe_models(learners, results, setup.eval_split, example)
    if setup.accelerator.num_processes > 1:
        # They have to fail together.
        costs: Any = _step_costs(setup, learners)
    else:
        unknown = {learner.name: {'flops': None, 'ms': None} for learner in learners}
        costs = attempt('measuring the cost of a step', lambda: _step_costs(setup, learners)) or unknown
    if setup.accelerator.is_main_process:
        if setup.recorder is not None:
            keep_arm_predictions(setup.recorder, learners, folder)
        folder.write_summary(
            {
                **describe(setup, command),
                'phases': setup.phases,
                'eval_split': setup.eval_split,
                'train_seconds': seconds,
                'steps': config.epochs * len(setup.loaders['train']),
                'student': config.student,
                'arms': {name: {'models': models[name], 'step': costs[name]} for name in models},
            },
        )
    close(setup)


def _step_costs(setup: Setup, learners: Sequence[Learner]) -> dict[str, dict[str, float]]:
    """Measure a training step of each learner alone, teacher included; their weights are useless afterwards.

    Returns:
        By learner `flops` (two a multiply-accumulate of convolutions and matrix products, forward and backward) and
        `ms` (median; the learners take turns, so that a busy machine is unfair to none).
    """
    input, target, _ = next(iter(setup.loaders['train']))
    if (setup.config.mixup or setup.config.cutmix) and target.ndim == 1:
        target = torch.nn.functional.one_hot(target.clamp(min=0), setup.data.num_classes).float()
    costs: dict[str, dict[str, float]] = {}
    times: dict[str, list[float]] = {learner.name: [] for learner in learners}
    setup.accelerator.gradient_state._set_sync_gradients(True)
    for learner in learners:
        learner.train()
        with flop_counter() as counter:
            learner.step(input, target, seed=0)
        # Of all processes, which share the batch.
        costs[learner.name] = {'flops': counter.get_total_flops() * setup.accelerator.num_processes}
    for _ in range(_TIMED_STEPS):
        for learner in learners:
            start = time.perf_counter()
            learner.step(input, target, seed=0)
            if input.is_cuda:
                torch.cuda.synchronize()
            times[learner.name].append(time.perf_counter() - start)
    return {name: {**cost, 'ms': 1000 * statistics.median(times[name])} for name, cost in costs.items()}


def _collect(
    folder: ComparisonFolder, names: Sequence[str], seeds: Sequence[int], reference: str, command: str
) -> dict[str, Any]:
    """Put the seeds that are finished together."""
    runs = [folder.seed(seed).read_summary() for seed in seeds]
    first = runs[0]
    arms_given = folder.read_arms()
    teachers = [run['arms'][name]['models'].get('teacher') for run in runs[:1] for name in names]
    arms: dict[str, Any] = {}
    for name in names:
        students = [run['arms'][name]['models']['student'] for run in runs]
        base = [run['arms'][reference]['models']['student'] for run in runs]
        arm: dict[str, Any] = {'options': arms_given[name]}
        for split, key in (('val', 'val_metrics'), (first['eval_split'], 'metrics')):
            score = str(score_of(students[0][key]))
            values = [student[key][score] for student in students]
            arm[split] = {'score': score, **summarise(values)}
            if name != reference and score_of(base[0][key]) == score:
                pairs = zip(values, (student[key][score] for student in base), strict=True)
                arm[split]['difference'] = summarise([value - other for value, other in pairs])
        times = [run['arms'][name]['step']['ms'] for run in runs if run['arms'][name]['step']['ms'] is not None]
        arm['step'] = {
            'flops': first['arms'][name]['step']['flops'],
            'ms': statistics.median(times) if times else None,
        }
        arms[name] = arm
    kept = ('dataset', 'dataset_sizes', 'epochs', 'steps', 'student', 'eval_split', 'versions', 'processes')
    return {
        'format_version': 1,
        'command': command,
        **{key: first[key] for key in kept},
        # One of other classes has no accuracy.
        'teacher': next((teacher for teacher in teachers if teacher and teacher['metrics']), None),
        'seeds': list(seeds),
        'reference': reference,
        'train_seconds': [run['train_seconds'] for run in runs],
        'arms': arms,
    }


def _write(folder: ComparisonFolder, result: Mapping[str, Any], report: bool) -> None:
    folder.write_result(result, comparison_text(result))
    runs = [folder.seed(seed).read_metrics() for seed in result['seeds']]
    attempt('drawing the comparison', lambda: plot_comparison(result, runs, folder.plot))
    if report:
        attempt('writing the report', lambda: write_comparison_page(folder, result))
