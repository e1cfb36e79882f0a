"""Files: written whole or not at all, with checksums that are compared when they are read.

space      free space on a disk
locks      locks that keep other processes out of a file
writing    atomic writing
text       JSON, CSV, encodings, checksums of bytes
archives   zip archives with a checksum, the containers of .pth and .npz
tensors    .pth and .safetensors
arrays     .npz

Nothing here loads torch or NumPy before it is needed.
"""

from storage.archives import need_file
from storage.arrays import load_arrays, save_arrays
from storage.locks import HeldError, held, lock, open_locked
from storage.space import can_be_made, free_space, in_bytes, need_room
from storage.tensors import load_tensors, save_safetensors, save_tensors
from storage.text import (
    as_json,
    as_table,
    digest,
    encoding_of,
    read_text,
    write_json,
    write_table,
)
from storage.writing import (
    check_outputs,
    followed,
    remove_left_over,
    write_atomically,
    write_content,
)
