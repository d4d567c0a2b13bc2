"""Draw the task scores of one or more models: score against context length, and against times a fact was seen.

The program is `umv2_megatron/commands/plot_scores.py`; this file starts it in a checkout.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from umv2_megatron.commands.plot_scores import run  # noqa: E402

if __name__ == "__main__":
    run()
