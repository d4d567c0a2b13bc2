"""Turn a corpus (JSONL or plain text, compressed or not) into the token files that --data-path reads.

The program is `umv2_megatron/commands/preprocess_data.py`; this file starts it in a checkout.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from umv2_megatron.commands.preprocess_data import run  # noqa: E402

if __name__ == "__main__":
    run()
