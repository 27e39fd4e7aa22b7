"""Write the page about a finished run: `python train/report.py RUN_DIR`."""
import os
import signal


def stop(signum: int, frame: object) -> None:
    """End while there is nothing to save."""
    try:
        os.write(2, f'Stopped by {signal.Signals(signum).name}: the same command tries again.\n'.encode())
    finally:
        os._exit(128 + signum)


if __name__ == '__main__':
    # Imports take seconds; the job has handlers of its own.
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)

    from timm_dfpt.job.stopping import leave
    from timm_dfpt.training.pages import main

    leave(main())
