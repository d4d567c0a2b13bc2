"""lm-eval's own program with our models: a Megatron checkpoint (no export is needed), or a Hugging Face export.

The program is `umv2_megatron/commands/lm_eval.py`; this file starts it in a checkout.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from umv2_megatron.commands.lm_eval import run  # noqa: E402

if __name__ == "__main__":
    run()
