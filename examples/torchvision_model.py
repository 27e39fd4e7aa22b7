"""Show a teacher that is not timm's: a torchvision ResNet, or any module whose stages and classifier you name.
Run it with `python examples/torchvision_model.py`: offline, on embedded small letters; the teacher is trained first.
Prints the stages that `wrap` opened, then the test accuracy of student, prompt path and teacher.
"""
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from timm.data import create_dataset
from torchvision import transforms
from torchvision.models.resnet import BasicBlock, ResNet

import timm_dfpt

DATA = Path(__file__).parents[1] / 'train' / 'quickstart_new_classes'
DATA_CONFIG = {'input_size': (3, 32, 32), 'mean': (0.5, 0.5, 0.5), 'std': (0.3, 0.3, 0.3)}
CLASSES, BATCH_SIZE = 26, 64

transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(DATA_CONFIG['mean'], DATA_CONFIG['std'])])


def load(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all images `[N, 3, 32, 32]` and labels `[N]` of a split, which is small enough for that."""
    images, labels = zip(*create_dataset(f'hfds/{DATA}', root=None, split=split, transform=transform), strict=True)
    return torch.stack(images), torch.tensor(labels)


def batches(epochs: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield shuffled batches of the training images, shifted by up to two pixels."""
    crop = transforms.RandomCrop(32, padding=2, fill=float(train_images.min()))
    for _ in range(epochs):
        for rows in torch.randperm(len(train_images)).split(BATCH_SIZE):
            yield crop(train_images[rows]), train_labels[rows]


torch.manual_seed(0)
train_images, train_labels = load('train')
test_images, test_labels = load('test')

# Stands for a model that you have, such as torchvision.models.resnet50(weights='DEFAULT').
model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for images, target in batches(epochs=12):
    torch.nn.functional.cross_entropy(model(images), target).backward()
    optimizer.step()
    optimizer.zero_grad()

# A stage ends with the module that is named; blocks go between stages, so that the last one gets none.
stages = ['layer1', 'layer2', 'layer3', 'layer4']
teacher = timm_dfpt.wrap(model, stages=stages, classifier='fc', input_size=(3, 32, 32))
print(teacher.summary())

student = timm.create_model(
    'resnet18', num_classes=CLASSES, layers=[1, 1, 1, 1], channels=[8, 16, 24, 24], output_stride=16
)
task = timm_dfpt.DFPTDistillationTask(
    student, teacher, temperature=2.0, input_config=DATA_CONFIG, teacher_input_config=DATA_CONFIG
)
optimizers = [
    torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    torch.optim.AdamW(teacher.parameter_groups(), lr=1e-3, weight_decay=0.01),
]
epochs, steps = 20, 20 * -(-len(train_images) // BATCH_SIZE)
schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(each, steps) for each in optimizers]
task.get_trainable_module().train()
for images, target in batches(epochs):
    task(images, target)['loss'].backward()
    for each, scheduler in zip(optimizers, schedulers, strict=True):
        each.step()
        each.zero_grad()
        scheduler.step()

task.get_trainable_module().eval()
with torch.inference_mode():
    for name, logits in task.eval_outputs(test_images).items():
        print(f'test top-1 of the {name}: {100 * (logits.argmax(1) == test_labels).float().mean():.2f}%')
timm_dfpt.save_student(student, 'output/torchvision_model/student', data_config=DATA_CONFIG)
teacher.save_pretrained('output/torchvision_model/prompt_path')
