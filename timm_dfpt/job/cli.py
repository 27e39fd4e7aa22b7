"""Options from a recipe, the command line, or both."""
from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ..data.checks import default_of, kind_of, nearest, range_of
from ..hub.files import parse_yaml, write_text
from ..tasks.methods import METHODS
from ..utils.messages import clip, shorten
from .devices import launched
from .options import TrainConfig, resolve_paths

__all__ = [
    'DEFAULT_RECIPE', 'build_parser', 'command_line', 'find_recipe', 'load_recipe', 'parse_config', 'resolve_config',
    'save_config',
]  # fmt: skip

_BASE_KEY = 'base'
# What `--help` shows; `--help-all` shows all.
_COMMON = (
    'method', 'baselines', 'teacher', 'teacher_head', 'student', 'student_pretrained', 'dataset', 'unlabelled',
    'input_size', 'batch_size', 'workers', 'epochs', 'lr', 'seed', 'output', 'resume', 'mixed_precision', 'export',
    'export_weights', 'push_to_hub',
)  # fmt: skip
DEFAULT_RECIPE = 'quickstart'
"""The recipe of a job that is given neither a recipe nor data."""
_RECIPES = Path(__file__).parents[1] / 'recipes'


def find_recipe(name: str | Path) -> Path:
    """Return the file of a recipe.

    Args:
        name: A file, or the name of a recipe that comes with the package, such as `quickstart`.

    Raises:
        ValueError: If there is neither.
    """
    path = Path(name)
    # A path, or a file of that name, is never something of the package.
    if path.is_file() or len(path.parts) != 1 or (path.suffix and path.suffix != '.yaml'):
        return path
    known = _RECIPES / f'{path.stem}.yaml'
    if known.is_file():
        return known
    if path.suffix:
        return path
    hint = nearest(str(name), [each.stem for each in _RECIPES.glob('*.yaml')])
    raise ValueError(f'config: there is no file {str(name)!r}, and no recipe of this name.{hint}')


def load_recipe(path: str | Path) -> dict[str, Any]:
    """Read a recipe: a YAML mapping of options.

    Paths in it that start with `./` or `../` (also behind `local-dir:`) are relative to the recipe's folder. The key
    `base` names another recipe, from that folder too, whose options apply where this one has none.

    Args:
        path: The YAML file, or the name of a recipe that comes with the package.

    Returns:
        The options.

    Raises:
        ValueError: If the file is missing, is not a mapping, has an unknown option, or is its own base.
    """
    return _load_recipe(find_recipe(path), ())


def _load_recipe(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    full = path.resolve()
    if full in seen:
        raise ValueError(f'config: {str(path)!r} is its own base: {" -> ".join(p.name for p in (*seen, full))}.')
    if not path.is_file():
        named = f', named as base by {str(seen[-1])!r}' if seen else ''
        raise ValueError(f'config: the file {str(path)!r}{named} does not exist.')
    try:
        values = parse_yaml(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'config: {str(path)!r} is not valid YAML: {error}') from error
    if not isinstance(values, dict):
        raise ValueError(f'config: {str(path)!r} must hold a mapping of options, such as "epochs: 30".')
    base = values.pop(_BASE_KEY, None)
    if not isinstance(base, str | None):
        raise ValueError(f'config: base in {str(path)!r} must be the name of a recipe, got {shorten(base)}.')
    known = [field.name for field in dataclasses.fields(TrainConfig)]
    for key in values:
        if key not in known:
            raise ValueError(f'config: {str(path)!r} has the unknown option {shorten(key)}.{nearest(key, known)}')
    values = resolve_paths(values, path.parent)
    if base is None:
        return values
    inherited = _load_recipe(path.parent / base, (*seen, full))
    return {**inherited, **values, **_joined_method_options(inherited, values)}


def _joined_method_options(inherited: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Join the options of each method, where both recipes have some; `TrainConfig` checks what they are."""
    first, second = (each.get('method_options') or {} for each in (inherited, values))
    if not (first and second and isinstance(first, dict) and isinstance(second, dict)):
        return {}
    return {'method_options': {m: {**first.get(m, {}), **second.get(m, {})} for m in {**first, **second}}}


_RARE = {field.name for field in dataclasses.fields(TrainConfig)} - set(_COMMON)


def save_config(config: TrainConfig, path: str | Path) -> None:
    """Write the resolved configuration as a recipe that `load_recipe` reads, whole or not at all."""
    write_text(Path(path), yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


class _Help(argparse.Action):
    """Show the help, without rarely used options unless everything is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, everything: bool = False, **options: Any) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, **options)
        self.everything = everything

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        for action in parser._actions:
            if not self.everything and action.dest in _RARE:
                action.help = argparse.SUPPRESS
        parser.print_help()
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """A parser that names the nearest flag to one that it does not know, in short messages."""

    def error(self, message: str) -> NoReturn:
        super().error(clip(message))

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = next((text.partition('=')[0] for text in unknown if text.startswith('--')), '')
            self.error(f'unrecognized arguments: {" ".join(unknown)}.{nearest(flag, [*self._option_string_actions])}')
        return found


def _key_value(text: str) -> tuple[str, Any]:
    """Read `key=value` of a command line, the value as YAML does.

    Raises:
        ArgumentTypeError: If there is no `=`.
    """
    key, separator, value = text.partition('=')
    if not separator or not key:
        raise argparse.ArgumentTypeError(f'{shorten(text)} must have the form key=value')
    try:
        return key, parse_yaml(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'the value of {key} is not valid YAML: {error}') from error


def _add_argument(group: Any, field: dataclasses.Field[Any]) -> None:
    """Add the argument of an option; what is not given leaves no trace in the result."""
    flag = '--' + field.name.replace('_', '-')
    kind, default = kind_of(TrainConfig, field.name), default_of(field)
    if default in (None, '', [], {}):
        default = field.metadata.get('unset', '')
    elif kind.container is list:
        default = ' '.join(map(str, default))
    elif kind.container is bool:
        default = 'yes' if default else 'no'
    shown = field.metadata.get('required', f'default: {default}' if default != '' else '')
    notes = '; '.join(filter(None, (range_of(field), shown)))
    # argparse takes a percent sign for a placeholder.
    help = (field.metadata['help'] + (f' ({notes})' if notes else '')).replace('%', '%%')
    options: dict[str, Any] = {'help': help, 'default': argparse.SUPPRESS}
    if kind.container is bool:
        # argparse would read --no-aug as the negation of an option --aug.
        action: Any = 'store_true' if flag.startswith('--no-') else argparse.BooleanOptionalAction
        group.add_argument(flag, action=action, **options)
        return
    if kind.container is dict:
        options |= {'nargs': '+', 'type': _key_value, 'metavar': 'KEY=VALUE'}
    else:
        options |= {'type': kind.item, 'metavar': kind.item.__name__.upper()}
        if kind.choices:
            # An empty string takes back what a recipe says.
            options['choices'] = ('', *kind.choices) if kind.optional else kind.choices
            options['metavar'] = f'{{{",".join(filter(None, kind.choices))}}}'
        if kind.container is list:
            options['nargs'] = '*'
    group.add_argument(flag, **options)


def build_parser(
    description: str, without: Sequence[str] = (), program: str | None = None
) -> argparse.ArgumentParser:
    """Return the command line of all options, plus `--config`.

    Args:
        description: First line of the help.
        without: Options to leave out.
        program: What the command is called; by default as the script.
    """
    # Abbreviations would turn a misspelt flag into another one.
    parser = _Parser(
        program, '%(prog)s [--config YAML] [options]', description, allow_abbrev=False, add_help=False
    )  # fmt: skip
    parser.add_argument('-h', '--help', action=_Help, help='show the options that most jobs need')
    parser.add_argument('--help-all', action=_Help, everything=True, help='show all options')
    parser.add_argument(
        '--config', metavar='YAML',
        help='recipe with any of these options, which the command line overrides: a file, or the name of one that '
        'comes with the package, such as quickstart',
    )  # fmt: skip
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(TrainConfig):
        if field.metadata.get('recipe_only') or field.name in without:
            continue
        name = field.metadata['group']
        groups.setdefault(name, parser.add_argument_group(name))
        _add_argument(groups[name], field)
    return parser


def resolve_config(values: Mapping[str, Any], recipe: str | None, default_recipe: str | Path | None) -> TrainConfig:
    """Merge a recipe and the values given on the command line; for the rest the launcher's choices apply.

    Args:
        values: Options from the command line, which win.
        recipe: The recipe that was named, if any.
        default_recipe: The recipe to use when neither a recipe nor a dataset is named.
    """
    base: dict[str, Any] = {}
    if recipe is not None:
        base = load_recipe(recipe)
    elif default_recipe is not None and 'dataset' not in values:
        base = load_recipe(default_recipe)
    given = {k: dict(v) if k.endswith('_kwargs') else v for k, v in values.items()}
    method = given.get('method', base.get('method', TrainConfig.method))
    base['baselines'] = [b for b in base.get('baselines', []) if b != method]
    # A method that is not in the table is refused by TrainConfig.
    known = METHODS.get(str(method))
    if known is not None and not known.needs_teacher:
        base['baselines'] = []
        base.pop('teacher', None)
        base.pop('teacher_checkpoint', None)
    own = _complete_method_options(base, given)
    choices = {option: value for option, (_, value) in launched().items()}
    return TrainConfig(**{**choices, **base, **own.get(method, {}), **given, 'method_options': own})


def _complete_method_options(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of each method without those given by the user, who wins, and complete.

    Complete: an option that one method sets is set for every method, so that going from one to another leaves nothing
    of the first behind.
    """
    options = base.get('method_options') or {}
    if not isinstance(options, dict) or not all(isinstance(own, dict) for own in options.values()):
        return options
    fields = TrainConfig.__dataclass_fields__
    keys = [key for key in dict.fromkeys(k for own in options.values() for k in own) if key not in given]
    common = {key: base.get(key, default_of(fields[key])) for key in keys if key in fields}
    methods = METHODS if keys else ()
    return {method: {**common, **{k: v for k, v in options.get(method, {}).items() if k in keys}} for method in methods}


def command_line(program: str, argv: Sequence[str] | None) -> str:
    """Return how a command was called, for the record.

    Args:
        program: What it is called.
        argv: Arguments; `None` for those of the process.
    """
    return shlex.join([*program.split(), *(sys.argv[1:] if argv is None else argv)])


def parse_config(
    argv: Sequence[str] | None = None,
    default_recipe: str | Path | None = None,
    description: str = '',
    program: str | None = None,
) -> TrainConfig:
    """Read the command line.

    Args:
        argv: Arguments; `None` for those of the process.
        default_recipe: The recipe to use when neither `--config` nor `--dataset` is given.
        description: First line of `--help`.
        program: What the command is called in it.

    Returns:
        The resolved configuration.

    Raises:
        SystemExit: If an option is wrong; the message says which and why.
    """
    parser = build_parser(description, program=program)
    given = vars(parser.parse_args(argv))
    recipe = given.pop('config')
    try:
        config = resolve_config(given, recipe, default_recipe)
        config.check_given(given)
        return config
    except ValueError as error:
        parser.exit(2, f'error: {clip(str(error))}\n')
