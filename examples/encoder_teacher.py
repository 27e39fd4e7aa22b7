"""Show an encoder without a classifier as the teacher: a head for new classes is fitted to it, then it teaches them.
Run it with `python examples/encoder_teacher.py`: offline, on embedded small letters, new to the encoder.
Prints the test accuracy of student, prompt path and teacher, which is the encoder with the fitted head.
"""
from pathlib import Path

import timm
import torch
from timm.data import create_dataset, resolve_model_data_config
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms

import timm_dfpt

DATA = Path(__file__).parents[1] / 'train' / 'quickstart_new_classes'
CLASSES, EPOCHS, TUNED_EPOCHS = 26, 40, 10

torch.manual_seed(0)

# Trained on capitals and digits; `num_classes=0` leaves that classifier out. Yours may be DINOv2, SigLIP, ...
encoder = timm.create_model(f'local-dir:{DATA}/teacher', pretrained=True, num_classes=0)
data_config = resolve_model_data_config(encoder)
transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(data_config['mean'], data_config['std'])])


def load(split: str) -> TensorDataset:
    """Return the images `[N, 1, 32, 32]` and labels `[N]` of a split."""
    dataset = create_dataset(f'hfds/{DATA}', root=None, split=split, input_img_mode='L', transform=transform)
    images, labels = zip(*dataset, strict=True)
    return TensorDataset(torch.stack(images), torch.tensor(labels))


train_set, test_set = load('train'), load('test')
train_loader = DataLoader(train_set, 64, shuffle=True)

# One pass over the images and a closed form, no training. The result is a plain model with 26 classes.
# Without this step, wrap(encoder, num_classes=26) gives the prompt path alone a new head, which starts at zero.
fitted = timm_dfpt.fit_head(encoder, DataLoader(train_set, 64), num_classes=CLASSES)

# Its features are of other images, so the path gets norm layers of its own, and the student learns from the path alone.
teacher = timm_dfpt.wrap(fitted, prompt=timm_dfpt.PromptConfig(norms='own'))
weights = timm_dfpt.DFPTWeights(prompt_teacher=0, student_teacher=0, student_prompt=2)
student = timm.create_model(
    'resnet18', num_classes=CLASSES, in_chans=1, layers=[1, 1, 1, 1], channels=[8, 16, 24, 24], stem_type='deep',
    stem_width=4, output_stride=16,
)  # fmt: skip
task = timm_dfpt.DFPTDistillationTask(
    student, teacher, weights=weights, prompt_epochs=TUNED_EPOCHS, input_config=data_config
)

# The path is tuned in the first epochs and then frozen: its schedule ends there.
optimizers = [
    torch.optim.SGD(student.parameters(), lr=0.2, momentum=0.9, nesterov=True, weight_decay=1e-3),
    torch.optim.AdamW(task.prompt_param_groups(), lr=3e-3, weight_decay=0.01),
]
schedulers = [
    torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(train_loader))
    for optimizer, epochs in zip(optimizers, (EPOCHS, TUNED_EPOCHS), strict=True)
]
update, total = 0, EPOCHS * len(train_loader)
crop = transforms.RandomCrop(32, padding=2, fill=float(train_set.tensors[0].min()))
for epoch in range(EPOCHS):
    task.get_trainable_module().train()
    for images, target in train_loader:
        task.set_progress(epoch, update, total)  # freezes the path
        trained = 1 if task.get_frozen_path() is not None else 2
        task(crop(images), target)['loss'].backward()
        for optimizer, scheduler in zip(optimizers[:trained], schedulers[:trained], strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        update += 1

task.get_trainable_module().eval()
images, target = test_set.tensors
with torch.inference_mode():
    for name, logits in {**task.eval_outputs(images), 'teacher': fitted(images)}.items():
        print(f'test top-1 of the {name}: {100 * (logits.argmax(1) == target).float().mean():.2f}%')

timm_dfpt.save_student(student, 'output/encoder_teacher/student', data_config=data_config)
teacher.save_pretrained('output/encoder_teacher/prompt_path')  # the fitted head is saved with it
