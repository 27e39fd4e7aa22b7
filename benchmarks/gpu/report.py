"""The records of `python -m benchmarks.gpu` as tables in Markdown."""
from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ['report']

_REFERENCE = 'timm kd'
_COLUMNS = (
    'pair', 'arm', 'ms (quartiles)', 'images/s', 'of the ceiling', 'time / KD', 'floor / KD', 'over floor', 'peak MiB',
    'kernels', 'outside kernels', 'in the blocks', 'first step, s',
)  # fmt: skip


def report(files: Sequence[Path]) -> str:
    """Return the tables of some files of records, one after the other."""
    records = [json.loads(line) for file in files for line in _whole_lines(file)]
    parts: list[str] = []
    for kind in ('machine', 'ceilings'):
        for record in (r for r in records if r['kind'] == kind):
            parts.append(_facts(record))
    steps = [r for r in records if r['kind'] == 'step']
    keys = ('batch', 'precision', 'mode', 'channels_last')
    for setting in dict.fromkeys(tuple(r[key] for key in keys) for r in steps):
        parts.append(_step_table(setting, [r for r in steps if tuple(r[key] for key in keys) == setting]))
    parts += [_data_table(records)] if any(r['kind'] in ('loader', 'fed') for r in records) else []
    skipped = [f'- {r["row"]}: {r["reason"]}' for r in records if r['kind'] == 'skipped']
    skipped += [f'- {r["row"]}: {r["failed"]}' for r in records if r['kind'] in ('loader', 'fed') and 'failed' in r]
    if skipped:
        parts.append('\n'.join(['Not measured:', '', *skipped]))
    return '\n\n'.join(parts) + '\n'


def _whole_lines(file: Path) -> list[str]:
    # The last line of a run that was killed may be cut off.
    return [line for line in file.read_text(encoding='utf-8').splitlines() if line.endswith('}')]


def _facts(record: Mapping[str, Any]) -> str:
    if record['kind'] == 'ceilings':
        products = ', '.join(f'{name.removeprefix("matmul_")} {value / 1e12:.1f} TFLOP/s' for name, value in
                             record.items() if name.startswith('matmul_'))  # fmt: skip
        clock = record.get('clock_after_matmul') or {}
        after = f' (clock after it {clock["clocks.sm"]})' if clock else ''
        return f'Ceilings: matrix product {products}{after}; copy {record["copy"] / 1e9:,.0f} GB/s, read and written.'
    driver = (record.get('idle') or {}).get('driver_version', '')
    versions = ', '.join(f'{name} {record[name]}' for name in ('torch', 'cuda', 'cudnn', 'timm', 'python') if
                         record.get(name))  # fmt: skip
    return f'{record["device"]}, {record["cores"]} cores, {record["date"]}: driver {driver or "-"}, {versions}.'


def _step_table(setting: tuple[Any, ...], rows: Iterable[Mapping[str, Any]]) -> str:
    batch, precision, mode, channels_last = setting
    layout = ', channels_last' if channels_last else ''
    lines = [
        f'### {batch} images, {precision}, {mode}{layout}',
        '',
        '| ' + ' | '.join(_COLUMNS) + ' |',
        '|---|---|' + '---:|' * (len(_COLUMNS) - 2),
    ]
    rows = list(rows)
    for row in rows:
        base = next((r for r in rows if r['pair'] == row['pair'] and r['arm'] == _REFERENCE and 'ms' in r), None)
        lines.append('| ' + ' | '.join(_cells(row, base)) + ' |')
    return '\n'.join(lines)


def _cells(row: Mapping[str, Any], base: Mapping[str, Any] | None) -> list[str]:
    if 'failed' in row and 'ms' not in row:
        return [row['pair'], row['arm'], row['failed'], *[''] * (len(_COLUMNS) - 3)]

    def shown(key: str, form: str) -> str:
        value = row.get(key)
        return '' if value is None else format(value, form)

    ratio = floor = None
    if base is not None:
        ratio, floor = row['ms'] / base['ms'], row['floor'] / base['floor']
    return [
        row['pair'],
        row['arm'],
        f'{row["ms"]:.1f} ({row["ms_low"]:.1f}-{row["ms_high"]:.1f})',
        shown('images_per_s', ',.0f'),
        shown('share_of_ceiling', '.0%'),
        '' if ratio is None else f'{ratio:.2f}',
        '' if floor is None else f'{floor:.2f}',
        '' if ratio is None or floor is None else f'{ratio / floor:.2f}',
        shown('peak_mib', ',.0f'),
        shown('kernels', ',d'),
        shown('outside_kernels', '.0%'),
        shown('blocks_share', '.0%') if row.get('blocks_share') else '',
        shown('first_step_s', '.1f'),
    ]


def _data_table(records: Sequence[Mapping[str, Any]]) -> str:
    lines = ['### The data path: JPEGs of 224 pixels', '', '| workers | images/s of the loader alone |', '|---:|---:|']
    measured = [r for r in records if r['kind'] in ('loader', 'fed') and 'failed' not in r]
    lines += [f'| {r["workers"]} | {r["images_per_s"]:,.0f} |' for r in measured if r['kind'] == 'loader']
    fed = [r for r in measured if r['kind'] == 'fed']
    if fed:
        lines += ['', '| step | workers | images/s from the loader | in memory | share |', '|---|---:|---:|---:|---:|']
    for r in fed:
        given, memory = r['images_per_s'], r['images_per_s_in_memory']
        name = f'{r["pair"]}, {r["arm"]}, {r["batch"]} images, {r["precision"]}'
        lines.append(f'| {name} | {r["workers"]} | {given:,.0f} | {memory:,.0f} | {given / memory:.0%} |')
    return '\n'.join(lines)
