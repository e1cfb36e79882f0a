"""Several processes that train one model: torch.distributed, made small.

`torchrun train.py …`, or `--gpu-id -1` (which calls `launch`), starts the processes; each calls
`joined`. NCCL moves what lies on GPUs, gloo the rest. Without a launcher there is one process, and
every function here is its own trivial case, so that nobody has to ask.

One batch is drawn by all processes alike and each takes its `shard` of the images. The outputs are
put together by `gather_rows`, and every process computes the same loss of the whole batch. The
gradient that flows back into a process's own rows is that of the whole loss, counted once, so the
gradients of the network are *summed* over processes (`sum_gradients`). A parameter that is used by
the loss itself (a proxy, a margin, a mask) has the same gradient everywhere and must not be
multiplied: `once` lets only the main process's through. The update then equals that of one process.

A parameter may also be divided (`Share`): each process has some of its rows, their gradient and
their optimiser's state. What a process computes with its rows is one part of the loss, so the
embeddings that go in have their gradient summed (`part_of_all`), and the parts that come out are
gathered. Checkpoints hold the whole.

How they find each other at the start stands in meeting.py, what happens when one dies in
watching.py.
"""

from __future__ import annotations

from processes.agreements import (
    barrier,
    check_alike,
    copy_main,
    from_main,
    in_all,
    largest,
    main_first,
)
from processes.gradients import count_once, once, sum_gradients
from processes.group import alone, gpu, is_group, is_main, local_rank, main_only, rank, world
from processes.joining import ended_at_once, joined
from processes.rows import (
    Share,
    divided,
    from_process,
    gather_rows,
    part_of_all,
    shard,
    share_of,
    sum_over,
    whole_size,
)
from processes.starting import ignore_requests, launch, run, stop_signals, wanted
