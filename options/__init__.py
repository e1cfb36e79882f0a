"""From a command line to options, and back from what a run has kept of them.

training   flags of train.py that belong to no method
evaluating flags of evaluate.py and report.py      declared  all flags of each command
needs      when a flag has an effect               files     `@FILE` on a command line
parser     argparse with sentences                 parsing   a command line → options
meaning    dependent defaults, clashes             ranking   post-processing of embeddings
suited     settings for the user's own images      looking   finds out about these images
stored     the options that a run has stored       searching flags of search.py

Options are resolved once, when they are parsed (`resolved`); what a run has kept of them is read
back by `kept`. What comes later on a command line wins, so `@recipes/emoji_scratch.txt --seed 2` is
the recipe with another seed.
"""

from __future__ import annotations

from options.declared import EVALUATE_GROUPS, REPORT_GROUPS, TRAIN_GROUPS, defaults, train_flags
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
    in_words,
    is_of,
    kept,
    lengthened,
    plain,
    same_command,
    same_training,
    same_words,
    settings,
    unknown,
)
from options.training import METRICS
