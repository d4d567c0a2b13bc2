"""Show what a checkpoint holds: keys, dtypes, shapes, bytes, shards, and the layout that saved it.

The program is `umv2_megatron/commands/inspect_checkpoint.py`; this file starts it in a checkout.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from umv2_megatron.commands.inspect_checkpoint import run  # noqa: E402

if __name__ == "__main__":
    run()
