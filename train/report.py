"""Write the page about a finished run: `python train/report.py RUN_DIR`."""
from timm_dfpt_cli import script

if __name__ == '__main__':
    script(__file__)
