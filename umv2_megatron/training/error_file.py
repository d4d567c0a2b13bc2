"""The sentence in which a rank fails, in torchrun's own summary too.

torchrun names a file for each rank in ``TORCHELASTIC_ERROR_FILE``, reads it when the rank has failed, and shows what it
says under "traceback"; without the file it shows a link to its manual. The format is that of torch 2.11 to 2.13
(torch/distributed/elastic/multiprocessing/errors): ``message.message``, and ``message.extraInfo.timestamp`` in seconds,
by which torchrun finds the rank that failed first.
"""

import contextlib
import json
import os
import time


def tell_launcher(sentence: str) -> None:
    """Write ``sentence`` where torchrun looks for it; does nothing under other launchers, nor if the file cannot be."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    told = {"message": {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()))}}}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump(told, file)
