"""The quick tests in two processes beside each other: unit tests, and tests that start ranks, in half the time.

    python tests/side_by_side.py [arguments of pytest]

Most unit tests compute on one thread, and most others wait for ranks, files or timeouts, so two processes fill two
cores. The second part's output is shown as it comes, the first part's when it has ended. The exit code is 0 where both
parts passed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile

PARTS = (["tests/unit"], ["tests/distributed", "tests/functional"])


def main(arguments: list[str]) -> int:
    """Run both parts; returns the larger exit code."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "not slow and not gpu", *arguments]
    first, second = ([*pytest, *part] for part in PARTS)
    with tempfile.TemporaryFile() as output, subprocess.Popen(first, stdout=output, stderr=output) as process:
        try:
            code = subprocess.run(second).returncode
            code = max(code, process.wait())
        finally:
            process.terminate()
        output.seek(0)
        print(f"{' '.join(PARTS[0])}:\n{output.read().decode(errors='replace')}", flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
