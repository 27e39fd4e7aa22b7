"""One of two processes that take a step together, started by test_gpu_steps.py: leaves its gradients in a file."""
from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from gpu_cases import gradients, make_batch, make_task
from torch import distributed

SIZE, BATCH = 32, 8


def main() -> None:
    folder, kind, method = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    rank = int(os.environ['RANK'])
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    apart = kind == 'cuda' and torch.cuda.device_count() > 1
    device = torch.device(kind, rank if apart else 0) if kind == 'cuda' else torch.device(kind)
    if kind == 'cuda':
        torch.cuda.set_device(device)
    store = distributed.FileStore(str(folder / 'store'), 2)
    distributed.init_process_group('nccl' if apart else 'gloo', store=store, rank=rank, world_size=2)
    task = make_task(method, device, size=SIZE)
    task.get_trainable_module().eval()
    task.prepare_distributed(device_ids=[device.index] if kind == 'cuda' else None)
    x, y = make_batch(device, batch=BATCH, size=SIZE)
    half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    task(x[half], y[half])['loss'].backward()
    grads = {name.removeprefix('module.'): grad for name, grad in gradients(task).items()}
    torch.save(grads, folder / f'rank{rank}.pt')
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == '__main__':
    main()
