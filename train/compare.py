"""Compare methods over seeds: `train/compare.py --methods scratch kd dfpt --seeds 0 1 2 --output DIR`."""
import os
import signal
from pathlib import Path


def stop(signum: int, frame: object) -> None:
    """End while there is nothing to save."""
    try:
        os.write(2, f'Stopped by {signal.Signals(signum).name}: give the same command again.\n'.encode())
    finally:
        os._exit(128 + signum)


if __name__ == '__main__':
    # Imports take seconds; the job has handlers of its own.
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)

    from timm_dfpt.job.stopping import leave
    from timm_dfpt.training.compare import main

    leave(main(default_recipe=Path(__file__).parent / 'recipes' / 'quickstart.yaml'))
