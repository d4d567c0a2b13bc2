"""Train variants and seeds of a plan one after another, and compare them in one report.

The program is `umv2_megatron/commands/ablate.py`; this file starts it in a checkout.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from umv2_megatron.commands.ablate import run  # noqa: E402

if __name__ == "__main__":
    run()
