"""What a run in progress is made of: train.py holds the loop, this package what the loop uses.

data      what is trained on and judged     setup     options → network, objective, optimisers
state     all that changes                  clock     where a run stands, when it looks and stops
keeping   what is written and told          optim     parameter groups, rates and schedules
faults    numbers that are not finite       signals   what asks a run to stop
collapse  all classes embedded alike        tracking  wandb and TensorBoard
"""
