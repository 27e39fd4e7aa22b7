"""Distill a student: `accelerate launch train/distill.py` runs the embedded default, `--help` lists the options."""
from timm_dfpt_cli import script

if __name__ == '__main__':
    script(__file__)
