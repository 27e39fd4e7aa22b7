"""A teacher with two forward paths: the frozen original and a trainable, prompt-based one."""
from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ._frozen import ModelState
from ._prefix import PathState, PrefixRecorder, PrefixReplay
from .blocks import PromptBlock, PromptConfig, create_fusion
from .stages import Stage, token_grid

__all__ = ['DualForwardOutput', 'DualForwardPathTeacher', 'PromptPath', 'VARIANTS']

_logger = logging.getLogger(__name__)

VARIANTS = ('dfpt', 'dfpt+')
_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)


class DualForwardOutput(NamedTuple):
    """Logits of both paths for one batch.

    Args:
        original: Logits `z_t` of the pre-trained teacher `[B, K]`, without gradient.
        prompt: Logits `z_p` of the prompt path `[B, K]`.
    """

    original: torch.Tensor
    prompt: torch.Tensor


class _Injection:
    """Forward hook on the module of a tap: replaces its features `h` by `F(h + P(h))`.

    A class and no closure, so that deepcopy and pickle take blocks and state along.
    """

    def __init__(self, index: int, stage: Stage, blocks: list[nn.Module], fusions: list[nn.Module], state: PathState):
        self.index, self.stage, self.blocks, self.fusions, self.state = index, stage, blocks, fusions, state

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        self.state.fired.append(self.index)
        if isinstance(output, torch.Tensor):
            return self._inject(output, 0)
        leaves, spec = pytree.tree_flatten(output)
        for i, feature in enumerate(self.stage.features):
            leaves[feature.index] = self._inject(leaves[feature.index], i)
        return pytree.tree_unflatten(leaves, spec)

    def _inject(self, h: torch.Tensor, i: int) -> torch.Tensor:
        block, fusion, feature = self.blocks[i], self.fusions[i], self.stage.features[i]
        if feature.layout == 'NCHW':
            return fusion(h + block(h))
        if feature.layout == 'NHWC':
            # A permuted view has channels_last strides, which convolutions take as they are: nothing is copied.
            x = h.permute(0, 3, 1, 2)
            return fusion(x + block(x)).permute(0, 2, 3, 1)
        prefix = feature.prefix_tokens
        tokens = h[:, prefix:] if prefix else h
        count = tokens.shape[1]
        grid = token_grid(count, self.state.image_size, self.stage.reduction) or (count, 1)
        x = tokens.unflatten(1, grid).permute(0, 3, 1, 2)
        x = fusion(x + block(x)).permute(0, 2, 3, 1).flatten(1, 2)
        return torch.cat([h[:, :prefix], x], dim=1) if prefix else x


class PromptPath(nn.Module):
    """The second forward path: prompt blocks, fusion blocks and a head, or with DFPT-KD+ a whole backbone.

    With `variant='dfpt'` the backbone's weights are the very tensors of the original path. This second tree of
    modules is not registered as a submodule, so that it is neither saved, nor trained, nor counted twice.

    Args:
        model: The frozen backbone of the original path.
        stages: Where the blocks go.
        config: How blocks and head are built.
        variant: `'dfpt'` or `'dfpt+'`.
        head: Names of the classifier modules, as in timm's `pretrained_cfg['classifier']`.
        num_classes: Number of classes `K`, where the prompt path's head shall have another number than the teacher's.
        train_bn: `'dfpt+'` only: the backbone copy's BatchNorm layers use and update batch statistics in training.
        state: Shared with the original path.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[Stage],
        config: PromptConfig,
        *,
        variant: str,
        head: Sequence[str],
        num_classes: int | None = None,
        train_bn: bool = False,
        state: PathState | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.variant = variant
        self.stages = tuple(stages)
        self.train_bn = train_bn
        self.head_names = tuple(head)
        self.state = state or PathState()
        # Copy first, hook second: a copy of a hooked tree would copy hooks and state.
        shared = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())} if variant == 'dfpt' else {}
        tree = copy.deepcopy(model, shared).eval()
        if num_classes is not None:
            _replace_head(tree, self.head_names, num_classes)
        own_head = num_classes is not None or config.head
        device, dtype = _device_and_dtype(model)
        features = [feature for stage in self.stages for feature in stage.features]
        self.blocks = nn.ModuleList(
            PromptBlock(feature.channels, config) if config.block else _NoBlock() for feature in features
        ).to(device=device, dtype=dtype)
        self.fusions = nn.ModuleList(create_fusion(feature.channels, config) for feature in features).to(
            device=device, dtype=dtype
        )
        self.head = nn.ModuleList()
        if variant == 'dfpt':
            if own_head:
                for name in self.head_names:
                    leaf = copy.deepcopy(tree.get_submodule(name)).requires_grad_(True)
                    tree.set_submodule(name, leaf)
                    self.head.append(leaf)
            self._shared_tree = (tree,)
        else:
            self.backbone = tree.requires_grad_(True)
            for name in self.head_names:
                tree.get_submodule(name).requires_grad_(own_head)
        self._hook_blocks()
        self.train(self.training)

    def _hook_blocks(self) -> None:
        done = 0
        for index, stage in enumerate(self.stages):
            part = slice(done, done + len(stage.features))
            hook = _Injection(index, stage, list(self.blocks[part]), list(self.fusions[part]), self.state)
            self.model.get_submodule(stage.module).register_forward_hook(hook)
            done = part.stop

    @property
    def model(self) -> nn.Module:
        """The backbone with the blocks in it."""
        return self.backbone if self.variant == 'dfpt+' else self._shared_tree[0]

    def share_weights_with(self, model: nn.Module) -> None:
        """Take every frozen tensor from `model` again, after a conversion or load that has replaced tensors."""
        if self.variant != 'dfpt':
            return
        for name, module in model.named_modules():
            if self.head and any(name == head or name.startswith(f'{head}.') for head in self.head_names):
                continue
            mine = self.model.get_submodule(name)
            mine._parameters.update(module._parameters)
            mine._buffers.update(module._buffers)

    def train(self, mode: bool = True) -> PromptPath:
        """Set the mode of blocks and head; the backbone stays in evaluation (its BatchNorm with `train_bn` not)."""
        super().train(mode)
        if self.variant == 'dfpt+':
            self.backbone.eval()
            if self.train_bn and mode:
                for module in self.backbone.modules():
                    if isinstance(module, _BATCH_NORMS):
                        module.train()
        return self

    def forward(self, x: Any) -> torch.Tensor:
        """Return the prompt path's logits `z_p` `[B, K]` for the input `x` `[B, C, H, W]`.

        Raises:
            RuntimeError: A block did not run exactly once.
        """
        state = self.state
        state.fired.clear()
        if isinstance(x, torch.Tensor):
            state.image_size = (x.shape[-2], x.shape[-1])
        try:
            logits = self.model(x)
        finally:
            state.clear()
        if len(state.fired) != len(self.stages):
            raise RuntimeError(self._explain_fired())
        return logits

    def _explain_fired(self) -> str:
        counts = {stage.module: self.state.fired.count(i) for i, stage in enumerate(self.stages)}
        wrong = {name: count for name, count in counts.items() if count != 1}
        return (
            f'The prompt blocks of {type(self.model).__name__} must each run once a forward, but ran as often as '
            f'{wrong} says. Something calls these modules in another way than when the model was wrapped, as '
            'gradient checkpointing over the children of a container does; wrap with other module names: stages=[...].'
        )


class _NoBlock(nn.Module):
    """Stands for a prompt block that adds nothing (ablation)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return zeros `[B, C, H, W]`."""
        return torch.zeros_like(x)


class DualForwardPathTeacher(nn.Module):
    """A frozen teacher with a second, prompt-based forward path. Made by `timm_dfpt.wrap`.

    Source: DFPT-KD and DFPT-KD+, arXiv 2506.18244. The original path is the wrapped model itself; nothing in it is
    replaced. The prompt path runs the same stages with a prompt block and a fusion block between them and a
    classification head of its own.

    Args:
        model: The pre-trained model; frozen and put into evaluation until `unwrap`.
        prompt_path: The second path.
        prefix: Modules before the first block and their number of calls, computed once for both paths.
    """

    def __init__(
        self,
        model: nn.Module,
        prompt_path: PromptPath,
        prefix: Sequence[tuple[str, int]] = (),
    ) -> None:
        super().__init__()
        self._model_state = ModelState(model)
        self.model = model.eval().requires_grad_(False)
        self.prompt_path = prompt_path
        self.grad_checkpointing = bool(getattr(model, 'grad_checkpointing', False))
        self._handles: list[Any] = []
        self.prefix = tuple(prefix)
        state = prompt_path.state
        state.outputs = [[] for _ in self.prefix]
        for slot, (name, calls) in enumerate(self.prefix):
            recorder = PrefixRecorder(state, slot, calls)
            self._handles.append(model.get_submodule(name).register_forward_hook(recorder))
            twin: Any = prompt_path.model.get_submodule(name)
            twin.forward = PrefixReplay(twin, state, slot)
        self.register_load_state_dict_post_hook(_share_after_load)

    @property
    def variant(self) -> str:
        """`'dfpt'` or `'dfpt+'`."""
        return self.prompt_path.variant

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages behind which there is a block."""
        return self.prompt_path.stages

    @property
    def config(self) -> PromptConfig:
        """How blocks and head were built."""
        return self.prompt_path.config

    @property
    def shares_prefix(self) -> bool:
        """Whether `teacher(x)` computes what lies before the first block once for both paths."""
        # Recomputation in the backward pass would find the record gone.
        return bool(self.prefix) and not self.grad_checkpointing

    def train(self, mode: bool = True) -> DualForwardPathTeacher:
        """Set the mode of the prompt path's own modules; the original path always stays in evaluation."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, x: Any) -> DualForwardOutput:
        """Run both paths on the same input.

        Args:
            x: Input `[B, C, H, W]`, normalised as the teacher was trained.

        Returns:
            `out.original` and `out.prompt`, logits `[B, K]`. The original's carry no gradient.
        """
        state = self.prompt_path.state
        state.clear()
        state.recording = self.shares_prefix
        try:
            original = self.original(x)
            state.recording, state.replaying = False, state.recording
            return DualForwardOutput(original, self.prompt_path(x))
        finally:
            state.clear()

    def original(self, x: Any) -> torch.Tensor:
        """Return the pre-trained teacher's logits `z_t` `[B, K]`, bit for bit those of the model before wrapping."""
        if self.model.training:
            # Somebody called .train() on the model itself, which would move its BatchNorm statistics.
            self.model.eval()
        with torch.no_grad():
            return self.model(x)

    def prompt(self, x: Any) -> torch.Tensor:
        """Return the prompt path's logits `z_p` `[B, K]`."""
        return self.prompt_path(x)

    def trainable_parameters(self) -> list[dict[str, Any]]:
        """Return parameter groups for an optimizer.

        Returns:
            A list of `{'name': ..., 'params': [...]}` for `'blocks'` (prompt and fusion blocks), `'head'` and, with
            DFPT-KD+, `'backbone'`. Groups without parameters are left out.
        """
        path = self.prompt_path
        head: list[nn.Parameter] = [p for p in path.head.parameters() if p.requires_grad]
        backbone: list[nn.Parameter] = []
        if path.variant == 'dfpt+':
            in_head = {id(p) for n in path.head_names for p in path.model.get_submodule(n).parameters()}
            for param in path.backbone.parameters():
                if param.requires_grad:
                    (head if id(param) in in_head else backbone).append(param)
        blocks = [p for p in itertools.chain(path.blocks.parameters(), path.fusions.parameters()) if p.requires_grad]
        groups = {'blocks': blocks, 'head': head, 'backbone': backbone}
        return [{'name': name, 'params': params} for name, params in groups.items() if params]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the prompt path's activations in the backward pass instead of keeping them (timm's switch).

        Raises:
            AssertionError: The architecture does not support it.
        """
        model: Any = self.prompt_path.model
        model.set_grad_checkpointing(enable)
        self.grad_checkpointing = enable

    def stop_sharing_prefix(self) -> None:
        """Run both paths in full from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for name, _ in self.prefix:
            twin: Any = self.prompt_path.model.get_submodule(name)
            del twin.forward
        self.prefix = ()

    def unwrap(self) -> nn.Module:
        """Give the wrapped model back as it was: no hooks, modes and `requires_grad` as before.

        The teacher must not be used afterwards.
        """
        self.stop_sharing_prefix()
        self._model_state.restore(self.model)
        return self.model

    def summary(self) -> str:
        """Return in words which stages are open, with which shapes, and how many parameters the prompt path adds."""
        total = sum(p.numel() for p in self.model.parameters())
        lines = [
            f'DualForwardPathTeacher(variant={self.variant!r}) on {type(self.model).__name__}: '
            f'{total:,} frozen parameters',
            f'{"block after":<32} {"layout":<6} {"channels":>8} {"reduction":>9}',
        ]
        for stage in self.stages:
            for feature in stage.features:
                lines.append(
                    f'{stage.module:<32} {feature.layout:<6} {feature.channels:>8} {stage.reduction:>9}'
                    + (f'  ({feature.prefix_tokens} prefix tokens pass through)' if feature.prefix_tokens else '')
                )
        trained = 0
        for group in self.trainable_parameters():
            count = sum(p.numel() for p in group['params'])
            trained += count
            lines.append(f'trainable {group["name"]}: {count:,} parameters')
        lines.append(f'trainable in all: {trained:,} parameters, {100 * trained / max(1, total):.1f}% of the teacher')
        lines.append(
            'both paths share the computation before the first block'
            if self.shares_prefix
            else 'the paths share no computation: a step costs two full forwards of the teacher'
        )
        return '\n'.join(lines)

    def _apply(self, fn: Any, recurse: bool = True) -> DualForwardPathTeacher:
        super()._apply(fn, recurse)
        self.prompt_path.share_weights_with(self.model)
        return self


def _share_after_load(teacher: DualForwardPathTeacher, incompatible_keys: Any) -> None:
    # load_state_dict(assign=True) puts new tensors into the original path.
    teacher.model.requires_grad_(False)
    teacher.prompt_path.share_weights_with(teacher.model)


def _device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    param = next(model.parameters())
    return param.device, param.dtype


def _replace_head(tree: Any, names: Sequence[str], num_classes: int) -> None:
    if hasattr(tree, 'reset_classifier'):
        tree.reset_classifier(num_classes)
        return
    for name in names:
        old = tree.get_submodule(name)
        if not isinstance(old, nn.Linear):
            raise ValueError(
                f'num_classes={num_classes} needs a new head, but {name!r} is a {type(old).__name__}, which cannot be '
                'rebuilt for another number of classes. Leave num_classes=None.'
            )
        tree.set_submodule(name, nn.Linear(old.in_features, num_classes, bias=old.bias is not None))

