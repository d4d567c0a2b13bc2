"""Write text with a trained model, streaming it to the terminal.

The program is `umv2_megatron/commands/generate.py`; this file starts it in a checkout.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from umv2_megatron.commands.generate import run  # noqa: E402

if __name__ == "__main__":
    run()
