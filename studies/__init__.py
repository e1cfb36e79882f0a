"""A study: which method suits these images, with which settings, by how much, and how surely.

asking    the command line
plan      the description of a study: data, methods, search, budget
space     the values that a search may try
ledger    the trials (Optuna) and the claims on work that all workers share
places    GPUs, or shares of the cores, for trainings
rehearsal checks the hardest trainings before the first one begins
threads   the workers of a process, one for each place
worker    does a piece of work: a trial, a run with a seed, an ensemble of the seeds
trainer   starts and watches a training, and interprets its failure
progress  prints a line after each training
judging   measures a trained network, and ensembles, on the test classes
results   collects results, with their statistical tests
tables    results as text, CSV and LaTeX
pages     results as an HTML page          markdown  results in a Markdown document

A trial leaves out each fold of the training classes in turn, trains on the others, and is judged on
the fold that was left out. With the best settings, each method is then trained on all training
classes, once per seed, and judged on the test classes after the last epoch.
"""
