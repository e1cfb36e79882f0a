"""A checkpoint → embeddings → numbers, tables, files and pictures; evaluate.py is the front door.

tasks       what is evaluated                 networks      a run, a folder or a file, opened
embedding   a network looks at images         whitening     and its embeddings are whitened
measuring   the numbers                       postprocessing what is done before the ranking
verifying   pairs, and the thresholds that they recommend (thresholds)
candidates  checkpoints side by side          meanings      what the numbers are called and mean
tables      numbers as text, CSV, LaTeX       files         what is written of single images
pictures    queries and what they find        lettering     names in pictures, in any script
inference   a run as a function from pictures to embeddings
"""
