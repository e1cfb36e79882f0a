"""The run folder: what was asked, where it ran, what came out, and the checkpoints.

Of several processes only the main one writes; in the others the writing functions do nothing.

args.json          every option        environment.json   versions, hardware, data fingerprint
metrics.csv        one row per epoch, and per evaluation inside an epoch, as it happens
results.json       what the best checkpoint reached, when the run has ended
last.pth           all that is needed to continue; step_00001200.pth: older ones (--keep)
base.pth           --peft: the resting weights, which the checkpoints beside it leave out
non_finite.json    where a loss or gradient was not finite: step, terms, rates, images
<dataset>_<model>_best.pth             weights and options of the best evaluation so far
margins.csv        AMLoss: class, learned margin, images
classes.npz        the training classes in their order; what was learned for each, epoch by epoch
checksums.json     of the files above that people read (.csv, .json); .pth and .npz carry their own
whitening.npz      what whitens its embeddings, once that was asked for (evaluate.py --whiten);
                   whitening_D.npz, where they are cut short
report.html        the run, explained (python report.py RUN)
"""

from runs.checkpoints import FORMAT, Checkpoint, checked, is_ours, load_checkpoint, with_base
from runs.folder import RunFolder, files_of, find_run
from runs.names import data_name, run_name
from runs.tables import ClassHistory, MetricsRow, MetricsTable
