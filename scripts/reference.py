"""train.py as it would be without any of our shortcuts: the reference row of the study.

    python scripts/reference.py --loss Proxy_Anchor --amp off …

The same network, data, batches and seeds as train.py with the same flags; the loss is the printed
formula in float32, modules are called one by one, and the optimiser is torch's plain loop.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import options
import train
from benchmarks.plain import plain_training
from utils import sentence_errors

if __name__ == "__main__":
    with sentence_errors(), plain_training():
        train.main(options.parse_train(["--amp", "off", *sys.argv[1:]]))
