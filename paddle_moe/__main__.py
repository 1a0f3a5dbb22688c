import sys

from paddle_moe.cli import main

sys.exit(main())
