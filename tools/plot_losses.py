"""Draw the loss curves of one or more runs into a PNG.

The program is `umv2_megatron/commands/plot_losses.py`; this file starts it in a checkout.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from umv2_megatron.commands.plot_losses import run  # noqa: E402

if __name__ == "__main__":
    run()
