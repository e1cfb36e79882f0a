"""From a command line to options, and back from what a run has kept of them.

training   the flags of train.py that belong to no method
evaluating those of evaluate.py and report.py      declared  all of a command, the methods' too
needs      what reads a flag                       files     `@FILE` on a command line
parser     argparse with sentences                 parsing   a command line → options
meaning    what options say, and what clashes      ranking   what is done before images are compared
suited     settings for the user's own images      looking   what is known of these
stored     what a run has kept of its options      searching the flags of search.py

Options are resolved once, when they are parsed (`resolved`); what a run has kept of them is read
back by `kept`. What comes later on a command line wins, so `@recipes/emoji_scratch.txt --seed 2` is
the recipe with another seed.
"""

from __future__ import annotations

from options.declared import (
    EVALUATE_GROUPS,
    REPORT_GROUPS,
    TRAIN_GROUPS,
    defaults,
    train_flags,
)
from options.evaluating import EVALUATED
from options.meaning import (
    by_flag,
    check_metrics,
    check_one_checkpoint,
    check_read,
    criterion_arguments,
    notices,
    of_all_processes,
    resolved,
)
from options.parsing import parse_evaluate, parse_report, parse_train, parsed
from options.stored import (
    as_begun,
    at_first,
    closeness,
    configuration,
    continued,
    is_of,
    kept,
    lengthened,
    plain,
    same_command,
    same_training,
    same_words,
    settings,
)
from options.training import METRICS
