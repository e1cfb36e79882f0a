"""A run, a folder or a file: what evaluate.py, `load_run`, export and --resume-run make of each."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import refusal

import evaluate
import net
import net.__main__ as net_command
import options
import report
from evaluation.networks import open_checkpoint
from net import load_run
from net.export import Graph
from utils import InputError

pytestmark = pytest.mark.usefixtures("maps_here")

COMMON = "--epochs 2 --warm 0 --amp off"
RUNS = {
    "pooling": f"{COMMON} --pooling max --input-spec white --eval-zoom 0.9 --image-size 48",
    "heads": f"{COMMON} --introspective paper --head-norm 1 --stem tiny --width 0.25",
    "masks": (
        f"{COMMON} --experiment margin_loss_resnet50 --model resnet10 --sampler distanceweighted "
        "--lr 1e-3 --nb-clusters 2 --mod-epoch 1 --IPC 2 --hierarchy-method none "
        "--mask-lr-mult 300 --masks-sum-for-full-emb 1 --masks-normalize-before-sum l1"
    ),
}
"""Runs whose network, or whose way of looking at images, cannot be told from the weights' keys."""


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logs")
    images = tiny.write_images(folder / "images", eval_images=5)
    for name, flags in RUNS.items():
        tiny.run(images, folder, name, f"{flags} --keep 2")
    return folder


def evaluated(*resume: Path, out: Path) -> list[dict]:
    """What evaluate.py writes of these with --json."""
    line = ["--resume", *map(str, resume), "--json", str(out / "n.json"), "--amp", "off"]
    evaluate.run(options.parse_evaluate([*line, "--workers", "0", "--metrics", "retrieval"]))
    return json.loads((out / "n.json").read_text())["results"]


def best(run: Path) -> Path:
    (file,) = run.glob("*_best.pth")
    return file


def steps(run: Path) -> list[Path]:
    """The older checkpoints, oldest first."""
    return sorted(run.glob("step_*.pth"))


def epochs(run: Path) -> list[dict[str, float]]:
    """What retrieval gave each epoch, as training saw it."""
    names = ("R@1", "MAP@R", "MRR")
    return [{name: float(row[name]) for name in names} for row in tiny.metrics_rows(run)]


def assert_same(found: dict, expected: dict[str, float]) -> None:
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=2e-6)


# --- every checkpoint of a run --------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_any_checkpoint_is_evaluated_as_training_evaluated_it(name, logs, tmp_path):
    run = logs / name
    first, last = epochs(run)
    assert first != last  # so that one cannot stand for the other
    assert_same(evaluated(run / "last.pth", out=tmp_path)[0], last)
    for file, expected in zip(steps(run), (first, last), strict=True):
        assert_same(evaluated(file, out=tmp_path)[0], expected)
    better = max(first, last, key=lambda row: row["R@1"])
    assert_same(evaluated(best(run), out=tmp_path)[0], better)


@pytest.mark.parametrize("name", RUNS)
def test_a_last_checkpoint_that_does_not_describe_its_network(name, logs, tmp_path):
    """Older ones do not; the options of their run do."""
    state = torch.load(logs / name / "last.pth", weights_only=True)
    state.pop("network", None)
    torch.save(state, tmp_path / "last.pth")
    assert_same(evaluated(tmp_path / "last.pth", out=tmp_path)[0], epochs(logs / name)[-1])


def test_a_run_folder_is_its_best_checkpoint(logs, tmp_path):
    run = logs / "masks"
    (of_folder,), (of_file,) = (evaluated(path, out=tmp_path) for path in (run, best(run)))
    assert of_folder == of_file and of_folder["checkpoint"] == str(best(run))
    found = evaluated(run, logs / "heads", run / "last.pth", out=tmp_path)
    assert [result["checkpoint"] for result in found] == [
        str(file) for file in (best(run), best(logs / "heads"), run / "last.pth")
    ]
    with pytest.raises(InputError, match="twice"):
        evaluated(run, best(run), out=tmp_path)


def test_flags_go_over_the_runs_own(logs, tmp_path):
    run = logs / "pooling"
    line = ["--resume", str(run), "--image-size", "40", "--pooling", "avg"]
    opened = open_checkpoint(run, options.parse_evaluate(line))
    assert opened.viewing.image_size == 40 and opened.network.architecture.pooling == "avg"
    own = open_checkpoint(run)
    assert own.viewing.image_size == 48 and own.network.architecture.pooling == "max"
    assert (own.viewing.zoom, own.network.architecture.input_spec) == (0.9, "white")
    assert own.data.name == f"folder:{logs / 'images'}"


@pytest.mark.parametrize("name", RUNS)
def test_load_run_takes_what_evaluate_takes(name, logs, tmp_path):
    run = logs / name
    for path in (run, best(run), run / "last.pth", steps(run)[-1]):
        line = ["--resume", str(path), "--export", str(tmp_path / "e.npz"), "--amp", "off"]
        evaluate.run(options.parse_evaluate([*line, "--workers", "0", "--metrics", "nmi"]))
        with np.load(tmp_path / "e.npz") as exported:
            found = load_run(path, device="cpu", amp="off")(exported["paths"].tolist())
            np.testing.assert_allclose(found, exported["embeddings"], atol=1e-6)


def test_export_takes_what_evaluate_takes(logs, tmp_path):
    run, images = logs / "heads", torch.rand(2, 3, 32, 32) * 255
    first, last = steps(run)[0], run / "last.pth"
    written = []
    for path in (first, last):
        net_command.main(["export", str(path), "--torchscript", str(tmp_path / "net.pt")])
        written.append(torch.jit.load(tmp_path / "net.pt")(images))
        expected = Graph(open_checkpoint(path).network, 32)(images)
        torch.testing.assert_close(written[-1], expected, rtol=0, atol=1e-5)
    assert (written[0] - written[1]).abs().max() > 1e-3


def test_training_starts_from_what_evaluate_takes(logs):
    run, flags = logs / "heads", RUNS["heads"]
    for path, file in ((run, best(run)), (run / "last.pth", run / "last.pth")):
        started = tiny.prepare(logs / "images", f"{flags} --checkpoint {path}").network.state_dict()
        saved = torch.load(file, weights_only=True)["model_state_dict"]
        assert all(torch.equal(value, saved[key]) for key, value in started.items())


# --- the best checkpoint --------------------------------------------------------------------------


def test_of_several_best_checkpoints_the_newest_is_taken_everywhere(logs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(logs / "heads", run)
    older = run / "of_an_older_version_best.pth"
    shutil.copyfile(best(logs / "pooling"), older)
    os.utime(older, (1, 1))
    newest = best(logs / "heads").name
    assert evaluated(run, out=tmp_path)[0]["checkpoint"] == str(run / newest)
    assert open_checkpoint(run).path == run / newest
    assert "uncertainty" in load_run(run, device="cpu").model.network.heads
    page = report.make([run], tmp_path / "x.html").read_text()
    assert '"kind": "certainty"' in page or '"kind":"certainty"' in page


def test_an_evaluation_says_which_options_of_the_run_it_does_not_know(logs, tmp_path, caplog):
    content = torch.load(best(logs / "pooling"), weights_only=True)
    content["args"]["sharper_edges"] = 2.0
    torch.save(content, tmp_path / "newer.pth")
    open_checkpoint(tmp_path / "newer.pth")
    (said,) = (record.getMessage() for record in caplog.records)
    assert "newer.pth was trained with --sharper-edges, which this version" in said


def test_a_single_best_checkpoint_makes_a_folder_a_run(logs, tmp_path):
    shutil.copy(best(logs / "heads"), tmp_path)
    shutil.copy(logs / "heads" / "last.pth", tmp_path)
    assert open_checkpoint(tmp_path).path == tmp_path / best(logs / "heads").name


# --- what cannot be opened ------------------------------------------------------------------------


def folder_of(kind: str, logs: Path, folder: Path) -> Path:
    """A path that no network can be read from."""
    if kind == "models":
        for name in RUNS:
            shutil.copyfile(best(logs / name), folder / f"{name}.pth")
        return folder
    if kind == "runs":
        return logs
    if kind == "unevaluated":
        shutil.copytree(logs / "heads", folder / "run")
        best(folder / "run").unlink()
        return folder / "run"
    if kind == "nowhere":
        return folder / "nowhere"
    return folder


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("models", ["not a run folder", "heads.pth, masks.pth, pooling.pth", "give one of these"]),
        ("runs", ["not a run folder", "heads, masks, pooling", "give one of these"]),
        ("unevaluated", ["no best checkpoint", "last.pth"]),
        ("empty", ["holds no checkpoint", "give a run folder"]),
        ("nowhere", ["does not exist"]),
    ],
)
def test_every_door_says_the_same_sentence(kind, words, logs, tmp_path, capsys):
    path = folder_of(kind, logs, tmp_path)
    with pytest.raises(InputError) as raised:
        load_run(path)
    said = str(raised.value)
    assert all(word in said for word in words) and str(path) in said and "\n" not in said
    if kind not in ("models", "runs"):  # several networks are what evaluate.py compares
        with pytest.raises(InputError, match=re.escape(said)):
            evaluated(path, out=tmp_path)
    export = ["export", str(path), "--torchscript", str(tmp_path / "net.pt")]
    assert refusal(capsys, net_command.main, export) == f"error: {said}\n"
    assert not (tmp_path / "net.pt").exists()


@pytest.mark.parametrize("kind", ["models", "runs"])
def test_evaluate_takes_a_folder_for_every_network_in_it(kind, logs, tmp_path, caplog):
    folder = tmp_path / "folder"
    folder.mkdir()
    if kind == "runs":
        for name in ("heads", "pooling", "masks"):
            shutil.copytree(logs / name, folder / name)
        best(folder / "masks").unlink()
    else:
        folder_of(kind, logs, folder)
    results = evaluated(folder, out=tmp_path)
    expected = ["heads", "pooling"] if kind == "runs" else sorted(RUNS)
    assert [result["label"] for result in results] == expected
    for result in results:
        assert Path(result["checkpoint"]).parent == folder / (
            result["label"] if kind == "runs" else ""
        )
    assert caplog.text.count("masks has no best checkpoint yet") == (kind == "runs")
    asked = options.parse_evaluate(["--resume", str(folder), "--failures", "1", "--workers", "0"])
    with pytest.raises(InputError, match=f"--failures describes one.*names {len(expected)}"):
        evaluate.run(asked)


def test_sizes_that_a_network_cannot_take_are_refused_everywhere(logs, tmp_path):
    network = net.build(net.Architecture("bn_inception", 8))
    file = tmp_path / "net.pth"
    torch.save({"network": network.description(), "model_state_dict": network.state_dict()}, file)
    words = "bn_inception cannot take images of 240 pixels: .* 32 divides, such as 256"
    for source in (f"--resume {file}", "--model bn_inception --pretrained none"):
        line = f"{source} --dataset folder:{logs / 'images'} --image-size 240 --workers 0"
        with pytest.raises(InputError, match=words):
            evaluate.run(options.parse_evaluate(line.split()))


def test_the_size_that_is_advised_is_another_one_and_fits():
    network = net.build(net.Architecture("timm:crossvit_tiny_240", 8, image_size=64))
    with pytest.raises(InputError, match=r"cannot take images of 64 pixels: .*, such as 240"):
        network.check_image_size(64)


def test_evaluations_carry_a_remark(logs, tmp_path, capsys):
    json_file = tmp_path / "remarked.json"
    command = ["--test_sop_model", str(logs / "heads"), "--remark", "as\x1b printed"]
    command += ["--json", str(json_file), "--workers", "0", "--metrics", "retrieval"]
    evaluate.run(options.parse_evaluate(command))
    assert "as\\x1b printed\n" in capsys.readouterr().out
    assert json.loads(json_file.read_text())["remark"] == "as\x1b printed"


def test_training_does_not_go_on_from_weights_alone(logs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(logs / "heads", run)
    shutil.copyfile(best(run), run / "step_00000003.pth")
    before = {file: file.read_bytes() for file in run.iterdir()}
    for name in (best(run).name, "step_00000003.pth"):
        with pytest.raises(InputError, match=rf"--resume-run .*{name}: .*weights.*run folder"):
            tiny.resume(run / name, "--epochs 3")
    assert {file: file.read_bytes() for file in run.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "word"), [("pooling", "--(eval-zoom|image-size|pooling)"), ("seed", "--seed")]
)
def test_training_does_not_go_on_from_another_runs_checkpoint(name, word, logs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(logs / "heads", run)
    if name == "seed":  # of the same shapes, so that loading alone would not notice
        tiny.run(logs / "images", tmp_path, "seed", f"{RUNS['heads']} --seed 2")
    other = (tmp_path if name == "seed" else logs) / name
    shutil.copyfile(other / "last.pth", run / "last.pth")
    with pytest.raises(InputError, match=rf"--resume-run .*last\.pth: .*another run, whose {word}"):
        tiny.resume(run, "--epochs 3")
    assert len(tiny.metrics_rows(run)) == 2


def test_a_run_that_was_continued_longer_goes_on(logs, tmp_path):
    """What may change in a continued run does not make its checkpoint another's."""
    run = tmp_path / "run"
    shutil.copytree(logs / "heads", run)
    tiny.resume(run, "--epochs 3 --eval-every 3")
    tiny.resume(run, "--epochs 4 --metrics nmi")
    assert [row["epoch"] for row in tiny.metrics_rows(run)] == ["1", "2", "3", "4"]
