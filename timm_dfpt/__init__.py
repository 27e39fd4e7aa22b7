"""timm_dfpt: dual-forward path teacher knowledge distillation for any timm backbone.

    teacher = timm_dfpt.wrap(timm.create_model('resnet50', pretrained=True))

DFPT-KD and DFPT-KD+ (arXiv 2506.18244) give a frozen teacher a second, prompt-based forward path that is trained
together with the student.
"""
from . import models
from .backbone import find_stages
from .deploy import export_onnx, export_pt2
from .hub import (
    from_pretrained,
    load_student,
    load_teacher,
    push_prompt_path,
    push_student,
    save_prompt_path,
    save_student,
)
from .losses import DFPTWeights
from .tasks import DFPTDistillationTask
from .teacher import DualForwardOutput, DualForwardPathTeacher, PromptConfig, fit_head, wrap
from .teacher.statistics import adapt_statistics
from .version import __version__

__all__ = [
    'DFPTDistillationTask',
    'DFPTWeights',
    'DualForwardOutput',
    'DualForwardPathTeacher',
    'PromptConfig',
    '__version__',
    'adapt_statistics',
    'export_onnx',
    'export_pt2',
    'find_stages',
    'fit_head',
    'from_pretrained',
    'load_student',
    'load_teacher',
    'models',
    'push_prompt_path',
    'push_student',
    'save_prompt_path',
    'save_student',
    'wrap',
]
