"""Find the model of another --ffn-variant that costs as much: the same activated FLOPs and total parameters within 1%.

The program is `umv2_megatron/commands/match.py`; this file starts it in a checkout.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from umv2_megatron.commands.match import run  # noqa: E402

if __name__ == "__main__":
    run()
