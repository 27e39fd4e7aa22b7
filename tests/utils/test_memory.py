"""What is freed stays with the process."""
from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import timm_dfpt.utils.memory

SCRIPT = """
import json, resource, runpy, sys

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(b'x') * (8 << 20) for _ in range(8)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = [faults() for _ in range(3)]
done = runpy.run_path(sys.argv[1])['keep_freed_memory']()
kept = [faults() for _ in range(3)]
print(json.dumps([usual, done, kept]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='of glibc')
def test_pages_that_were_freed_are_not_asked_for_again() -> None:
    command = [sys.executable, '-c', SCRIPT, str(Path(timm_dfpt.utils.memory.__file__))]
    usual, done, kept = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert done
    # 64 MiB are thousands of pages.
    assert usual[-1] > 1000
    assert kept[-1] < usual[-1] / 10
