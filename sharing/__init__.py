"""A run for others: one file of weights that says what it is, a model card, the Hugging Face hub.

references   the papers behind what a run used; docs/references.md is made from them
card         what a run's files say, as a model card; naming is a part of it
bundle       the files that others get
"""
