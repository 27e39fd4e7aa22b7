"""The community's CIFAR networks restated as plain functions of named weights, float64, evaluation mode.

`Weights` draws each parameter when a network asks for it, so that running a network once gives both its logits and a
random state dict with the community's names. Nothing of the package or of timm is used.
"""

import torch
from torch.nn import functional as F


class Weights(dict):
    def __init__(self, seed=0):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, name, *shape, std=1.0):
        self[name] = torch.randn(*shape, generator=self.generator, dtype=torch.float64) * std

    def conv(self, name, x, out_chs, kernel, stride=1, groups=1, bias=False):
        fan_in = x.shape[1] // groups * kernel**2
        self.normal(f'{name}.weight', out_chs, x.shape[1] // groups, kernel, kernel, std=fan_in**-0.5)
        if bias:
            self.normal(f'{name}.bias', out_chs, std=0.1)
        return F.conv2d(x, self[f'{name}.weight'], self.get(f'{name}.bias'), stride, kernel // 2, groups=groups)

    def bn(self, name, x):
        chs = x.shape[1]
        for part in ('weight', 'bias', 'running_mean', 'running_var'):
            self.normal(f'{name}.{part}', chs, std=0.2)
        self[f'{name}.weight'] += 1
        self[f'{name}.running_var'] = self[f'{name}.running_var'].abs() + 0.5
        self[f'{name}.num_batches_tracked'] = torch.tensor(7)
        return F.batch_norm(
            x, self[f'{name}.running_mean'], self[f'{name}.running_var'], self[f'{name}.weight'], self[f'{name}.bias']
        )

    def linear(self, name, x, out_features):
        self.normal(f'{name}.weight', out_features, x.shape[1], std=x.shape[1] ** -0.5)
        self.normal(f'{name}.bias', out_features, std=0.1)
        return x @ self[f'{name}.weight'].T + self[f'{name}.bias']


def pool(x):
    return x.mean(dim=(2, 3))


def residual(w, name, x, widths, kernels, stride, shortcut):
    """Post-activation block: convolutions of these widths and kernels, stride on the first 3x3."""
    out = x
    stride_at = kernels.index(3)
    for i, (width, kernel) in enumerate(zip(widths, kernels, strict=True)):
        out = w.conv(f'{name}.conv{i + 1}', out, width, kernel, stride if i == stride_at else 1)
        out = w.bn(f'{name}.bn{i + 1}', out)
        if i < len(widths) - 1:
            out = out.relu()
    if stride != 1 or x.shape[1] != widths[-1]:
        x = w.bn(f'{name}.{shortcut}.1', w.conv(f'{name}.{shortcut}.0', x, widths[-1], 1, stride))
    return (out + x).relu()


def resnet(w, x, depth, widths, num_classes):
    x = w.bn('bn1', w.conv('conv1', x, widths[0], 3)).relu()
    for i, width in enumerate(widths[1:]):
        for j in range((depth - 2) // 6):
            stride = 2 if i > 0 and j == 0 else 1
            x = residual(w, f'layer{i + 1}.{j}', x, (width, width), (3, 3), stride, 'downsample')
    return w.linear('fc', pool(x), num_classes)


def resnet_imagenet_layout(w, x, depths, bottleneck, num_classes):
    x = w.bn('bn1', w.conv('conv1', x, 64, 3)).relu()
    for i, depth in enumerate(depths):
        width = 64 * 2**i
        for j in range(depth):
            stride = 2 if i > 0 and j == 0 else 1
            widths, kernels = ((width, width, 4 * width), (1, 3, 1)) if bottleneck else ((width, width), (3, 3))
            x = residual(w, f'layer{i + 1}.{j}', x, widths, kernels, stride, 'shortcut')
    return w.linear('linear', pool(x), num_classes)


def wrn(w, x, depth, width, num_classes):
    x = w.conv('conv1', x, 16, 3)
    for i in range(3):
        chs = 16 * width * 2**i
        for j in range((depth - 4) // 6):
            name, stride = f'block{i + 1}.layer.{j}', 2 if i > 0 and j == 0 else 1
            activated = w.bn(f'{name}.bn1', x).relu()
            if x.shape[1] != chs:
                x = w.conv(f'{name}.convShortcut', activated, chs, 1, stride)
            out = w.bn(f'{name}.bn2', w.conv(f'{name}.conv1', activated, chs, 3, stride)).relu()
            x = x + w.conv(f'{name}.conv2', out, chs, 3)
    return w.linear('fc', pool(w.bn('bn1', x).relu()), num_classes)


def vgg(w, x, depths, num_classes):
    for i, (depth, width) in enumerate(zip(depths, (64, 128, 256, 512, 512), strict=True)):
        if i in (1, 2, 3):
            x = F.max_pool2d(x, 2)
        for j in range(depth):
            x = w.bn(f'block{i}.{3 * j + 1}', w.conv(f'block{i}.{3 * j}', x, width, 3, bias=True)).relu()
    return w.linear('classifier', pool(x), num_classes)


def mobilenetv2_half(w, x, num_classes):
    x = w.bn('conv1.1', w.conv('conv1.0', x, 16, 3, stride=2)).relu()
    settings = [(1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1)]
    for i, (expansion, chs, depth, first_stride) in enumerate(settings):
        for j in range(depth):
            name, stride, mid = f'blocks.{i}.{j}.conv', first_stride if j == 0 else 1, expansion * x.shape[1]
            out = w.bn(f'{name}.1', w.conv(f'{name}.0', x, mid, 1)).relu()
            out = w.bn(f'{name}.4', w.conv(f'{name}.3', out, mid, 3, stride, groups=mid)).relu()
            out = w.bn(f'{name}.7', w.conv(f'{name}.6', out, chs, 1))
            x = x + out if stride == 1 and x.shape[1] == chs else out
    x = w.bn('conv2.1', w.conv('conv2.0', x, 1280, 1)).relu()
    return w.linear('classifier.0', pool(x), num_classes)


def shuffle(x, groups):
    order = torch.arange(x.shape[1]).view(groups, -1).T.flatten()
    return x[:, order]


def shufflenetv1(w, x, num_classes):
    x = w.bn('bn1', w.conv('conv1', x, 24, 1)).relu()
    for i, (depth, width) in enumerate(zip((4, 8, 4), (240, 480, 960), strict=True)):
        for j in range(depth):
            name, stride, chs = f'layer{i + 1}.{j}', 2 if j == 0 else 1, width - x.shape[1] if j == 0 else width
            groups, mid = 1 if x.shape[1] == 24 else 3, chs // 4
            out = shuffle(w.bn(f'{name}.bn1', w.conv(f'{name}.conv1', x, mid, 1, groups=groups)).relu(), groups)
            out = w.bn(f'{name}.bn2', w.conv(f'{name}.conv2', out, mid, 3, stride, groups=mid)).relu()
            out = w.bn(f'{name}.bn3', w.conv(f'{name}.conv3', out, chs, 1, groups=3))
            x = torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1) if stride == 2 else out + x
            x = x.relu()
    return w.linear('linear', pool(x), num_classes)


def shufflenetv2(w, x, num_classes):
    x = w.bn('bn1', w.conv('conv1', x, 24, 1)).relu()
    for i, (depth, width) in enumerate(zip((4, 8, 4), (116, 232, 464), strict=True)):
        half = width // 2
        for j in range(depth):
            name = f'layer{i + 1}.{j}'
            if j == 0:
                left = w.bn(f'{name}.bn1', w.conv(f'{name}.conv1', x, x.shape[1], 3, 2, groups=x.shape[1]))
                left = w.bn(f'{name}.bn2', w.conv(f'{name}.conv2', left, half, 1)).relu()
                right, first, stride = x, 3, 2
            else:
                left, right, first, stride = x[:, :half], x[:, half:], 1, 1
            right = w.bn(f'{name}.bn{first}', w.conv(f'{name}.conv{first}', right, half, 1)).relu()
            right = w.bn(
                f'{name}.bn{first + 1}', w.conv(f'{name}.conv{first + 1}', right, half, 3, stride, groups=half)
            )
            right = w.bn(f'{name}.bn{first + 2}', w.conv(f'{name}.conv{first + 2}', right, half, 1)).relu()
            x = shuffle(torch.cat([left, right], 1), 2)
    x = w.bn('bn2', w.conv('conv2', x, 1024, 1)).relu()
    return w.linear('linear', pool(x), num_classes)


NARROW, WIDE = (16, 16, 32, 64), (32, 64, 128, 256)

# Registered name here: the community's network and its arguments.
NETWORKS = {
    **{f'cifar_resnet{depth}': (resnet, depth, NARROW) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f'cifar_resnet{depth}x4': (resnet, depth, WIDE) for depth in (8, 32)},
    'cifar_resnet18': (resnet_imagenet_layout, (2, 2, 2, 2), False),
    'cifar_resnet50': (resnet_imagenet_layout, (3, 4, 6, 3), True),
    **{f'cifar_wrn_{depth}_{width}': (wrn, depth, width) for depth in (16, 40) for width in (1, 2)},
    'cifar_vgg8': (vgg, (1, 1, 1, 1, 1)),
    'cifar_vgg11': (vgg, (1, 1, 2, 2, 2)),
    'cifar_vgg13': (vgg, (2, 2, 2, 2, 2)),
    'cifar_vgg16': (vgg, (2, 2, 3, 3, 3)),
    'cifar_vgg19': (vgg, (2, 2, 4, 4, 4)),
    'cifar_mobilenetv2_050': (mobilenetv2_half,),
    'cifar_shufflenetv1': (shufflenetv1,),
    'cifar_shufflenetv2': (shufflenetv2,),
}


def run(name, x, num_classes=100):
    """Return logits `[B, num_classes]` of the community's network with random weights, and those weights."""
    network, *args = NETWORKS[name]
    weights = Weights()
    logits = network(weights, x, *args, num_classes=num_classes)
    return logits, dict(weights)
