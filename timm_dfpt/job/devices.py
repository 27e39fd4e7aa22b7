"""Devices and processes: the accelerator of a run, and all that concerns FSDP2."""
from __future__ import annotations

import contextlib
import itertools
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
    gather_object,
)
from safetensors.torch import load_file, load_model
from timm.utils import unwrap_model
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor

from ..utils.memory import keep_freed_memory
from .options import TrainConfig

__all__ = [
    'ShardedRoot', 'clip_shards', 'create_accelerator', 'is_sharding', 'launched', 'load_optimizer_state',
    'load_weights', 'local_part', 'on_main', 'optimizer_state', 'set_up_sharding', 'whole_weights',
]  # fmt: skip

_logger = logging.getLogger(__name__)

_TRUE = ('1', 'true', 'yes', 'on', 'y', 't')
_FALSE = ('', '0', 'false', 'no', 'off', 'n', 'f')


def create_accelerator(config: TrainConfig) -> Accelerator:
    """Create the accelerator of a run from its options and the launcher's variables.

    Raises:
        ValueError: If an option or the launcher asks for something that does not work here.
    """
    if config.log_with is not None and config.log_with not in map(str, get_available_trackers()):
        # accelerate would train on and log nowhere.
        raise ValueError(f'log_with={config.log_with} needs a package: pip install {config.log_with}.')
    # accelerate warns about the pinned memory of machines without an accelerator.
    warnings.filterwarnings('ignore', message='.*pin_memory.*')
    _refuse_engines()
    _check_launcher(config)
    accelerator = Accelerator(
        cpu=config.cpu,
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.grad_accum_steps,
        log_with=config.log_with,
        # Tasks compile what they know to be compilable, see `Learner`.
        dynamo_backend='no',
        dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
        # Learners share their batch statistics after each update, evaluation and EMA included.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if accelerator.device.type == 'cpu':
        keep_freed_memory()
    set_up_sharding(accelerator, config)
    if config.mixed_precision == 'fp16' and accelerator.device.type == 'cpu':
        # accelerate would compute in float32 and say nothing.
        raise ValueError('mixed_precision=fp16 needs a GPU, and this runs on the CPU: use bf16 or no.')
    if config.compile_mode == 'reduce-overhead' and accelerator.num_processes > 1:
        raise ValueError(
            'compile_mode=reduce-overhead: CUDA graphs are for one process, since gradients are averaged outside of '
            'them: use --compile-mode default.'
        )
    if accelerator.num_processes == 1 and 'MASTER_PORT' in os.environ:
        # accelerate sets a port for several processes, and leaves it to MPI to start them where there is no GPU.
        _logger.warning(
            'This is the only process, though MASTER_PORT is set. `accelerate launch --cpu --num_processes N` starts '
            'one process only: use --config_file train/accelerate/multi_cpu.yaml, or torchrun.'
        )
    return accelerator


def on_main(accelerator: Accelerator, act: Callable[[], Any]) -> Any:
    """Let the main process do something, and give every process its result, or its error.

    Raises:
        OSError: If the main process raised it.
        TypeError: If the main process raised it.
        ValueError: If the main process raised it.
    """
    done: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            done = [(act(), None)]
        except (OSError, TypeError, ValueError) as error:
            done = [(None, error)]
    result, failed = broadcast_object_list(done)[0]
    if failed is not None:
        raise failed
    return result


class ShardedRoot(nn.Module):
    """What FSDP2 hooks onto, as DistributedDataParallel is around what it wraps.

    Calls of the root gather the weights and share them out again; calls of `module` and its parts do not, so that a
    process may make them alone while the weights are whole.

    Args:
        module: What is trained.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self.module(*args, **kwargs)


def is_sharding(accelerator: Accelerator) -> bool:
    """Return whether prepared weights are spread over the processes."""
    return accelerator.distributed_type == DistributedType.FSDP


def launched() -> dict[str, tuple[str, Any]]:
    """Return what accelerate's launcher, its configuration file or its variables ask for, except what it always sets.

    Returns:
        By option where that was asked for, and its value.

    Raises:
        ValueError: If it is something that does not work here.
    """
    found: dict[str, tuple[str, Any]] = {}
    precision = _variable('MIXED_PRECISION')
    if precision not in ('', 'no'):
        if precision not in ('bf16', 'fp16'):
            raise ValueError(f'ACCELERATE_MIXED_PRECISION={precision} is not supported: use bf16, fp16 or no.')
        found['mixed_precision'] = ('ACCELERATE_MIXED_PRECISION', precision)
    numbers = {
        'grad_accum_steps': ('ACCELERATE_GRADIENT_ACCUMULATION_STEPS', int, _variable('GRADIENT_ACCUMULATION_STEPS')),
        'clip_grad': ('ACCELERATE_GRADIENT_CLIPPING', float, _variable('GRADIENT_CLIPPING')),
    }
    # accelerate hands this one on to DeepSpeed only.
    steps = _of_launch_command('gradient_accumulation_steps')
    if steps:
        numbers['grad_accum_steps'] = ('accelerate launch --gradient_accumulation_steps', int, steps)
    for option, (source, kind, text) in numbers.items():
        if text in ('', 'none', 'auto'):  # DeepSpeed's
            continue
        try:
            found[option] = (source, kind(text))
        except ValueError as error:
            raise ValueError(f'{source}={text} must be a number.') from error
    if _variable('USE_CPU') in _TRUE:
        found['cpu'] = ('ACCELERATE_USE_CPU', True)
    elif _variable('TORCH_DEVICE'):
        found['cpu'] = ('ACCELERATE_TORCH_DEVICE', _variable('TORCH_DEVICE') == 'cpu')
    if _variable('DYNAMO_BACKEND') not in ('', 'no'):
        _check_dynamo()
        found['compile'] = ('ACCELERATE_DYNAMO_BACKEND', True)
    return found


def _variable(name: str) -> str:
    return os.environ.get(f'ACCELERATE_{name}', '').strip().lower()


def _refuse_engines() -> None:
    # Before accelerate asks for them to be installed.
    if _variable('USE_DEEPSPEED') in _TRUE:
        raise ValueError(
            'DeepSpeed is not supported: its engine has a single optimizer, and student and prompt path need one '
            'each. Use train/accelerate/fsdp2.yaml, which shards more than ZeRO-2, or train/accelerate/multi_gpu.yaml.'
        )
    for name in ('USE_MEGATRON_LM', 'USE_PARALLELISM_CONFIG'):
        if _variable(name) in _TRUE:
            raise ValueError(f'ACCELERATE_{name} is not supported: use train/accelerate/multi_gpu.yaml or fsdp2.yaml.')


def _check_dynamo() -> None:
    """Refuse what is not torch.compile as --compile has it."""
    allowed = {
        'BACKEND': ('inductor',), 'MODE': ('', 'default'), 'USE_FULLGRAPH': _FALSE, 'USE_DYNAMIC': _FALSE,
        'USE_REGIONAL_COMPILATION': _FALSE,
    }  # fmt: skip
    for name, values in allowed.items():
        if _variable(f'DYNAMO_{name}') not in values:
            raise ValueError(
                f'ACCELERATE_DYNAMO_{name}={_variable(f"DYNAMO_{name}")} is not supported: leave the options of dynamo '
                'out, and give --compile.'
            )


def _of_launch_command(option: str) -> str:
    """Return the value of an option of `accelerate launch`, where that is what has started this process (Linux)."""
    try:
        words = Path(f'/proc/{os.getppid()}/cmdline').read_text(encoding='utf-8', errors='replace').split('\0')
    except OSError:
        return ''
    if not any('accelerate' in word for word in words[:3]):
        return ''
    for word, following in itertools.pairwise(words):
        flag, given, value = word.partition('=')
        if flag.replace('-', '_') == f'__{option}':
            return value if given else following
    return ''


def _check_launcher(config: TrainConfig) -> None:
    for option, (source, value) in launched().items():
        given = getattr(config, option)
        if given != value:
            raise ValueError(
                f'{option}={given} and {source}={value} of the launcher contradict each other: leave one of them out.'
            )


def set_up_sharding(accelerator: Accelerator, config: TrainConfig) -> None:
    """Make accelerate shard in the one way that is tested here, if the launcher asks for FSDP.

    Args:
        accelerator: As accelerate made it from the launcher's variables.
        config: The options of the run.

    Raises:
        ValueError: If the launcher or an option asks for something that FSDP2 excludes; see docs/DISTRIBUTED.md.
    """
    asked = os.environ.get('ACCELERATE_USE_FSDP', 'false').lower() == 'true'
    if asked and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate shards on accelerators only; on CPUs it would train whole copies without a word.
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if not is_sharding(accelerator):
        return
    plugin = accelerator.state.fsdp_plugin
    needed = {
        'fsdp_version: 2': plugin.fsdp_version == 2,
        'fsdp_auto_wrap_policy: NO_WRAP': plugin.auto_wrap_policy is None,
        'fsdp_offload_params: false': not isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        'fsdp_activation_checkpointing: false': not plugin.activation_checkpointing,
        'fsdp_cpu_ram_efficient_loading: false': not plugin.cpu_ram_efficient_loading,
    }
    missing = ', '.join(setting for setting, given in needed.items() if not given)
    if missing:
        raise ValueError(f'FSDP needs {missing} in the configuration of accelerate; take train/accelerate/fsdp2.yaml.')
    refused = {
        '--compile': config.compile,
        '--channels-last': config.channels_last,
        '--mixed-precision fp16': config.mixed_precision == 'fp16',
    }
    for option, given in refused.items():
        if given:
            raise ValueError(f'{option} does not work with FSDP2: leave it out or use train/accelerate/multi_gpu.yaml.')
    accelerator.print(f'FSDP2: trained weights are sharded over {accelerator.num_processes} processes')
    # Autocast as without sharding: the gathered weights, of which averages are made, stay in float32.
    plugin.mixed_precision_policy = None


@contextlib.contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Give every process all weights of a sharded module within the context; do nothing for another one.

    All processes must enter it. Within, `module.module` and its parts are plain modules to read and to call, and
    `module` itself must not be called.

    Args:
        module: What was prepared.
    """
    shards: dict[str, Any] = {}
    whole: dict[str, nn.Parameter] = {}
    root: Any = module
    if isinstance(module, FSDPModule):
        root.reshard()
        shards = {name: param for name, param in module.named_parameters() if isinstance(param, DTensor)}
    if shards:
        # All in one message. Copies, since FSDP2 frees its own when it likes.
        root.unshard()
        whole = {
            name: nn.Parameter(param.detach().clone(), requires_grad=param.requires_grad)
            for name, param in module.named_parameters()
        }
        root.reshard()
    _set(module, whole)
    try:
        yield
    finally:
        _set(module, shards)


def load_weights(module: nn.Module, path: Path) -> None:
    """Load weights that were saved while they were whole, without the names that wrappers add.

    Args:
        module: What was prepared.
        path: A safetensors file.

    Raises:
        RuntimeError: If they are of another module.
    """
    plain = unwrap_model(module)
    shards = {name: param for name, param in plain.named_parameters() if isinstance(param, DTensor)}
    if not shards:
        load_model(plain, str(path))
        return
    tensors = load_file(path)
    for name, shard in shards.items():
        if name in tensors and tensors[name].shape == shard.shape:
            tensors[name] = _spread(tensors[name], shard)
    plain.load_state_dict(tensors)


def _set(module: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        parent, _, leaf = name.rpartition('.')
        setattr(module.get_submodule(parent), leaf, parameter)


def clip_shards(accelerator: Accelerator, parameters: Sequence[nn.Parameter], limit: float | None) -> torch.Tensor:
    """Clip gradients that are spread over the processes to a norm.

    Args:
        accelerator: Sums over the processes.
        parameters: Parameters with gradients.
        limit: The norm to clip to; `None` or 0 to leave them as they are.

    Returns:
        The norm of all of them together, before.
    """
    # torch's functions, but with one message in all instead of one for each parameter.
    parts = [local_part(p.grad) for p in parameters if p.grad is not None]
    squares: Any = accelerator.reduce(nn.utils.get_total_norm(parts).square())
    norm = squares.sqrt()
    if limit:
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        for part in parts:
            part.mul_(scale)
    return norm


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _spread(value: torch.Tensor, like: DTensor) -> DTensor:
    mesh = like.device_mesh
    parts, rank = value.to(like.device).chunk(mesh.size()), mesh.get_local_rank()
    own = parts[rank] if rank < len(parts) else value[:0].to(like.device)
    # No process asks another, since all have all of it.
    return DTensor.from_local(own, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's state with whole tensors, as if nothing was sharded; all processes must call it."""
    state = optimizer.state_dict()
    own = {
        (index, key): value.to_local().cpu()
        for index, entries in state['state'].items()
        for key, value in entries.items()
        if isinstance(value, DTensor)
    }
    if not own:
        return state
    # All in one message; processes have consecutive rows.
    parts = gather_object([own])
    entries = {index: dict(each) for index, each in state['state'].items()}
    for index, key in own:
        entries[index][key] = torch.cat([part[index, key] for part in parts])
    return {**state, 'state': entries}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `optimizer_state` returned; all processes must call it."""
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group['params']))

    def spread(index: int, value: Any) -> Any:
        param = parameters.get(index)
        if isinstance(param, DTensor) and isinstance(value, torch.Tensor) and value.shape == param.shape:
            return _spread(value, param)
        return value

    entries = {i: {key: spread(i, value) for key, value in each.items()} for i, each in state['state'].items()}
    optimizer.load_state_dict({**state, 'state': entries})
