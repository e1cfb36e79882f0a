"""What wandb and TensorBoard are told about a run, read back from their files."""

from __future__ import annotations

import argparse
import http.server
import io
import json
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
from conftest import ROOT, SMALL, run_cli, run_code
from PIL import Image

from training import tracking
from training.clock import Length
from training.keeping import Keeper
from training.tracking import About, Tracker, wandb_mode


def wandb_records(file: Path) -> Iterator[bytes]:
    """The records of an offline run: a 7-byte header, then LevelDB's log format (32 KiB blocks)."""
    data, position, part = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield part
            part = b""


def wandb_content(file: Path) -> tuple[str, dict[str, str], list[dict]]:
    """An offline run: its id, its configuration as JSON by name, and its rows."""
    protocol = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    run_id, config, rows = "", {}, []
    for content in wandb_records(file):
        record = protocol.Record()
        record.ParseFromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = record.history.item
            rows.append({tuple(i.nested_key) or (i.key,): i.value_json for i in items})
        elif kind == "run":
            run_id = record.run.run_id
            config |= {item.key: item.value_json for item in record.run.config.update}
    return run_id, config, rows


def events(folder: Path):
    """TensorBoard's own reading of what is in a folder."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = module.EventAccumulator(
        str(folder), size_guidance={"images": 0, "scalars": 0, "histograms": 0}
    )
    return read.Reload()


def scalars(read, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read.Scalars(name)]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an AMLoss run of four epochs that was stopped after two and continued."""
    pytest.importorskip("tensorboard")
    root = tmp_path_factory.mktemp("tracked")
    images = tiny.write_images(root / "data")
    network = [*tiny.NETWORK, "--warm", "0", "--amp", "off", "--loss", "AMLoss"]
    network[network.index("disabled")] = "offline"
    command = ["--dataset", f"folder:{images}", *network, "--tensorboard", "--wandb-images", "2"]
    command += ["--wandb-project", "mine", "--name", "of my own"]
    for more in (
        [*command, "--epochs", "2"],
        ["--resume-run", "logs/of my own", "--epochs", "4"],
    ):
        done = run_cli("train.py", *more, cwd=root, WANDB_MODE="offline")
        assert done.returncode == 0, done.stderr
        assert "tensorboard logs/of my own/tensorboard" in done.stdout
    return root / "logs" / "of my own"


def test_wandb_is_told_everything_and_a_continued_run_continues(tracked):
    files = sorted((tracked / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    parts = [wandb_content(file) for file in files]
    assert parts[0][0] == parts[1][0] != ""
    assert json.loads(parts[0][1]["loss"]) == "AMLoss"
    rows = tiny.metrics_rows(tracked)
    assert len(rows) == 4
    by_step = {int(row[("step",)]): row for _, _, history in parts for row in history}
    assert list(by_step) == [int(row["step"]) for row in rows]
    logged = list(by_step.values())
    for row, known in zip(logged, rows, strict=True):
        for name, value in known.items():
            told = json.loads(row[(tracking.grouped(name),)])
            assert told == pytest.approx(float(value), rel=1e-4), name
        assert json.loads(row[("train/margins", "_type")]) == "histogram"
        assert sum(json.loads(row[("train/margins", "values")])) == 8  # classes
    best = [json.loads(row[("best/R@1",)]) for row in logged]
    assert best == pytest.approx(np.maximum.accumulate([float(row["R@1"]) for row in rows]))
    pictured = [("eval/neighbours", "path") in row for row in logged]
    assert pictured == [False, True, False, True]
    pictures = [[*file.parent.glob("files/media/images/**/*.png")] for file in files]
    assert [len(each) for each in pictures] == [1, 1]  # what the first part drew is not repeated
    assert all(Image.open(picture).width > 500 for each in pictures for picture in each)


def test_projects_and_names_are_the_users(tracked):
    protocol = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    (file, _) = sorted((tracked / "wandb").glob("offline-run-*/*.wandb"))
    records = [protocol.Record.FromString(content) for content in wandb_records(file)]
    (run,) = [r.run for r in records if r.WhichOneof("record_type") == "run"][:1]
    assert (run.project, run.display_name) == ("mine", "of my own")
    assert run.run_group.startswith("AMLoss on data (")
    assert [*run.tags] == ["AMLoss", "data", "seed 1"]
    config = wandb_content(file)[1]
    assert len(json.loads(config["data fingerprint"])) == 16 and "commit" in config


def test_wandbs_summary_keeps_the_best_and_the_last(tracked):
    protocol = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    (file, _) = sorted((tracked / "wandb").glob("offline-run-*/*.wandb"))
    records = [protocol.Record.FromString(content) for content in wandb_records(file)]
    metrics = {r.metric.name: r.metric.summary for r in records if r.HasField("metric")}
    assert metrics["eval/R@1"].max and metrics["eval/R@1"].last
    assert metrics["train/loss"].min and not metrics["train/loss"].max
    assert not metrics["time/seconds"].max


@pytest.mark.parametrize(
    ("column", "name"),
    [
        ("R@1", "eval/R@1"),
        ("raw MAP@R", "eval/raw MAP@R"),
        ("queries_left_out", "eval/queries_left_out"),
        ("lr backbone", "lr/backbone"),
        ("best R@1", "best/R@1"),
        ("data_wait", "time/data_wait"),
        ("loss", "train/loss"),
        ("proxy-proxy", "train/proxy-proxy"),
        ("epoch", "epoch"),
    ],
)
def test_columns_come_in_groups(column, name):
    assert tracking.grouped(column) == name


def test_tensorboard_is_told_everything_and_a_continued_run_continues(tracked):
    read = events(tracked / "tensorboard")
    rows = tiny.metrics_rows(tracked)
    for name in rows[0]:
        expected = [(int(row["step"]), float(row[name])) for row in rows]
        found = scalars(read, tracking.grouped(name))
        assert [step for step, _ in found] == [step for step, _ in expected], name
        np.testing.assert_allclose([v for _, v in found], [v for _, v in expected], rtol=1e-4)
    margins = read.Histograms("train/margins")
    assert [event.histogram_value.num for event in margins] == [8] * 4
    pictures = read.Images("eval/neighbours")
    steps = [int(row["step"]) for row in rows]
    assert [event.step for event in pictures] == [steps[1], steps[3]]
    picture = Image.open(io.BytesIO(pictures[0].encoded_image_string))
    assert picture.width > 500 and len(picture.getcolors(1 << 20)) > 50
    options = read.Tensors("options/text_summary")
    assert len(options) == 1 and b"AMLoss" in options[0].tensor_proto.string_val[0]
    plugin = read.SummaryMetadata("_hparams_/session_start_info")
    assert b"AMLoss" in plugin.plugin_data.content and b"commit" in plugin.plugin_data.content


# --- sweeps ---------------------------------------------------------------------------------------


def test_the_sweep_that_is_here_draws_commands_that_train(capsys):
    """The commands as wandb's agent makes them: `--name=value`, switches as True and False."""
    yaml = pytest.importorskip("yaml")
    import itertools

    import options
    from training.tracking import grouped

    sweep = yaml.safe_load((ROOT / "recipes" / "sweep.yaml").read_text())
    assert sweep["metric"]["name"] == grouped("best R@1")
    fixed = [word for word in sweep["command"] if not word.startswith("${")]
    fixed = [word.replace("@recipes", f"@{ROOT / 'recipes'}") for word in fixed]
    drawn = [
        [(name, value) for value in how.get("values", [how.get("min"), how.get("max")])]
        for name, how in sweep["parameters"].items()
    ]
    commands = list(itertools.product(*drawn))
    for command in commands[:: len(commands) // 16]:
        args = options.parse_train([*fixed, *(f"--{name}={value}" for name, value in command)])
        chosen = dict(command)
        unread = "alphap" if chosen["loss"] == "Proxy_Anchor" else "alpha"
        assert args.lr == chosen["lr"] and unread not in args.given
        assert args.val_fold == 0 and args.no_test
    assert "note: --alpha has no effect here" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        options.parse_train(["--loss", "AMLoss", "--alpha=3"])


@pytest.mark.parametrize(
    "words", ["--mrg-lr=0.002 --soft-loss=False", "--mrg_lr=0.002 --soft_loss=false --sweep=True"]
)
def test_every_flag_by_its_name_and_a_value(words):
    import options

    args = options.parse_train(["--loss", "AMLoss", "--sweep", *words.split()])
    assert args.mrg_lr == 0.002 and args.soft_loss is False


@pytest.mark.parametrize(
    ("name", "drawn", "typed"),
    [
        ("matryoshka", [64, 512], "--matryoshka 64 512"),
        ("matryoshka", [], ""),
        ("metrics", ["retrieval", "nmi"], "--metrics retrieval nmi"),
        ("loss-args", ["margin=0.3", "scale=20"], "--loss-args margin=0.3 scale=20"),
        ("loss-args", {"margin": 0.3, "scale": 20}, "--loss-args margin=0.3 scale=20"),
        ("model-args", {"depths": [2, 2, 6, 2]}, "--model-args depths=2,2,6,2"),
        ("val-fold", None, ""),
        ("remark", "[none]", "--remark [none]"),
        ("l2-norm", False, "--l2-norm 0"),
        ("decay-vectors", True, "--decay-vectors 1"),
    ],
)
def test_what_a_sweep_draws_is_what_a_person_types(name, drawn, typed):
    """Lists, mappings, nothing and truths, in the words that wandb's own agent makes of them."""
    import options

    agent = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    words = agent.create_sweep_command_args({"args": {name: {"value": drawn}}})["args"]
    fixed = ["--loss", "CosFace", "--model", "timm:convnext_atto", "--sweep", "--pretrained=none"]
    one, other = (options.parse_train([*fixed, *more]) for more in (words, typed.split()))
    assert options.plain(one) == options.plain(other)


def test_without_a_sweep_a_value_is_what_it_is(capsys):
    import options

    assert options.parse_train(["--name=None", "--remark=[1, 2]"]).name == "None"
    with pytest.raises(SystemExit):
        options.parse_train(["--l2-norm", "2"])
    assert "'2' is neither 0 nor 1" in capsys.readouterr().err


def test_repeated_steps_replace_the_earlier_ones(tmp_path):
    pytest.importorskip("tensorboard")
    first = Tracker("disabled", About("p", "n", tmp_path), tensorboard=True)
    for step in (10, 20, 30):
        first.log({"loss": 1.0}, step)
    first.finish()
    again = Tracker("disabled", About("p", "n", tmp_path), tensorboard=True, continued_at=20)
    again.log({"loss": 2.0}, 20)
    again.finish()
    assert scalars(events(tmp_path / "tensorboard"), "train/loss") == [(10, 1.0), (20, 2.0)]


# --- what must not stop a run ---------------------------------------------------------------------


def test_a_tracker_that_fails_leaves_the_other_running(tmp_path, monkeypatch, caplog):
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter
    wandb = pytest.importorskip("wandb")
    seen = []

    class Run:
        id = "abc"

        def define_metric(self, name, summary):
            pass

        def log(self, row, step):
            seen.append((step, row))

        def finish(self):
            pass

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(tracking, "answers", lambda *_: True)
    monkeypatch.setattr(wandb, "init", lambda **_: Run())
    tracker = Tracker("online", About("p", "n", tmp_path), tensorboard=True)
    tracker.log({"loss": 1.0}, 1)
    monkeypatch.setattr(writer, "add_scalar", fail)
    tracker.log({"loss": 2.0}, 2)
    tracker.log({"loss": 3.0}, 3)
    tracker.log_picture("neighbours", fail, 3)
    tracker.finish()
    assert [step for step, _ in seen] == [1, 2, 3]
    assert tracker.status == {"wandb": "online", "tensorboard": "off (it failed)"}
    warned = [record.message for record in caplog.records]
    assert warned[0].startswith("tensorboard stopped (the disk is full)")
    assert warned[1].startswith("no picture of neighbours") and len(warned) == 2


def test_without_tensorboard_a_run_says_so_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    images = tiny.write_images(tmp_path / "data")
    folder = tiny.run(images, tmp_path, "run", "--epochs 1 --warm 0 --tensorboard")
    said = "tensorboard off (tensorboard is not installed: pip install tensorboard)"
    assert said in capsys.readouterr().out
    assert len(tiny.metrics_rows(folder)) == 1 and not (folder / "tensorboard").exists()


@pytest.mark.parametrize(
    ("every", "flags", "pictured"),
    [
        (10, {"eval_every": 4}, [12, 20, 30]),
        (10, {"eval_every": 36}, [30]),
        (20, {"eval_every": 1}, [20, 30]),
        (1, {"eval_every": 1}, [*range(1, 31)]),
        (0, {"eval_every": 1}, []),
        (10, {"eval_every": 1, "eval_steps": 15}, [11, 20, 21, 30]),
    ],
)
def test_pictures_come_with_the_next_evaluation(every, flags, pictured):
    flags = {"eval_steps": None, **flags}
    standing = argparse.Namespace(
        length=Length(epochs=30, **flags), loader=range(10), finished=False
    )
    keeper = Keeper(standing, None, None, picture_every=every)
    due = []
    for epoch in range(1, 31):
        standing.finished = epoch == 30
        in_epoch = range((epoch - 1) * 10 + 1, epoch * 10 + 1)
        evaluated = epoch % flags["eval_every"] == 0
        if flags["eval_steps"]:
            evaluated = any(step % flags["eval_steps"] == 0 for step in in_epoch)
        if (evaluated or standing.finished) and keeper.picture_due(epoch):
            due.append(epoch)
    assert due == pictured


def test_a_flag_that_nobody_reads_is_refused(workdir):
    done = run_cli("train.py", *SMALL, "--wandb-images", "3", cwd=workdir)
    assert done.returncode == 2 and "wandb or --tensorboard" in done.stderr


def test_missing_wandb_is_no_error(images, tmp_path):
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "wandb.py").write_text("raise ImportError('not installed')\n")
    command = ["--dataset", f"folder:{images}", *tiny.NETWORK, "--max-steps", "1"]
    command[command.index("disabled")] = "offline"
    more = ["--name", "plain"]
    done = run_cli("train.py", *command, *more, cwd=tmp_path, PYTHONPATH=str(blocked))
    assert done.returncode == 0, done.stderr
    assert "wandb is not installed" in done.stdout
    assert (tmp_path / "logs" / "plain" / "metrics.csv").is_file()


def test_wandb_is_quiet_where_the_home_folder_cannot_be_written(tmp_path):
    (tmp_path / ".cache").touch()  # a file, as good as a read-only home
    code = (
        "import training.tracking as t; from pathlib import Path; "
        "w = t._Wandb('offline', t.About('p', 'n', Path('run')), None); "
        "w.log({'loss': 1.0}, 1); w.finish()"
    )
    quiet = {"HOME": str(tmp_path), "XDG_CACHE_HOME": "", "WANDB_CACHE_DIR": ""}
    (tmp_path / "run").mkdir()
    done = run_code(code, cwd=tmp_path, **quiet, WANDB_MODE="offline")
    assert done.returncode == 0 and done.stdout + done.stderr == ""
    assert list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))


def test_without_a_key_wandb_is_offline_and_never_asks(monkeypatch, tmp_path):
    for variable in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode(None) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_mode(None) == "online"
    assert wandb_mode("disabled") == "disabled"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """wandb's server, as the environment names it, with a key; it says no to everything."""

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as here:
        threading.Thread(target=here.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{here.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.chdir(tmp_path)
        yield here
        here.shutdown()


@pytest.mark.parametrize(
    ("variable", "in_folder", "of_user", "expected"),
    [
        ("dryrun", "", "", "offline"),
        ("run", "disabled", "", "online"),
        ("", "disabled", "online", "disabled"),
        ("", "", "offline", "offline"),
        ("", "", "", "online"),
        ("nonsense", "", "", "online"),
    ],
)
def test_what_wandbs_own_commands_have_set_holds(
    variable, in_folder, of_user, expected, server, monkeypatch, tmp_path
):
    monkeypatch.setenv("WANDB_MODE", variable)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    for folder, mode in ((tmp_path / "wandb", in_folder), (tmp_path / "config", of_user)):
        folder.mkdir()
        (folder / "settings").write_text(f"[default]\nmode = {mode}\n" if mode else "")
    assert wandb_mode(None) == expected
    assert wandb_mode("offline") == "offline"


def test_what_wandbs_own_variables_name_holds(monkeypatch, tmp_path):
    wandb, told = pytest.importorskip("wandb"), {}
    monkeypatch.setattr(wandb, "init", lambda **given: told.update(given) or Begun())
    for name in ("NAME", "TAGS", "RUN_GROUP"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("WANDB_NAME", "of my own")  # which wandb reads itself
    Tracker("offline", About("p", "n", tmp_path, group="g", tags=("t",))).finish()
    assert "name" not in told and (told["group"], told["tags"]) == ("g", ("t",))
    code = "import options, sys; print(options.parse_train(sys.argv[1:]).wandb_project)"
    for words, project in (([], "mine"), (["--wandb-project", "other"], "other")):
        done = run_code(code, *words, cwd=tmp_path, WANDB_PROJECT="mine")
        assert done.stdout == f"{project}\n"


class Begun:
    """Stands for wandb's run."""

    id = "abc"

    def finish(self) -> None:
        pass


@pytest.mark.parametrize("fault", ["gone", "slow", "refuses"])
def test_a_server_that_does_not_answer_makes_wandb_offline(fault, server, monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb")
    modes = []

    def init(mode: str, **_: object) -> Begun:
        modes.append(mode)
        if mode == "online" and fault == "refuses":
            raise TimeoutError("run initialization has timed out")
        return Begun()

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(tracking, "ANSWER", 0.5 if fault == "slow" else 20.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        if fault != "refuses":  # either takes the call and says nothing, or is not there
            port = silent.getsockname()[1] if fault == "slow" else 1
            monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        tracker = Tracker("online", About("p", "n", tmp_path))
        tracker.finish()
    assert modes == (["online", "offline"] if fault == "refuses" else ["offline"])
    why = "has timed out" if fault == "refuses" else "does not answer"
    assert tracker.status["wandb"].startswith("offline (") and why in tracker.status["wandb"]
    assert tracker.run_id == "abc"


def test_a_server_that_says_no_is_there(server):
    assert tracking.answers(tracking.wandb_server(), 20)
