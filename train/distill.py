"""Distill a student: `accelerate launch train/distill.py` runs the embedded default, `--help` tells the options."""
import sys
from pathlib import Path

from timm_dfpt.training.run import main

if __name__ == '__main__':
    sys.exit(main(default_recipe=Path(__file__).parent / 'recipes' / 'quickstart.yaml'))
