"""Evaluate a model: loss and bits per byte on texts, and synthetic tasks of memory with exact scoring.

The program is `umv2_megatron/commands/evaluate.py`; this file starts it in a checkout.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from umv2_megatron.commands.evaluate import run  # noqa: E402

if __name__ == "__main__":
    run()
