"""Publish a finished run on the Hugging Face Hub: `python train/publish.py RUN_DIR --push-to-hub user/name`."""
import sys

from timm_dfpt.training.publish import main

if __name__ == '__main__':
    sys.exit(main())
