"""What student and teacher must have in common, checked when a task is built."""
from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from ..backbone.modes import look_through
from ..backbone.types import name_of
from ..teacher.teacher import DualForwardPathTeacher

__all__ = ['check_classes', 'check_learns', 'check_student']


def check_learns(student: nn.Module) -> None:
    """Refuse a student that has nothing to train.

    Raises:
        ValueError: If no parameter asks for a gradient.
    """
    if not any(param.requires_grad for param in student.parameters()):
        raise ValueError(
            f'The student {name_of(look_through(student))} has no trainable parameter: all are frozen, or it has '
            'none. Call student_model.requires_grad_(True), or train a model that is not frozen elsewhere.'
        )


def check_student(student: nn.Module, teacher: str | nn.Module) -> None:
    """Refuse a student that shares weights with its teacher, which is frozen, or has nothing to train.

    Args:
        student: The student.
        teacher: The teacher, with all of its paths, before it is frozen; or the name of one to be created.

    Raises:
        ValueError: If it cannot learn; the message names a weight.
    """
    if isinstance(teacher, nn.Module):
        theirs = {_memory_of(t) for t in itertools.chain(teacher.parameters(), teacher.buffers()) if t.numel()}
        shared = [name for name, param in student.named_parameters() if param.numel() and _memory_of(param) in theirs]
        if shared:
            raise ValueError(
                f'Student and teacher share {len(shared)} weights, such as {shared[0]} of the student, but a teacher '
                'is frozen and a student is trained. Give the student weights of its own: copy.deepcopy(model) before '
                'it is wrapped, or another timm.create_model(...).'
            )
    check_learns(student)


def _memory_of(tensor: torch.Tensor) -> tuple[Any, int]:
    """Return what is equal for tensors of one memory, such as views and tied weights."""
    if tensor.device.type == 'meta':
        return 'meta', id(tensor)
    return tensor.device, tensor.untyped_storage().data_ptr()


def check_classes(student: nn.Module, teacher: nn.Module, original: bool = True) -> None:
    """Refuse a student and a teacher with different numbers of classes, as far as they are known.

    Args:
        student: The student.
        teacher: The teacher.
        original: Whether anything learns from the original path of a teacher with two of them.

    Raises:
        ValueError: If they differ.
    """
    counts = {'student': _classes_of(student)}
    if isinstance(teacher, DualForwardPathTeacher):
        counts |= {'teacher': teacher.num_classes} if original else {}
        counts |= {'prompt path': teacher.prompt_path.num_classes}
        if original and not teacher.num_classes:
            raise ValueError(
                'The teacher is an encoder, whose original path has no logits to learn from: set the weights '
                'prompt_teacher (a) and student_teacher (c) to 0.'
            )
    else:
        counts['teacher'] = _classes_of(teacher)
    known = {name: count for name, count in counts.items() if count}
    if len(set(known.values())) > 1:
        raise ValueError(
            f'Teacher and student must have the same classes, but num_classes is {known}. Fine-tune the teacher on '
            'these classes first, or create the student with num_classes of the teacher'
            + (
                ', or learn from the prompt path alone: the weights prompt_teacher (a) and student_teacher (c) are 0.'
                if known['student'] == known.get('prompt path') else '.'
            )
        )


def _classes_of(model: nn.Module) -> int | None:
    """Return the number of logits by the classifier itself, which may have been put on by hand, or by `num_classes`."""
    plain: Any = look_through(model)
    if hasattr(plain, 'get_classifier'):
        head = plain.get_classifier()
        while isinstance(head, (tuple, list, nn.Sequential, nn.ModuleList)) and len(head):
            head = head[len(head) - 1]
        if isinstance(head, (nn.Linear, nn.Conv2d)):
            return head.out_features if isinstance(head, nn.Linear) else head.out_channels
    count = getattr(plain, 'num_classes', None)
    return count if isinstance(count, int) else None
