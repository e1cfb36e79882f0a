"""A checkpoint → embeddings → numbers, tables, files and pictures; evaluate.py is the front door.

`tasks` says what is evaluated, `networks` opens a run, a folder or a file, `embedding` looks at
images, `measuring` makes the numbers, `candidates` compares checkpoints, and `tables`, `files` and
`pictures` write. `inference` makes a run a function from pictures to embeddings.
"""
