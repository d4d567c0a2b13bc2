"""Write a page about a run: losses, rates, throughput, memory layers, restarts, faults, checkpoints, settings.

The program is `umv2_megatron/commands/report.py`; this file starts it in a checkout.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from umv2_megatron.commands.report import run  # noqa: E402

if __name__ == "__main__":
    run()
