"""For jobs whose ranks have limits of a few seconds."""

import os
import time
from pathlib import Path


def meet_other_ranks() -> None:
    """Returns when all ranks have come here; a busy machine imports Paddle on one long before another."""
    master, directory = os.environ["PADDLE_MASTER"], Path(os.environ["PADDLE_LOG_DIR"])
    (directory / f"rank_{os.environ['PADDLE_TRAINER_ID']}_met_at_{master}").touch()
    while len(list(directory.glob(f"rank_*_met_at_{master}"))) < int(os.environ["PADDLE_TRAINERS_NUM"]):
        time.sleep(0.02)
