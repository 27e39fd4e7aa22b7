"""A head that is fitted to features: what the copy returns, against ridge regression on features read by hand."""
from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

import timm_dfpt
from tests.tiny import RESNET, VIT
from timm_dfpt.teacher.fitted_head import put_head, reorder_classes
from timm_dfpt.teacher.ridge import fit_ridge

CLASSES = 3
MODELS = {
    'CNN': ('resnet18', RESNET, lambda m, x: m.forward_head(m.forward_features(x), pre_logits=True)),
    'ViT': ('test_vit', {**VIT, 'img_size': 32}, lambda m, x: m.forward_head(m.forward_features(x), pre_logits=True)),
    'convolution': ('test_efficientnet', {}, lambda m, x: m.forward_head(m.forward_features(x), pre_logits=True)),
    'two averaged heads': (
        'deit_tiny_distilled_patch16_224', {**VIT, 'img_size': 32}, lambda m, x: m.forward_features(x)[:, :2].flatten(1)
    ),
    'encoder': (
        'test_vit', {**VIT, 'img_size': 32, 'num_classes': 0},
        lambda m, x: m.forward_head(m.forward_features(x), pre_logits=True),
    ),
}  # fmt: skip


def batches(count: int = 24) -> list[tuple[torch.Tensor, torch.Tensor]]:
    target = torch.arange(count) % CLASSES
    x = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)) + target[:, None, None, None] * 0.3
    return [(x[:10], target[:10]), (x[10:], target[10:])]


@pytest.mark.parametrize('kind', MODELS)
def test_the_copy_returns_what_the_ridge_does(kind: str) -> None:
    name, kwargs, features = MODELS[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, **{'num_classes': 7, **kwargs})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    fitted = timm_dfpt.fit_head(model, batches(), CLASSES)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert fitted.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.eval()
    fitted.eval()
    x, target = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    with torch.no_grad():
        known = features(model, x)
        ridge = fit_ridge(known, target, CLASSES)
        expected = known.double() @ ridge.weight.T + ridge.bias
        torch.testing.assert_close(fitted(x).double(), expected, rtol=1e-3, atol=1e-4)
        head = fitted.fitted_head
        assert (head.accuracy, head.images) == (ridge.accuracy, len(x))
        again = put_head(model, head).eval()
        assert torch.equal(again(x), fitted(x))


def test_paths_of_a_fitted_teacher_start_alike() -> None:
    torch.manual_seed(0)
    fitted = timm_dfpt.fit_head(timm.create_model('resnet18', num_classes=7, **RESNET), batches(), CLASSES)
    x = batches()[0][0]
    out = timm_dfpt.wrap(fitted).eval()(x)
    assert torch.equal(out.original, out.prompt)
    assert out.prompt.shape == (10, CLASSES)


@pytest.mark.parametrize('variant', ['dfpt', 'dfpt+'])
@pytest.mark.parametrize('kind', ['CNN', 'convolution', 'two averaged heads'])
def test_a_smaller_head_is_of_the_prompt_path_alone(kind: str, variant: Any) -> None:
    torch.manual_seed(0)
    name, kwargs, _ = MODELS[kind]
    fitted = timm_dfpt.fit_head(timm.create_model(name, **{'num_classes': 7, **kwargs}), batches(), CLASSES).eval()
    x = batches()[0][0]
    with torch.no_grad():
        expected = fitted(x)
        teacher = timm_dfpt.wrap(fitted, variant=variant).eval()
        teacher.prompt_path.scale_head(0.25)
        out = teacher(x)
    assert torch.equal(out.original, expected)
    torch.testing.assert_close(out.prompt, 0.25 * expected)


def test_a_head_that_is_the_teachers_is_not_scaled() -> None:
    model = timm.create_model('resnet18', num_classes=7, **RESNET)
    before = model.fc.weight.detach().clone()
    for prompt in (timm_dfpt.PromptConfig(new_head=False), timm_dfpt.PromptConfig(head_rank=1)):
        with pytest.raises(ValueError, match='is not a linear one of its own'):
            timm_dfpt.wrap(model, prompt=prompt).prompt_path.scale_head(0.5)
    assert torch.equal(model.fc.weight, before)


def test_a_new_head_alone_starts_from_zero() -> None:
    teacher = timm_dfpt.wrap(timm.create_model('resnet18', num_classes=7, **RESNET), num_classes=CLASSES).eval()
    out = teacher(batches()[0][0])
    assert out.original.shape == (10, 7)
    assert not out.prompt.any()


def test_classes_in_another_order() -> None:
    model = timm.create_model('test_efficientnet', num_classes=4).eval()
    reordered = reorder_classes(model, [2, 0, 3, 1])
    x = batches()[0][0]
    with torch.no_grad():
        assert torch.equal(reordered(x), model(x)[:, [2, 0, 3, 1]])


class Auxiliary(nn.Module):
    """As VOLO: the largest logits of its places are added to those of its first classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.aux_head = nn.Conv2d(3, 4, 4, 4), nn.Linear(4, 5), nn.Linear(4, 5)
        self.num_classes, self.pretrained_cfg = 5, {'classifier': ('head', 'aux_head')}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.stem(x).flatten(2).mT
        out: torch.Tensor = self.head(tokens.mean(1)) + 0.5 * self.aux_head(tokens).amax(1)
        return out


def test_a_classifier_that_is_not_linear_is_silent() -> None:
    fitted: Any = timm_dfpt.fit_head(Auxiliary(), batches(), CLASSES)
    assert not any(param.any() for param in fitted.aux_head.parameters())
    x, target = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    known = fitted.stem(x).flatten(2).mean(2)
    ridge = fit_ridge(known.detach(), target, CLASSES)
    torch.testing.assert_close(fitted(x).double(), known.double() @ ridge.weight.T + ridge.bias, rtol=1e-3, atol=1e-4)


class Squared(nn.Module):
    """A timm-like model whose logits are not linear in what enters its classifier."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.stem, self.fc, self.num_classes = nn.Conv2d(3, 4, 4, 4), classifier, 5

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(self.stem(x).mean((2, 3)))
        return out.square()


@pytest.mark.parametrize(
    ('classifier', 'message'),
    [
        (nn.Linear(4, 5), "not linear in what enters its classifier 'fc'.*Fine-tune it"),
        (nn.Sequential(nn.Linear(4, 5), nn.GELU()), "'fc' of Squared is a Sequential.*Fine-tune it"),
    ],
)
def test_classifiers_that_cannot_be_fitted(classifier: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm_dfpt.fit_head(Squared(classifier), batches(), CLASSES)


def test_labels_that_cannot_be_fitted() -> None:
    model = timm.create_model('resnet18', num_classes=7, **RESNET)
    x, target = batches()[0]
    with pytest.raises(ValueError, match='labels from 0 to 2, outside of num_classes=2'):
        timm_dfpt.fit_head(model, [(x, target)], 2)
    with pytest.raises(ValueError, match='class indices'):
        timm_dfpt.fit_head(model, [(x, torch.rand(10, 3))], 3)
    with pytest.raises(ValueError, match='no batch'):
        timm_dfpt.fit_head(model, [], 3)


class Answering(nn.Module):
    """A model that returns its logits in something."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.stem, self.fc, self.num_classes, self.answer = nn.Conv2d(3, 4, 4, 4), nn.Linear(4, 5), 5, answer

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: torch.Tensor) -> Any:
        return self.answer(self.fc(self.stem(x).mean((2, 3))))


X, LABELS = batches()[0]


@pytest.mark.parametrize(
    ('loader', 'message'),
    [
        ([{'image': X, 'label': LABELS}], r"got a dict of \['image', 'label'\]: give fit_head pairs"),
        ([X], 'got a Tensor: give fit_head pairs'),
        ([(X[:0], LABELS[:0])], 'no batch'),
        ([(X[:, :1], LABELS)], r'Answering does not take what loader gives, images \(10, 1, 32, 32\).*prepare='),
        ([(X / 0, LABELS)], 'gives images that are not finite'),
        ([(torch.ones_like(X), LABELS)], 'are the same for all images'),
    ],
)
def test_loaders_that_nothing_can_be_fitted_to(loader: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm_dfpt.fit_head(Answering(lambda logits: logits), loader, CLASSES)


def test_models_that_nothing_can_be_fitted_to() -> None:
    for answer, kind in ((lambda logits: {'logits': logits}, 'dict'), (lambda logits: (logits, logits), 'tuple')):
        with pytest.raises(ValueError, match=f'returns a {kind}, not logits'):
            timm_dfpt.fit_head(Answering(answer), batches(), CLASSES)
    model = Answering(lambda logits: logits)
    torch.nn.init.constant_(model.stem.weight, torch.nan)
    with pytest.raises(ValueError, match='such as stem.weight: it cannot teach'):
        timm_dfpt.fit_head(model, batches(), CLASSES)


def test_a_copy_has_the_modes_of_the_model() -> None:
    model = timm.create_model('resnet18', num_classes=7, **RESNET).eval()
    # An empty batch in between is no obstacle.
    fitted = timm_dfpt.fit_head(model, [(X[:0], LABELS[:0]), *batches()], CLASSES)
    assert not any(module.training for module in fitted.modules())


def test_features_that_hardly_differ_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = Answering(lambda logits: logits)
    timm_dfpt.fit_head(model, batches(), CLASSES)
    assert not caplog.records
    torch.nn.init.constant_(model.stem.bias, 1e4)
    timm_dfpt.fit_head(model, batches(), CLASSES)
    assert 'features of Answering hardly differ between images' in caplog.text
