"""Are 2 and 3 processes the same as one? The largest difference after five steps, per method.

    python benchmarks/processes.py

Five optimisation steps on small pictures (the last batch smaller than the others) by one process,
and by two and three gloo processes on this machine: losses, weights and buffers of network and
criterion are compared, absolutely below 1 and relatively above. What the tests check, as a table.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny
import together
import torch
from test_processes import METHODS, five_steps, largest_difference


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    print("| method | 2 processes | 3 processes |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        images = tiny.write_images(Path(folder) / "data")
        for method, flags in METHODS.items():
            steps = partial(five_steps, images, flags)
            alone, cells = steps(), []
            for count in (2, 3):
                results = together.run(count, steps, Path(folder))
                worst = max(largest_difference(alone, result) for result in results)
                cells.append(f"{worst:.1e}")
            print(f"| {method} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
