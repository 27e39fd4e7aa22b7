"""Students as they are run elsewhere: the form that is deployed, and files of other runtimes."""
from .onnx_files import export_onnx
from .programs import export_pt2

__all__ = ['export_onnx', 'export_pt2']
