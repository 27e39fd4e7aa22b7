"""Every family of timm, really run: one small architecture of each model class through all checks of the sweep.

By default those of `KINDS`, one for each thing that can be special; the others are among the slow tests.
"""
from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn

import timm_dfpt
from benchmarks.coverage import architectures, build, create, family
from timm_dfpt.backbone.rules import RULES, rule_for
from timm_dfpt.testing import check_teacher

# The smallest architecture of each family and model class, made smaller still where it is large.
TEST_CASES: dict[str, dict[str, Any]] = {
    'beit_base_patch16_224': {'embed_dim': 48, 'depth': 4, 'num_heads': 2},
    'cait_xxs24_224': {'depth': 6},
    'coat_lite_tiny': {},
    'coat_tiny': {},
    'convit_tiny': {'depth': 6, 'local_up_to_layer': 5},
    'convmixer_768_32': {},
    'cpubone_nano': {},
    'crossvit_tiny_240': {'depth': ((1, 1, 0), (1, 1, 0))},
    'cs3darknet_focus_s': {},
    'csatv2': {},
    'cspnext_tiny': {},
    'davit_tiny': {'embed_dims': (16, 32, 64, 128), 'depths': (1, 1, 1, 1), 'num_heads': (1, 2, 4, 8)},
    'deepseek_vit_412m': {'embed_dim': 64, 'depth': 4, 'num_heads': 2},
    'deit_tiny_distilled_patch16_224': {'depth': 4},
    'densenet121': {'block_config': (2, 2, 2, 2)},
    'dla46x_c': {},
    'dpn48b': {},
    'eca_botnext26ts_256': {},
    'edgenext_xx_small': {},
    'efficientformer_l1': {'depths': (1, 1, 1, 2)},
    'efficientformerv2_s0': {},
    'efficientvim_m1': {},
    'efficientvim_m1_dist': {},
    'efficientvit_b0': {},
    'efficientvit_l1': {'widths': (8, 16, 32, 64, 128), 'depths': (1, 1, 1, 1, 1)},
    'efficientvit_m0': {},
    'ese_vovnet19b_slim_dw': {},
    'fasternet_t0': {},
    'fastvit_t8': {'layers': (1, 1, 1, 1)},
    'focalnet_tiny_srf': {},
    'gcvit_xxtiny': {},
    'gemma4_vit_167m': {'embed_dim': 96, 'depth': 4, 'num_heads': 2},
    'ghostnet_050': {},
    'gmlp_ti16_224': {},
    'hardcorenas_a': {},
    'hgnetv2_b0': {},
    'hiera_tiny_224': {'stages': (1, 1, 2, 1), 'embed_dim': 24},
    'hrnet_w18_small': {},
    'iformer_t': {},
    'inception_next_atto': {},
    'inception_resnet_v2': {},
    'inception_v3': {},
    'inception_v4': {},
    'lcnetv2_small': {},
    'legacy_seresnet18': {},
    'legacy_xception': {},
    'levit_128s': {},
    'levit_256d': {},
    'lowformer_b0': {},
    'mobilenetv3_small_050': {},
    'mobilenetv5_base': {'channel_multiplier': 0.25},
    'mobilevit_xxs': {},
    'mvitv2_tiny': {},
    'naflexvit_base_patch16_parfac_gap': {'embed_dim': 48, 'depth': 4, 'num_heads': 2},
    'nasnetalarge': {'num_features': 480, 'stem_size': 24},
    'nest_tiny': {},
    'nextvit_small': {},
    'pit_ti_224': {},
    'pnasnet5large': {},
    'poolformerv2_s12': {},
    'pvt_v2_b0': {},
    'qwen3_vit_88m': {'embed_dim': 64, 'depth': 4, 'num_heads': 2},
    'rdnet_tiny': {},
    'regnetx_002': {},
    'repghostnet_050': {},
    'repvit_m1': {'depth': (1, 1, 2, 1)},
    'res2next50': {'layers': (1, 1, 1, 1)},
    'resnest14d': {},
    'resnetv2_18': {},
    'rexnet_100': {},
    'sam2_hiera_tiny': {'stages': (1, 1, 2, 1), 'embed_dim': 24},
    'samvit_base_patch16_224': {'embed_dim': 48, 'depth': 4, 'num_heads': 2},
    'selecsls42': {},
    'sequencer2d_s': {'layers': (1, 1, 1, 1), 'embed_dims': (24, 48, 48, 48)},
    'shvit_s1': {},
    'skresnet18': {},
    'starnet_s050': {},
    'swiftformer_xs': {},
    'swin_tiny_patch4_window7_224': {'embed_dim': 24, 'depths': (1, 1, 2, 1)},
    'swinv2_cr_tiny_224': {'embed_dim': 24, 'depths': (1, 1, 2, 1)},
    'swinv2_tiny_window8_256': {'embed_dim': 24, 'depths': (1, 1, 2, 1)},
    'test_byobnet': {},
    'test_coatnet': {},
    'test_convnext': {},
    'test_efficientnet': {},
    'test_mambaout': {},
    'test_nfnet': {},
    'test_resnet': {},
    'test_vit': {},
    'test_vit_relpos': {},
    'tiny_vit_5m_224': {},
    'tnt_s_legacy_patch16_224': {'depth': 4},
    'tresnet_m': {'layers': (1, 1, 1, 1)},
    'twins_svt_small': {'depths': (1, 1, 2, 1)},
    'vgg11': {'mlp_ratio': 0.02},
    'visformer_tiny': {},
    'vit_tiny_patch16_dinov3_qkvb': {'depth': 4},
    'vit_tiny_r_s16_p8_224': {},
    'vitamin_small_224': {},
    'volo_d1_224': {},
    'xception41p': {},
    'xcit_nano_12_p8_224': {'depth': 4},
}
# Of the default tests: why. The name of a class is that of its rule.
KINDS = {
    'coat_tiny': 'CoaT',
    'efficientvim_m1': 'EfficientViM',
    'gemma4_vit_167m': 'Gemma4VitClassifier',
    'hiera_tiny_224': 'Hiera',
    'hrnet_w18_small': 'HighResolutionNet',
    'mvitv2_tiny': 'MultiScaleVit',
    'nasnetalarge': 'NASNetALarge',
    'pit_ti_224': 'PoolingVisionTransformer',
    'selecsls42': 'SelecSls',
    'twins_svt_small': 'Twins',
    'legacy_xception': 'Xception',
    'xception41p': 'XceptionAligned',
    'cait_xxs24_224': 'the class token joins after the stages',
    'crossvit_tiny_240': 'two branches',
    'deit_tiny_distilled_patch16_224': 'two class tokens, two heads',
    'levit_128s': 'tokens of three resolutions',
    'mobilenetv3_small_050': 'a head with a convolution',
    'naflexvit_base_patch16_parfac_gap': 'patches of any size, register tokens',
    'swin_tiny_patch4_window7_224': 'NHWC, one size only',
    'test_byobnet': 'layers from a description',
    'test_convnext': 'NCHW with LayerNorm',
    'test_efficientnet': 'NCHW, depthwise',
    'test_mambaout': 'NHWC, any size',
    'test_nfnet': 'standardised weights',
    'test_resnet': 'NCHW with BatchNorm',
    'test_vit': 'a class token',
    'tnt_s_legacy_patch16_224': 'two streams, one of which the blocks do not see',
    'vgg11': 'no normalisation, layers without blocks',
    'volo_d1_224': 'outlook attention, a class token afterwards',
}
# Nothing makes it smaller.
LARGE_RULES = {'PNASNet5Large'}


def make(name: str, **kwargs: Any) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return build(name, create(name, 'meta'), num_classes=5, **kwargs)


@pytest.mark.parametrize(
    'name', [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in TEST_CASES]
)
def test_family(name: str) -> None:
    model, x = make(name, **TEST_CASES[name])
    if KINDS.get(name) in RULES:
        assert rule_for(model) is RULES[KINDS[name]]
    assert check_teacher(model, x)['stages']


def test_every_rule_is_a_kind() -> None:
    assert {kind for kind in KINDS.values() if kind in RULES} == set(RULES) - LARGE_RULES


def test_every_family_of_timm_is_here() -> None:
    assert {family(name) for name in architectures()} == {family(name) for name in TEST_CASES}


# One architecture for each layout and each kind of output.
FINE_TUNED = ['test_resnet', 'test_mambaout', 'test_vit', 'test_convnext', 'mvitv2_tiny', 'hiera_tiny_224']


@pytest.mark.parametrize('name', FINE_TUNED)
def test_fine_tuning_a_step(name: str) -> None:
    model, x = make(name, **TEST_CASES[name])
    with torch.no_grad():
        expected = model(x)
    state = copy.deepcopy(model.state_dict())
    teacher = timm_dfpt.wrap(model, variant='dfpt+', input_size=tuple(x.shape[1:])).train()
    optimizer = torch.optim.SGD(teacher.parameter_groups(), lr=0.1)
    before = [p.clone() for p in teacher.prompt_path.backbone.parameters()]
    nn.functional.cross_entropy(teacher(x).prompt, torch.tensor([0, 1])).backward()
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, teacher.prompt_path.backbone.parameters(), strict=True)]
    assert sum(moved) > 0.8 * len(moved)
    assert torch.equal(teacher.original(x), expected)
    assert not torch.equal(teacher.prompt(x), expected)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_attention_that_keeps_its_biases() -> None:
    torch.manual_seed(0)
    shape = {'embed_dim': (16, 24, 32), 'num_heads': (2, 2, 2), 'depth': (1, 1, 1), 'key_dim': 8}
    model = timm.create_model('levit_128s', num_classes=5, **shape).eval()
    x = torch.randn(2, 3, 224, 224)
    # With the gradient: what is kept could not be copied.
    model(x)
    teacher = timm_dfpt.wrap(model, variant='dfpt+')
    biases = [p for name, p in teacher.prompt_path.named_parameters() if name.endswith('attention_biases')]
    with torch.inference_mode():
        before = teacher.prompt(x)
    for _ in range(2):
        teacher.prompt(x)[:, 0].sum().backward()
        assert all(bias.grad is not None for bias in biases)
        for bias in biases:
            torch.nn.init.normal_(bias)
    after = teacher.prompt(x)
    assert not torch.equal(after, before)
    again = timm_dfpt.wrap(timm.create_model('levit_128s', num_classes=5, **shape), variant='dfpt+')
    again.prompt_path.load_state_dict(teacher.prompt_path.state_dict())
    assert torch.equal(again.prompt(x), after)
