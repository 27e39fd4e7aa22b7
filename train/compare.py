"""Compare methods over seeds: `train/compare.py --methods scratch kd dfpt --seeds 0 1 2 --output DIR`."""
import sys
from pathlib import Path

from timm_dfpt.training.compare import main

if __name__ == '__main__':
    sys.exit(main(default_recipe=Path(__file__).parent / 'recipes' / 'quickstart.yaml'))
