"""Where test processes fork from: a server with the heavy imports done, and nothing of huggingface_hub.

Python has one fork server a process and its first user decides what it imports, so all tests share this one. Clients
of the Hub read their environment when huggingface_hub is imported, which therefore happens in the processes.
"""
import multiprocessing
import os

# Threads of OpenMP do not live through a fork, and what the processes compute is tiny.
os.environ.setdefault('OMP_NUM_THREADS', '1')

CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(
    ['__main__', 'torch', 'torchvision.datasets.folder', 'numpy', 'pandas', 'PIL.Image', 'jinja2', 'yaml', 'pyarrow',
     'matplotlib.pyplot']
)  # fmt: skip
