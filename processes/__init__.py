"""Several processes that train one model: the little of torch.distributed that this needs.

`torchrun train.py …`, or `--gpu-id -1` (which calls `launch`), starts the processes; each enters
`joined`. NCCL transfers tensors between GPUs, gloo all others. Without a launcher there is one
process, and the functions here do the trivial thing, so that callers need not ask which it is.

All processes draw the same batch, and each computes the embeddings of its `shard` of the images.
`gather_rows` puts them together, and every process computes the same loss of the whole batch. The
gradient with respect to a process's own rows is that of the whole loss, counted once, so the
network's gradients are *summed* over processes (`sum_gradients`). A parameter of the loss itself (a
proxy, a margin, a mask) has the same gradient everywhere, which must be counted once: `once` lets
only the main process's through. The update then equals that of a single process.

A parameter may also be divided (`Share`): each process has some of its rows, with their gradient
and optimiser state. From its rows a process computes one part of the loss, so the gradient of the
embeddings is summed over processes (`part_of_all`), and the parts of the loss are gathered.
Checkpoints hold the whole parameter.

meeting.py lets processes find each other at the start; watching.py ends all of them when one dies.
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
