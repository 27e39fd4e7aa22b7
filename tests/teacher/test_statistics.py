"""BatchNorm statistics estimated anew: against plain means of what the layers see."""
import copy

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

import timm_dfpt


def batches(count=4, size=6, shift=2.0):
    torch.manual_seed(0)
    return [torch.randn(size, 3, 32, 32) * 1.5 + shift for _ in range(count)]


class Net(nn.Module):
    """A convolution and its norm, with dropout before them and a layer that keeps no statistics after them."""

    def __init__(self, drop=0.5):
        super().__init__()
        torch.manual_seed(1)
        self.drop, self.conv, self.norm = nn.Dropout(drop), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3)
        self.other = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x):
        return self.other(self.norm(self.conv(self.drop(x)))).mean((2, 3))


def test_statistics_are_the_means_of_those_of_the_batches():
    net, loader = Net().train(), batches()
    before = copy.deepcopy(net.state_dict())
    adapted = timm_dfpt.adapt_statistics(net, ((x, 'a label') for x in loader))
    with torch.no_grad():
        # Dropout does nothing, though the network was in training.
        seen = [net.conv(x) for x in loader]
    torch.testing.assert_close(adapted.norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0))
    torch.testing.assert_close(adapted.norm.running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0))
    assert adapted.norm.num_batches_tracked == 4
    assert (adapted.training, adapted.norm.training, adapted.norm.momentum) == (True, True, 0.3)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    for (name, param), other in zip(adapted.named_parameters(), net.parameters(), strict=True):
        assert torch.equal(param, other), name
        assert param.requires_grad
        assert param.grad is None


@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet', 'test_mambaout'])
def test_images_of_another_normalisation_are_those_it_knows(name):
    """With statistics of its own, a first BatchNorm takes back what was done to the images; deterministic, too."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, drop_rate=0.5, drop_path_rate=0.3).train()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    if not layers:
        with pytest.raises(ValueError, match='has no BatchNorm with running statistics'):
            timm_dfpt.adapt_statistics(model, batches())
        return
    loader = batches()
    state = torch.random.get_rng_state()
    adapted, again = (timm_dfpt.adapt_statistics(model, loader).eval() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state), 'dropout has drawn random numbers'
    darker = timm_dfpt.adapt_statistics(model, [x * 0.5 for x in batches()]).eval()
    x = batches(1)[0]
    with torch.no_grad():
        assert torch.equal(adapted(x), again(x))
        if name == 'test_resnet':
            torch.testing.assert_close(darker(x * 0.5), adapted(x), rtol=1e-2, atol=1e-2)
            assert (model.eval()(x * 0.5) - model(x)).abs().max() > 0.02


def test_half_precision_is_averaged_in_full():
    net = Net(drop=0.0).to(torch.bfloat16).eval()
    adapted = timm_dfpt.adapt_statistics(net, batches(200, 2))
    assert adapted.norm.running_mean.dtype == torch.bfloat16
    with torch.no_grad():
        expected = torch.stack([net.conv(x.bfloat16()).float().mean((0, 2, 3)) for x in batches(200, 2)]).mean(0)
    torch.testing.assert_close(adapted.norm.running_mean.float(), expected, rtol=5e-3, atol=5e-3)


def test_no_batch_and_infinite_images_are_refused():
    with pytest.raises(ValueError, match='no batch'):
        timm_dfpt.adapt_statistics(Net(), [])
    with pytest.raises(ValueError, match='not finite'):
        timm_dfpt.adapt_statistics(Net(), [torch.full((2, 3, 8, 8), float('inf'))])


@pytest.mark.parametrize('variant', ['dfpt', 'dfpt+'])
def test_of_a_teacher_they_are_those_of_its_prompt_path(variant):
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=5).eval()
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    expected = timm_dfpt.adapt_statistics(model, batches())
    teacher = timm_dfpt.wrap(model, prompt=timm_dfpt.PromptConfig(norms='own'), variant=variant)
    adapted = timm_dfpt.adapt_statistics(teacher, batches())
    x = batches(1)[0]
    with torch.no_grad():
        original, path = adapted.eval()(x)
        assert torch.equal(original, teacher.eval().original(x))
        assert torch.equal(teacher.prompt(x), original)
        torch.testing.assert_close(path, expected.eval()(x), rtol=1e-5, atol=1e-5)
        assert (path - original).abs().max() > 0.01


def test_a_path_with_the_statistics_of_its_teacher_is_refused():
    teacher = timm_dfpt.wrap(timm.create_model('test_resnet', num_classes=5))
    with pytest.raises(ValueError, match=r"wrap with PromptConfig\(norms='own'\)"):
        timm_dfpt.adapt_statistics(teacher, batches())


def test_batches_that_are_not_tensors_are_refused():
    for batch in ({'image': batches(1)[0]}, batches(1)[0].numpy(), ()):
        with pytest.raises(TypeError, match=f'The loader gives {type(batch).__name__} and not tensors of images'):
            timm_dfpt.adapt_statistics(Net(), [batch])


def test_dropout_in_a_norm_layer_draws_nothing():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4, drop_layer=nn.Dropout), nn.Conv2d(4, 4, 3))
    net.append(BatchNormAct2d(4))
    adapted = [timm_dfpt.adapt_statistics(net, batches()) for _ in range(2)]
    assert torch.equal(adapted[0][3].running_mean, adapted[1][3].running_mean)
    assert adapted[0][1].drop.training
