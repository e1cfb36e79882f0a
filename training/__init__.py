"""The parts of a training run: train.py holds the loop, this package everything that it uses.

data      images to train and to judge on   setup     options → network, objective, optimisers
state     everything that changes           clock     progress, and when to evaluate, save and end
keeping   what is written and printed       optim     parameter groups and optimisers
faults    numbers that are not finite       signals   requests to stop
collapse  all classes embedded alike        tracking  wandb and TensorBoard
"""
