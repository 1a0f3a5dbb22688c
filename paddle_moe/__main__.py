import sys

from paddle_moe.cli import main

sys.exit(main(program="python -m paddle_moe"))
