"""Files that are whole or not there, and that show their damage when they are read.

space      how much room a disk has
locks      what keeps other processes out
writing    whole files or none
text       JSON, tables, encodings, checksums of bytes
archives   zip archives with a checksum: tensors and arrays are stored in them
tensors    .pth and .safetensors
arrays     .npz

Nothing here loads torch or NumPy before it is needed.
"""

from storage.arrays import load_arrays, save_arrays
from storage.locks import HeldError, held, lock, open_locked
from storage.space import can_be_made, free_space, in_bytes, need_room
from storage.tensors import load_tensors, save_safetensors, save_tensors
from storage.text import as_json, as_table, decoded, digest, encoding_of, write_json, write_table
from storage.writing import (
    check_outputs,
    followed,
    remove_left_over,
    write_atomically,
    write_content,
)
