"""Publish a finished run on the Hugging Face Hub: `python train/publish.py RUN_DIR --push-to-hub user/name`."""
from timm_dfpt_cli import script

if __name__ == '__main__':
    script(__file__)
