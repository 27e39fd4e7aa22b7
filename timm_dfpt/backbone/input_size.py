"""Models at another input size than the one that they were trained at."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .modes import evaluating, look_through
from .types import name_of

__all__ = ['InputSize', 'input_size_of', 'published_state', 'set_input_size']

_ATTRIBUTE = 'changed_input_size'


@dataclasses.dataclass(frozen=True, eq=False)
class InputSize:
    """What was changed in a model for another input size.

    Args:
        size: `(height, width)` of its images now.
        published: What its state dict had under the names of what was changed, such as position embeddings.
        added: Names in its state dict that were not there.
    """

    size: tuple[int, int]
    published: Mapping[str, torch.Tensor]
    added: frozenset[str] = frozenset()

    def __deepcopy__(self, memo: dict[int, Any]) -> InputSize:
        # Nothing in it ever changes.
        return self


def input_size_of(model: nn.Module) -> tuple[int, int] | None:
    """Return the `(height, width)` that `set_input_size` has set a model to, `None` where it has not."""
    found = getattr(look_through(model), _ATTRIBUTE, None)
    return found.size if isinstance(found, InputSize) else None


def published_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict of a model as it was before `set_input_size`, in the precision of the model."""
    state = model.state_dict()
    changed = getattr(model, _ATTRIBUTE, None)
    if not isinstance(changed, InputSize):
        return state
    before = {
        name: tensor.to(state[name].dtype if name in state else tensor.dtype)
        for name, tensor in changed.published.items()
    }
    return {name: tensor for name, tensor in {**state, **before}.items() if name not in changed.added}


def set_input_size(model: nn.Module, size: tuple[int, int]) -> None:
    """Let a timm model take images of another size, by its own `set_input_size` where it has one.

    That resamples what was trained for a grid, such as position embeddings, on the CPU, so that they are the same
    everywhere. Fully convolutional networks, and others that take images of any size, are left as they are. The
    model's `pretrained_cfg` then names the new size.

    Args:
        model: The model; is changed, and must not be used if this fails.
        size: `(height, width)` of the images.

    Raises:
        ValueError: If the model cannot take images of this size.
    """
    model = look_through(model)
    cfg: dict[str, Any] = getattr(model, 'pretrained_cfg', None) or {}
    height, width = size
    kind, shown = name_of(model), f'{height} x {width}'
    patches: Any = getattr(model, 'patch_embed', None)
    if tuple(getattr(patches, 'img_size', None) or tuple(cfg.get('input_size') or ())[1:]) == (height, width):
        return
    patch = getattr(patches, 'patch_size', None)
    if isinstance(patch, tuple) and not getattr(patches, 'dynamic_img_pad', False):
        rest = [side % part for side, part in zip(size, patch, strict=True)]
        if any(rest):
            fits = ' x '.join(str(max(part, side - left)) for side, left, part in zip(size, rest, patch, strict=True))
            raise ValueError(
                f'{kind} takes images in patches of {patch[0]} x {patch[1]} and would not see all of {shown}: give a '
                f'multiple, such as {fits}.'
            )
    state: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    before = {name: (tensor, tensor._version) for name, tensor in state.items()}
    if hasattr(model, 'set_input_size'):
        devices = {tensor.device for tensor, _ in before.values()}
        away = next((device for device in devices if device.type not in ('cpu', 'meta')), None)
        own: Any = model
        try:
            own = model.cpu() if away else model
            with torch.no_grad():
                own.set_input_size(img_size=(height, width))
        except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f'{kind} cannot be set to images of {shown}: {_words(error)}') from error
        finally:
            if away:
                model.to(away)
    param = next(model.parameters())
    channels = getattr(model, 'in_chans', None) or tuple(cfg.get('input_size') or (3,))[0]
    try:
        with evaluating(model), torch.no_grad():
            model(torch.zeros(2, channels, height, width, device=param.device, dtype=param.dtype))
    except Exception as error:
        # Whatever a network fails with on images that it was not made for.
        why = '' if hasattr(model, 'set_input_size') else ' and has no set_input_size() of its own'
        raise ValueError(f'{kind} does not take images of {shown}{why}: {_words(error)}') from error
    after = model.state_dict(keep_vars=True)
    known = getattr(model, _ATTRIBUTE, None)
    earlier: Mapping[str, torch.Tensor] = known.published if isinstance(known, InputSize) else {}
    changed = {
        name: tensor.detach().clone() if tensor.is_meta else tensor.detach().cpu().clone()
        for name, (tensor, version) in before.items()
        if name not in earlier and (after.get(name) is not tensor or tensor._version != version)
    }
    added = (after.keys() - before.keys()) | (known.added if isinstance(known, InputSize) else set())
    setattr(model, _ATTRIBUTE, InputSize((height, width), {**changed, **earlier}, frozenset(added)))
    if cfg:
        model.pretrained_cfg = {**cfg, 'input_size': (channels, height, width)}  # type: ignore[assignment]


def _words(error: Exception) -> str:
    return ' '.join(str(error).split()) or type(error).__name__
