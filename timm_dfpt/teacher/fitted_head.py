"""A classifier for other classes on a pre-trained model: fitted to its features, or its own in another order."""
from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..backbone.heads import add_head, replace_head, watch_inputs
from ..backbone.modes import evaluating, look_through
from ..backbone.types import name_of
from ..utils.messages import shorten
from .checks import check_finite, check_model, find_classifier
from .head_record import ATTRIBUTE, FittedHead, fitted_head_of
from .prompt_path import match_dtype
from .ridge import fit_ridge

__all__ = ['fit_head', 'put_head', 'reorder_classes']

_logger = logging.getLogger(__name__)

# How far logits may be from what the classifiers alone explain, in relation to the largest.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
_LOW_PRECISION_TOLERANCE = 0.1
# Far below what pre-trained networks have (about 0.1 to 1).
_SMALL_SPREAD = 1e-3
_REMEDY = (
    'Fine-tune it on these classes (--method supervised --student MODEL --student-pretrained) and take the result as '
    'the teacher, or give the prompt path alone a new head: --teacher-head new, wrap(model, num_classes=K).'
)


def fit_head(
    model: nn.Module,
    loader: Iterable[Any],
    num_classes: int,
    *,
    classifier: str | Sequence[str] | None = None,
    label_names: Sequence[str] | None = None,
    balanced: bool = False,
    prepare: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> nn.Module:
    """Make a teacher of any classes from a pre-trained model: one pass over images, no training.

    A copy of the model gets a linear classifier by ridge regression on its standardised features, with exact
    leave-one-out for the penalty. Standardisation and temperature are folded into its weights, so that the copy
    is a plain model again. Where a model has several classifiers whose logits it averages, as the distilled DeiT, they
    are fitted together.

    Args:
        model: Any timm model, with a classifier of other classes or without one (`num_classes=0`); stays as it is.
        loader: Batches whose first two parts are images `[B, C, H, W]`, normalised as the model was trained and without
            augmentation, and class indices `[B]`.
        num_classes: Number of classes `K`.
        classifier: Name (or names) of the classifier module; by default what timm or `get_classifier()` says.
        label_names: Names of the classes, noted in the copy's `pretrained_cfg`.
        balanced: Give the images of each class together the same weight.
        prepare: Applied to each batch of images, on the model's device.

    Returns:
        A copy of the model with `K` classes, in the modes of the model. `copy.fitted_head` says how it was fitted, and
        how accurate it is on images left out, one at a time (`accuracy`, in percent).

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If there are no images of two classes, a label is not one of the classes, or the model's logits are
            not linear in what enters its classifier; the message names it.

    Example:
        >>> model = timm.create_model('resnet50', pretrained=True)
        >>> teacher = timm_dfpt.wrap(timm_dfpt.fit_head(model, loader, num_classes=37))
    """
    if type(num_classes) is not int or num_classes < 2:
        raise ValueError(f'num_classes must be an integer of at least 2, got {num_classes!r}.')
    if label_names is not None and (isinstance(label_names, str) or len(label_names) != num_classes):
        raise ValueError(f'label_names must be a list of {num_classes} names, got {shorten(label_names)}.')
    if not isinstance(loader, Iterable):
        raise TypeError(f'loader must give batches (images, class indices), got {type(loader).__name__}.')
    model = look_through(model)
    check_model(model)
    fitted, names = _with_classifier(model, num_classes, classifier)
    features: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    shares: list[float] = []
    with evaluating(fitted), torch.inference_mode(False), torch.no_grad():
        for batch in loader:
            input, target = _checked_batch(batch, num_classes)
            if not len(target):
                continue
            x = match_dtype(input.to(next(fitted.parameters()).device), fitted)
            x = match_dtype(prepare(x), fitted) if prepare is not None else x
            if not features:
                shares = _find_shares(fitted, names, x)
            inputs, _ = _run(fitted, names, x)
            used = [part for part, share in zip(inputs, shares, strict=True) if share]
            features.append(torch.cat(used, dim=1).float().cpu())
            targets.append(target.cpu())
        if not features:
            raise ValueError('loader has no batches to fit a head to.')
        ridge = fit_ridge(torch.cat(features), torch.cat(targets), num_classes, balanced=balanced)
        if ridge.spread < _SMALL_SPREAD:
            _logger.warning(
                f'The features of {name_of(model)} hardly differ between images (by {ridge.spread:.1g} of their '
                'size), and the fitted head amplifies these differences, so that training on them may diverge. Check '
                'that the model is pretrained and that the images are normalized as it expects.'
            )
        _set_weights(fitted, names, shares, ridge.weight, ridge.bias)
    _note(
        fitted,
        model,
        FittedHead(
            how='fitted',
            classifier=names,
            num_classes=num_classes,
            tensors=_new_tensors(fitted, model, names),
            published=_published_tensors(model, names),
            images=sum(map(len, targets)),
            balanced=balanced,
            penalty=ridge.penalty,
            temperature=ridge.temperature,
            accuracy=ridge.accuracy,
            loss=ridge.loss,
        ),
        label_names,
    )
    return fitted


def reorder_classes(model: nn.Module, order: Sequence[int], label_names: Sequence[str] | None = None) -> nn.Module:
    """Return a copy of a model whose class `i` is class `order[i]` of the model.

    Args:
        model: The model; stays as it is.
        order: A permutation of its classes.
        label_names: Names of the classes in their new order.

    Raises:
        ValueError: If a classifier is neither linear nor a convolution.
    """
    model = look_through(model)
    check_model(model)
    names = find_classifier(model, None)
    reordered = copy.deepcopy(model)
    rows = torch.tensor(list(order))
    with torch.no_grad():
        for name in names:
            leaf = reordered.get_submodule(name)
            if not isinstance(leaf, (nn.Linear, nn.Conv2d)):
                raise ValueError(
                    f'{name!r} of {name_of(model)} is a {type(leaf).__name__}, whose classes cannot be reordered. '
                    "Give the classes of the data the order of the model's, or fit a head: --teacher-head fit."
                )
            for param in leaf.parameters():
                param.copy_(param[rows.to(param.device)])
    _note(
        reordered,
        model,
        FittedHead(
            how='reordered',
            classifier=names,
            num_classes=len(rows),
            tensors=_new_tensors(reordered, model, names),
            published=_published_tensors(model, names),
        ),
        label_names,
    )
    return reordered


def put_head(model: nn.Module, head: FittedHead, label_names: Sequence[str] | None = None) -> nn.Module:
    """Return a copy of a published model with a head that was fitted to it, or put into order, before.

    Args:
        model: The published model, or a copy of it with another head; stays as it is.
        head: The head.
        label_names: Names of the classes.

    Raises:
        ValueError: If the head is not of such a model.
    """
    model = look_through(model)
    copied, names = _with_classifier(model, head.num_classes, None)
    wanted = {name: (tuple(t.shape)) for name, t in head.tensors.items()}
    state = copied.state_dict()
    found = {name: tuple(state[name].shape) for name in _names_of_new(copied, model, names)}
    for name in names:
        if f'{name}.bias' not in wanted:
            # A published classifier without a bias that was put into another order.
            copied.get_submodule(name).register_parameter('bias', None)
            found.pop(f'{name}.bias', None)
    if names != head.classifier or wanted != found:
        raise ValueError(
            f'The fitted head has {wanted} and does not fit {name_of(model)}, which needs {found}: it was fitted to '
            'another model.'
        )
    with torch.no_grad():
        for name, tensor in head.tensors.items():
            state[name].copy_(tensor)
    _note(
        copied,
        model,
        dataclasses.replace(
            head, tensors=_new_tensors(copied, model, names), published=_published_tensors(model, names)
        ),
        label_names,
    )
    return copied


def _note(model: Any, base: Any, head: FittedHead, label_names: Sequence[str] | None) -> None:
    """Note a new head on a model, and what its classes are, which its published config says otherwise."""
    setattr(model, ATTRIBUTE, head)
    cfg = getattr(base, 'pretrained_cfg', None)
    if cfg is not None:
        kept = {key: value for key, value in cfg.items() if key not in ('label_names', 'label_descriptions')}
        names = {'label_names': list(label_names)} if label_names is not None else {}
        model.pretrained_cfg = {**kept, 'num_classes': head.num_classes, **names}


def _with_classifier(
    model: nn.Module, num_classes: int, classifier: str | Sequence[str] | None
) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a copy of a model with linear classifiers of new weights, and their names."""
    fitted = copy.deepcopy(model)
    head = fitted_head_of(model)
    # New weights are overwritten: drawing them must not move the user's random state.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if head is not None:
            names = head.classifier
            replace_head(fitted, names, num_classes)
        else:
            names = find_classifier(model, classifier, num_classes)
            odd = [name for name in names if not isinstance(model.get_submodule(name), (nn.Linear, nn.Conv2d))]
            if odd:
                raise ValueError(
                    f'The classifier {odd[0]!r} of {name_of(model)} is a {type(model.get_submodule(odd[0])).__name__}, '
                    f'and only a linear one can be fitted in closed form. {_REMEDY}'
                )
            if names:
                replace_head(fitted, names, num_classes)
            else:
                names = add_head(fitted, num_classes)
    for name in names:
        leaf: Any = fitted.get_submodule(name)
        if leaf.bias is None:
            leaf.bias = nn.Parameter(leaf.weight.new_zeros(num_classes))
    return fitted, tuple(names)


def _names_of_new(model: nn.Module, base: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the names of tensors in a state dict that a base has not, or that are of the classifier."""
    heads = tuple(f'{name}.' for name in names)
    head = fitted_head_of(base)
    known = base.state_dict().keys() - (head.tensors.keys() if head is not None else set())
    return [name for name in model.state_dict() if name not in known or name.startswith(heads)]


def _new_tensors(model: nn.Module, base: nn.Module, names: Sequence[str]) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {name: _plain(state[name]) for name in _names_of_new(model, base, names)}


def _published_tensors(base: nn.Module, names: Sequence[str]) -> Mapping[str, torch.Tensor]:
    head = fitted_head_of(base)
    if head is not None:
        return head.published
    heads = tuple(f'{name}.' for name in names)
    return {name: _plain(t) for name, t in base.state_dict().items() if name.startswith(heads)}


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone() if tensor.is_meta else tensor.detach().cpu().clone()


def _checked_batch(batch: Any, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(batch, Sequence) or len(batch) < 2 or not isinstance(batch[0], torch.Tensor):
        keys = f' of {shorten(list(batch))}' if isinstance(batch, Mapping) else ''
        raise ValueError(
            f'loader must give batches (images, class indices), got a {type(batch).__name__}{keys}: give fit_head '
            'pairs, as a generator makes them, ((b["image"], b["label"]) for b in loader).'
        )
    input, target = batch[0], torch.as_tensor(batch[1])
    if target.ndim != 1 or target.is_floating_point() or len(target) != len(input):
        raise ValueError(
            f'loader must give class indices [B] with its images, got {tuple(target.shape)} of {target.dtype}: leave '
            'mixup and cutmix out.'
        )
    if not bool(input.isfinite().all()):
        raise ValueError('loader gives images that are not finite (NaN or Inf): no head can be fitted to them.')
    low, high = (int(target.min()), int(target.max())) if len(target) else (0, 0)
    if low < 0 or high >= num_classes:
        raise ValueError(f'loader gives labels from {low} to {high}, outside of num_classes={num_classes}.')
    return input, target.long()


def _run(model: nn.Module, names: Sequence[str], x: torch.Tensor) -> tuple[list[torch.Tensor], Any]:
    """Run a model; return what enters each classifier, `[B, D]` (the mean over places), and what it returns."""
    with contextlib.ExitStack() as stack:
        inputs = {name: stack.enter_context(watch_inputs(model.get_submodule(name))) for name in names}
        try:
            output = model(x)
        except Exception as error:
            # Whatever a network fails with on images that it was not made for.
            raise ValueError(
                f'{name_of(model)} does not take what loader gives, images {tuple(x.shape)} of {x.dtype}: '
                f'{" ".join(str(error).split())}. Give images as the model takes them, or convert them by prepare=....'
            ) from error
    wrong = [name for name in names if len(inputs[name]) != 1]
    if wrong:
        raise ValueError(
            f'The classifier {wrong[0]!r} of {name_of(model)} ran {len(inputs[wrong[0]])} times for one batch, not '
            'once: no head can be fitted to what enters it. Name another with classifier=....'
        )
    features = []
    for name in names:
        h = inputs[name][0]
        if isinstance(model.get_submodule(name), nn.Conv2d):
            features.append(h.flatten(2).mean(dim=2))
        else:
            features.append(h if h.ndim == 2 else h.flatten(1, -2).mean(dim=1))
    return features, output


def _find_shares(model: nn.Module, names: Sequence[str], x: torch.Tensor) -> list[float]:
    """Return by which factors the logits are made of what the classifiers give for their mean features.

    Where the logits are not linear in all of them (VOLO adds the largest of its tokens' logits), all but the first are
    set to zero.

    Raises:
        ValueError: If not even the first explains the logits.
    """
    for used in dict.fromkeys((len(names), 1)):
        for name in names[used:]:
            for param in model.get_submodule(name).parameters():
                param.zero_()
        inputs, logits = _run(model, names, x)
        outputs = []
        for h, name in zip(inputs[:used], names, strict=False):
            leaf: Any = model.get_submodule(name)
            outputs.append(nn.functional.linear(h.double(), leaf.weight.flatten(1).double(), leaf.bias.double()))
        classes = outputs[0].shape[1]
        if not isinstance(logits, torch.Tensor):
            raise ValueError(
                f'{name_of(model)} returns a {type(logits).__name__}, not logits [B, K]: give fit_head a module whose '
                'forward returns the logits alone.'
            )
        check_finite(model, logits)
        if logits.shape == (len(x), classes):
            wanted = logits.double().flatten()
            columns = torch.stack([output.flatten() for output in outputs], dim=1)
            found = torch.linalg.lstsq(columns.cpu(), wanted.cpu()[:, None]).solution
            rest = (columns.cpu() @ found).flatten() - wanted.cpu()
            tolerance = _TOLERANCES.get(logits.dtype, _LOW_PRECISION_TOLERANCE)
            shares = found.flatten().tolist()
            if float(rest.abs().max()) <= tolerance * float(wanted.abs().max()) and any(s > tolerance for s in shares):
                return [s if abs(s) > tolerance else 0.0 for s in shares] + [0.0] * (len(names) - used)
    raise ValueError(
        f'The logits of {name_of(model)} are not linear in what enters its classifier '
        f'{", ".join(map(repr, names))}: something follows it, and no head can be fitted in closed form. '
        f'{_REMEDY}'
    )


def _set_weights(
    model: nn.Module, names: Sequence[str], shares: Sequence[float], weight: torch.Tensor, bias: torch.Tensor
) -> None:
    """Share a linear classifier `[K, D]` out among those of a model."""
    used = sum(1 for share in shares if share)
    start = 0
    for name, share in zip(names, shares, strict=True):
        leaf: Any = model.get_submodule(name)
        if not share:
            leaf.weight.zero_()
            leaf.bias.zero_()
            continue
        width = leaf.weight.shape[1]
        leaf.weight.copy_((weight[:, start : start + width] / share).view_as(leaf.weight))
        leaf.bias.copy_(bias / (share * used))
        start += width
