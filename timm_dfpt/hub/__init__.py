"""Saving, loading and publishing of students and prompt paths, locally and on the Hugging Face Hub."""
from .errors import HubError
from .load import from_pretrained, load_teacher
from .prompt_path import save_prompt_path
from .push import push_prompt_path, push_student
from .student import save_student

__all__ = [
    'HubError',
    'from_pretrained',
    'load_teacher',
    'push_prompt_path',
    'push_student',
    'save_prompt_path',
    'save_student',
]
