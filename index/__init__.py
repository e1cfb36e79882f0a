"""A gallery that stays: images of any kind by their embeddings, in one file that grows.

journal    the file: records that are added, each whole or not there
entries    the images of a record        gallery  `Index`: what all records say, and its search
scanning   all embeddings against some queries: exact, and by codes (codes) with exact rescoring
graph      an approximate search for large indexes, by usearch
sources    which images are meant        files    image files → embeddings, checksums
known      which of them are there       adding   what is new is embedded and added
network    the network of an index       making   build, add, remove, compact, approximate
asking     pictures → answers            showing  what is said of all this, pictures a sheet of it
duplicates which images look alike

    index = Index.open("shop.index")
    hits = index.search(index.embedder()(["photo.jpg"]), top=10)
    [index.entry(row).path for row in hits.rows[0]]
"""

from __future__ import annotations

from index.entries import Entry
from index.gallery import Index
from index.scanning import Hits

__all__ = ["Entry", "Hits", "Index"]
