"""What the CIFAR networks share: a small convolutional trunk with timm's model interface, and its builder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead
from timm.models import build_model_with_cfg, checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

__all__ = ['StagedNet', 'build_cifar_model', 'cifar_cfg', 'init_conv_fan_out']

# Mean and standard deviation of CIFAR-100's training images in [0, 1], as the KD literature rounds them.
CIFAR_MEAN = (0.5071, 0.4867, 0.4408)
CIFAR_STD = (0.2675, 0.2565, 0.2761)


def cifar_cfg(pool_size: int, first_conv: str, classifier: str) -> dict[str, Any]:
    """Describe a network for CIFAR-100 images as timm's `pretrained_cfg` does.

    No weights come with it: `pretrained=True` fails, as with any timm name that has none.

    Args:
        pool_size: Height and width, in pixels, of the last feature map of a 32x32 image.
        first_conv: Name of the convolution that sees the image.
        classifier: Name of the linear layer that gives the logits.

    Returns:
        Keyword arguments of timm's `PretrainedCfg`.
    """
    return {
        'num_classes': 100,
        'input_size': (3, 32, 32),
        'pool_size': (pool_size, pool_size),
        'crop_pct': 1.0,
        'interpolation': 'bicubic',
        'mean': CIFAR_MEAN,
        'std': CIFAR_STD,
        'first_conv': first_conv,
        'classifier': classifier,
    }


def build_cifar_model(
    model_cls: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    num_levels: int,
    **kwargs: Any,
) -> nn.Module:
    """Build a network by timm's `build_model_with_cfg`, with one default output per level for `features_only=True`.

    timm takes five feature levels for granted, each a direct child of the network; here they are three to five children
    of its `nn.Sequential` of stages.

    Args:
        model_cls: Class or function that makes the network.
        variant: Name under which the network is registered.
        pretrained: Whether to load weights from the source that `pretrained_cfg` names.
        num_levels: Length of the network's `feature_info`.
        **kwargs: Arguments of timm's builder and of `model_cls`.

    Returns:
        The network, or timm's feature extractor around it.
    """
    feature_cfg = {'out_indices': tuple(range(num_levels)), 'flatten_sequential': True}
    return build_model_with_cfg(model_cls, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


def init_conv_fan_out(model: nn.Module, linear_std: float | None = None) -> None:
    """Initialise convolutions as RepDistiller and MDistiller do: std sqrt(2 / (kernel area * output channels)).

    Source: He et al. 2015, "Delving Deep into Rectifiers" (arXiv 1502.01852), section 2.2, backward-propagation case.
    Groups are not divided out, so depth-wise convolutions start smaller than with timm's own rule.

    Args:
        model: Network to initialise in place.
        linear_std: Standard deviation for linear weights, with zero bias; None keeps PyTorch's default.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, std=linear_std)
            nn.init.zeros_(module.bias)


class StagedNet(nn.Module):
    """Stem, stages, an optional last layer, then pooling and a linear classifier, behind timm's model interface.

    Each stage is an `nn.Sequential` that maps a single tensor to a single tensor and whose last child gives the
    stage's output, so both can be hooked (gradient checkpointing calls the children only).
    The stages alone are the features: `feature_info` and `forward_intermediates` do not list the stem.

    Args:
        stem: Layer before the stages.
        stages: The stages, in order.
        channels: Output channels of each stage.
        reductions: Stride of each stage's output relative to the image, in pixels.
        final: Layer between the last stage and the pooling; None for none.
        num_features: Channels that reach the pooling; None for those of the last stage.
        num_classes: Number of logits; 0 for pooled features.
        in_chans: Image channels the stem was built for.
        global_pool: timm's pooling name ('avg', 'max', 'avgmax', 'catavgmax', or '' for none).
        drop_rate: Dropout probability before the classifier.
        device: Device of the classifier's parameters.
        dtype: Data type of the classifier's parameters.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Sequential],
        channels: Sequence[int],
        reductions: Sequence[int],
        final: nn.Module | None = None,
        num_features: int | None = None,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.final = final or nn.Identity()
        self.feature_info = [
            {'num_chs': num_chs, 'reduction': reduction, 'module': f'stages.{i}'}
            for i, (num_chs, reduction) in enumerate(zip(channels, reductions, strict=True))
        ]
        self.num_features = num_features or channels[-1]
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, device=device, dtype=dtype
        )
        self.head_hidden_size = self.head.num_features

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Give timm's patterns for parameter groups: per stage if `coarse`, else per block."""
        block = r'^stages\.(\d+)' if coarse else r'^stages\.(\d+)\.(\d+)'
        return {'stem': r'^stem', 'blocks': [(block, None), (r'^final', (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn on recomputing each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the linear layer that gives the logits."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one.

        Args:
            num_classes: Number of logits; 0 for pooled features.
            global_pool: timm's pooling name; None keeps the current one.
        """
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Run the trunk and keep the outputs of some stages.

        Args:
            x: Images, `[B, C, H, W]`.
            indices: The last n stages for an int, all for None, else the stages with these indices.
            norm: Whether to pass the last stage's output through the final norm, where the network has one.
            stop_early: Whether to stop after the last stage asked for.
            output_fmt: Must be 'NCHW'.
            intermediates_only: Whether to return the stages' outputs only.

        Returns:
            The stages' outputs, `[B, C_i, H_i, W_i]` each, preceded by the trunk's output unless `intermediates_only`
            (with `stop_early` that is the output of the last stage run, when it is not the network's last).

        Raises:
            ValueError: If `output_fmt` is not 'NCHW'.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt={output_fmt!r}: a convolutional network only has 'NCHW' features.")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last_index = len(self.stages) - 1
        # A final convolution changes the channels that feature_info promises, a norm does not.
        norm = norm and isinstance(self.final, nn.BatchNorm2d)

        intermediates = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages[: max_index + 1] if stop_early else self.stages):
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            if i in take_indices:
                intermediates.append(self.final(x) if norm and i == last_index else x)
        if intermediates_only:
            return intermediates
        if max_index == last_index or not stop_early:
            x = self.final(x)
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove, in place, what the outputs of some stages do not need.

        What follows the last stage asked for always goes, and the classifier with it.

        Args:
            indices: The last n stages for an int, else the stages with these indices.
            prune_norm: Whether to remove the final norm, too.
            prune_head: Whether to remove the pooling and the classifier, too.

        Returns:
            The indices of the stages asked for, from 0.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        ends_early = max_index < len(self.stages) - 1
        # A final norm is part of the last stage's features; a final convolution only serves the head.
        serves_head = not isinstance(self.final, (nn.BatchNorm2d, nn.Identity))
        self.stages = self.stages[: max_index + 1]
        if ends_early or prune_norm or (prune_head and serves_head):
            self.final = nn.Identity()
            if ends_early or serves_head:
                self.num_features = self.head.in_features = self.feature_info[max_index]['num_chs']
                prune_head = True
        if prune_head:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Run the trunk.

        Args:
            x: Images, `[B, C, H, W]`.

        Returns:
            Features, `[B, num_features, H / reduction, W / reduction]`.
        """
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.stages, x, flatten=True)
        else:
            x = self.stages(x)
        return self.final(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify.

        Args:
            x: Features of `forward_features`, `[B, num_features, h, w]`.
            pre_logits: Whether to return the pooled features.

        Returns:
            Logits, `[B, num_classes]`, or pooled features, `[B, head_hidden_size]`.
        """
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images `[B, C, H, W]` as logits `[B, num_classes]`."""
        return self.forward_head(self.forward_features(x))
