"""A study: which method suits these images, at which settings, by how much, and how sure that is.

asking    the command line
plan      what is asked: data, methods, what is searched, budget
space     what a search may try
ledger    the trials that all workers share (Optuna), and who is at what
worker    takes what is open, trains and judges it
judging   one trained network on the test classes; the seeds of a method together
results   what was found, with its tests
tables    the same as text, CSV and LaTeX
pages     the same as an HTML page

A trial trains without one of the folds of the training classes, for each fold in turn, and is
judged on the fold that it has not seen. At the best settings a method is then trained on all
training classes, with each seed, and judged on the test classes after the last epoch.
"""
