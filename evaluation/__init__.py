"""A checkpoint → embeddings → numbers, tables, files and pictures; evaluate.py is the front door.

tasks       queries and galleries             networks      opens a run, a folder or a file
embedding   images → embeddings               whitening     whitened embeddings
measuring   embeddings → numbers              postprocessing between embeddings and ranking
verifying   pairs of images                   thresholds    verdicts: same, unsure, different
candidates  checkpoints side by side          meanings      names and definitions of the numbers
tables      numbers as text, CSV, LaTeX       files         embeddings, neighbours, failures
pictures    queries and what they find        lettering     text in pictures, in any script
inference   a run as a function from pictures to embeddings
"""
