"""Choose the rows of value tables that new documents pick more than other documents do, to train them alone.

The program is `umv2_megatron/commands/select_rows.py`; this file starts it in a checkout.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from umv2_megatron.commands.select_rows import run  # noqa: E402

if __name__ == "__main__":
    run()
