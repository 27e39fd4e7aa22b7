"""Where backbones are opened: rules, grids, prefix tokens and refusals."""
from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import timm_dfpt
from timm_dfpt.backbone.layouts import find_layout, find_prefix_tokens, token_grid
from timm_dfpt.backbone.rules import RULES
from timm_dfpt.backbone.stages import find_stages, find_taps
from timm_dfpt.backbone.types import Feature, Stage


def create(name: str, **kwargs: object) -> nn.Module:
    with torch.device('meta'):
        return timm.create_model(name, **kwargs)


def test_stages_of_a_cnn_are_those_of_feature_info() -> None:
    assert find_stages(timm.create_model('test_resnet')) == [
        # The last block and not the nn.Sequential around it, whose call gradient checkpointing passes by.
        Stage('layer1.0', 4, (Feature(0, 32, 'NCHW'),)),
        Stage('layer2.0', 8, (Feature(0, 48, 'NCHW'),)),
        Stage('layer3.0', 16, (Feature(0, 192, 'NCHW'),)),
        Stage('layer4.0', 32, (Feature(0, 96, 'NCHW'),)),
    ]


def test_blocks_of_a_plain_transformer_are_grouped_evenly() -> None:
    model = create('vit_base_patch16_224')
    for count, blocks in ((None, [2, 5, 8, 11]), (2, [5, 11]), (3, [3, 7, 11]), (5, [2, 4, 7, 9, 11])):
        assert [tap.module for tap in find_taps(model, count)] == [f'blocks.{i}' for i in blocks]
    assert len(find_taps(model, 12)) == 12
    assert find_stages(model)[0].features == (Feature(0, 768, 'NLC', 1),)


def test_number_of_stages() -> None:
    assert [s.module for s in find_stages(timm.create_model('test_resnet'), 2)] == ['layer3.0', 'layer4.0']


# Architecture, modules of the stages with a block, layout and prefix tokens: one for each rule and each special case.
TEST_CASES = [
    ('coat_lite_tiny', ['serial_blocks1.1', 'serial_blocks2.1', 'serial_blocks3.1'], 'NLC', 1),
    ('convit_tiny', ['blocks.2', 'blocks.5', 'blocks.8'], 'NLC', 0),  # the class token joins after them
    ('cait_xxs24_224', ['blocks.5', 'blocks.11', 'blocks.17'], 'NLC', 0),
    ('crossvit_tiny_240', ['blocks.0', 'blocks.1'], 'NLC', 1),
    ('deit_tiny_distilled_patch16_224', ['blocks.2', 'blocks.5', 'blocks.8'], 'NLC', 2),
    ('densenet121', ['features.denseblock1', 'features.denseblock2', 'features.denseblock3'], 'NCHW', 0),
    ('efficientvim_m1', ['stages.0.blocks.1', 'stages.1.blocks.1'], 'NCHW', 0),
    ('hiera_tiny_224', ['blocks.0', 'blocks.2', 'blocks.9'], 'NLC', 0),
    ('hrnet_w18_small', ['layer1.0', 'stage2', 'stage3'], 'NCHW', 0),
    ('legacy_xception', ['block2', 'block3', 'block12'], 'NCHW', 0),
    ('mvitv2_tiny', ['stages.0', 'stages.1', 'stages.2'], 'NLC', 0),
    ('pit_ti_224', ['transformers.0', 'transformers.1'], 'NCHW', 0),
    ('selecsls42', ['features.3', 'features.5', 'head.1.2'], 'NCHW', 0),
    ('swin_tiny_patch4_window7_224', ['layers.0', 'layers.1', 'layers.2'], 'NHWC', 0),
    ('tnt_s_legacy_patch16_224', ['blocks.2', 'blocks.5', 'blocks.8'], 'NLC', 1),
    ('twins_svt_small', ['blocks.0.1', 'blocks.1.1', 'blocks.2.9'], 'NLC', 0),
    ('vit_small_patch14_reg4_dinov2', ['blocks.2', 'blocks.5', 'blocks.8'], 'NLC', 5),
    ('volo_d1_224', ['network.0.3', 'network.2.3', 'network.3.7'], 'NHWC', 0),
    ('xception41p', ['blocks.1', 'blocks.2', 'blocks.11'], 'NCHW', 0),
    ('xcit_nano_12_p8_224', ['blocks.2', 'blocks.5', 'blocks.8'], 'NLC', 0),
]


@pytest.mark.parametrize(('name', 'modules', 'layout', 'prefix'), TEST_CASES, ids=[case[0] for case in TEST_CASES])
def test_special_families(name: str, modules: list[str], layout: str, prefix: int) -> None:
    stages = find_stages(create(name))[: len(modules)]
    assert [stage.module for stage in stages] == modules
    assert {f.layout for stage in stages for f in stage.features} == {layout}
    assert {f.prefix_tokens for stage in stages for f in stage.features} == {prefix}


# One of each layout; the others are among the slow tests.
NAMED = ('coat_lite_tiny', 'hrnet_w18_small', 'swin_tiny_patch4_window7_224')


@pytest.mark.parametrize(
    ('name', 'modules'),
    [pytest.param(*case[:2], marks=() if case[0] in NAMED else pytest.mark.slow, id=case[0]) for case in TEST_CASES],
)
def test_named_one_by_one_the_same_stages_hold_the_same(name: str, modules: list[str]) -> None:
    assert find_stages(create(name), modules) == find_stages(create(name))[: len(modules)]


def test_every_branch_gets_its_blocks() -> None:
    hrnet = find_stages(create('hrnet_w18_small'))
    assert [[f.channels for f in stage.features] for stage in hrnet[:3]] == [[128], [16, 32], [16, 32, 64]]
    crossvit = find_stages(create('crossvit_tiny_240'))
    assert [f.channels for f in crossvit[0].features] == [96, 192]


def test_every_rule_has_a_reason_and_a_family() -> None:
    classes = set()
    for names in ('coat*', 'efficientvim*', 'gemma4*', 'hiera*', 'hrnet*', 'mvitv2*', 'nasnet*', 'pnasnet*', 'pit*',
                  'selecsls*', 'twins*', 'legacy_xception', 'xception41'):
        classes.update(c.__name__ for c in type(create(timm.list_models(names)[0])).__mro__)
    assert set(RULES) <= classes
    assert all(rule.why for rule in RULES.values())


def test_hiera_tokens_become_a_feature_map() -> None:
    """Against timm's own forward_intermediates, which rolls the tokens up into maps."""
    torch.manual_seed(0)
    model = timm.create_model('hiera_tiny_224', img_size=96, num_classes=3).eval()
    teacher = timm_dfpt.wrap(model, input_size=(3, 96, 96)).eval()
    seen: list[torch.Tensor] = []
    for block in teacher.prompt_path.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        teacher.prompt(x)
        maps = model.forward_intermediates(x, indices=[0, 1, 2], intermediates_only=True)
    assert len(seen) == len(maps) == 3
    assert all(map(torch.equal, seen, maps))


def test_duplicated_and_wrong_feature_info_is_an_error_that_names_the_way_out() -> None:
    model = timm.create_model('test_resnet')
    model.feature_info = [{'module': 'nowhere', 'num_chs': 8, 'reduction': 2}]
    with pytest.raises(ValueError, match=r"no module 'nowhere'.*stages="):
        find_stages(model)
    model.feature_info = [{'module': 'layer1', 'num_chs': 7, 'reduction': 4}]
    with pytest.raises(ValueError, match=r'of 7 channels.*stages='):
        find_stages(model)


def test_input_size_that_the_model_does_not_take() -> None:
    with pytest.raises(ValueError, match=r'does not run on a calibration input .*input_size='):
        find_stages(create('deit_tiny_patch16_224'), input_size=(3, 64, 64))
    with pytest.raises(ValueError, match=r'does not run on a calibration input'):
        find_stages(timm.create_model('test_resnet'), input_size=(4, 64, 64))
    assert find_stages(timm.create_model('test_resnet', in_chans=1))[0].reduction == 4


@settings(max_examples=200, deadline=None)
@given(
    reduction=st.sampled_from([4, 7, 8, 14, 16, 17, 32]),
    height=st.integers(32, 400),
    width=st.integers(32, 400),
    prefix=st.integers(0, 5),
    known=st.booleans(),
)
def test_grid_of_tokens_is_found_for_any_image(
    reduction: int, height: int, width: int, prefix: int, known: bool
) -> None:
    rows, columns = -(-height // reduction), -(-width // reduction)
    size = (height, width)
    if known:
        assert token_grid(rows * columns, size, reduction) == (rows, columns)
        assert find_prefix_tokens(rows * columns + prefix, 0, size, reduction) == prefix
    elif height == width:
        assert token_grid(rows * columns, size, None) == (rows, columns)
        assert find_prefix_tokens(rows * columns + prefix, prefix, size, None) == prefix
    else:
        grid = token_grid(rows * columns, size, None)
        assert grid is not None
        assert grid[0] * grid[1] == rows * columns


def test_tokens_that_form_no_grid() -> None:
    assert token_grid(7, (64, 64), None) is None
    assert token_grid(0, (64, 64), None) is None
    assert token_grid(15, (64, 64), 16) is None


def test_layouts() -> None:
    assert find_layout(torch.Size((2, 9, 8)), 8, None) == 'NLC'
    assert find_layout(torch.Size((2, 9, 8)), 9, None) is None
    assert find_layout(torch.Size((2, 8, 5, 5)), 8, 'NHWC') == 'NCHW'
    assert find_layout(torch.Size((2, 8, 8, 8)), 8, 'NHWC') == 'NHWC'
    assert find_layout(torch.Size((2, 8, 8, 8)), 8, None) == 'NCHW'
    assert find_layout(torch.Size((2, 8)), 8, None) is None


class _Lying(nn.Module):
    """Two stages whose features lie in any way; the model takes one size, or all."""

    def __init__(self, channels: int, lie: Callable[[torch.Tensor], torch.Tensor], size: int | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 16, 16)
        self.lie, self.size = lie, size
        self.stage1, self.stage2 = _Scaled(), _Scaled()
        self.head = nn.Linear(1, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.size is not None and x.shape[-2:] != (self.size, self.size):
            raise ValueError(f'takes {self.size}')
        x = self.lie(self.stem(x))
        x = self.stage2(self.stage1(x))
        return self.head(x.sum().expand(1, 1))


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


LIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    'NCHW': lambda x: x,
    'NHWC': lambda x: x.permute(0, 2, 3, 1),
    'NLC': lambda x: x.flatten(2).transpose(1, 2),
    'NCL': lambda x: x.flatten(2),
    'LNC': lambda x: x.flatten(2).permute(2, 0, 1),
    'HWNC': lambda x: x.permute(2, 3, 0, 1),
    'pooled': lambda x: x.mean((2, 3), keepdim=True),
    'pooled NHWC': lambda x: x.mean((2, 3), keepdim=True).permute(0, 2, 3, 1),
}


# Also as many channels as there are rows and columns (4), or tokens (16), in the calibration input.
@pytest.mark.parametrize('channels', [3, 4, 16])
@pytest.mark.parametrize('lie', LIES)
def test_two_sizes_tell_which_axis_has_the_channels(lie: str, channels: int) -> None:
    expected = {'pooled': 'NCHW', 'pooled NHWC': 'NHWC'}.get(lie, lie)
    for fixed in (None, 64):
        model = _Lying(channels, LIES[lie], fixed)
        if fixed and lie in ('NCL', 'LNC', 'HWNC'):
            continue  # a single size tells nothing there
        if fixed and channels == 4 and lie in ('NCHW', 'NHWC'):
            with pytest.raises(ValueError, match=r'stage1.*\(2, 4, 4, 4\), does not show which axis .*output_fmt'):
                find_stages(model, ['stage1', 'stage2'])
            model.output_fmt = lie  # type: ignore[assignment]
        if expected in ('NCHW', 'NHWC', 'NLC'):
            features = [stage.features for stage in find_stages(model, ['stage1', 'stage2'])]
            assert features == [(Feature(0, channels, expected),)] * 2  # type: ignore[arg-type]
        else:
            with pytest.raises(ValueError, match='does not hold features'):
                find_stages(model, ['stage1', 'stage2'])


def test_a_vision_transformer_of_torchvision_whose_features_are_nhwc() -> None:
    models = pytest.importorskip('torchvision.models')
    torch.manual_seed(0)
    model = models.SwinTransformer([4, 4], 8, [1, 1, 1, 1], [1, 1, 1, 1], [7, 7], num_classes=4).eval()
    names = [f'features.{i}' for i in (1, 3, 5, 7)]
    assert {f.layout for stage in find_stages(model, names) for f in stage.features} == {'NHWC'}
    assert [stage.features[0].channels for stage in find_stages(model, names)] == [8, 16, 32, 64]
    teacher = timm_dfpt.wrap(model, stages=names, classifier='head').eval()
    for size in ((64, 64), (64, 96)):
        x = torch.randn(2, 3, *size)
        assert torch.equal(teacher(x).prompt, model(x))
    # Blocks get maps.
    shapes: list[torch.Size] = []
    teacher.prompt_path.blocks[0].register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    teacher.prompt(torch.randn(2, 3, 64, 96))
    assert shapes == [(2, 8, 16, 24)]
