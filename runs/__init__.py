"""The run folder: options, environment, metrics, results and checkpoints.

Of several processes only the main one writes; in the others the writing functions do nothing.

args.json          every option        environment.json   versions, hardware, data fingerprint
metrics.csv        one row per epoch and per evaluation within an epoch, written as it happens
results.json       the metrics of the best checkpoint, written when the run ends
last.pth           the state needed to continue; step_00001200.pth: earlier ones (--keep)
base.pth           --peft: the frozen weights, which the checkpoints beside it leave out
non_finite.json    the step at which a loss or gradient was not finite, with terms, rates, images
<dataset>_<model>_best.pth             weights and options of the best evaluation so far
margins.csv        AMLoss: class, learned margin, images
classes.npz        the training classes in their order, and values learned for each, by epoch
checksums.json     of the .csv and .json files; .pth and .npz contain their own
whitening.npz      the whitening of its embeddings, made by evaluate.py --whiten;
                   whitening_D.npz: that of embeddings cut to D dimensions
report.html        the page about the run (python report.py RUN)
"""

from runs.checkpoints import FORMAT, Checkpoint, checked, is_ours, load_checkpoint, with_base
from runs.folder import RunFolder, files_of, find_run
from runs.names import data_name, run_name
from runs.tables import ClassHistory, MetricsRow, MetricsTable
