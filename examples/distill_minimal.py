"""Show DFPT-KD in a plain PyTorch loop: wrap a teacher, make a task, train, save, and load with timm alone.
Run it with `python examples/distill_minimal.py`: offline, on images and a teacher that are part of the repository.
Prints the terms of the loss after each epoch, then the test accuracy of student, prompt path and teacher.
"""
from collections import Counter
from pathlib import Path

import timm
import torch
from timm.data import create_dataset, resolve_model_data_config
from torch.utils.data import DataLoader
from torchvision import transforms

import timm_dfpt

DATA = Path(__file__).parents[1] / 'train' / 'quickstart'
OUTPUT = Path('output') / 'distill_minimal'
EPOCHS, BATCH_SIZE = 3, 128

torch.manual_seed(0)
device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')

# The teacher is frozen; `wrap` gives it a second forward path, which is trained together with the student.
model = timm.create_model(f'local-dir:{DATA}/teacher', pretrained=True)
teacher = timm_dfpt.wrap(model)
student = timm.create_model(
    'resnet18', num_classes=10, in_chans=1, layers=[1, 1, 1, 1], channels=[8, 16, 24, 24], stem_type='deep',
    stem_width=4, output_stride=16,
)  # fmt: skip
data_config = resolve_model_data_config(model)
task = timm_dfpt.DFPTDistillationTask(student, teacher, temperature=2.0, input_config=data_config).to(device)
teacher.print_trainable_parameters()

# For a folder of your own images: create_dataset('', root='photos', split='train', transform=...).
to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize(data_config['mean'], data_config['std'])])
augment = transforms.Compose([transforms.RandomCrop(28, padding=2), transforms.RandomHorizontalFlip(), to_tensor])
train_set = create_dataset(f'hfds/{DATA}', root=None, split='train', input_img_mode='L', transform=augment)
test_set = create_dataset(f'hfds/{DATA}', root=None, split='test', input_img_mode='L', transform=to_tensor)
train_loader = DataLoader(train_set, BATCH_SIZE, shuffle=True, drop_last=True)
test_loader = DataLoader(test_set, 500)

# One optimizer each: the student is trained from scratch, the prompt path is tuned.
optimizers = [
    torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
    torch.optim.AdamW(teacher.parameter_groups(), lr=1e-3, weight_decay=0.01),
]
steps = EPOCHS * len(train_loader)
schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) for optimizer in optimizers]

for epoch in range(EPOCHS):
    task.get_trainable_module().train()  # student and prompt path; the teacher itself stays in evaluation mode
    terms: Counter[str] = Counter()
    for images, target in train_loader:
        result = task(images.to(device), target.to(device))
        result['loss'].backward()  # one backward pass for student and prompt path
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        terms.update({name: value.item() for name, value in result.items() if name.endswith('loss')})
    print(f'epoch {epoch + 1}:', ', '.join(f'{name} {value / len(train_loader):.3f}' for name, value in terms.items()))

task.get_trainable_module().eval()
correct: Counter[str] = Counter()
with torch.inference_mode():
    for images, target in test_loader:
        outputs = task.eval_outputs(images.to(device))
        correct.update({name: (logits.argmax(1).cpu() == target).sum().item() for name, logits in outputs.items()})
for name, count in correct.items():
    print(f'test top-1 of the {name}: {100 * count / len(test_set):.2f}%')

# The student is a plain timm model; of the teacher only what was trained is saved.
label_names = model.pretrained_cfg['label_names']
timm_dfpt.save_student(student, OUTPUT / 'student', label_names=label_names, data_config=data_config)
teacher.save_pretrained(OUTPUT / 'prompt_path')
loaded = timm.create_model(f'local-dir:{OUTPUT}/student', pretrained=True).eval()
images, _ = next(iter(test_loader))
assert torch.equal(loaded(images), student.cpu()(images))
print(f"load it with timm.create_model('local-dir:{OUTPUT}/student', pretrained=True)")
