"""The package `anchorage`: what a wheel holds, that it works from any folder, and completion."""

from __future__ import annotations

import ast
import itertools
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import pytest
import tiny
from conftest import ROOT, files_in, run_python

import options
from anchorage import completion
from anchorage.commands import COMMANDS, commands
from options.files import RECIPES, words_of
from page import about
from utils import InputError


@pytest.fixture(scope="module")
def build():
    """hatch_build.py, with stand-ins for the two classes of hatchling that it builds upon."""
    hooks = {
        "hatchling.builders.hooks.plugin.interface": "BuildHookInterface",
        "hatchling.metadata.plugin.interface": "MetadataHookInterface",
    }
    for name, cls in hooks.items():
        module = types.ModuleType(name)
        setattr(module, cls, object)
        sys.modules.setdefault(name, module)
    import hatch_build

    yield hatch_build
    for name in hooks:
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def site(build, tmp_path_factory) -> Path:
    """A folder of packages in which `anchorage` is installed."""
    folder = tmp_path_factory.mktemp("site")
    build.write_package(ROOT, folder)
    return folder


def installed(site: Path, cwd: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """`python WORDS` where the package is installed and the repository is not in reach."""
    return run_python(*words, cwd=cwd, PYTHONPATH=str(site))


def printed_by(program: str, site: Path, folder: Path) -> str:
    """What a program of somebody else's prints, in a folder, where the package is installed."""
    (folder / "program.py").write_text(program)
    done = installed(site, folder, "program.py")
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- how modules are written ----------------------------------------------------------------------


def test_imports_of_our_modules_are_moved_and_others_stay(build):
    source = (
        "import net\nimport torch, json\nimport dataset as data\nfrom net.heads import pool\n"
        "from utils import (  # why\n    InputError,\n)\nfrom . import base\n"
        "def later():\n    αβ = 1; from utils import our_name; return 'python train.py --x'\n"
    )
    written = build.installed(source, {"net", "dataset", "utils"})
    assert written == (
        "from anchorage import net\nimport torch, json\nfrom anchorage import dataset as data\n"
        "from anchorage.net.heads import pool\n"
        "from anchorage.utils import (  # why\n    InputError,\n)\nfrom . import base\n"
        "def later():\n    αβ = 1; from anchorage.utils import our_name; "
        "return 'anchorage train --x'\n"
    )


@pytest.mark.parametrize(
    ("source", "words"),
    [("import net.heads", "from net import heads"), ("import json, net", "a line of its own")],
)
def test_an_import_that_has_no_such_form_is_told(build, source, words):
    with pytest.raises(ValueError, match=words):
        build.installed(source, {"net"})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("python train.py @x", "anchorage train @x"),
        ("`python -m net export RUN`", "`anchorage export RUN`"),
        ("python -m dataset check cub", "anchorage dataset check cub"),
        ("python -m network.py stays", "python -m network.py stays"),
    ],
)
def test_commands_are_called_as_they_are_called_there(build, before, after):
    assert build.commands(before) == after


def test_modules_and_commands_are_named_so_that_they_can_be_moved(build):
    """`import_module("net.heads")` cannot: `our_name` or a relative name can. Nor can a list."""
    ours = set(build.modules(ROOT))
    found = []
    for path, _ in build.files(ROOT):
        if path.suffix != ".py" or "data" in path.relative_to(ROOT).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = ""
            if isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
                named = ast.unparse(node.args[0]).lstrip("f'\"")
            if isinstance(node, ast.List):
                words = [_text(element) for element in node.elts]
                named = "train" if words[:1] == ["python"] else ""
                named = named or dict(itertools.pairwise(words)).get("-m") or ""
            if named.partition(".")[0] in ours:
                found.append(f"{path.relative_to(ROOT)} line {node.lineno}: {ast.unparse(node)}")
    assert not found


def _text(node: ast.expr) -> str | None:
    return node.value if isinstance(node, ast.Constant) else None


# --- what is installed ----------------------------------------------------------------------------


def test_the_package_holds_modules_recipes_and_data_and_nothing_else(site):
    files = files_in(site)
    assert {file.partition("/")[0] for file in files} == {"anchorage"}
    held = {file.split("/")[1] for file in files}
    assert {"train.py", "net", "page", "recipes", "data", "__main__.py", "py.typed"} <= held
    assert not held & {"tests", "benchmarks", "scripts", "docs", "logs", "hatch_build.py"}
    assert files_in(site / "anchorage/recipes") == files_in(RECIPES)
    texts = [file for file in files if file.endswith(".py") and "/data/" not in file]
    assert not [file for file in texts if "python train.py" in (site / file).read_text("utf-8")]


def test_printed_commands_are_called_as_the_one_that_prints_them(tmp_path):
    """From another folder they work when pasted, be it by the scripts' paths or by `anchorage`."""
    tiny.write_images(tmp_path / "photos")
    check = ["check", "folder:photos"]
    shown = run_python("-m", "dataset", *check, cwd=tmp_path)
    (command,) = re.findall(r"^ +(python \S*train.py --dataset .*)", shown.stdout, re.MULTILINE)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    pasted = [f"{command} --help"]
    absent = run_python("-m", "dataset", "check", "cub", cwd=tmp_path).stdout
    pasted += [f"{words} --help" for words in re.findall("PYTHONPATH=.* download cub", absent)]
    assert len(pasted) >= 2, absent
    for command in pasted:
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr
    editable = f"import sys; sys.argv[0] = '/bin/anchorage'; sys.path.insert(0, {str(ROOT)!r})"
    code = f"{editable}; from anchorage.__main__ import main; main(['dataset', *{check}])"
    shown = run_python("-c", code, cwd=tmp_path)
    assert "anchorage train --dataset folder:photos" in shown.stdout
    assert "python" not in shown.stdout


@pytest.mark.parametrize(
    ("kept", "shown"),
    [
        ("/opt/venv/bin/anchorage train --loss MS", "anchorage train --loss MS"),
        ("train.py --loss MS --name anchorage", "python train.py --loss MS --name anchorage"),
        ("-m anchorage train --loss MS", "python -m anchorage train --loss MS"),
    ],
)
def test_a_page_shows_the_command_of_its_run_as_one_types_it(kept, shown):
    record = types.SimpleNamespace(environment={"command": kept}, args={})
    assert about.command(record) == shown


def test_a_missing_package_is_asked_for_in_words_that_work_there(site, tmp_path):
    """The file with the tests' versions is the repository's; installed, there is none to name."""
    code = "from {}utils import installing; print(installing('usearch', 'onnx'))"
    shown = run_python("-c", code.format(""), cwd=tmp_path).stdout
    command, _, versions = shown.strip().partition(" -c ")
    assert command == "pip install usearch onnx" and (tmp_path / versions).samefile(
        ROOT / "constraints.txt"
    )
    done = installed(site, tmp_path, "-c", code.format("anchorage."))
    assert done.stdout == "pip install usearch onnx\n", done.stderr


def test_its_names_meet_nobody_else_s(site, tmp_path):
    """A program with a utils.py and a net.py of its own uses the library, and both find theirs."""
    (tmp_path / "utils.py").write_text("WHOSE = 'mine'")
    (tmp_path / "net.py").write_text("WHOSE = 'mine'")
    program = (
        "import net, utils\n"
        "from anchorage import load_run, retrieval_metrics\n"
        "import anchorage.losses, anchorage.net, importlib.util\n"
        "loss = anchorage.losses.AMLoss(4, 8)\n"
        "assert type(loss).__module__ == 'anchorage.criteria.amloss'\n"
        "assert net.WHOSE == utils.WHOSE == 'mine' and load_run is anchorage.net.load_run\n"
        "names = ('losses', 'train', 'dataset', 'options', 'storage', 'flags')\n"
        "print([name for name in names if importlib.util.find_spec(name)])\n"
    )
    assert printed_by(program, site, tmp_path) == "[]\n"


def test_a_program_that_imports_it_stays_as_it_is(site, tmp_path):
    """Its warnings, its log, its random numbers and its threads are its own."""
    tiny.write_images(tmp_path / "photos")
    program = (
        "import logging, os, random, signal, sys, warnings\n"
        "import numpy, PIL.Image, torch\n"
        "def state():\n"
        "    log = logging.getLogger()\n"
        "    chance = random.getstate(), numpy.random.get_state()[1].tolist()\n"
        "    chance += (torch.get_rng_state().tolist(), torch.get_num_threads())\n"
        "    heard = list(warnings.filters), list(log.handlers), log.level\n"
        "    system = dict(os.environ), sys.excepthook, signal.getsignal(signal.SIGTERM)\n"
        "    return chance, heard, system, PIL.Image.MAX_IMAGE_PIXELS\n"
        "before = state()\n"
        "from anchorage import load_run, retrieval_metrics, clustering_metrics\n"
        "import anchorage.losses, anchorage.metrics, anchorage.dataset, anchorage.index\n"
        "import anchorage.train\n"
        "anchorage.dataset.load('folder:photos').read(0)\n"
        "print([now for now, then in zip(state(), before) if now != then])\n"
    )
    assert printed_by(program, site, tmp_path) == "[]\n"


def test_every_command_says_how_it_is_called_and_loads_no_torch(site, tmp_path):
    done = installed(site, tmp_path, "-m", "anchorage")
    assert done.returncode == 0 and all(f"\n  {name} " in done.stdout for name in commands())
    told = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules))"
    for name in commands():
        code = f"{told}; from anchorage.__main__ import main; main(['{name}', '--help'])"
        done = installed(site, tmp_path, "-c", code)
        assert done.returncode == 0 and done.stdout.endswith("False\n"), done.stderr
        assert f"usage: anchorage {name}" in done.stdout
    done = installed(site, tmp_path, "-m", "anchorage", "trian")
    assert done.returncode == 2
    assert done.stderr == "error: there is no command trian; did you mean train?\n"


def test_it_trains_from_an_empty_folder(site, tmp_path):
    images = tiny.write_images(tmp_path / "photos")
    (tmp_path / "empty").mkdir()
    flags = ["--dataset", f"folder:{images}", *tiny.NETWORK, "--max-steps", "1", "--name", "one"]
    where = tmp_path / "empty"
    done = installed(site, where, "-m", "anchorage", "train", *flags, "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert "anchorage evaluate --resume logs/one\n" in done.stdout
    assert [path.name for path in where.iterdir()] == ["logs"]
    known = (where / "logs/one/environment.json").read_text()
    assert '"git_commit": null' in known and "anchorage train --dataset" in known
    export = ("export", "logs/one", "--card", "card.md")
    done = installed(site, where, "-m", "anchorage", *export)
    assert done.returncode == 0, done.stderr
    assert "load_run('one')" in (where / "card.md").read_text()


@pytest.mark.slow
def test_a_wheel_is_built_and_installed_and_trains(tmp_path):
    """As a user would: build, install, go elsewhere, train; also two processes, and workers."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheels = [*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path / "wheels", ROOT]
    done = subprocess.run(wheels, capture_output=True, text=True)
    if done.returncode and "hatchling" in done.stderr:
        pytest.skip("hatchling cannot be had here")
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheels").glob("anchorage-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"anchorage"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert wheel.stat().st_size < 12e6
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (packages,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    import torch

    (packages / "shared.pth").write_text(str(Path(torch.__file__).parents[1]))
    python, command = tmp_path / "venv/bin/python", tmp_path / "venv/bin/anchorage"
    install = ["--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run([*pip, *install], check=True)
    (tmp_path / "empty").mkdir()

    def train(*flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
        small = "--model resnet10 --width 0.125 --stem imagenet --embedding-size 8 --max-steps 1"
        small += " --batch-size 32 --wandb disabled --metrics retrieval --workers 1"
        known = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        return subprocess.run(
            [command, "train", "@recipes/emoji_scratch.txt", *small.split(), *flags],
            cwd=tmp_path / "empty",
            env={**known, **variables},
            capture_output=True,
            text=True,
            timeout=300,
        )

    done = train("--name", "one")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "empty/logs/one/report.html").is_file()
    assert "t-SNE" in (tmp_path / "empty/logs/one/report.html").read_text()
    # Two processes: torch is told that it has two GPUs, and used on the CPU.
    (tmp_path / "two").mkdir()
    (tmp_path / "two/sitecustomize.py").write_text(
        "import torch\ntorch.cuda.device_count = lambda: 2\n"
    )
    done = train("--gpu-id", "-1", "--name", "two", "--no-report", PYTHONPATH=str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout


# --- recipes --------------------------------------------------------------------------------------


def test_recipes_are_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = list(words_of([f"@{RECIPES / 'emoji_scratch.txt'}"]))
    for name in ("@recipes/emoji_scratch.txt", "@emoji_scratch.txt"):
        assert list(words_of([name])) == expected
    assert options.parse_train(["@recipes/emoji_scratch.txt"]).loss == "AMLoss"
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/emoji_scratch.txt").write_text("--loss MS")  # one's own comes first
    assert list(words_of(["@recipes/emoji_scratch.txt"])) == ["--loss", "MS"]
    with pytest.raises(InputError, match=r"did you mean @recipes/emoji_scratch\.txt"):
        list(words_of(["@recipes/emoji_scrach.txt"]))
    with pytest.raises(InputError, match=r"no file of flags elsewhere/emoji_scratch\.txt"):
        list(words_of(["@elsewhere/emoji_scratch.txt"]))


# --- completion -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> Path:
    """A folder to complete in, with the completion of each shell."""
    folder = tmp_path_factory.mktemp("shell")
    found = list(completion.syntaxes())
    for name, written in completion.SHELLS.items():
        (folder / name).write_text(written(found))
    for made in ("photos", "logs/demo", "recipes", "things/red mug"):
        (folder / made).mkdir(parents=True)
    (folder / "recipes/mine.txt").touch()
    (folder / "things/red mug/IMG 1.jpg").touch()
    return folder


LINES = {
    "anchorage tr": "anchorage train ",
    "anchorage dataset ch": "anchorage dataset check ",
    "anchorage dataset check --js": "anchorage dataset check --json ",
    "anchorage train --resume-r": "anchorage train --resume-run ",
    "anchorage train --loss Proxy_A": "anchorage train --loss Proxy_Anchor ",
    "anchorage train --loss=Proxy_A": "anchorage train --loss=Proxy_Anchor ",
    "anchorage train --dataset cu": "anchorage train --dataset cub ",
    "anchorage train --dataset folder:ph": "anchorage train --dataset folder:photos/",
    "anchorage train @recipes/emoji_im": "anchorage train @recipes/emoji_imagenet.txt ",
    "anchorage train @recipes/mi": "anchorage train @recipes/mine.txt ",
    "anchorage evaluate --resume logs/demo lo": "anchorage evaluate --resume logs/demo logs/",
    "anchorage evaluate --resume a logs/d": "anchorage evaluate --resume a logs/demo/",
    "anchorage evaluate --resume a b --jso": "anchorage evaluate --resume a b --json ",
    "anchorage evaluate --metrics retrieval ve": (
        "anchorage evaluate --metrics retrieval verification "
    ),
    "anchorage report logs/d": "anchorage report logs/demo/",
    "anchorage search query i things/r": "anchorage search query i things/red\\ mug/",
    "anchorage search query i things/red\\ mug/": (
        "anchorage search query i things/red\\ mug/IMG\\ 1.jpg "
    ),
    "anchorage train --dataset folder:things/r": (
        "anchorage train --dataset folder:things/red\\ mug/"
    ),
    "anchorage export --torch-e": "anchorage export --torch-export ",
    "anchorage completion z": "anchorage completion zsh ",
}


def completed(shell: str, folder: Path, line: str) -> str:
    """What stands on the command line after one press of Tab in a shell that somebody types in."""
    starts = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}
    begin = {
        "bash": "bind 'set enable-bracketed-paste off'; bind 'set bell-style none'",
        "zsh": "autoload -U compinit; compinit -u -D; unsetopt BEEP ZLE_BRACKETED_PASTE",
    }
    show = {  # so that the line itself is told, and not how a terminal is to draw it
        "bash": 'show() { echo "<$READLINE_LINE>"; }; bind -x \'"\\C-g": show\'',
        "zsh": 'show() { print -r "<$BUFFER>"; }; zle -N show; bindkey "^g" show',
    }
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.environ.update(TERM="dumb", PS1="> ", HISTFILE="", COLUMNS="400")
        os.execvp(starts[shell][0], starts[shell])
    said = b""

    def until(words: bytes) -> None:
        nonlocal said
        end = time.monotonic() + 200  # a busy machine takes a while to start the shells' Pythons
        while words not in said and time.monotonic() < end:
            if select.select([terminal], [], [], 0.1)[0]:
                try:
                    said += os.read(terminal, 65536)
                except OSError:
                    return

    try:
        os.write(terminal, f"{begin[shell]}; {show[shell]}; . ./{shell}; echo rea''dy\n".encode())
        until(b"ready")
        said = b""
        os.write(terminal, f"{line}\t\x07".encode())
        until(b">\r\n")
        return said.decode().rpartition("<")[2].partition(">")[0]
    finally:
        os.write(terminal, b"\x15exit\n")
        os.close(terminal)
        os.waitpid(process, 0)


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize("line", LINES)
def test_bash_completes(scripts, line):
    assert completed("bash", scripts, line) == LINES[line]


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_a_flag_of_one_value_is_followed_by_no_other(scripts):
    for line in ("anchorage evaluate --json a lo", "anchorage evaluate --resume a --csv b lo"):
        assert completed("bash", scripts, line) == line


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
@pytest.mark.parametrize("line", LINES)
def test_zsh_completes(scripts, line):
    assert completed("zsh", scripts, line) == LINES[line]


@pytest.mark.skipif(shutil.which("fish") is None, reason="there is no fish")
def test_fish_completes(scripts):
    lines = [line for line in LINES if not any(sign in line for sign in ("=", "folder:", "things"))]
    asked = "; ".join(f"complete -C '{line}' | string split \\t | head -1" for line in lines)
    done = subprocess.run(
        ["fish", "--no-config", "-c", f"source fish; {asked}"],
        cwd=scripts,
        capture_output=True,
        text=True,
    )
    found = dict(zip(lines, done.stdout.splitlines(), strict=True))
    assert {line: f"{line.rpartition(' ')[0]} {word}" for line, word in found.items()} == {
        line: LINES[line].rstrip() for line in lines
    }


def test_every_flag_that_help_shows_is_completed():
    by_name = {syntax.command: syntax for syntax in completion.syntaxes()}
    assert set(commands()) <= set(by_name) and set(commands()) <= set(COMMANDS)
    known = {name for option in by_name["train"].options for name in option.spellings}
    shown = {spelling for flag in options.train_flags() for spelling in flag.spellings}
    assert shown <= known
    switch = next(o for o in by_name["train"].options if "--dry-run" in o.spellings)
    assert not switch.takes
