"""A teacher with two forward paths: the frozen original and a trainable, prompt-based one."""
from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..backbone.modes import freeze, keep_frozen
from ..backbone.types import Stage, name_of
from .blocks import PromptConfig
from .calls import Record, needs_gradient
from .prefix import PrefixRecorder, PrefixReplay
from .prompt_path import PromptPath, Variant, match_dtype
from .wrapped import register, remove_hooks, state_before, unregister

__all__ = ['DualForwardOutput', 'DualForwardPathTeacher', 'HubFunctions']


class DualForwardOutput(NamedTuple):
    """Logits of both paths for one batch.

    Args:
        original: Logits `z_t` of the pre-trained teacher `[B, K]`, without gradient; of an encoder what it returns.
        prompt: Logits `z_p` of the prompt path `[B, K]`.
    """

    original: torch.Tensor
    prompt: torch.Tensor


class HubFunctions(NamedTuple):
    """What `timm_dfpt.hub` lends to teachers as methods. It imports the teacher, which so need not import it.

    Args:
        save: `timm_dfpt.save_prompt_path`.
        push: `timm_dfpt.push_prompt_path`.
        load: `timm_dfpt.load_teacher`.
    """

    save: Callable[..., Path]
    push: Callable[..., str]
    load: Callable[..., DualForwardPathTeacher]


class DualForwardPathTeacher(nn.Module):
    """A frozen teacher with a second, prompt-based forward path. Made by `timm_dfpt.wrap`.

    Source: DFPT-KD and DFPT-KD+, arXiv 2506.18244. The original path is the wrapped model itself; nothing in it is
    replaced. The prompt path runs the same stages with a prompt block and a fusion block between them and a
    classification head of its own.

    Args:
        model: The pre-trained model; frozen and put into evaluation until `unwrap`.
        prompt_path: The second path.
        prefix: Modules before the first block and their number of calls, computed once for both paths.
        bypassed: Stages around which the model passes features on to later layers; for `summary`.

    Attributes:
        num_classes: Number of logits of the original path, as `wrap` saw them; 0 for an encoder, which has none.
    """

    hub: ClassVar[HubFunctions]
    num_classes: int

    def __init__(
        self,
        model: nn.Module,
        prompt_path: PromptPath,
        prefix: Sequence[tuple[str, int]] = (),
        bypassed: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self._model_state = state_before(model)
        freeze(model)
        self.model = model
        self.prompt_path = prompt_path
        self.unwrapped = False
        self.bypassed = tuple(bypassed)
        self._handles: list[RemovableHandle] = []
        self.prefix = tuple(prefix)
        for slot, (name, count) in enumerate(self.prefix):
            recorder = PrefixRecorder(prompt_path.calls, slot, count)
            self._handles.append(model.get_submodule(name).register_forward_hook(recorder))
            twin: Any = prompt_path.model.get_submodule(name)
            twin.forward = PrefixReplay(twin, prompt_path.calls, slot)
        self._guard()
        self.register_load_state_dict_post_hook(_share_after_load)

    @property
    def variant(self) -> Variant:
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
    def same_classes(self) -> bool:
        """Whether the original path has the classes of the prompt path."""
        return self.prompt_path.starts_as_teacher and self.num_classes == self.prompt_path.num_classes

    @property
    def shares_prefix(self) -> bool:
        """Whether `teacher(x)` computes what lies before the first block once for both paths."""
        # Recomputation in the backward pass would find the record gone.
        return bool(self.prefix) and not self.prompt_path.recomputes

    def _guard(self) -> None:
        """Keep the model frozen, whoever calls it, and know it again if it is to be wrapped once more."""
        self._frozen_modules = list(self.model.modules())
        register(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not self.unwrapped:
            # A copy, whose model is another one.
            self._guard()

    def train(self, mode: bool = True) -> DualForwardPathTeacher:
        """Set the mode of the prompt path's own modules; the original path always stays in evaluation."""
        super().train(mode)
        self.keep_frozen()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> DualForwardPathTeacher:
        """Switch gradients of the prompt path on or off; the original path stays frozen."""
        self.prompt_path.requires_grad_(requires_grad)
        return self

    def keep_frozen(self) -> None:
        """Freeze the original path again, whatever was called on the model; costs little where nothing was."""
        if not self.unwrapped:
            keep_frozen(self._frozen_modules)

    def _check_in_use(self) -> None:
        if self.unwrapped:
            raise RuntimeError(
                f'This teacher gave its model back by unwrap() and can no longer be used. Wrap {name_of(self.model)} '
                'again.'
            )

    def forward(self, x: Any) -> DualForwardOutput:
        """Run both paths on the same input.

        Args:
            x: Input `[B, C, H, W]`, normalised as the teacher was trained.

        Returns:
            `out.original` and `out.prompt`, logits `[B, K]`. The original's carry no gradient.
        """
        self._check_in_use()
        # What the original path computes carries no gradient to the input.
        record: Record | None = [[] for _ in self.prefix] if self.shares_prefix and not needs_gradient(x) else None
        here = self.prompt_path.calls.here
        outer, here.record = here.record, record
        try:
            original = self.original(x)
        finally:
            here.record = outer
        return DualForwardOutput(original, self.prompt_path(x, record))

    def original(self, x: Any) -> torch.Tensor:
        """Return the pre-trained teacher's logits `z_t` `[B, K]`, bit for bit those of the model before wrapping.

        Of an encoder this is what it returns, features and no logits.
        """
        self._check_in_use()
        if torch.compiler.is_compiling() or self.model._compiled_call_impl is not None:
            # Else its hook does it.
            self.keep_frozen()
        with torch.no_grad():
            return self.model(match_dtype(x, self.model))

    def prompt(self, x: Any) -> torch.Tensor:
        """Return the prompt path's logits `z_p` `[B, K]`."""
        self._check_in_use()
        return self.prompt_path(x)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return parameter groups for an optimizer.

        Returns:
            Groups with `params` and the `name` 'blocks' (prompt and fusion blocks), 'norms' (with
            `PromptConfig(norms='own')`), 'head' and, with DFPT-KD+, 'backbone'. Groups without parameters are left out.
        """
        path = self.prompt_path
        names = {id(param): 'norms' for norm in path.own_norms for param in norm.parameters()}
        if path.variant == 'dfpt+':
            names |= {id(param): 'head' for name in path.heads for param in path.model.get_submodule(name).parameters()}
        kinds = {'blocks': 'blocks', 'fusions': 'blocks', 'head': 'head', 'backbone': 'backbone'}
        groups: dict[str, list[nn.Parameter]] = {name: [] for name in ('blocks', 'head', 'backbone', 'norms')}
        for name, param in path.named_parameters():
            if param.requires_grad:
                groups[names.get(id(param)) or kinds[name.partition('.')[0]]].append(param)
        return [{'name': name, 'params': params} for name, params in groups.items() if params]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the prompt path's activations in the backward pass instead of keeping them (timm's switch).

        Gradients stay the same. The paths then share no computation.

        Raises:
            ValueError: If the architecture does not support it.
        """
        model: Any = self.prompt_path.model
        try:
            model.set_grad_checkpointing(enable)
        except (AssertionError, AttributeError) as error:
            raise ValueError(f'{name_of(self.model)} does not support gradient checkpointing.') from error

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
        """Give the wrapped model back as it was: no hooks; modes, `requires_grad` and gradients as before.

        The teacher must not be used afterwards. A model that has several teachers stays frozen until the last is
        unwrapped.
        """
        if self.unwrapped:
            return self.model
        self.stop_sharing_prefix()
        self.prompt_path.release()
        self.unwrapped = True
        if unregister(self):
            remove_hooks(self.model)
            self._model_state.restore(self.model)
        return self.model

    def summary(self) -> str:
        """Return which stages are open, with which shapes, and how many parameters the prompt path adds, as text."""
        path, total = self.prompt_path, sum(p.numel() for p in self.model.parameters())
        lines = [
            f'DualForwardPathTeacher(variant={self.variant!r}) on {name_of(self.model)}: '
            f'{total:,} frozen parameters',
        ]
        if not self.num_classes:
            lines.append(
                f'an encoder: the original path has no logits; the prompt path has {path.num_classes} '
                f'(new head: {", ".join(path.heads)})'
            )
        if not self.config.open:
            lines.append('no blocks: features of the stages stay as they are')
        else:
            lines.append(f'{"block after":<32} {"layout":<6} {"channels":>8} {"reduction":>9}')
        for stage in self.stages if self.config.open else ():
            for feature in stage.features:
                lines.append(
                    f'{stage.module:<32} {feature.layout:<6} {feature.channels:>8} {stage.reduction:>9}'
                    + (f'  ({feature.prefix_tokens} prefix tokens pass through)' if feature.prefix_tokens else '')
                )
        for name in self.bypassed if self.config.open else ():
            lines.append(f'{name}: later layers also see features from before it, which pass its block by')
        if self.config.norms == 'own':
            lines.append(path.describe_norms())
        trained = 0
        ranks = {}
        if self.config.fusion_rank is not None:
            ranks['blocks'] = f' (fusion of rank {self.config.fusion_rank})'
        if self.config.head_rank is not None:
            ranks['head'] = f" (the teacher's with a correction of rank {self.config.head_rank})"
        for group in self.parameter_groups():
            count = sum(p.numel() for p in group['params'])
            trained += count
            lines.append(f'trainable {group["name"]}: {count:,} parameters{ranks.get(group["name"], "")}')
        lines.append(f'trainable in all: {trained:,} parameters, {100 * trained / max(1, total):.1f}% of the teacher')
        lines.append(
            'both paths share the computation before the first block'
            if self.shares_prefix
            else 'the paths share no computation: every step runs two full forward passes of the teacher'
        )
        return '\n'.join(lines)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, of how many in all, as PEFT does."""
        trained = sum(p.numel() for group in self.parameter_groups() for p in group['params'])
        total = sum(p.numel() for p in self.parameters())
        print(f'trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}')

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> Path:
        """Save the prompt path alone; the same as `timm_dfpt.save_prompt_path`, which describes the options."""
        return self.hub.save(self, save_directory, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Publish the prompt path; the same as `timm_dfpt.push_prompt_path`, which describes the options."""
        return self.hub.push(self, repo_id, **options)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], model: nn.Module | None = None, **options: Any
    ) -> DualForwardPathTeacher:
        """Load a saved prompt path; the same as `timm_dfpt.load_teacher`, which describes the options."""
        return cls.hub.load(pretrained_model_name_or_path, model, **options)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> DualForwardPathTeacher:
        super()._apply(fn, recurse)
        if not self.unwrapped:
            self.prompt_path.share_weights_with(self.model)
        return self


def _share_after_load(teacher: DualForwardPathTeacher, incompatible_keys: object) -> None:
    # load_state_dict(assign=True) puts new tensors into the original path.
    teacher.keep_frozen()
    teacher.prompt_path.share_weights_with(teacher.model)
