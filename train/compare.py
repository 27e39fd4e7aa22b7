"""Compare methods over seeds: `train/compare.py --methods scratch kd dfpt --seeds 0 1 2 --output DIR`."""
from timm_dfpt_cli import script

if __name__ == '__main__':
    script(__file__)
