"""The commands of README and of the guides run as printed; long trainings are cut to two steps."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import official_layouts
import pytest
import tiny
import together
import torch
from conftest import ROOT, link_repository_data, run_cli, run_python, start_python
from PIL import Image
from scipy import stats

import losses
from anchorage.completion import syntaxes
from criteria import COMMANDS

GUIDES = "training evaluation report library datasets demo"
"""The documents whose commands are run here; others have tests beside what they are about."""
TEXT = "\n".join(
    file.read_text(encoding="utf-8")
    for file in (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in GUIDES.split()))
)
SHORT = "--max-steps 2 --wandb disabled --workers 0 --no-report".split()
NARROW = ["--width", "0.125"]  # for what starts from no weights


def blocks(language: str) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)
    return list(dict.fromkeys(found))


def commands() -> list[str]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return list(dict.fromkeys(re.sub(r" +", " ", line) for line in lines if line[:1] not in "# "))


TRAINING = [command for command in commands() if command.startswith("python train.py")]
EVALUATION = [command for command in commands() if command.startswith("python evaluate.py")]
REPORTS = [command for command in commands() if command.startswith("python report.py")]
EMBEDDED = {  # one of those that differ in the seed and the name
    re.sub(r" --(seed|name) \S+", "", command): command
    for command in TRAINING
    if "--dataset" not in command
}.values()
OWN = [command for command in TRAINING if "photos" in command]
PUBLISHED = [c for c in TRAINING if "--dataset" in c and c not in OWN]
EXPORT = [command for command in commands() if command.startswith("python -m net export")]
SEARCH = [command for command in commands() if command.startswith("python search.py")]
STUDIES = [command for command in commands() if command.startswith("python study.py")]
CHECKS = [command for command in commands() if command.startswith("python -m dataset check")]


def arguments(command: str) -> list[str]:
    return shlex.split(command)[2:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone's worth of data: a tenth of the embedded set, and small copies of the benchmarks."""
    path = tmp_path_factory.mktemp("readme")
    link_repository_data(path)
    official_layouts.write("cub", "official", path / "data", classes=8, images=6)
    official_layouts.write("cars", "official", path / "data", classes=8, images=6)
    tiny.write_images(path)
    (path / "photos").mkdir()
    for image_class in (path / "train").iterdir():
        image_class.rename(path / "photos" / image_class.name)
    rows = [f"{p.relative_to(path)},{p.parent.name},eval" for p in path.glob("eval/*/*.png")]
    rows += [f"{p.relative_to(path)},{p.parent.name},train" for p in path.glob("photos/*/*.png")]
    (path / "photos.csv").write_text("\n".join(["path,label,split", *rows]))
    return path


def test_readme_has_the_commands_it_promises():
    assert "make demo" in commands() and "make test" in commands()
    assert len(EMBEDDED) >= 6 and len(PUBLISHED) >= 3 and len(EVALUATION) >= 2
    assert any("AMLoss" in command for command in PUBLISHED)


@pytest.mark.parametrize("target", [c.split()[1] for c in commands() if c.startswith("make ")])
def test_make_targets_exist(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", EMBEDDED, ids=lambda command: command[16:60])
def test_training_on_the_embedded_data(command, folder):
    narrow = [] if "imagenet" in command else NARROW
    done = run_cli("train.py", *arguments(command), *SHORT, *narrow, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "--dry-run" in command or "run folder" in done.stdout


@pytest.mark.parametrize("command", OWN, ids=lambda command: command[16:60])
def test_training_on_ones_own_images(command, folder):
    small = (
        "--model resnet10 --width 0.125 --pretrained none --image-size 32 --batch-size 8".split()
    )
    cache = ["--cache-dir", str(folder / "cache")] if "--decode cache" in command else []
    done = run_cli("train.py", *arguments(command), *SHORT, *small, *cache, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "R@1" in done.stdout


def test_from_photographs_to_a_search_page(folder):
    """What stands below `train.py` in the second task: an index, and a page that answers."""
    if not (folder / "logs" / "shop").exists():
        (train,) = (command for command in OWN if "--name shop" in command)
        test_training_on_ones_own_images(train, folder)
    build, serve = SEARCH
    done = run_cli("search.py", *arguments(build), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "shop.index").stat().st_size > 0
    server = start_python(ROOT / "search.py", *arguments(serve), "--port", "0", cwd=folder)
    try:
        address = next(
            found[0] for line in server.stdout if (found := re.findall(r"http:\S+", line))
        )
        with urllib.request.urlopen(f"{address.rstrip('/')}/api/info", timeout=20) as answer:
            assert answer.status == 200
    finally:
        server.kill()
        server.communicate()


@pytest.mark.parametrize("command", STUDIES, ids=lambda command: command[16:60])
def test_studies_can_be_planned(command, folder, monkeypatch):
    import study
    from studies import asking

    monkeypatch.chdir(folder)
    plan = study.plan_of(asking.parse(arguments(command)))
    assert len(plan.entrants) == 3


@pytest.mark.parametrize("command", CHECKS, ids=lambda command: command[24:])
def test_checks_of_data(command, folder):
    done = run_python(*shlex.split(command)[1:], cwd=folder)
    assert done.returncode in (0, 1), done.stderr
    assert "images" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", PUBLISHED, ids=lambda command: command[16:70])
def test_published_commands(command, folder):
    small = [*SHORT, "--pretrained", "none", "--batch-size", "6"]  # of two classes, IPC 3 too
    done = run_cli("train.py", *arguments(command), *small, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "R@1" in done.stdout


@pytest.fixture(scope="module")
def demo(folder: Path) -> Path:
    """The same folder with the runs of the demo, and pictures of one's own."""
    for seed, name in enumerate(("demo", "demo2"), 1):
        if not (folder / "logs" / name).exists():
            flags = ["@recipes/emoji_scratch.txt", "--name", name, "--seed", str(seed)]
            assert run_cli("train.py", *flags, *SHORT, *NARROW, cwd=folder).returncode == 0
    for name in ("drawing.png", "photo.jpg"):
        Image.new("RGB", (30, 40), "red").save(folder / name)
    return folder


def test_evaluation_of_the_demo(demo):
    folder = demo
    for command in EVALUATION:
        done = run_cli("evaluate.py", *arguments(command), cwd=folder)
        assert done.returncode == 0, done.stderr
    for command in REPORTS:
        done = run_cli("report.py", *arguments(command), cwd=folder)
        assert done.returncode == 0, done.stderr
    written = "runs.csv numbers.json table.csv table.tex embeddings.npz neighbours.png classes.csv"
    written += " worst/failures.csv worst/failures.png logs/demo/query.csv logs/demo/query.png"
    for name in written.split():
        assert (folder / name).stat().st_size > 0


ALONE = [code for code in blocks("python") if "DistributedDataParallel" not in code]


@pytest.mark.parametrize("code", ALONE)
def test_python_blocks(code, demo, tmp_path):
    (tmp_path / "block.py").write_text(code)
    done = run_python(tmp_path / "block.py", cwd=demo)
    assert done.returncode == 0, done.stderr


def test_losses_elsewhere_train_network_proxies_and_margins():
    (code,) = (block for block in blocks("python") if "AMLoss" in block)
    before, loop = re.split(r"^(?=for )", code, flags=re.MULTILINE)
    torch.manual_seed(0)
    names: dict = {}
    exec(before, names)
    criterion, network = names["criterion"], names["network"]
    learned = {**dict(criterion.named_parameters()), **dict(network.named_parameters())}
    start = {name: value.detach().clone() for name, value in learned.items()}
    exec(loop, names)
    assert {"proxies", "margins", "weight", "bias"} == set(learned)
    for name, value in learned.items():
        assert (value != start[name]).float().mean() > 0.9, name
    rates = [group["initial_lr"] for group in names["optimiser"].param_groups]
    assert rates == pytest.approx([1e-4, 1e-2, 1e-4])  # network, proxies, margins


def test_the_losses_need_the_files_that_are_named_and_no_others(tmp_path):
    document = (ROOT / "docs" / "library.md").read_text()
    (said,) = re.findall(r"They need .*?\n\n", document, flags=re.DOTALL)
    for name in re.findall(r"`([\w./]+)`", said):
        place = ROOT / name
        (shutil.copytree if place.is_dir() else shutil.copy)(place, tmp_path / name)
    (code,) = (block for block in blocks("python") if "AMLoss" in block)
    (tmp_path / "block.py").write_text(code)
    done = run_python(tmp_path / "block.py", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_losses_in_several_processes_train_as_in_one(tmp_path):
    (code,) = (block for block in blocks("python") if "DistributedDataParallel" in block)
    code = re.sub(r"^dist\..*\n", "", code, flags=re.MULTILINE)  # together.run does that

    def of_two() -> dict[str, torch.Tensor]:
        names: dict = {}
        exec(code, names)
        module, criterion = names["network"].module, names["criterion"]
        return {"weight": module.weight.detach(), **criterion.state_dict()}

    one, other = together.run(2, of_two, tmp_path)
    alone = trained_by_one_process(steps=2)
    for name, value in alone.items():
        assert torch.equal(one[name], other[name]), name
        torch.testing.assert_close(one[name], value, msg=name)
    assert one["taken"] == 32


def trained_by_one_process(steps: int) -> dict[str, torch.Tensor]:
    """What docs/library.md's example of two processes does, in one with the whole batch."""
    torch.manual_seed(0)
    network = torch.nn.Linear(64, 512)
    criterion = losses.MemoryBank(losses.MultiSimilarityLoss(), size=1000, embedding_size=512)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4)
    drawn = []
    for rank in range(2):
        torch.manual_seed(1 + rank)
        drawn.append([(torch.randn(8, 64), torch.randint(10, (8,))) for _ in range(steps)])
    for parts in zip(*drawn, strict=True):
        images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        optimiser.zero_grad()
        criterion(network(images), labels).backward()
        optimiser.step()
    return {"weight": network.weight.detach(), **criterion.state_dict()}


def test_export_of_the_demo(demo):
    pytest.importorskip("onnxscript")
    for command in EXPORT:
        done = run_python(*shlex.split(command)[1:], cwd=demo)
        assert done.returncode == 0, done.stderr
    assert EXPORT and all((demo / f"demo.{kind}").is_file() for kind in ("onnx", "safetensors"))


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_links_and_pictures_lead_somewhere(document):
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in heads}


def test_the_readme_is_short_and_names_every_document():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    linked = set(re.findall(r"docs/(\w+)\.md", text))
    reached = {name for page in linked for name in re.findall(
        r"\((\w+)\.md", (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"))}  # fmt: skip
    assert {path.stem for path in DOCUMENTS[1:]} <= linked | reached


def test_the_index_of_documents_names_each_once() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| \[(\w+\.md)\]\(\1\) \|", index, flags=re.MULTILINE)
    documents = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert sorted(named) == sorted(documents)


@pytest.mark.parametrize("start", ["from scratch", "from ImageNet"])
def test_the_table_of_the_demo_is_that_of_its_seeds(start: str) -> None:
    def cells(document: str, words: str) -> list[str]:
        text = (ROOT / document).read_text(encoding="utf-8")
        (line,) = re.findall(rf"^\| \**{words}.*$", text, flags=re.MULTILINE)
        return [cell.strip(" *") for cell in line.strip("|").split("|")[1:]]

    r1, map_at_r, _, nmi = cells("docs/demo.md", f"{start}, seeds")
    for seeds, told in zip((r1, map_at_r, nmi), cells("README.md", start), strict=True):
        values = np.array([float(value) for value in seeds.split(" / ")])
        half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
        assert list(map(float, told.split(" ± "))) == pytest.approx([values.mean(), half], abs=6e-4)


def commands_of(text: str) -> Iterator[tuple[str, list[str]]]:
    """The commands in the blocks and sentences of a document: a program, and the words behind it.

    `anchorage X`, `python X.py` and `X.py` are one program; what stands in quotes, and what follows
    `|`, `>` or `#`, is left out.
    """
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    shell = "\n".join(block for language, block in fenced if language in ("", "bash"))
    rest = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = shell.replace("\\\n", " ").splitlines() + re.findall(r"`([^`]+)`", rest)
    start = r"(?:\w+=\S* )*(?:python (?:-m )?|anchorage )?([\w/]+)(?:\.py)? (.*)"
    for line in lines:
        if found := re.match(start, " ".join(line.split())):
            yield found[1], re.sub(r"\"[^\"]*\"|'[^']*'|[#|>].*", "", found[2]).split()


def test_commands_of_documents_have_flags_that_their_programs_know() -> None:
    known = {one.command: {s for o in one.options for s in o.spellings} for one in syntaxes()}
    measuring = (ROOT / "benchmarks" / "measuring.py").read_text(encoding="utf-8")
    inside = {"dataset": "dataset {}", "search": "search {}", "net": "{}"}
    looked_at = 0
    for document in DOCUMENTS:
        if document.stem == "extending":  # there they are made
            continue
        for program, words in commands_of(document.read_text(encoding="utf-8")):
            flags = {word.partition("=")[0] for word in words if re.match("--?[A-Za-z]", word)}
            name = inside.get(program, program).format(*words[:1])
            if program.startswith(("benchmarks/", "scripts/")):
                source = (ROOT / f"{program}.py").read_text(encoding="utf-8") + measuring
                unknown = {flag for flag in flags if f'"{flag}"' not in source}
            else:
                unknown = flags - known.get(name, flags)
            assert not unknown, (document.name, program, unknown)
            looked_at += len(flags)
    assert looked_at > 300


def test_flags_in_sentences_and_tables_are_flags_of_ours() -> None:
    of_others = {
        "--build-arg", "--gpus-per-task", "--max-restarts", "--shm-size", "--signal", "--upgrade",
    }  # fmt: skip
    known = {spelling for one in syntaxes() for o in one.options for spelling in o.spellings}
    for room in ("benchmarks", "scripts"):
        for file in (ROOT / room).glob("*.py"):
            known |= set(re.findall(r'"(--[a-z][\w-]*)"', file.read_text(encoding="utf-8")))
    looked_at = 0
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        rest = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        named = set(
            re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", " ".join(re.findall(r"`[^`]+`", rest)))
        )
        assert named <= known | of_others, (document.name, named - known - of_others)
        looked_at += len(named)
    assert looked_at > 300


def test_every_loss_has_its_place_in_the_document_of_methods() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[\d+ .*\| (.*) \|$", text, flags=re.MULTILINE)
    names = [name for cell in listed for name in re.findall(r"`([\w-]+)`", cell)]
    losses_told = [name for name in names if not name.startswith("--")]
    assert sorted(losses_told) == sorted(n for group in COMMANDS.values() for n in group)


def test_tests_that_documents_name_are_there() -> None:
    """`tests/test_X.py -k WORDS`: each word is in the name of one of its tests."""
    named = set()
    for document in DOCUMENTS:
        text = " ".join(document.read_text(encoding="utf-8").split())
        named |= set(re.findall(r"(tests/test_\w+\.py) -k (\"[^\"]+\"|\w+)", text))
    faults = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    for cell in re.findall(r"\| ([^|]*) \|$", faults, flags=re.MULTILINE):
        bare = [
            words
            for words in re.findall(r"`([^`]+)`", cell)
            if re.fullmatch(r"\"?[a-z_ ]+\"?", words)
        ]
        named |= {("tests/test_faults.py", words) for words in bare}
    assert len(named) > 100
    for file, words in named:
        names = re.findall(r"def (test_\w+)", (ROOT / file).read_text(encoding="utf-8"))
        for word in re.findall(r"\w+", words):
            known = word in ("or", "and", "not", "NAME") or any(word in name for name in names)
            assert known, (file, word)


def test_files_of_ours_that_documents_name_are_there() -> None:
    rooms = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != ".")
    named = {
        file
        for document in DOCUMENTS
        for file in re.findall(
            rf"(?<![\w./-])((?:{rooms})/[a-z_/]+\.(?:py|txt|toml|npz|bib))\b",
            document.read_text(encoding="utf-8"),
        )
    }
    missing = {file for file in named if not (ROOT / file).exists()}
    assert len(named) > 50
    assert {Path(file).name for file in missing} <= {"mine.py"}  # in the guides to one's own
