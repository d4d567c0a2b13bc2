"""Write documents that teach the format of the evaluation's tasks, and the facts of fact recall, as JSONL.

The program is `umv2_megatron/commands/make_tasks.py`; this file starts it in a checkout.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from umv2_megatron.commands.make_tasks import run  # noqa: E402

if __name__ == "__main__":
    run()
