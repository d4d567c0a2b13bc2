"""What a model and a run of it cost before anything is built: parameters, FLOPs, bytes on every rank, time of a step.

The program is `umv2_megatron/commands/plan.py`; this file starts it in a checkout.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from umv2_megatron.commands.plan import run  # noqa: E402

if __name__ == "__main__":
    run()
