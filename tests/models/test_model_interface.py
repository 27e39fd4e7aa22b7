import copy

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.layers import DropPath
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn

import timm_dfpt.models  # noqa: F401

ALL = timm.list_models('cifar_*')
# One small network of each class.
SMALL = [
    'cifar_resnet8',
    'cifar_resnet18',
    'cifar_wrn_16_1',
    'cifar_vgg8',
    'cifar_mobilenetv2_050',
    'cifar_shufflenetv1',
    'cifar_shufflenetv2',
]
STAGED = [name for name in SMALL if name not in ('cifar_resnet18', 'cifar_mobilenetv2_050')]


def create(name, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Fresh statistics would hide a norm that is skipped.
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def weights_of(model):
    """Overlay of timm's pretrained_cfg that names this model's weights as the pretrained ones."""
    return {'state_dict': dict(model.state_dict())}


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Recorder:
    """Forward hook that keeps what a module was given and what it returned, each time it is called."""

    def __init__(self, module):
        self.inputs, self.outputs = [], []
        module.register_forward_hook(self)

    def __call__(self, module, args, output):
        self.inputs.append(args)
        self.outputs.append(output.clone())


@pytest.mark.parametrize('name', ALL)
def test_cfg_describes_the_network(name):
    model = timm.create_model(name, device='meta').eval()
    cfg = model.pretrained_cfg
    assert cfg['architecture'] == name
    assert model.num_classes == cfg['num_classes'] == 100
    data = resolve_data_config(model=model)
    assert data['input_size'] == (3, 32, 32)
    assert (data['mean'], data['std']) == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
    assert data['crop_pct'] == 1.0

    first, last = model.get_submodule(cfg['first_conv']), model.get_submodule(cfg['classifier'])
    assert last is model.get_classifier()
    assert isinstance(last, nn.Linear)
    x = torch.empty(1, 3, 32, 32, device='meta')
    saw = []
    first.register_forward_pre_hook(lambda module, args: saw.append(args[0] is x))
    assert model.forward_features(x).shape == (1, model.num_features, *cfg['pool_size'])
    assert saw == [True]


@pytest.mark.parametrize('name', ALL)
def test_intermediates_are_the_outputs_of_the_feature_modules(name):
    model = create(name)
    stages = [Recorder(model.get_submodule(info['module'])) for info in model.feature_info]
    last_children = [
        Recorder(list(model.get_submodule(info['module']).children())[-1])
        for info in model.feature_info
        if isinstance(model.get_submodule(info['module']), nn.Sequential)
    ]
    x = images(1, 3, 16, 32)
    with torch.no_grad():
        features, intermediates = model.forward_intermediates(x)
        torch.testing.assert_close(model.forward_features(x), features, rtol=0, atol=0)
        torch.testing.assert_close(model(x), model.forward_head(features), rtol=0, atol=0)

    assert len(intermediates) == len(model.feature_info) >= 3
    for info, recorder, intermediate in zip(model.feature_info, stages, intermediates, strict=True):
        assert len(recorder.outputs) == 3
        assert len(recorder.inputs[0]) == 1
        torch.testing.assert_close(recorder.outputs[0], intermediate, rtol=0, atol=0)
        reduction = info['reduction']
        assert intermediate.shape == (1, info['num_chs'], 16 // reduction, 32 // reduction)
    for recorder, intermediate in zip(last_children[::-1], intermediates[::-1], strict=False):
        assert len(recorder.outputs) == 3
        torch.testing.assert_close(recorder.outputs[0], intermediate, rtol=0, atol=0)


@pytest.mark.parametrize('name', STAGED)
def test_options_of_forward_intermediates(name):
    model, x = create(name), images(1, 3, 16, 16)
    with torch.no_grad():
        features, everything = model.forward_intermediates(x)
        (last,) = model.forward_intermediates(x, indices=1, intermediates_only=True)
        torch.testing.assert_close(last, everything[-1], rtol=0, atol=0)

        calls = Recorder(model.stages[-1])
        early, taken = model.forward_intermediates(x, indices=[0, -2], stop_early=True)
        assert calls.outputs == []
        torch.testing.assert_close(taken, [everything[0], everything[-2]], rtol=0, atol=0)
        torch.testing.assert_close(early, everything[-2], rtol=0, atol=0)

        normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    torch.testing.assert_close(normed[:-1], everything[:-1], rtol=0, atol=0)
    # Only the wide ResNet ends with a norm.
    expected = features if 'wrn' in name else everything[-1]
    torch.testing.assert_close(normed[-1], expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match='NHWC'):
        model.forward_intermediates(x, output_fmt='NHWC')


@pytest.mark.parametrize('name', SMALL)
def test_features_only(name):
    model, x = create(name), images(1, 3, 32, 32)
    extractor = timm.create_model(name, pretrained=True, features_only=True, pretrained_cfg_overlay=weights_of(model))
    extractor.eval()
    with torch.no_grad():
        expected = model.forward_intermediates(x, intermediates_only=True)
        features = extractor(x)
        chosen = timm.create_model(name, features_only=True, out_indices=(0, 2)).eval()(x)
    assert extractor.feature_info.channels() == [info['num_chs'] for info in model.feature_info]
    assert extractor.feature_info.reduction() == [info['reduction'] for info in model.feature_info]
    torch.testing.assert_close(features, expected)
    assert [f.shape for f in chosen] == [expected[0].shape, expected[2].shape]


@pytest.mark.parametrize('name', SMALL)
def test_classifier_can_be_replaced(name):
    model, x = create(name, num_classes=10), images(2, 3, 32, 32)
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        assert model(x).shape == (2, 10)
        torch.testing.assert_close(pooled, features.mean(dim=(2, 3)), rtol=1e-5, atol=1e-6)

        model.reset_classifier(7)
        assert model.num_classes == 7
        torch.testing.assert_close(model(x), model.get_classifier()(pooled), rtol=0, atol=0)
        model.reset_classifier(0)
        torch.testing.assert_close(model(x), pooled, rtol=0, atol=0)
        model.reset_classifier(0, '')
        torch.testing.assert_close(model(x), features, rtol=0, atol=0)
        model.reset_classifier(5, 'catavgmax')
        assert model.head_hidden_size == model.get_classifier().in_features == 2 * model.num_features
        assert model(x).shape == (2, 5)

        headless = create(name, num_classes=0, global_pool='max')
        torch.testing.assert_close(headless(x), headless.forward_features(x).amax(dim=(2, 3)), rtol=0, atol=0)


@pytest.mark.parametrize('name', SMALL)
def test_gradient_checkpointing_changes_no_gradient(name):
    plain = create(name).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    x = images(2, 3, 32, 32)
    calls = []
    last_stage = checkpointed.get_submodule(checkpointed.feature_info[-1]['module'])
    list(last_stage.children())[-1].register_forward_pre_hook(lambda module, args: calls.append(module))
    for model in (plain, checkpointed):
        model(x).square().mean().backward()
    # The second call is the backward pass computing the block again.
    assert len(calls) == 2
    for (parameter, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert a.grad is not None, parameter
        torch.testing.assert_close(a.grad, b.grad, msg=parameter)

    checkpointed.load_state_dict(plain.state_dict())
    torch.testing.assert_close(
        checkpointed.eval().forward_intermediates(x, intermediates_only=True),
        plain.eval().forward_intermediates(x, intermediates_only=True),
    )


@pytest.mark.parametrize('name', ALL)
def test_any_channels_and_size(name):
    model = timm.create_model(name, in_chans=1, num_classes=10, device='meta').eval()
    for size in [(9, 8), (33, 47), (224, 160)]:
        assert model(torch.empty(2, 1, *size, device='meta')).shape == (2, 10)


@pytest.mark.parametrize('name', SMALL)
def test_gray_odd_sized_images_give_finite_logits(name):
    with torch.no_grad():
        logits = create(name, in_chans=1, num_classes=10)(images(2, 1, 33, 47))
    assert logits.isfinite().all()
    assert (logits[0] != logits[1]).any()


@pytest.mark.parametrize('name', SMALL)
def test_weights_adapt_to_other_channels_and_classes(name):
    source = create(name)
    weights = source.state_dict()
    adapted = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=weights_of(source), in_chans=1, num_classes=10
    )
    first, last = source.pretrained_cfg['first_conv'], source.pretrained_cfg['classifier']
    for key, value in adapted.state_dict().items():
        if key == f'{first}.weight':
            torch.testing.assert_close(value, weights[key].sum(dim=1, keepdim=True))
        elif not key.startswith(last):
            torch.testing.assert_close(value, weights[key], rtol=0, atol=0)


def test_no_weights_come_along():
    with pytest.raises(RuntimeError, match='No pretrained weights exist for cifar_resnet8'):
        timm.create_model('cifar_resnet8', pretrained=True)


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('coarse', [True, False])
def test_parameter_groups_follow_the_depth(name, coarse):
    model = create(name)
    layers = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    names = [n for n, _ in model.named_parameters()]
    assert set(layers) == set(names)
    ids = [layers[n] for n in names if n in layers]
    assert ids == sorted(ids)
    assert layers[names[0]] == 0
    # The head stands alone at the end.
    assert [n for n in names if layers[n] == max(ids)] == names[-2:]
    assert len(set(ids)) >= len(model.stages if name in STAGED else model.feature_info) + (0 if 'vgg' in name else 1)
    scales = [group['lr_scale'] for group in param_groups_layer_decay(model, layer_decay=0.5)]
    assert min(scales) < 0.5 < max(scales) == 1.0


@pytest.mark.parametrize('name', SMALL)
def test_drop_rate_is_dropout_before_the_classifier(name):
    model = create(name, drop_rate=0.5)
    features = torch.rand(8, model.num_features, 2, 2)
    with torch.no_grad():
        kept = (model.train().forward_head(features, pre_logits=True) > 0).float().mean()
        exact = model.eval().forward_head(features, pre_logits=True)
    assert 0.35 < kept < 0.65
    torch.testing.assert_close(exact, features.mean(dim=(2, 3)))


@pytest.mark.parametrize('name', ['cifar_resnet20', 'cifar_resnet18', 'cifar_wrn_16_1', 'cifar_shufflenetv1'])
def test_drop_path_rate_grows_to_the_last_block(name):
    model = create(name, drop_path_rate=0.3)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.3)
    assert len(rates) >= 5
    x = images(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), create(name)(x), rtol=0, atol=0)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        assert (model(x) != model(x)).any()


@pytest.mark.parametrize('name', ['cifar_vgg8', 'cifar_shufflenetv2'])
def test_networks_without_shortcuts_refuse_drop_path(name):
    with pytest.raises(TypeError, match='drop_path_rate'):
        timm.create_model(name, drop_path_rate=0.1)


@pytest.mark.parametrize('name', ['cifar_resnet8x4', 'cifar_resnet50', 'cifar_wrn_16_2', 'cifar_vgg8'])
def test_convolutions_start_as_the_literature_initialises_them(name):
    torch.manual_seed(0)
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            expected = (2 / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.05)
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()


def test_depthwise_convolutions_of_mobilenetv2_start_small():
    torch.manual_seed(0)
    model = timm.create_model('cifar_mobilenetv2_050')
    depthwise = model.blocks[5][2].conv_dw
    assert depthwise.groups == depthwise.out_channels == 480
    assert depthwise.weight.std().item() == pytest.approx((2 / (9 * 480)) ** 0.5, rel=0.05)
    assert model.classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)
