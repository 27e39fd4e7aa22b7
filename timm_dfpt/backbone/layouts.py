"""Feature layouts: which one a tensor has; convert between token sequences and 2-D feature maps."""
from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from .types import Layout

__all__ = [
    'TokenOrder', 'compare_layouts', 'find_layout', 'find_prefix_tokens', 'from_patches', 'guess_layout', 'is_doubtful',
    'to_patches', 'token_grid',
]  # fmt: skip

_MAX_PREFIX_TOKENS = 16


def find_layout(shape: torch.Size, channels: int | None, declared: str | None) -> Layout | None:
    """Return `'NCHW'`, `'NHWC'` or `'NLC'`, or `None` when `shape` holds no features of `channels` channels.

    Args:
        shape: Shape of the tensor.
        channels: Number of channels, where it is known.
        declared: What the model says of itself; decides where both 4-D layouts fit.
    """
    if len(shape) == 3:
        return 'NLC' if channels in (None, shape[2]) else None
    if len(shape) != 4:
        return None
    axes: dict[Layout, int] = {'NCHW': 1, 'NHWC': 3}
    fits = [layout for layout, axis in axes.items() if channels in (None, shape[axis])]
    return next((layout for layout in fits if layout == declared), next(iter(fits), None))


def is_doubtful(shape: torch.Size, channels: int | None) -> bool:
    """Say whether the shape of features alone leaves open which axis has the `channels`, which may not be known."""
    if len(shape) not in (3, 4):
        return False
    return channels is None or (shape[1] == shape[-1] == channels)


def compare_layouts(first: torch.Size, second: torch.Size, batches: tuple[int, int]) -> Layout | None:
    """Return the layout of features by their shapes for two inputs, of which the second is wider.

    Args:
        first: Shape for the first input.
        second: Shape for the second input, of as many dimensions.
        batches: Batch sizes of the inputs.

    Returns:
        The layout, or `None` where channels are not the second or the last axis, or images not the first one.
    """
    if (first[0], second[0]) != batches:
        return None
    grown = [axis for axis in range(1, len(first)) if first[axis] != second[axis]]
    if len(first) == 3:
        return 'NLC' if 2 not in grown else None
    if not grown:
        # Without a side that follows the input, such as after pooling.
        return guess_layout(first, (1, 1)) or 'NCHW'
    if 1 not in grown:
        return 'NCHW' if 3 in grown else 'NHWC'
    return 'NHWC' if 3 not in grown else None


def guess_layout(shape: torch.Size, image_size: tuple[int, int]) -> Layout | None:
    """Return the layout of features by which of their axes are as the sides of the image, `None` if that says nothing.

    Args:
        shape: Shape of the features.
        image_size: Height and width of the input.
    """
    if len(shape) == 3:
        return 'NLC'
    height, width = image_size
    nhwc, nchw = (shape[axis] * width == shape[axis + 1] * height for axis in (1, 2))
    layouts: dict[tuple[bool, bool], Layout] = {(True, False): 'NHWC', (False, True): 'NCHW'}
    return layouts.get((nhwc, nchw))


def find_prefix_tokens(tokens: int, declared: int, image_size: tuple[int, int], reduction: int | None) -> int:
    """Return how many of `tokens` tokens come before the image tokens (class and register tokens).

    What the model declares is not always so at the place of the tap: in CaiT, XCiT and ConViT the class token joins
    later. So the grid decides, and first the one that the reduction asks for.

    Args:
        tokens: Number of all tokens.
        declared: What the model says of itself.
        image_size: Height and width of the input in pixels.
        reduction: Input pixels per token along a side, where it is known.
    """
    if reduction:
        for height, width in _grids_of_reduction(image_size, reduction):
            if 0 <= tokens - height * width <= _MAX_PREFIX_TOKENS:
                return tokens - height * width
    candidates = (declared, 0, 1, 2)
    return next((p for p in candidates if token_grid(tokens - p, image_size, None) is not None), declared)


def token_grid(tokens: int, image_size: tuple[int, int], reduction: int | None) -> tuple[int, int] | None:
    """Return the grid `(H, W)` in which `tokens` image tokens stand, or `None` when they form none.

    Args:
        tokens: Number of tokens without class and register tokens.
        image_size: Height and width of the input in pixels.
        reduction: Input pixels per token along a side, where it is known. Where it does not fit, the grid is the one
            whose aspect ratio is nearest to the input's, within rounding of the sides.
    """
    if reduction:
        for height, width in _grids_of_reduction(image_size, reduction):
            if height * width == tokens:
                return height, width
    if tokens < 1 or min(image_size) < 1:
        return None
    ideal = math.isqrt(max(1, tokens * image_size[0] // image_size[1]))
    heights = [h for h in range(max(1, ideal // 2), 2 * ideal + 2) if tokens % h == 0]
    errors = {h: abs(h * image_size[1] - tokens // h * image_size[0]) for h in heights}
    best = min(errors, key=lambda h: errors[h], default=None)
    if best is None or errors[best] >= max(image_size):
        return None
    return best, tokens // best


def _grids_of_reduction(image_size: tuple[int, int], reduction: int) -> Iterable[tuple[int, int]]:
    height, width = image_size
    yield -(-height // reduction), -(-width // reduction)
    yield height // reduction, width // reduction


class TokenOrder(nn.Module):
    """Module that puts tokens with an order of their own into raster order, and back.

    Args:
        to_raster: For each spatial position, row by row, the index of its token `[L]`.
    """

    to_raster: torch.Tensor
    from_raster: torch.Tensor

    def __init__(self, to_raster: torch.Tensor) -> None:
        super().__init__()
        # Not persistent: they follow from the architecture and are not weights.
        self.register_buffer('to_raster', to_raster, persistent=False)
        self.register_buffer('from_raster', torch.argsort(to_raster), persistent=False)


def to_patches(
    tokens: torch.Tensor, coord: torch.Tensor, valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Put patches at given coordinates (NaFlex: images of different sizes in a batch) into feature maps.

    Args:
        tokens: Patch tokens `[B, L, C]`.
        coord: Row and column of each patch `[B, L, 2]`.
        valid: Which patches are not padding `[B, L]`; `None` for all.

    Returns:
        The feature maps `[B, C, H, W]`, zero where an image has no patch; where it has one `[B, 1, H, W]`; and each
        token's index in a feature map `[B, L]`, which for padding is `H * W`.
    """
    batch, _, channels = tokens.shape
    valid = torch.ones_like(coord[..., 0], dtype=torch.bool) if valid is None else valid.bool()
    places = coord * valid.unsqueeze(-1)
    height, width = int(places[..., 0].max()) + 1, int(places[..., 1].max()) + 1
    index = torch.where(valid, places[..., 0] * width + places[..., 1], height * width).long()
    canvas = tokens.new_zeros(batch, height * width + 1, channels)
    canvas = canvas.scatter(1, index.unsqueeze(-1).expand(-1, -1, channels), tokens)
    mask = tokens.new_zeros(batch, height * width + 1).scatter(1, index, 1.0)
    maps = canvas[:, :-1].unflatten(1, (height, width)).permute(0, 3, 1, 2)
    return maps, mask[:, :-1].view(batch, 1, height, width), index


def from_patches(maps: torch.Tensor, index: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """Take the patch tokens out of feature maps again.

    Args:
        maps: Feature maps `[B, C, H, W]`.
        index: What `to_patches` returned `[B, L]`.
        padding: Tokens `[B, L, C]` from which the padding is taken.

    Returns:
        Patch tokens `[B, L, C]`.
    """
    places = maps.shape[-2] * maps.shape[-1]
    flat = maps.flatten(2).transpose(1, 2)
    taken = flat.gather(1, index.clamp(max=places - 1).unsqueeze(-1).expand(-1, -1, flat.shape[-1]))
    return torch.where((index < places).unsqueeze(-1), taken, padding)
