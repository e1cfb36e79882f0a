"""Sharing a run: a file of weights that describes itself, a model card, the Hugging Face Hub.

references   the papers behind losses, methods, networks and data; makes docs/references.md
card         a model card, from the files of a run
naming       options and data sets without the folders of this machine
bundle       the files that are shared
"""
