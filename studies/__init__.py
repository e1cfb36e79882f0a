"""A study: which method suits these images, at which settings, by how much, and how sure that is.

asking    the command line
plan      what is asked: data, methods, what is searched, budget
space     what a search may try
ledger    the trials that all workers share (Optuna), and who is at what
places    where it computes: GPUs, or shares of the cores
rehearsal tries the hardest trainings before the first begins
threads   workers that take what is open, one for each place
worker    does a piece of work: a trial, a run with a seed, the seeds together
trainer   one training: started, watched, and what its failure means
progress  what is printed meanwhile
judging   one trained network on the test classes; the seeds of a method together
results   what was found, with its tests
tables    the same as text, CSV and LaTeX
pages     the same as an HTML page

A trial trains without one of the folds of the training classes, for each fold in turn, and is
judged on the fold that it has not seen. At the best settings a method is then trained on all
training classes, with each seed, and judged on the test classes after the last epoch.
"""
