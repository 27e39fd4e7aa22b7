"""The second forward path of a teacher: its stages with trainable blocks between them, and a head of its own."""
from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from timm.layers import use_reentrant_ckpt
from torch import nn
from torch.utils import _pytree as pytree

from ..backbone.heads import add_head, replace_head, scale_head
from ..backbone.layouts import TokenOrder
from ..backbone.modes import forget_caches, keep_frozen
from ..backbone.norms import find_norms, has_statistics, unshare
from ..backbone.rules import rule_for
from ..backbone.types import Stage, name_of
from .blocks import FusionBlock, PromptBlock, PromptConfig
from .calls import Call, Calls, Record, remembered
from .frozen_layers import save_fewer_activations
from .hooks import CastInput, Injection, KeepStatistics
from .low_rank import LowRankHead, correct_head
from .wrapped import remove_hooks

__all__ = ['PromptPath', 'VARIANTS', 'Variant']

Variant = Literal['dfpt', 'dfpt+']
"""What is trained in the prompt path: blocks and head (DFPT-KD), or a copy of the backbone as well (DFPT-KD+)."""
VARIANTS: tuple[Variant, ...] = get_args(Variant)
_LOW_PRECISION = (torch.bfloat16, torch.float16)
# The switches of gradient checkpointing in timm, transformers, torchvision and others.
_RECOMPUTES = ('grad_checkpointing', 'gradient_checkpointing', 'use_checkpoint', 'memory_efficient', 'with_cp')


class PromptPath(nn.Module):
    """The second forward path: prompt blocks, fusion blocks and a head, or with DFPT-KD+ a whole backbone.

    With `variant='dfpt'` the backbone's weights are the very tensors of the original path. This second tree of
    modules is not registered as a submodule, so that it is neither saved, nor trained, nor counted twice.

    Args:
        model: The frozen backbone of the original path.
        stages: Where the blocks go.
        config: How blocks and head are built.
        variant: `'dfpt'` or `'dfpt+'`.
        classifier: Names of the classifier modules, as in timm's `pretrained_cfg['classifier']`; none for an encoder,
            which gets one.
        num_classes: Number of classes `K` of a head with new weights; `None` starts from the teacher's head.
        save_memory: `'dfpt'` only: do not save inputs of frozen layers for the backward pass; the results are the same.
        x: Encoders only: images `[B, C, H, W]` that the model takes; by default of the smallest size.

    Raises:
        ValueError: If the head cannot be corrected by a low rank as the config asks, or norms cannot be its own.

    Attributes:
        classifier: Names of the classifier modules.
        heads: Names of the modules that make up the head: the classifier, and what an encoder got along with it.
        num_classes: Number of its logits, as `wrap` saw them.
        own_norms: The norm layers of the backbone that are its own, see `PromptConfig`.
        starts_as_teacher: Whether its head was the teacher's at the start, and so its classes are.
    """

    num_classes: int

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[Stage],
        config: PromptConfig,
        *,
        variant: Variant,
        classifier: Sequence[str],
        num_classes: int | None = None,
        save_memory: bool = True,
        x: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        if config.head_rank is not None and num_classes is not None:
            raise ValueError(
                f'head_rank={config.head_rank} corrects the head of {name_of(model)}, and num_classes={num_classes} '
                'gives the prompt path a new one: leave one of them out, or give the model a head first, by '
                'timm_dfpt.fit_head.'
            )
        self.variant: Variant = variant
        self.stages = tuple(stages)
        self.classifier = tuple(classifier)
        self.calls = Calls()
        # Copy first, hook second: a copy of a hooked tree would copy hooks and state, as of another teacher's.
        kept = [model] if variant == 'dfpt' else []
        if config.head_rank is not None:
            kept += [model.get_submodule(name) for name in self.classifier]
        shared = {id(t): t for part in kept for t in itertools.chain(part.parameters(), part.buffers())}
        forget_caches(model.modules())
        tree = copy.deepcopy(model, shared).eval()
        remove_hooks(tree)
        self.heads = self.classifier
        self.starts_as_teacher = num_classes is None
        if num_classes is not None:
            if self.classifier:
                replace_head(tree, self.classifier, num_classes, init_scale=0)
            else:
                known = set(tree.modules())
                self.classifier = add_head(tree, num_classes, init_scale=0, x=x)
                self.heads = _outermost(name for name, m in tree.named_modules() if m not in known and _has_weights(m))
            config = dataclasses.replace(config, new_head=True)
        self.config = config
        param = next(model.parameters())
        # What is trained is kept in float32, even where the frozen teacher is not.
        dtype = torch.float32 if param.dtype in _LOW_PRECISION else param.dtype
        features = [feature for stage in self.stages for feature in stage.features]
        if not config.open:
            features = []
        self.blocks = nn.ModuleList(
            PromptBlock(feature.channels, config) if config.block else _NoBlock() for feature in features
        ).to(device=param.device, dtype=dtype)
        self.fusions = nn.ModuleList(
            nn.Identity()
            if config.fusion == 'none'
            else FusionBlock(feature.channels, config.fusion == 'depthwise', config.fusion_rank)
            for feature in features
        ).to(device=param.device, dtype=dtype)
        # Without parameters and persistent buffers: nothing of it is in the state dict.
        self.orders = nn.ModuleList(
            _token_order(tree, stage.module) for stage in self.stages for _ in stage.features if config.open
        ).to(device=param.device)
        if config.head_rank is not None:
            for name in self.heads:
                correct_head(tree, name, config.head_rank)
        self.head = nn.ModuleList()
        # Of the shared backbone; those of a copy are in it.
        self.norms = nn.ModuleList()
        if variant == 'dfpt':
            if config.new_head:
                for name in self.heads:
                    leaf = tree.get_submodule(name)
                    if not isinstance(leaf, LowRankHead):
                        leaf = copy.deepcopy(leaf)
                    leaf.to(dtype).requires_grad_(True)
                    leaf.register_forward_pre_hook(CastInput())
                    tree.set_submodule(name, leaf)
                    self.head.append(leaf)
            self.norms.extend(self._own_norms(tree))
            if save_memory:
                save_fewer_activations(tree)
            self._shared_tree = (tree,)
        else:
            self.backbone = tree.to(dtype).requires_grad_(True)
            for name in self.heads:
                tree.get_submodule(name).requires_grad_(config.new_head)
        self.own_norms = list(self.norms)
        if variant == 'dfpt+' and config.norms == 'own':
            self.own_norms = list(find_norms(tree, self.heads).values())
        # Those of frozen weights may be kept.
        self._caching = [m for m in tree.modules() if hasattr(m, 'attention_bias_cache') and variant == 'dfpt+']
        self._statistics = [part for norm in self.own_norms for part in norm.modules() if has_statistics(part)]
        self._unused: list[nn.Parameter] = []
        self._keeps_statistics = False
        if config.open:
            self._hook_blocks()
        # Modules of the original path, and those that share their weights.
        self._twins = self._pair_with(model)
        self._switches = [(module, name) for module in tree.modules() for name in _RECOMPUTES if hasattr(module, name)]
        self.train(self.training)

    def _own_norms(self, tree: nn.Module) -> list[nn.Module]:
        norms = list(find_norms(tree, self.heads).values()) if self.config.norms == 'own' else []
        low = next((p.dtype for norm in norms for p in norm.parameters() if p.dtype in _LOW_PRECISION), None)
        if low is not None:
            raise ValueError(
                f"norms='own' trains the norm layers in float32, and those of {name_of(tree)} are in {low}: wrap the "
                "model in float32, take variant='dfpt+', or leave norms='teacher'."
            )
        unshare(norms)
        return norms

    def describe_norms(self) -> str:
        """Say how many norm layers are its own, and how many of them keep running statistics."""
        return f'norm layers of its own: {len(self.own_norms)}, {len(self._statistics)} with running statistics'

    def leave_unused(self, parameters: Iterable[nn.Parameter]) -> None:
        """Leave parameters untrained on which the logits do not depend."""
        self._unused.extend(parameters)
        self.keep_frozen()

    def _hook_blocks(self) -> None:
        done = 0
        for index, stage in enumerate(self.stages):
            part = slice(done, done + len(stage.features))
            blocks, fusions, orders = (list(modules[part]) for modules in (self.blocks, self.fusions, self.orders))
            hook = Injection(index, stage, blocks, fusions, orders, self.calls)
            self.model.get_submodule(stage.module).register_forward_hook(hook)
            done = part.stop

    @property
    def model(self) -> nn.Module:
        """The backbone with the blocks in it."""
        return self.backbone if self.variant == 'dfpt+' else self._shared_tree[0]

    @property
    def shares_backbone(self) -> bool:
        """Whether the backbone's weights are those of the original path, and not a copy."""
        return self.variant == 'dfpt'

    def borrowed_parameters(self) -> list[nn.Parameter]:
        """Return parameters of the original path that it computes with and does not have itself."""
        return [param for _, mine in self._twins for param in mine.parameters(recurse=False)]

    @property
    def recomputes(self) -> bool:
        """Whether the backward pass computes activations again (gradient checkpointing)."""
        return any(getattr(module, name) is True for module, name in self._switches)

    def share_weights_with(self, model: nn.Module) -> None:
        """Take every frozen tensor from `model` again, after a conversion or load that has replaced tensors."""
        self._twins = self._pair_with(model)
        self.keep_frozen()

    def _shared_modules(self) -> Iterator[tuple[str, nn.Module]]:
        own = {id(part) for part in itertools.chain(self.head.modules(), self.norms.modules())}
        for name, mine in self.model.named_modules():
            if isinstance(mine, LowRankHead):
                yield from mine.frozen.named_modules(prefix=name)
            elif self.shares_backbone and id(mine) not in own:
                yield name, mine

    def _pair_with(self, model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
        modules = dict(model.named_modules(remove_duplicate=False))
        twins = []
        for name, mine in self._shared_modules():
            theirs = modules.get(name)
            if theirs is None or theirs._parameters.keys() != mine._parameters.keys():
                raise RuntimeError(
                    f'{name_of(model)} was changed after wrapping: its module {name!r} was replaced, as fuse() or '
                    'reparameterize() do. Change the model before you wrap it.'
                )
            twins.append((theirs, mine))
        return twins

    def scale_head(self, factor: float) -> None:
        """Multiply weights and biases of the head, which must be the path's own; 0: logits of zero.

        Raises:
            ValueError: If the head is the teacher's, or neither linear nor a convolution: logits of others do not scale
                with their weights.
        """
        heads = [self.model.get_submodule(name) for name in self.heads]
        if not self.config.new_head or not all(isinstance(head, (nn.Linear, nn.Conv2d)) for head in heads):
            raise ValueError(
                f'the head of the prompt path ({", ".join(self.heads)}) is not a linear one of its own: leave its '
                'scale (prompt_head_init_scale) at 1.'
            )
        for head in heads:
            scale_head(head, factor)

    def keep_frozen(self) -> None:
        """Freeze the backbone again, whatever was called on it; costs little where nothing was."""
        for param in self._unused:
            if param.requires_grad:
                param.requires_grad_(False)
        if not self.shares_backbone:
            adapting = {id(module) for module in self._statistics if self.training}
            for module in self.backbone.modules():
                if module.training and id(module) not in adapting:
                    module.training = False
            if not self.config.new_head:
                keep_frozen(part for name in self.heads for part in self.backbone.get_submodule(name).modules())
        for _, mine in self._twins:
            if mine.training:
                mine.training = False
        holders = [twins for twins in self._twins if twins[0]._parameters or twins[0]._buffers]
        keep_frozen(theirs for theirs, _ in holders)
        if torch.compiler.is_compiling():
            return
        for theirs, mine in holders:
            # A conversion or load of the model alone puts other tensors into it.
            for now, ours in ((theirs._parameters, mine._parameters), (theirs._buffers, mine._buffers)):
                if not all(map(operator.is_, now.values(), ours.values())) and now.keys() == ours.keys():
                    ours.update(now)  # type: ignore[arg-type]

    def release(self) -> None:
        """Leave the original path's weights to themselves."""
        self._twins = []

    def requires_grad_(self, requires_grad: bool = True) -> PromptPath:
        """Switch gradients of what is trained on or off: never those of the original path, or of a head it keeps."""
        super().requires_grad_(requires_grad)
        self.keep_frozen()
        return self

    def _replicate_for_data_parallel(self) -> PromptPath:
        # The hooks of its copies would still be those of the one device where the blocks are.
        raise RuntimeError(
            'A prompt path cannot be trained with torch.nn.DataParallel. Use DistributedDataParallel with one process '
            'per GPU: task.prepare_distributed(), or `accelerate launch`.'
        )

    def train(self, mode: bool = True) -> PromptPath:
        """Set the mode of blocks, head and statistics of its own; all else of the backbone stays in evaluation."""
        super().train(mode)
        (self.norms if self.shares_backbone else self.backbone).eval()
        for module in self._statistics:
            module.training = mode
        return self

    def forward(self, x: Any, record: Record | None = None) -> torch.Tensor:
        """Return the prompt path's logits `z_p` `[B, K]`.

        Args:
            x: Input `[B, C, H, W]`.
            record: What the prefix returned for this input in the original path; is used up.

        Raises:
            RuntimeError: If a block did not run exactly once.
        """
        self.keep_frozen()
        forget_caches(self._caching)
        call = Call.of(x, record)
        here = self.calls.here
        outer, here.call = here.call, call
        recomputes = self.recomputes and torch.is_grad_enabled()
        x = match_dtype(x, self.model)
        if recomputes and use_reentrant_ckpt():
            # A layer none of whose inputs asks for a gradient then gives none to its weights either.
            x = pytree.tree_map(_asking_for_gradient, x)
        if recomputes and not self._keeps_statistics:
            self._keep_statistics()
        try:
            with remembered(self.calls, call) if recomputes else contextlib.nullcontext():
                logits = self.model(x)
        finally:
            here.call = outer
            forget_caches(self._caching)
        if self.config.open and sorted(call.fired) != list(range(len(self.stages))):
            raise RuntimeError(self._explain_fired(call))
        return logits

    def _keep_statistics(self) -> None:
        # Only where it is needed: hooks cost time, and compilers trace them.
        self._keeps_statistics = True
        for module in self.modules():
            if has_statistics(module):
                KeepStatistics(self.calls).around(module)

    def _explain_fired(self, call: Call) -> str:
        counts = {stage.module: call.fired.count(i) for i, stage in enumerate(self.stages)}
        wrong = {name: count for name, count in counts.items() if count != 1}
        return (
            f'The prompt blocks of {name_of(self.model)} must run exactly once per forward; call counts: {wrong}. '
            'The forward has changed since wrap(), as gradient checkpointing over the children of a container changes '
            'it; wrap with other module names: stages=[...].'
        )


class _NoBlock(nn.Module):
    """Prompt block that adds nothing (ablation)."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return zeros `[B, C, H, W]`."""
        return torch.zeros_like(x)


def match_dtype(x: Any, model: nn.Module) -> Any:
    """Cast a floating-point input to the precision of the model's weights; leave any other input as it is."""
    param = next(model.parameters(), None)
    if param is None or not isinstance(x, torch.Tensor) or not x.is_floating_point() or not param.is_floating_point():
        return x
    return x.to(param.dtype)


def _asking_for_gradient(leaf: Any) -> Any:
    plain = isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and not leaf.requires_grad
    return leaf.detach().requires_grad_() if plain else leaf


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _outermost(names: Iterable[str]) -> tuple[str, ...]:
    found: list[str] = []
    for name in names:
        if not any(name.startswith(f'{outer}.') for outer in found):
            found.append(name)
    return tuple(found)


def _token_order(model: Any, name: str) -> nn.Module:
    """Return how to put the tokens behind a module into raster order; `nn.Identity` where they are."""
    if not rule_for(model).reroll:
        return nn.Identity()
    block = int(name.rsplit('.', 1)[-1])
    height, width = model.reroll.schedule[block][1]
    places = torch.arange(height * width, dtype=torch.float64).view(1, -1, 1)
    return TokenOrder(model.reroll(places, block).flatten().long())
