"""A run for others: its weights in one file, its card, the Hub, and what is cited."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from conftest import ROOT, refusal

import criteria
import dataset
import evaluate
import methods
import net.__main__ as command
import options
import search
from anchorage import __version__
from evaluation import networks
from evaluation.thresholds import Rate, Thresholds
from net import load_run
from runs import load_checkpoint
from sharing import references
from sharing.card import read_intervals
from storage import load_tensors
from utils import InputError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photographs and a run on them, which has two heads and a running mean."""
    root = tmp_path_factory.mktemp("sharing")
    images = tiny.write_images(root / "photos")
    tiny.run(images, root, "run", "--epochs 2 --warm 0 --amp off --disent True --be 1 --ema 0.5")
    return root


@pytest.fixture
def run(root: Path) -> Path:
    return root / "run"


def export(*words: object) -> None:
    command.main(["export", *map(str, words)])


def pictures(root: Path) -> list[Path]:
    return sorted((root / "photos").rglob("*.png"))[:5]


# --- weights --------------------------------------------------------------------------------------


def embeddings(root: Path, path: Path | str) -> np.ndarray:
    return load_run(path, device="cpu", amp="off")(pictures(root))


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_safetensors_give_the_run_s_embeddings(root, run, tmp_path, weights):
    file = tmp_path / "model.safetensors"
    export(run, "--safetensors", file, "--weights", weights)
    expected = load_run(run, device="cpu", amp="off", weights=weights)(pictures(root))
    np.testing.assert_array_equal(embeddings(root, file), expected)
    np.testing.assert_array_equal(embeddings(root, tmp_path), expected)  # the folder it stands in
    other = load_run(run, device="cpu", amp="off", weights={"ema": "raw", "raw": "ema"}[weights])
    assert np.abs(other(pictures(root)) - expected).max() > 1e-4


def test_safetensors_say_what_they_are_and_name_no_folder_of_this_machine(root, run, tmp_path):
    export(run, "--safetensors", tmp_path / "m.safetensors")
    content = load_checkpoint(tmp_path / "m.safetensors")
    assert content["network"]["heads"] == ["embedding", "specific"]
    assert content["args"]["dataset"] == "folder:photos" and content["epoch"] >= 1
    note = {k: v for k, v in content.items() if not k.endswith("state_dict")}
    assert str(root) not in json.dumps(note)


def test_a_plain_file_of_safetensors_is_read_as_before(tmp_path):
    save = pytest.importorskip("safetensors.torch").save_file
    weights = {"layer.weight": __import__("torch").ones(2, 3)}
    save(weights, tmp_path / "plain.safetensors")
    assert load_tensors(tmp_path / "plain.safetensors").keys() == weights.keys()


def test_damaged_safetensors_are_one_sentence(run, tmp_path):
    file = tmp_path / "m.safetensors"
    export(run, "--safetensors", file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be read safely"):
        load_run(file)


# --- the card -------------------------------------------------------------------------------------


def card_of(run: Path, tmp_path: Path, *flags: object) -> str:
    export(run, "--card", tmp_path / "README.md", *flags)
    return (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_card_replaces_a_card_and_no_other_file(run, tmp_path, capsys):
    written = card_of(run, tmp_path)
    assert card_of(run, tmp_path) == written
    mine = tmp_path / "mine.md"
    mine.write_text("# My repository\n")
    assert "not a model card of ours" in refusal(capsys, export, run, "--card", mine)
    assert mine.read_text() == "# My repository\n"


def test_a_card_says_what_the_run_s_files_carry(root, run, tmp_path):
    text = card_of(run, tmp_path, "--licence", "cc-by-4.0")
    results = json.loads((run / "results.json").read_text())["results"]
    (numbers,) = (entry for title, entry in results.items() if "raw" not in title)
    assert f"| R@1 | {numbers['R@1']:.4f} |" in text
    assert "shared under cc-by-4.0" in text and "No confidence intervals were" in text
    images = len(list((root / "photos").rglob("train*/*.png")))
    assert f"the training split of folder:photos, {images} images of" in text
    assert "- **Starting weights**: random\n" in text and "Proxy_Anchor + DDML" in text
    assert "@inproceedings{park2025deep," in text and "@inproceedings{kim2020proxy," in text
    assert "wang2022learnable" not in text and str(root) not in text
    assert "picked on the test classes. The numbers above are of the same classes" in text
    wrong = f"{100 * (1 - numbers['R@1']):.0f}"
    assert f"the nearest picture was of another class for {wrong} of 100 queries." in text


def test_the_header_of_a_card_is_what_the_hub_reads(run, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    text = card_of(run, tmp_path, "--licence", "mit")
    data = hub.ModelCard(text).data
    assert data.license == "mit" and data.pipeline_tag == "image-feature-extraction"
    results = json.loads((run / "results.json").read_text())["results"]
    measured = {(r.dataset_name, r.metric_name): r.metric_value for r in data.eval_results}
    title, numbers = next(iter(results.items()))
    assert "photos" in title
    assert measured["folder:photos, evaluation split", "R@1"] == pytest.approx(
        numbers["R@1"], abs=1e-4
    )


def test_a_card_says_what_the_weights_began_with_and_that_no_epoch_was_picked(root, tmp_path):
    """The Hub lists a model below its `base_model`: no network that was trained from nothing."""
    flags = "--model timm:test_vit --width 1 --stem imagenet --image-size 64 --max-steps 1"
    run = tiny.run(root / "photos", tmp_path, "vit", flags)
    assert "base_model" not in card_of(run, tmp_path)
    tiny.edit(run / "args.json", pretrained="imagenet")
    text = card_of(run, tmp_path)
    assert "the weights after epoch 1, the only ones that were evaluated" in text
    assert "\nbase_model: timm/test_vit.r160_in1k\n" in text
    told = "timm:test_vit from timm/test_vit.r160_in1k on the Hub (licence: apache-2.0)"
    assert f"- **Starting weights**: the pretrained {told}\n" in text


def edited(run: Path, file: str, **changes: object) -> Path:
    """A copy of the run beside it, with other entries in one of its files."""
    copy = shutil.copytree(run, run.parent / file / run.name, dirs_exist_ok=True)
    tiny.edit(copy / file, **changes)
    return copy


def test_a_card_calls_held_out_classes_what_they_are(run, tmp_path):
    rates = ("false_same", "false_different", "found_same", "found_different")
    kept = {"same": None, "different": 0.25, "classes": 6} | dict.fromkeys(
        rates, Rate(0.05)._asdict()
    )
    held_out = edited(
        run,
        "results.json",
        results={"validation": {"R@1": 0.5, "queries": 12}},
        verification={},
        thresholds={"validation": kept},
        picked_on="validation classes",
    )
    text = card_of(held_out, tmp_path)
    assert "On classes held out of the training split of folder:photos, 12 queries" in text
    assert "name: folder:photos, classes held out of the training split\n" in text
    assert "evaluation split" not in text
    assert "No cosine is high enough to call two pictures the same; below 0.250 they are" in text
    assert "called different, wrongly for 5 % of the pairs of one class. This was measured" in text
    assert "Measured on 6 classes alone, these errors are a rough guess" in text
    assert "picked on the validation classes. The numbers above are of the same classes" in text


def test_a_card_has_options_as_a_command_line_has_them(run, tmp_path):
    given = {"loss_args": [["base", 0.5]], "metrics": ["retrieval", "nmi"], "remark": "24/7"}
    ours = {"LOG_DIR": "/home/me/logs", "workers": 7, "name": "secret"}  # of no use to others
    copy = edited(run, "args.json", **given, **ours, given=[*ours, *given])
    told = "`loss-args` base=0.5, `metrics` retrieval nmi, `remark` 24/7"
    assert f"- **Options that were given**: {told}\n" in card_of(copy, tmp_path)


def test_without_a_licence_the_card_says_so(run, tmp_path):
    text = card_of(run, tmp_path)
    assert "\nlicense:" not in text and "No licence was given for these weights" in text


def numbers_file(run: Path, tmp_path: Path, shift: float = 0.0) -> Path:
    results = json.loads((run / "results.json").read_text())["results"]
    title, numbers = next(iter(results.items()))
    about = {"title": title, "R@1": numbers["R@1"] + shift, "interval_95": {"R@1": [0.25, 0.5]}}
    file = tmp_path / "numbers.json"
    file.write_text(json.dumps({"results": [about]}))
    return file


def test_a_card_takes_intervals_from_an_evaluation_of_this_run_alone(run, tmp_path, capsys):
    known = numbers_file(run, tmp_path)
    known.write_text(known.read_text().replace("[0.25, 0.5]", "[null, null]"))
    assert "| not measured |" in card_of(run, tmp_path, "--numbers", known)
    text = card_of(run, tmp_path, "--numbers", numbers_file(run, tmp_path))
    assert "| 0.2500 to 0.5000 |" in text and "No confidence" not in text
    strange = numbers_file(run, tmp_path, shift=0.1)
    said = refusal(capsys, export, run, "--card", tmp_path / "c.md", "--numbers", strange)
    assert "is not about this run" in said and not (tmp_path / "c.md").exists()
    # After post-processing R@1 may be the same, and the others are not.
    content = json.loads(numbers_file(run, tmp_path).read_text())
    (about,) = content["results"]
    about["interval_95"]["MAP@R"], about["MAP@R"] = [0.25, 0.5], 0.0
    strange.write_text(json.dumps(content))
    said = refusal(capsys, export, run, "--card", tmp_path / "c.md", "--numbers", strange)
    assert "MAP@R of folder:" in said and "is 0.0000 there" in said
    said = refusal(capsys, export, run, "--card", tmp_path / "c.md", "--numbers", tmp_path / "no")
    assert "no does not exist; give a file that python evaluate.py" in said
    strange.write_text('{"results": []}')
    with pytest.raises(InputError, match="holds no intervals"):
        read_intervals(strange, {})


def test_a_card_is_of_the_network_that_was_measured(run, tmp_path, capsys, monkeypatch):
    files = ("--card", tmp_path / "c.md", "--safetensors", tmp_path / "c.safetensors")
    said = refusal(capsys, export, run / "last.pth", *files)
    assert f"measured with {tiny.best_checkpoint(run).name}, not with last.pth; give {run}" in said
    said = refusal(capsys, export, run, "--weights", "raw", *files)
    assert "not with the raw ones; leave out --weights raw" in said
    assert not list(tmp_path.iterdir())
    monkeypatch.chdir(run)
    assert f"load_run({run.name!r})" in card_of(Path(), tmp_path)


def test_a_card_has_what_was_measured_on_pairs(run, tmp_path):
    (first, *_) = json.loads((run / "results.json").read_text())["verification"].values()
    assert f"| EER | {first['EER']:.4f} |" in card_of(run, tmp_path)


def test_what_cannot_be_written_is_one_sentence(run, tmp_path, capsys):
    lonely = shutil.copy(tiny.best_checkpoint(run), tmp_path / "lonely.pth")
    for flags, words in (
        ((lonely, "--card", tmp_path / "c.md"), "is not a run folder"),
        ((run, "--card", tmp_path), "is a folder; name a file"),
        ((run, "--card", tmp_path / "x", "--onnx", tmp_path / "x"), "both name"),
        ((run, "--onnx", tmp_path / "x", "--licence", "mit"), "--licence is for the model card"),
        ((run, "--card", tmp_path / "x", "--private"), "--private is for --push-to-hub"),
        ((run, "--safetensors", tmp_path / "x.pth"), "call it x.safetensors"),
        ((run, "--push-to-hub", "nobody"), "give USER/NAME"),
    ):
        assert words in refusal(capsys, export, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["lonely.pth"]


# --- the Hub --------------------------------------------------------------------------------------


class Hub:
    """The Hub's client as far as it is used; it keeps what is uploaded in a folder."""

    def __init__(self, folder: Path, token: str | None = "secret") -> None:
        self.folder, self.token, self.asked = folder, token, {}
        self.public: set[str] = set()  # models that are there, for all to see
        self.fetched: list[str] = []

    def get_token(self) -> str | None:
        return self.token

    def HfApi(self) -> Hub:
        return self

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> str:
        self.asked |= {"name": name, "private": private, "exist_ok": exist_ok}
        return f"https://hub.example/{name}"

    def model_info(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.asked["private"] and name not in self.public)

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        shutil.copytree(folder_path, self.folder / repo_id)
        self.asked["message"] = commit_message

    def snapshot_download(self, name: str, *, revision: str | None, allow_patterns: object) -> str:
        if not (self.folder / name).is_dir():
            raise OSError("404: no such model")
        self.asked["revision"] = revision
        self.fetched.append(name)
        return str(self.folder / name)


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Hub:
    fake = Hub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


def test_a_run_goes_to_the_hub_and_comes_back(root, run, hub, capsys):
    export(run, "--push-to-hub", "me/birds.v1", "--private", "--licence", "mit")
    assert hub.asked["private"] is True and "DDML" in hub.asked["message"]
    assert "load_run('hf:me/birds.v1')" in capsys.readouterr().out
    folder = hub.folder / "me" / "birds.v1"
    files = {path.name: path for path in folder.iterdir()}
    assert set(files) == {"README.md", "config.json", "model.safetensors", "results.json"}
    card = files["README.md"].read_text()
    assert "# birds.v1" in card and "load_run('hf:me/birds.v1')" in card
    assert not [name for name, path in files.items() if str(root).encode() in path.read_bytes()]
    np.testing.assert_array_equal(embeddings(root, "hf:me/birds.v1@main"), embeddings(root, run))
    assert hub.asked["revision"] == "main"
    (found,) = networks.checkpoint_files("hf:me/birds.v1")
    assert found == files["model.safetensors"]


def test_what_has_arrived_is_told_though_the_disk_here_does_not_tidy_up(
    run, hub, tmp_path, monkeypatch, capsys
):
    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "README.md")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with monkeypatch.context() as patched:
        patched.setattr(hub, "upload_folder", lambda **_: patched.setattr("os.unlink", fails))
        export(run, "--push-to-hub", "me/birds")
    assert "load_run('hf:me/birds')" in capsys.readouterr().out


def test_a_model_of_the_hub_is_asked_for_once(root, run, hub, tmp_path, monkeypatch):
    export(run, "--push-to-hub", "me/birds", "--licence", "mit")
    line = f"--resume hf:me/birds --dataset folder:{root}/photos --metrics retrieval --amp off"
    evaluate.run(options.parse_evaluate([*line.split(), "--json", str(tmp_path / "n.json")]))
    assert hub.fetched == ["me/birds"]
    made = f"--images {root}/photos --index {tmp_path / 'birds.index'} --workers 0"
    search.main(f"build hf:me/birds {made}".split())
    assert hub.fetched == ["me/birds"] * 2


def test_thresholds_go_along_with_the_network_that_they_were_measured_for(root, run, hub, tmp_path):
    title, shares = f"folder:{root}/photos", [Rate(0.1, 0.05, 0.2)] * 4
    fingerprint = networks.fingerprint_of(load_run(run).model.network)
    measured = Thresholds(0.8125, 0.5, *shares, title=title, network=fingerprint)
    changed = shutil.copytree(run, tmp_path / "run")
    tiny.edit(changed / "results.json", thresholds={title: measured.as_dict()})
    export(changed, "--push-to-hub", "me/x")
    assert load_run("hf:me/x").thresholds == replace(measured, title="folder:photos")
    text = (hub.folder / "me/x/README.md").read_text()
    assert "a cosine of 0.812 or more are called the same" in text and "Below 0.500 they" in text
    assert "wrong for 10 % of the pairs of two classes" in text
    assert "measured on the evaluation split of folder:photos." in text


def test_what_the_hub_refuses_is_one_sentence(run, hub, monkeypatch, capsys):
    with pytest.raises(InputError, match=r"hf:me/none cannot be downloaded from the Hub \(404"):
        load_run("hf:me/none")
    hub.token = None
    assert "hf auth login" in refusal(capsys, export, run, "--push-to-hub", "me/x")
    hub.token, hub.public = "secret", {"me/x"}
    said = refusal(capsys, export, run, "--push-to-hub", "me/x", "--private")
    assert "me/x exists on the Hub and is public" in said and "give another name" in said
    for status, advice in ((403, "may not write there"), (500, "; try again")):

        def refuse(*_: object, status: int = status, **__: object) -> None:
            error = OSError(f"{status} of the Hub")
            error.response = SimpleNamespace(status_code=status)
            raise error

        hub.create_repo = refuse
        said = refusal(capsys, export, run, "--push-to-hub", "me/x")
        assert f"me/x could not be uploaded ({status} of the Hub)" in said and advice in said
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in refusal(capsys, export, run, "--push-to-hub", "me/x")
    assert not hub.folder.exists()


# --- references -----------------------------------------------------------------------------------


def test_every_loss_method_network_and_data_set_has_its_paper():
    assert set(references.LOSSES) == set(criteria.LOSSES)
    named = {method.name for method in methods.METHODS}
    assert named <= {*references.METHODS, *references.WITHOUT}
    assert set(references.DATA) == set(dataset.NAMES) - {"emoji"}
    used = {*references.LOSSES.values(), *references.NETWORKS.values(), *references.PEFT.values()}
    used |= {*references.DATA.values(), *references.OTHERS.values()}
    used |= {key for _, keys in references.METHODS.values() for key in keys}
    assert used == set(references.references())


def test_a_run_cites_what_it_used():
    words = "--loss AMLoss --model timm:vit_tiny_patch16_224 --dataset cub --peft lora:4 --mixup 1"
    found = [each.key for each in references.of_run(options.parse_train(words.split()))]
    assert found[:2] == ["wang2022learnable", "zhang2018mixup"]
    assert set(found[2:]) == {"hu2022lora", "wightman2019timm", "wah2011caltech"}
    (other,) = references.of_run(options.parse_train(["--loss", "pml:CircleLoss"]))[:1]
    assert other.key == "musgrave2020pytorch"


def test_what_has_no_paper_here_cites_none(monkeypatch):
    """A loss and a backbone of one's own, as docs/extending.md adds them."""
    monkeypatch.setitem(references.FAMILIES, "mine", ("plain",))
    given = vars(options.parse_train([])) | {"loss": "Mine", "model": "plain"}
    assert references.of_run(argparse.Namespace(**given)) == []


def test_the_page_of_references_is_made_from_them():
    text = (ROOT / "docs" / "references.md").read_text(encoding="utf-8")
    assert text == references.page() + "\n", "python -m sharing.references > docs/references.md"
    assert not re.search(r"[{}\\]", text.split("## Licences")[0])  # no accent is left as in BibTeX


def test_the_citation_file_is_whole():
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found["cff-version"] == "1.2.0" and found["type"] == "software"
    assert {"message", "title", "authors"} <= found.keys()
    assert found["version"] == __version__ and found["license"] == "Apache-2.0"
    assert found["authors"] == [{"name": "The Anchorage authors"}]
    assert "Apache License" in (ROOT / "LICENSE").read_text() and len(found["references"]) >= 1
