"""Speed, memory and accuracy of the searches of an index, compared with faiss and usearch.

    python benchmarks/search.py                      # 100,000 vectors of 512 numbers
    python benchmarks/search.py --size 1000000 --threads 2
    python benchmarks/search.py --only exact int8 graph

The vectors are synthetic: clusters of 20 around centres that are near a 64-dimensional subspace,
and queries drawn from the same clusters. R@1 counts nearest neighbours of the query's cluster;
agreement is the share of the 10 nearest that a search has in common with the exact one. Each kind
runs in a process of its own; its memory is the growth of the process by opening and searching. The
folder (--folder) needs 2 to 4 kB per vector, and is used again by the next call.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import door

door.settle_threads(os.environ)

import numpy as np
import torch

from benchmarks.measuring import apart, status
from index import Index, codes, graph, journal, making
from index.entries import entry_arrays
from options import searching
from utils import InputError, sentence_errors

KINDS = ("exact", "int8", "binary", "graph", "faiss-flat", "faiss-hnsw", "faiss-ivf", "usearch")
QUERIES, BATCH, TOP, IN_CLUSTER, NOISE, RECORD = 1024, 64, 10, 20, 1.6, 8192

IN_VIEW = 256  # nodes in the search list of the other libraries' graphs

# --- vectors --------------------------------------------------------------------------------------


def clustered(count: int, size: int, clusters: np.ndarray, seed: int) -> np.ndarray:
    """Unit vectors (count, size), each near the centre of its cluster."""
    rng = np.random.default_rng(0)
    plane = rng.standard_normal((64, size), dtype=np.float32) / 8
    made = np.empty((count, size), np.float32)
    noise = np.random.default_rng(seed)
    for start in range(0, count, RECORD):
        part = clusters[start : start + RECORD]
        # A centre is a function of its number, so that centres need no memory.
        draws = np.stack([_draws(cluster, size) for cluster in part.tolist()])
        centres = draws[:, :64] @ plane + 0.3 * draws[:, 64:]
        centres /= np.linalg.norm(centres, axis=1, keepdims=True)
        away = noise.standard_normal(centres.shape, dtype=np.float32) * (NOISE / size**0.5)
        made[start : start + RECORD] = centres + away
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    return made


def _draws(cluster: int, size: int) -> np.ndarray:
    return np.random.default_rng([1, cluster]).standard_normal(64 + size, dtype=np.float32)


def prepare(folder: Path, count: int, size: int) -> None:
    """Makes vectors, queries and their clusters, and an index with each kind of codes."""
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(2)
    own = rng.integers(max(1, count // IN_CLUSTER), size=count)
    asked = rng.integers(max(1, count // IN_CLUSTER), size=QUERIES)
    vectors = clustered(count, size, own, 3)
    np.save(folder / "vectors.npy", vectors)
    np.save(folder / "queries.npy", clustered(QUERIES, size, asked, 4))
    np.savez(folder / "clusters.npz", own=own, asked=asked)
    centre = vectors[:RECORD].mean(axis=0)
    for kind in ("none", "int8", "binary"):
        path = folder / f"{kind}.index"
        journal.create(path)
        about = {"kind": "network", "made": "0", "size": size, "codes": kind, "weights": None}
        with journal.writing(path) as writer:
            writer.add({**about, "run": "", "folder": "", "model": "", "fingerprint": ""}, {})
            for start in range(0, count, RECORD):
                part = vectors[start : start + RECORD]
                writer.add({"folder": str(folder)}, _arrays(part, start, kind, centre, folder))
    (folder / "done").touch()


def _arrays(
    part: np.ndarray, start: int, kind: str, centre: np.ndarray, folder: Path
) -> dict[str, np.ndarray]:
    numbers = range(start, start + len(part))
    entries = [SimpleNamespace(id=str(n), path=f"{folder}/{n}.jpg", label=None) for n in numbers]
    return {
        "vectors": part,
        **entry_arrays(entries, str(folder)),
        **codes.as_arrays(kind, part, centre),
        "contents": np.zeros((len(part), 16), np.uint8),
        "stamps": np.zeros((len(part), 2), np.int64),
        "centre": centre,
    }


# --- searches -------------------------------------------------------------------------------------

Search = Callable[[np.ndarray], np.ndarray]
"""Queries (Q, d) → (Q, 10) numbers of vectors."""
Facts = dict[str, float]
"""Name of a column → its number."""


def ours(folder: Path, kind: str, threads: int) -> tuple[Search, Facts]:
    """A search of one of our indexes."""
    path = folder / f"{'none' if kind in ('exact', 'graph') else kind}.index"
    facts: Facts = {}
    if kind == "graph" and not searching.graph_of(path).exists():
        facts["build_seconds"] = making.approximate(path)
    index = Index.open(path, exact=kind == "exact")
    return lambda queries: index.search(queries, TOP).rows, facts


def faiss_index(folder: Path, kind: str, threads: int) -> tuple[Search, Facts]:
    """A search by faiss: all vectors, a graph of them, or cells."""
    import faiss

    faiss.omp_set_num_threads(threads)
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    size, inner = vectors.shape[1], faiss.METRIC_INNER_PRODUCT
    began = time.perf_counter()
    if kind == "faiss-flat":
        found = faiss.IndexFlatIP(size)
    elif kind == "faiss-hnsw":
        found = faiss.IndexHNSWFlat(size, graph.CONNECTIVITY, inner)
        found.hnsw.efConstruction = graph.ON_ADDING
        found.hnsw.efSearch = IN_VIEW
    else:
        cells = int(4 * len(vectors) ** 0.5)
        found = faiss.IndexIVFFlat(faiss.IndexFlatIP(size), size, cells, inner)
        found.train(np.array(vectors[: 40 * cells]))
        found.nprobe = 32
    for start in range(0, len(vectors), 1 << 16):
        found.add(np.array(vectors[start : start + (1 << 16)]))
    facts = {"build_seconds": time.perf_counter() - began}
    return lambda queries: found.search(queries, TOP)[1], facts


def usearch_index(folder: Path, _: str, threads: int) -> tuple[Search, Facts]:
    """usearch by itself, with the settings of our graph, without exact scores."""
    from usearch.index import Index as Usearch

    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    found = Usearch(
        ndim=vectors.shape[1],
        metric="ip",
        dtype=graph.NUMBERS,
        connectivity=graph.CONNECTIVITY,
        expansion_add=graph.ON_ADDING,
        expansion_search=IN_VIEW,
    )
    began = time.perf_counter()
    for start in range(0, len(vectors), 1 << 16):
        part = np.array(vectors[start : start + (1 << 16)])
        found.add(np.arange(start, start + len(part)), part, threads=threads)
    facts = {"build_seconds": time.perf_counter() - began}

    def search(queries: np.ndarray) -> np.ndarray:
        return found.search(queries, TOP, threads=threads).keys.reshape(len(queries), -1)

    return search, facts


def measure(kind: str, folder: Path, threads: int, single: int) -> Facts:
    """Time, memory and correctness of one kind of search; `single` queries are asked one by one."""
    torch.set_num_threads(threads)
    queries = np.load(folder / "queries.npy")
    clusters = np.load(folder / "clusters.npz")
    before = status("VmHWM")
    make = faiss_index if "faiss" in kind else usearch_index if kind == "usearch" else ours
    search, facts = make(folder, kind, threads)
    search(queries[:BATCH])  # the first call reads the files
    facts["memory_mb"] = (status("VmHWM") - before) / 1e6
    times = []
    for query in queries[:single]:
        start = time.perf_counter()
        search(query[None])
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    found = np.concatenate(
        [search(queries[first : first + BATCH]) for first in range(0, QUERIES, BATCH)]
    )
    facts["batch_ms"] = (time.perf_counter() - start) / QUERIES * 1e3
    facts["single_ms"] = float(np.median(times)) * 1e3
    facts["R@1"] = float((clusters["own"][found[:, 0]] == clusters["asked"]).mean())
    if kind == "exact":
        np.save(folder / "exact.npy", found)
    if (folder / "exact.npy").exists():
        wanted = np.load(folder / "exact.npy")
        pairs = zip(found.tolist(), wanted.tolist(), strict=True)
        facts["agreement"] = float(np.mean([len(set(a) & set(b)) / TOP for a, b in pairs]))
    return facts


# --- the command ----------------------------------------------------------------------------------

COLUMNS = {
    "build_seconds": ("build s", "{:.0f}"),
    "memory_mb": ("MB", "{:,.0f}"),
    "single_ms": ("1 query ms", "{:.2f}"),
    "batch_ms": ("of 64 ms", "{:.2f}"),
    "R@1": ("R@1", "{:.4f}"),
    "agreement": ("agree", "{:.4f}"),
}


def main(args: argparse.Namespace) -> None:
    """Measures every kind in a process of its own, and prints a table."""
    folder = Path(args.folder or f"logs/search-{args.size}x{args.numbers}")
    prepare(folder, args.size, args.numbers)
    print(
        f"{args.size:,} x {args.numbers}, {args.threads} thread(s), load {os.getloadavg()[0]:.1f}"
    )
    print(f"{'':12}" + "".join(f"{title:>12}" for title, _ in COLUMNS.values()), flush=True)
    for kind in args.only or KINDS:
        try:
            facts = apart(measure, kind, folder, args.threads, args.single)
        except ModuleNotFoundError as missing:
            raise InputError(f"{kind} needs the package {missing.name}") from None
        cells = (
            form.format(facts[name]) if name in facts else "-"
            for name, (_, form) in COLUMNS.items()
        )
        print(f"{kind:12}" + "".join(f"{cell:>12}" for cell in cells), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=100_000, help="how many vectors")
    parser.add_argument("--numbers", type=int, default=512, help="of each vector")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--single", type=int, default=50, help="queries that are asked one by one")
    parser.add_argument("--only", nargs="+", choices=KINDS)
    parser.add_argument("--folder", help="where vectors and indexes are kept")
    with sentence_errors():
        main(parser.parse_args())
