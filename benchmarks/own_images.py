"""The settings that train.py chooses for the user's images, against others: metrics and time.

    python benchmarks/photos.py photos --products 60 --uneven --seed 5
    python benchmarks/own_images.py folder:photos
    python benchmarks/own_images.py folder:photos --only "image-size *" --seeds 1 2

Each row is `train.py --dataset folder:photos` with one setting changed, evaluated on held-out
classes at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import heads, line, reached

ALTERNATIVES = {
    "chosen": "",
    "not trained at all": "--epochs 1 --lr 1e-9 --lr_p 1e-9",
    "image-size 128": "--image-size 128",
    "image-size 160": "--image-size 160",
    "image-size 192": "--image-size 192",
    "image-size 160, in the same time": "--image-size 160 --epochs {twice}",
    "half as long": "--epochs {half}",
    "batch-size 32": "--batch-size 32",
    "batch-size 64": "--batch-size 64",
    "lr 3e-4, lr_p 1e-4": "--lr 3e-4 --lr_p 1e-4",
    "lr_p 1e-4": "--lr_p 1e-4",
    "freeze-blocks 0": "--freeze-blocks 0",
    "freeze-blocks 10": "--freeze-blocks 10",
    "crop-scale 0.25": "--crop-scale 0.25",
    "loss AMLoss": "--loss AMLoss",
    "loss ms": "--loss ms",
    "published rates": "--lr 1e-4 --lr_p 1e-4 --schedule step --weight-decay 1e-4 "
    "--decay-vectors 1 --warm 1",
    "pretrained none": "--pretrained none",
}
"""Change → flags; `half` and `twice` mean the number of epochs that train.py chooses."""


def trained(data: str, flags: list[str], epochs: int | None) -> dict[str, float]:
    """The metrics of one run, its seconds of training, and its epochs."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"half": (epochs or 0) // 2, "twice": (epochs or 0) * 2}
        command = [
            *(sys.executable, str(ROOT / "train.py"), "--dataset", data, "--LOG_DIR", folder),
            *("--name", "run", "--wandb", "disabled", "--no-report", "--metrics", "retrieval"),
            *(flag.format(**settings) for flag in flags),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
        run = Path(folder) / "run"
        asked = json.loads((run / "args.json").read_text())
        return {**reached(run), "epochs": asked["epochs"]}


def main() -> None:
    """Prints a table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="folder:PATH or csv:FILE")
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of names")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--flags", default="--eval-classes 0.5", help="for every run")
    args = parser.parse_args()
    os.environ.setdefault("WANDB_MODE", "disabled")
    epochs = None
    print(heads(("", "R@1", "MAP@R", "epochs", "seconds of training")))
    for name, flags in ALTERNATIVES.items():
        if name != "chosen" and not any(fnmatch(name, pattern) for pattern in args.only):
            continue
        shared = args.flags.split()
        runs = [
            trained(args.data, [*shared, *flags.split(), "--seed", str(seed)], epochs)
            for seed in args.seeds
        ]
        row = {key: mean(run[key] for run in runs) for key in ("R@1", "MAP@R", "epochs", "seconds")}
        epochs = epochs or int(row["epochs"])
        cells = [f"{row['R@1']:.4f}", f"{row['MAP@R']:.4f}", f"{row['epochs']:.0f}"]
        print(line([name, *cells, f"{row['seconds']:.0f}"]), flush=True)


if __name__ == "__main__":
    main()
