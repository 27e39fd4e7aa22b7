"""Show the loop of distill_minimal.py with accelerate: several processes or GPUs, mixed precision, one script.
Run it with `accelerate launch --config_file train/accelerate/multi_cpu.yaml examples/distill_accelerate.py`: offline.
Prints the number of processes, the loss of each epoch, and the test accuracy of student, prompt path and teacher.
"""
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.data import create_dataset, resolve_model_data_config
from torch.utils.data import DataLoader
from torchvision import transforms

import timm_dfpt

DATA = Path(__file__).parents[1] / 'train' / 'quickstart'
OUTPUT = Path('output') / 'distill_accelerate'
EPOCHS, BATCH_SIZE = 2, 128  # of all processes together

accelerator = Accelerator(cpu=not torch.cuda.is_available())  # `cpu` must be given for processes without GPUs
set_seed(0)
accelerator.print(f'{accelerator.num_processes} processes on {accelerator.device.type}')

model = timm.create_model(f'local-dir:{DATA}/teacher', pretrained=True)
teacher = timm_dfpt.wrap(model)
student = timm.create_model(
    'resnet18', num_classes=10, in_chans=1, layers=[1, 1, 1, 1], channels=[8, 16, 24, 24], stem_type='deep',
    stem_width=4, output_stride=16,
)  # fmt: skip
data_config = resolve_model_data_config(model)
task = timm_dfpt.DFPTDistillationTask(student, teacher, temperature=2.0, input_config=data_config)
task.to(accelerator.device)

to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize(data_config['mean'], data_config['std'])])
augment = transforms.Compose([transforms.RandomCrop(28, padding=2), transforms.RandomHorizontalFlip(), to_tensor])
with accelerator.main_process_first():  # which writes the cache of the dataset
    train_set = create_dataset(f'hfds/{DATA}', root=None, split='train', input_img_mode='L', transform=augment)
    test_set = create_dataset(f'hfds/{DATA}', root=None, split='test', input_img_mode='L', transform=to_tensor)
train_loader = DataLoader(train_set, BATCH_SIZE // accelerator.num_processes, shuffle=True, drop_last=True)
test_loader = DataLoader(test_set, 500)

optimizers = [
    torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
    torch.optim.AdamW(teacher.parameter_groups(), lr=1e-3, weight_decay=0.01),
]
# What is prepared is the one module that holds student and prompt path. The frozen teacher is not in it, so that
# DistributedDataParallel neither broadcasts it nor waits for its gradients.
task.trainable_module, train_loader, test_loader, *optimizers = accelerator.prepare(
    task.trainable_module, train_loader, test_loader, *optimizers
)
# Not prepared: it counts the steps of one process, which are those of all.
steps = EPOCHS * len(train_loader)
schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(each.optimizer, steps) for each in optimizers]

for epoch in range(EPOCHS):
    task.get_trainable_module().train()
    total = torch.zeros((), device=accelerator.device)
    for images, target in train_loader:
        with accelerator.autocast():
            result = task(images, target)
        accelerator.backward(result['loss'])
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        total += result['loss'].detach()
    accelerator.print(f'epoch {epoch + 1}: loss {accelerator.reduce(total, "mean").item() / len(train_loader):.3f}')

task.get_trainable_module().eval()
correct: dict[str, int] = {}
with torch.inference_mode():
    for images, target in test_loader:
        for name, logits in task.eval_outputs(images).items():
            hits = accelerator.gather_for_metrics(logits.argmax(1) == target)
            correct[name] = correct.get(name, 0) + int(hits.sum())
for name, count in correct.items():
    accelerator.print(f'test top-1 of the {name}: {100 * count / len(test_set):.2f}%')

if accelerator.is_main_process:
    label_names = model.pretrained_cfg['label_names']
    timm_dfpt.save_student(student, OUTPUT / 'student', label_names=label_names, data_config=data_config)
    teacher.save_pretrained(OUTPUT / 'prompt_path')
accelerator.end_training()
