"""Saving, loading and publishing of students and prompt paths, locally and on the Hugging Face Hub."""
from ..teacher.teacher import DualForwardPathTeacher, HubFunctions
from .errors import HubError
from .load import from_pretrained, load_student, load_teacher
from .options import LoadOptions, PromptPathOptions, PushOptions, StudentOptions
from .prompt_path import save_prompt_path
from .push import push_prompt_path, push_student
from .student import save_student

__all__ = [
    'HubError',
    'LoadOptions',
    'PromptPathOptions',
    'PushOptions',
    'StudentOptions',
    'from_pretrained',
    'load_student',
    'load_teacher',
    'push_prompt_path',
    'push_student',
    'save_prompt_path',
    'save_student',
]

DualForwardPathTeacher.hub = HubFunctions(save_prompt_path, push_prompt_path, load_teacher)
