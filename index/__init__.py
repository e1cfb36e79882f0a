"""An index: the embeddings of images, in one file that grows, and the search in it.

journal    the file, a sequence of records     entries    the images of a record
gallery    `Index`: all records, searchable    codes      short codes of embeddings
scanning   exact search, and search by codes   graph      approximate search, by usearch
sources    the images that a user names        files      embeddings and checksums of image files
known      the images that an index has        adding     embeds and adds new images
network    the network that made an index      making     build, add, remove, compact, approximate
asking     answers to pictures                 reordering query expansion, re-ranking
showing    what the commands print             pictures   answers as a contact sheet
duplicates images that look alike              keys       texts that are found without reading all

    index = Index.open("shop.index")
    hits = index.search(index.embedder()(["photo.jpg"]), top=10)
    [index.entry(row).path for row in hits.rows[0]]
"""

from __future__ import annotations

from index.entries import Entry
from index.gallery import Index
from index.scanning import Hits

__all__ = ["Entry", "Hits", "Index"]
