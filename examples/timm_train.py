"""Show DFPT-KD in timm's own train.py: the lines that timm_train.patch adds to it, in a script that runs alone.
Run it with `python examples/timm_train.py`, offline; or with timm's script: `patch train.py examples/timm_train.patch`.
Prints timm's summary of each epoch: the loss, and the test accuracy of the student.
"""
import argparse
from pathlib import Path

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import LogitDistillationTask
from timm.utils import AverageMeter, accuracy

from timm_dfpt import DFPTDistillationTask  # added

DATA = Path(__file__).parents[1] / 'train' / 'quickstart'

# As in train.py, with the values of the embedded quickstart.
parser = argparse.ArgumentParser()
parser.add_argument('--kd-model-name', default=f'local-dir:{DATA}/teacher')
parser.add_argument('--kd-distill-type', default='dfpt', choices=['logit', 'dfpt'])
parser.add_argument('--kd-temperature', default=2.0, type=float)
parser.add_argument('--kd-prompt-lr', default=1e-3, type=float)
parser.add_argument('--opt', default='adamw')
parser.add_argument('--lr', default=5e-3, type=float)
parser.add_argument('--weight-decay', default=0.01, type=float)
parser.add_argument('--epochs', default=3, type=int)
args = parser.parse_args()

torch.manual_seed(42)
device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
model = timm.create_model(
    'resnet18', num_classes=10, in_chans=1, layers=[1, 1, 1, 1], channels=[8, 16, 24, 24], stem_type='deep',
    stem_width=4, output_stride=16,
).to(device)  # fmt: skip
options = {'input_size': (1, 28, 28), 'mean': (0.286,), 'std': (0.353,), 'crop_pct': 1.0}
data_config = resolve_data_config(options, model=model)
loader_config = {name: data_config[name] for name in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')}
loader_config |= {'batch_size': 128, 'use_prefetcher': False, 'num_workers': 0, 'device': device}
dataset_train = create_dataset(f'hfds/{DATA}', root=None, split='train', input_img_mode='L')
dataset_eval = create_dataset(f'hfds/{DATA}', root=None, split='test', input_img_mode='L')
loader_train = create_loader(dataset_train, is_training=True, scale=(0.7, 1.0), color_jitter=None, **loader_config)
loader_eval = create_loader(dataset_eval, is_training=False, **loader_config)

train_loss_fn = torch.nn.CrossEntropyLoss()
if args.kd_distill_type == 'logit':
    task = LogitDistillationTask(
        student_model=model,
        teacher_model=args.kd_model_name,
        criterion=train_loss_fn,
        temperature=args.kd_temperature,
        device=device,
    )
# Added: the task, with the arguments of timm's own.
elif args.kd_distill_type == 'dfpt':
    task = DFPTDistillationTask(
        student_model=model,
        teacher_model=args.kd_model_name,
        criterion=train_loss_fn,
        temperature=args.kd_temperature,
        input_config=data_config,
        device=device,
    )

model = task.get_trainable_module()
eval_model = task.get_eval_model()
# Added: a group for the student and one for the prompt path, whose learning rate timm's schedulers derive from --lr.
parameters = model
if args.kd_distill_type == 'dfpt':
    scale = args.kd_prompt_lr / args.lr
    parameters = [{'params': list(eval_model.parameters())}]
    parameters += [{**group, 'lr_scale': scale * group.get('lr_scale', 1.0)} for group in task.prompt_param_groups()]
optimizer = create_optimizer_v2(parameters, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay)
# End of what is added.
lr_scheduler, num_epochs = create_scheduler_v2(optimizer, num_epochs=args.epochs, warmup_epochs=0)

for epoch in range(num_epochs):
    model.train()
    losses, top1 = AverageMeter(), AverageMeter()
    for input, target in loader_train:
        result = task(input.to(device), target.to(device))
        optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()
        losses.update(result['loss'].item(), len(input))
    eval_model.eval()
    with torch.inference_mode():
        for input, target in loader_eval:
            top1.update(accuracy(eval_model(input.to(device)), target.to(device))[0].item(), len(input))
    print(f'Train: {epoch}  Loss: {losses.avg:.3g}  Test: Acc@1: {top1.avg:.2f}')
    lr_scheduler.step(epoch + 1)
