"""Runs an example of PaddleFormers without paddlefleet: run_example.py SCRIPT ARGUMENT..."""

import runpy
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
from paddleformers_models import stand_in_for_paddlefleet

stand_in_for_paddlefleet()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
