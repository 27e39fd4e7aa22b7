"""Models from timm's layout: names of its files, and models without memory to check files against."""
from __future__ import annotations

import contextlib
import ctypes
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .files import TensorSpec
from .repo import Source

__all__ = [
    'BUILD_ERRORS',
    'CONFIG',
    'WEIGHTS',
    'bounded',
    'build_meta',
    'count_values',
    'float_dtype',
    'record_loading',
    'remember_origin',
    'specs_of',
]

CONFIG = 'config.json'
WEIGHTS = 'model.safetensors'
# What building a model from a wrong config can end in, all over timm's models.
BUILD_ERRORS = (
    AssertionError,
    AttributeError,
    ArithmeticError,
    ImportError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)

# Of processor time: a generous multiple of what timm's models take on a slow machine.
_SECONDS, _SECONDS_PER_TENSOR, _MAX_SECONDS = 3.0, 0.005, 10.0


class _TooMuch(BaseException):
    """More is being built than the weights can belong to. Not an `Exception`, which constructors may catch."""


def build_meta(
    create: Callable[[], nn.Module], dtype: torch.dtype, tensors: int | None = None, elements: int | None = None
) -> nn.Module:
    """Build a model without memory for its weights.

    Args:
        create: Builds it.
        dtype: Dtype of its parameters.
        tensors: See `bounded`.
        elements: Likewise.

    Raises:
        ValueError: If it cannot be built, or is more than its weights can be of; whatever was raised is the cause.
    """
    try:
        with bounded(tensors, elements), torch.device('meta'):
            return create().to(dtype)
    except BUILD_ERRORS as error:
        raise ValueError(f'The config cannot be built into a model: {type(error).__name__}: {error}') from error


@contextlib.contextmanager
def bounded(tensors: int | None = None, elements: int | None = None) -> Iterator[None]:
    """Bound what the constructors of models may do in this thread, for untrusted configs.

    A config of a few bytes can ask for a model of any size, and no list of arguments says which of them decide that.
    The weights say what is plausible: some times as many modules and elements, and processor time in proportion.

    Args:
        tensors: Number of tensors in the weights, where it is known.
        elements: Number of values in them.

    Raises:
        ValueError: If a model takes more.
    """
    tensors, elements = tensors or 2000, elements or 2**33
    left = {'modules': 50 * tensors + 5000, 'tensors': 4 * tensors + 1000, 'values': 4 * elements + 2**26}
    thread = threading.get_ident()

    def count(module: nn.Module, name: str, value: Any) -> None:
        # The hooks see the constructors of all threads.
        if threading.get_ident() != thread or value is None:
            return
        if isinstance(value, nn.Module):
            left['modules'] -= 1
        else:
            left['tensors'] -= 1
            left['values'] -= value.numel()
        for what, rest in left.items():
            if rest < 0:
                raise _TooMuch(f'it asks for many more {what} than its weights have')

    registries = nn.modules.module
    try:
        with contextlib.ExitStack() as stack:
            for register in (
                registries.register_module_module_registration_hook,
                registries.register_module_parameter_registration_hook,
                registries.register_module_buffer_registration_hook,
            ):
                stack.callback(register(count).remove)
            stack.enter_context(_time_limit(min(_MAX_SECONDS, _SECONDS + _SECONDS_PER_TENSOR * tensors)))
            yield
    except _TooMuch as error:
        raise ValueError(f'{error}. The files do not belong to the same model.') from None


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise `_TooMuch` in this thread when it has taken so much processor time: loops of Python know no other end."""
    thread, over = threading.get_ident(), threading.Event()
    clock = _clock_of_thread()
    end = clock() + seconds
    lock = threading.Lock()

    def watch() -> None:
        while not over.wait(min(0.1, seconds / 4)):
            with lock:
                if clock() > end and not over.is_set():
                    _raise_in(thread, _TimeUp)
                    return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        with lock:
            over.set()
        watcher.join()


class _TimeUp(_TooMuch):
    def __init__(self) -> None:
        super().__init__('building it takes far longer than a model of so many weights does')


def _clock_of_thread() -> Callable[[], float]:
    """Return a clock of this thread's processor time that other threads can read; where there is none, of real time."""
    if not hasattr(time, 'pthread_getcpuclockid'):
        return time.monotonic
    clock = time.pthread_getcpuclockid(threading.get_ident())
    return lambda: time.clock_gettime(clock)


def _raise_in(thread: int, error: type[BaseException]) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error))


def count_values(specs: Mapping[str, TensorSpec]) -> int:
    """Return the number of values in all tensors."""
    return sum(math.prod(shape) for shape, _ in specs.values())


def specs_of(model: nn.Module) -> dict[str, TensorSpec]:
    """Return shape and dtype of every tensor in a model's state dict."""
    return {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}


def float_dtype(specs: Mapping[str, TensorSpec]) -> torch.dtype:
    """Return the dtype of the first floating-point tensor, float32 where there is none."""
    return next((dtype for _, dtype in specs.values() if dtype.is_floating_point), torch.float32)


def remember_origin(model: Any, source: Source) -> None:
    """Note in the model's `pretrained_cfg`, as timm does, where its weights are from."""
    for key in ('file', 'url', 'hf_hub_id', 'source'):
        model.pretrained_cfg.pop(key, None)
    if source.folder is not None:
        model.pretrained_cfg.update(source='local-dir', file=str(source.folder))
        return
    model.pretrained_cfg.update(source='hf-hub', hf_hub_id=source.pinned)


@contextlib.contextmanager
def record_loading() -> Iterator[Callable[[nn.Module], tuple[set[str], set[str]]]]:
    """Take note of which tensors are loaded into models that are built, which timm only logs.

    Returns:
        A function of such a model, which gives the names of tensors that were missing in its weights, and of those that
        its weights have and it has not. Both are empty where nothing was loaded.
    """
    found: dict[nn.Module, tuple[set[str], set[str]]] = {}
    handles = []

    def watch(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if parent not in found:
            found[parent] = (set(), set())
            handles.append(parent.register_load_state_dict_post_hook(note))

    def note(module: nn.Module, keys: Any) -> None:
        found[module] = (set(keys.missing_keys), set(keys.unexpected_keys))

    registration = nn.modules.module.register_module_module_registration_hook(watch)
    try:
        yield lambda model: found.get(model, (set(), set()))
    finally:
        registration.remove()
        for handle in handles:
            handle.remove()
