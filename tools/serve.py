"""Serve an export over HTTP with the API of OpenAI.

The program is `umv2_megatron/commands/serve.py`; this file starts it in a checkout.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from umv2_megatron.commands.serve import run  # noqa: E402

if __name__ == "__main__":
    run()
