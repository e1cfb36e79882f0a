"""scripts/study.py: which trainings are left, what they are called with, and the statistics."""

from __future__ import annotations

import importlib.util
import itertools
import statistics
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tiny
import torch
from scipy import stats

import options
from benchmarks.plain import plain_training

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The script as a module, with results, times, page and logs in a temporary folder."""
    spec = importlib.util.spec_from_file_location("study", ROOT / "scripts" / "study.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "study", module)
    spec.loader.exec_module(module)
    files = {"RESULTS": "study.csv", "TIMES": "times.csv", "PAGE": "study.md"}
    for name, file in {**files, "PICTURE": "study.svg"}.items():
        monkeypatch.setattr(module, name, tmp_path / file)
    monkeypatch.setattr(module, "LOGS", tmp_path / "logs")
    return module


def pretend(study, task, best_exponent=-5):
    """An outcome: the nearer the rate is to the best, the better."""
    value = 0.5 - 0.01 * abs(task.exponent - best_exponent) + 0.001 * task.seed
    place = list(study.METHODS).index(task.method)
    value += 0.01 * place + 0.0005 * ((7 * task.seed + 3 * place) % 5)
    numbers = {"R@1": value}
    if task.stage == "run":
        numbers = dict.fromkeys(study.METRICS, value)
    return study.Outcome(task.stage, task.method, task.exponent, task.seed, numbers)


def test_every_command_is_one_that_train_accepts(study):
    for method, stage in itertools.product(study.METHODS, ("trial", "run")):
        command = study.Task(stage, method, -6, 3).command(Path("start.pth"))
        args = options.parse_train([*command[1:], *study.QUIET.split()])
        assert (args.epochs, args.steps, args.optimizer) == (study.EPOCHS, None, "adamw")
        assert args.lr == args.lr_p == 1e-3
        assert args.no_test == (stage == "trial")  # trials do not look at the test classes
        assert (args.val_fold is not None) == (stage == "trial")
        assert args.eval_every == args.epochs  # one look, at the end


def test_methods_differ_in_their_own_flags_alone(study):
    own = {"loss", "IPC", "given", "name", "alpha", "l2_norm", "mixup"}
    own |= {
        "disent",
        "al",
        "be",
        "gam",
        "introspective",
        "sec_wei",
        "mrg_lr",
        "sampler",
        "fixed_mask",
    }
    own |= {"nb_clusters", "mod_epoch", "batch_sampler", "force_full_embedding_epoch"}
    own |= {"mask_lr_mult", "masking_lambda", "mask_wd_mult", "command"}
    own |= {"pooling", "head_norm", "head_init"}  # the head of spherical embeddings
    own |= {"milestones", "lr_decay_gamma", "workers"}  # nothing that changes a number here
    first = None
    for method in study.METHODS:
        command = study.Task("run", method, -6, 1).command(Path("start.pth"))
        shared = {k: v for k, v in vars(options.parse_train(command[1:])).items() if k not in own}
        first = first or shared
        assert shared == first, method


def test_all_trials_come_before_runs_and_nothing_twice(study):
    order = []
    while (task := next(study.open_tasks(study.read_outcomes()), None)) is not None:
        study.append(pretend(study, task))
        order.append(task)
    assert len(order) == len(set(order))
    kinds = [task.stage for task in order]
    assert kinds == sorted(kinds, reverse=True)  # trial, …, run, …
    searched = [name for name, method in study.METHODS.items() if method.rate_of is None]
    assert kinds.count("trial") == study.TRIALS * len(searched)
    assert kinds.count("run") == len(study.SEEDS) * len(study.METHODS)
    seeds = [task.seed for task in order if task.stage == "run"]
    assert seeds == sorted(seeds)  # all methods with one seed, then with the next
    assert {task.exponent for task in order if task.stage == "run"} == {-5}


def test_trials_walk_towards_better_rates(study):
    low, high = study.FIRST_RATES
    assert study.next_rate({}) == low
    assert study.next_rate({low: 0.3}) == high
    assert study.next_rate({low: 0.3, high: 0.4}) == high + 1
    assert study.next_rate({low: 0.4, high: 0.3}) == low - 1
    assert study.next_rate({low: 0.4, high: 0.3, low - 1: 0.5}) == low - 2
    assert study.next_rate({low: 0.4, high: 0.3, low - 1: 0.3}) == low - 2  # both neighbours known
    assert study.next_rate({low: 0.4, high: 0.3, low - 1: 0.5, low - 2: 0.6}) is None


def test_the_reference_takes_the_rate_of_proxy_anchor(study):
    for exponent in (-6, -5, -4, -3):
        study.append(pretend(study, study.Task("trial", "pa", exponent, 0), best_exponent=-4))
    assert study.chosen_rate(study.read_outcomes(), "reference") == -4
    assert study.chosen_rate(study.read_outcomes(), "amloss") is None


def test_an_interrupted_study_goes_on_and_failures_stop_nothing(study, monkeypatch):
    monkeypatch.setattr(study, "METHODS", {"pa": study.METHODS["pa"], "ms": study.METHODS["ms"]})
    monkeypatch.setattr(study, "train_start", lambda: Path("start.pth"))
    trained = []

    def run_task(task, start):
        if len(trained) == 4:
            trained.append(None)
            raise study.subprocess.CalledProcessError(2, "train.py")
        trained.append(task)
        return pretend(study, task)

    monkeypatch.setattr(study, "run_task", run_task)
    with pytest.raises(SystemExit, match="1 trainings failed"):
        study.train(jobs=2)
    before = len(study.read_outcomes())
    assert 4 <= before < 18
    study.train(jobs=2)
    assert len(study.read_outcomes()) == 18
    assert len({outcome.task for outcome in study.read_outcomes()}) == 18


def test_p_values_are_corrected_for_their_number(study):
    # Holm (1979): 3 · .01, 2 · .02, 1 · .03, and never below the one before.
    corrected = study.holm({"c": 0.03, "a": 0.01, "b": 0.02})
    assert corrected == pytest.approx({"a": 0.03, "b": 0.04, "c": 0.04})
    assert study.holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_interval_is_students(study):
    values = [1.0, 2.0, 4.0, 4.5, 5.0]
    low, high = stats.t.interval(0.95, 4, statistics.mean(values), stats.sem(values))
    assert study.half_width(values) == pytest.approx((high - low) / 2)


def test_tables_are_written_between_their_marks(study):
    while (task := next(study.open_tasks(study.read_outcomes()), None)) is not None:
        study.append(pretend(study, task))
    names = ("results", "baseline", "additions", "trials")
    marks = [f"<!-- {name} -->\nold\n<!-- end of {name} -->\n" for name in names]
    study.PAGE.write_text("words\n" + "between\n".join(marks) + "after\n")
    for _ in range(2):  # the second time over the first
        study.write_tables()
        page = study.PAGE.read_text()
        assert "old" not in page
        assert page.startswith("words\n") and page.endswith("after\n")
        assert page.count("between\n") == 3
        for name, method in study.METHODS.items():
            assert page.count(f"| {method.title} |") >= 2, name
    assert "| AMLoss | Proxy-Anchor | +1." in page or "| AMLoss | Proxy-Anchor | +0.9" in page


def test_picture_has_one_row_per_method_with_the_best_on_top(study):
    while (task := next(study.open_tasks(study.read_outcomes()), None)) is not None:
        study.append(pretend(study, task))
    root = ElementTree.fromstring(study.picture(study.read_runs()))
    space = "{http://www.w3.org/2000/svg}"
    texts = [node.text for node in root.iter(f"{space}text")]
    titles = [m.title for name, m in study.METHODS.items() if name != study.BASELINE]
    assert [text for text in texts if text in titles] == titles[::-1]  # later ones pretend more
    dots = [float(node.get("cx")) for node in root.iter(f"{space}circle")]
    assert len(dots) == len(titles) and dots == sorted(dots, reverse=True)
    zero = texts.index("0")
    assert 250 <= float(list(root.iter(f"{space}text"))[zero].get("x")) <= min(dots)


def test_picture_can_be_read_in_the_dark(study):
    def brightness(colour: str) -> int:
        return sum(int(colour[at : at + 2], 16) for at in (1, 3, 5))

    light, dark = study.SVG_LIGHT, study.SVG_DARK
    for part in ("ink", "soft", "mean", "zero"):
        assert brightness(light["paper"]) - brightness(light[part]) > 250, part
        assert brightness(dark[part]) - brightness(dark["paper"]) > 250, part
    drawn = (ROOT / "docs" / "study.svg").read_text()
    assert f"@media (prefers-color-scheme:dark){{{study.svg_style(dark)}}}" in drawn
    root = ElementTree.fromstring(drawn)
    for node in root.iter():
        if node.tag.rpartition("}")[2] in ("line", "circle", "rect"):
            assert node.get("class") in {*dark, "mean"}, "its colour follows the scheme"


def trained(folder: Path) -> tuple[list[float], torch.Tensor]:
    """The losses of the epochs, and the proxies at the end."""
    losses = [float(row["loss"]) for row in tiny.metrics_rows(folder)]
    state = tiny.saved(folder)["criterion_state_dict"]
    (proxies,) = (value for name, value in state.items() if name.endswith("proxies"))
    return losses, proxies


def test_the_reference_sees_the_same_batches_and_gives_the_same_loss(tmp_path):
    images = tiny.write_images(tmp_path / "images")
    flags = "--loss Proxy_Anchor --amp off --epochs 3 --warm 1 --lr 1e-4"
    ours, proxies = trained(tiny.run(images, tmp_path, "ours", flags))
    with plain_training():
        plain, plain_proxies = trained(tiny.run(images, tmp_path, "plain", flags))
    assert plain == pytest.approx(ours, rel=2e-4)
    assert torch.allclose(proxies, plain_proxies, atol=1e-3)
    assert not torch.equal(proxies, plain_proxies)  # it is another computation
    other, _ = trained(tiny.run(images, tmp_path, "other", f"{flags} --seed 2"))
    assert other != pytest.approx(ours, rel=2e-4)
