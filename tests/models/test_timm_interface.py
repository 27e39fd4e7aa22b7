"""What timm asks of each of its models, asked of ours: three networks by default, all of them with `-m slow`."""
import copy
import warnings

import pytest
import timm
import torch
from timm.models import get_notrace_functions, get_notrace_modules
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import timm_dfpt.models  # noqa: F401

# They end in a norm, in a convolution, and in the last stage of timm's own ResNet class.
DEFAULT = ('cifar_wrn_16_1', 'cifar_shufflenetv2', 'cifar_resnet18')
NETWORKS = [
    pytest.param(name, marks=[] if name in DEFAULT else pytest.mark.slow) for name in timm.list_models('cifar_*')
]
pytestmark = pytest.mark.parametrize('name', NETWORKS)


def create(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


def images(batch_size=1, size=32):
    return torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(1))


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_forward(name):
    model, x = create(name), images()
    logits = model(x)
    assert logits.shape == (1, 100)
    assert logits.isfinite().all()
    model.set_grad_checkpointing()
    same(model(x), logits)
    same(model.forward_intermediates(x)[0], model.forward_features(x))


def test_backward_reaches_every_parameter(name):
    model = create(name, num_classes=42).train()
    logits = model(images(2, 16))
    assert logits.shape == (2, 42)
    logits.square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_head_is_the_one_that_the_config_names(name):
    model, x = create(name), images()
    cfg, weights = model.default_cfg, model.state_dict()
    assert {f'{cfg["first_conv"]}.weight', f'{cfg["classifier"]}.weight'} <= set(weights)
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        assert features.shape == (1, model.num_features, *cfg['pool_size'])
        assert pooled.shape == (1, model.head_hidden_size)
        model.reset_classifier(0)
        assert model.num_classes == 0
        same(model(x), pooled)
        model.reset_classifier(0, '')
        same(model(x), features)
        assert create(name, num_classes=0, global_pool='')(x).shape == features.shape


@pytest.mark.parametrize('feature_cls', [None, 'getter'])
def test_feature_extraction(name, feature_cls):
    kwargs = {} if feature_cls is None else {'feature_cls': feature_cls}
    extractor = create(name, features_only=True, **kwargs)
    with torch.no_grad():
        features = extractor(images())
    assert len(features) >= 3
    shapes = zip(extractor.feature_info.channels(), extractor.feature_info.reduction(), strict=True)
    assert [f.shape for f in features] == [(1, c, 32 // r, 32 // r) for c, r in shapes]


def test_layers_that_features_do_not_need_can_be_removed(name):
    whole, x = create(name), images(size=16)
    levels = len(whole.feature_info)
    with torch.no_grad():
        expected = whole.forward_intermediates(x, intermediates_only=True)
        normed = whole.forward_intermediates(x, norm=True, intermediates_only=True)
        for indices in ([0], [0, levels - 2], [levels - 1], 1, levels):
            model = copy.deepcopy(whole)
            taken = model.prune_intermediate_layers(indices)
            last = taken[-1]
            assert taken == (list(range(levels - indices, levels)) if isinstance(indices, int) else indices)
            same(model.forward_intermediates(x, taken, norm=True, intermediates_only=True), [normed[i] for i in taken])
            # What is left is a network of its own, which says how wide its output is and takes a new head.
            features = model(x)
            same(features, model.forward_intermediates(x, taken)[0])
            assert features.shape[1] == model.num_features == model.head_hidden_size == expected[last].shape[1]
            if last < levels - 1:
                same(features, expected[last])
                removed = model.feature_info[last + 1]['module']
                assert not any(n.startswith(f'{removed}.') for n, _ in model.named_parameters())
            model.reset_classifier(7, 'avg')
            assert model(x).shape == (1, 7)

        bare = copy.deepcopy(whole)
        bare.prune_intermediate_layers([levels - 1], prune_norm=True)
        same(bare(x), expected[-1])
        assert isinstance(getattr(bare, 'final', None), nn.Identity | None)
        kept = copy.deepcopy(whole)
        kept.prune_intermediate_layers(1, prune_head=False)
        same(kept(x), whole(x))


def test_graphs_give_the_logits(name):
    model, x = create(name, scriptable=True), images(size=16)
    tracer = {'leaf_modules': get_notrace_modules(), 'autowrap_functions': get_notrace_functions()}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='`torch.jit', category=FutureWarning)
        logits = model(x)
        same(torch.jit.script(model)(x), logits)
        same(torch.jit.trace(model, x)(x), logits)
        last = get_graph_node_names(model, tracer_kwargs=tracer)[1][-1]
        symbolic = create_feature_extractor(model, [last], tracer_kwargs=tracer)
        same(symbolic(x)[last], logits)
