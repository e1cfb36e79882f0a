"""Settings that suit the user's own images, where no network is named: each with its reason.

    python train.py --dataset folder:photos

The published defaults are those of benchmarks with thousands of images, on a GPU. With a few
hundred photographs they give two steps an epoch, at a low rate. So `RULES` map what is known of
the images and the machine to flags. A flag that is given wins, and the rules after it see it.
What they were chosen by is in docs/own_images.md; `python benchmarks/own_images.py` measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dataset.own import LEAST_CLASSES, count_held_out, suited_share
from flags import Flag, Options
from options.declared import train_flags
from options.needs import HELD_OUT, OWN_DATA
from storage import in_bytes
from utils import counted

MODEL = "efficientnet_lite0"
"""The network whose ImageNet weights are installed with the other packages."""

LEAST_STEPS = 20
"""An epoch should have as many: fewer would make the batches too few before the rates fall."""


class Images(NamedTuple):
    """What is known of the images before training.

    Attributes:
        classes: of all of them. divided: whether the data say themselves which are held out.
        trained: classes that are trained on. images: of those. smallest, largest: of a class.
        side: short side of a usual picture, in pixels.
        fewest: images of the smallest classes, if so many are trained on: there are no fewer,
            whichever classes validation takes.
    """

    classes: int
    divided: bool
    trained: int = 0
    images: int = 0
    smallest: int = 0
    largest: int = 0
    side: int = 0
    fewest: int = 0

    def __str__(self) -> str:
        each = f"{self.smallest}" if self.smallest == self.largest else (
            f"{self.smallest} to {self.largest}"
        )  # fmt: skip
        return f"{self.images:,} training images of {self.trained:,} classes, {each} each"


class Machine(NamedTuple):
    """What is known of the machine.

    Attributes:
        weights: whether the ImageNet weights of `MODEL` are installed; remedy: what installs them.
        free: bytes of the disk that caches are kept on.
    """

    cores: int
    gpu: bool
    weights: bool
    remedy: str
    free: int

    def __str__(self) -> str:
        return "a GPU" if self.gpu else counted(self.cores, "CPU core")


class Chosen(NamedTuple):
    """Settings that belong together, by option, and why they are what they are."""

    settings: Mapping[str, Any]
    why: str


Rule = Callable[[Options, Images, Machine], Chosen]


def wanted(args: Options) -> bool:
    """Whether the settings are to suit the images: asked for, or own images and nothing else named.

    Who names a network, a checkpoint or a file of flags is a researcher with a setting in mind.
    """
    if args.defaults is not None:
        return args.defaults == "suited" and OWN_DATA.met(args)
    named = {"model", "checkpoint"} & set(args.given) or args.recipe
    return OWN_DATA.met(args) and not named and args.pretrained in (None, "imagenet", "none")


# --- the rules ------------------------------------------------------------------------------------


def held_out(args: Options, images: Images, machine: Machine) -> Chosen:
    """So many classes that there is something to measure."""
    share = suited_share(images.classes)
    count = count_held_out(share, images.classes)
    return Chosen(
        {} if images.divided else {"eval_classes": share},
        f"{count} of the {images.classes} classes are held out: the network is measured on them",
    )


def network(args: Options, images: Images, machine: Machine) -> Chosen:
    """ImageNet weights where they are at hand, else a network that learns fast from nothing."""
    if "model" in args.given and args.model != MODEL:
        return Chosen({}, "")  # its weights and its blocks are its own
    if args.pretrained != "none" and (machine.weights or args.pretrained == "imagenet"):
        return Chosen(
            {"model": MODEL, "pretrained": "imagenet", "freeze_blocks": 5},
            "ImageNet weights that are installed; the first blocks see edges and colours and stay "
            "frozen",
        )
    why = "from nothing, as --pretrained none says"
    if args.pretrained is None:
        why = f"from nothing, for want of ImageNet weights; far better: {machine.remedy}"
    narrow = {} if "model" in args.given else {"model": "resnet18", "width": 0.5}
    return Chosen({**narrow, "pretrained": "none"}, why)


def pixels(args: Options, images: Images, machine: Machine) -> Chosen:
    """As many as the weights were trained at, and as there are."""
    if "model" in args.given:  # whose weights may want a certain size
        return Chosen({}, "")
    if images.side < 128:
        return Chosen({"image_size": max(32, images.side // 32 * 32)}, "the pictures have no more")
    if args.pretrained == "none" and not machine.gpu:
        return Chosen(
            {"image_size": 112}, "from nothing it takes many looks, so each of them must be quick"
        )
    return Chosen({"image_size": 224}, "detail tells much, and the weights were trained at it")


def reading(args: Options, images: Images, machine: Machine) -> Chosen:
    """A cache, where it holds what the network sees, saves time, and the disk has room."""
    all_of_them = images.images * images.classes / max(1, images.trained)
    needed = all_of_them * 3 * 256 * 384  # short side 256, as a camera's pictures are shaped
    seen_whole = (args.image_size or 224) <= 224 and images.side >= 128
    if not seen_whole or needed > machine.free / 4:
        return Chosen({}, "")
    return Chosen(
        {"decode": "cache"},
        f"each file is decoded once, to a short side of 256; about {in_bytes(needed)}",
    )


def batches(args: Options, images: Images, machine: Machine) -> Chosen:
    """So that an epoch has enough steps; of pairs, so that each batch has some."""
    size = min(images.images // LEAST_STEPS, 128 if machine.gpu else 32)
    size = min(max(size, 8), images.fewest or images.images)
    if "batch_size" in args.given:
        size = args.batch_size
    from losses import needs_pairs  # with torch, which training loads anyway

    pairs = needs_pairs(args.loss) and args.nb_clusters is None
    if pairs and (each := _instances(args, size, images.trained)):
        size = max(LEAST_CLASSES, min(size // each, images.trained)) * each
        return Chosen(
            {"batch_size": size, "IPC": each},
            f"{args.loss} learns from pairs: {each} images of each class of a batch",
        )
    size = max(2, size // 4 * 4) if size > 4 else size
    return Chosen({"batch_size": size}, f"{_steps(images, size)} an epoch")


def _instances(args: Options, size: int, classes: int) -> int:
    """How many images of a class a batch has: four, or what divides a size that was given; else 0.

    Args:
        size: of the batch. classes: that are trained on.
    """
    if "IPC" in args.given:
        return args.IPC
    if "batch_size" not in args.given:
        return min(4, size // LEAST_CLASSES) if size >= 2 * LEAST_CLASSES else 0
    return instances_in(size, classes)


def instances_in(size: int, classes: int) -> int:
    """A number of images of each class that divides a batch: 4, or else the nearest below or above.

    0 where none does, so that the batch has two classes or more, and no more than there are.
    """
    each = range(2, size // LEAST_CLASSES + 1)
    fits = [n for n in each if size % n == 0 and size // n <= classes]
    return min(fits, key=lambda n: (n > 4, abs(n - 4)), default=0)


def length(args: Options, images: Images, machine: Machine) -> Chosen:
    """Looks at images that the machine has in minutes, if each is looked at ten times by then."""
    looks = 120_000 if machine.gpu else 10_000
    if args.pretrained == "none":
        looks *= 2
    epochs = min(max(round(looks / images.images), 10), 100)
    steps = f"{_steps(images, args.batch_size)} each"
    if args.steps is not None or "epochs" in args.given:
        return Chosen({}, "")
    return Chosen({"epochs": epochs}, f"{steps}, {epochs * images.images:,} looks at an image")


def judging(args: Options, images: Images, machine: Machine) -> Chosen:
    """Once, so that no epoch is picked on the classes that say how good it is."""
    if args.steps is not None or args.eval_steps is not None:
        return Chosen({}, "")
    if HELD_OUT.met(args):
        every = max(1, args.epochs // 10)
        return Chosen({"eval_every": every}, "ten times, since other classes pick the epoch")
    return Chosen(
        {"eval_every": args.epochs}, "once, at the end: no epoch is picked on held-out classes"
    )


def rates(args: Options, images: Images, machine: Machine) -> Chosen:
    """High at first and down to nothing, as the few steps there are must do."""
    if args.optimizer != "adamw":
        return Chosen({"warm": 0, "schedule": "cosine"}, "down to nothing at the end")
    settings = {"schedule": "cosine", "warm": 0, "weight_decay": 0.02, "decay_vectors": 0}
    if args.pretrained == "none":
        return Chosen({"lr": 4e-3, **settings}, "few steps from nothing must be long ones")
    lr = args.lr if "lr" in args.given else 1e-3
    return Chosen(
        {"lr": lr, "lr_p": lr / 2, **settings},
        "few steps must be long ones; the network changes less than its new head",
    )


RULES: tuple[Rule, ...] = (
    held_out,
    network,
    pixels,
    reading,
    batches,
    length,
    judging,
    rates,
)
"""In the order in which they are carried out, and told."""


def choose(
    args: Options, look: Callable[[Options], Images], machine: Machine
) -> tuple[Options, list[list[str]]]:
    """The options with what `RULES` set of them, and for people: settings, and why.

    Args:
        look: what is known of the images, once it is settled which classes are held out.
    """
    flags = {entry.dest: entry for entry in train_flags()}
    told = []
    args = Options(**vars(args))
    images = look(args)
    for rule in RULES if images.images else ():
        chosen = rule(args, images, machine)
        settings = {k: v for k, v in chosen.settings.items() if k not in args.given}
        vars(args).update(settings)
        if settings:
            words = " ".join(_as_flag(flags[name], value) for name, value in settings.items())
            told.append([words, chosen.why])
        if "eval_classes" in settings:
            images = look(args)
    if told:
        told.insert(0, ["", f"for {images}, on {machine}; a flag that you give wins"])
    return args, told


def _steps(images: Images, size: int) -> str:
    """How many batches of a size an epoch has, in words."""
    return counted(max(1, images.images // size), "step")


def _as_flag(entry: Flag, value: Any) -> str:
    shown = f"{value:g}" if isinstance(value, float) else value
    return f"{entry.spellings[0]} {shown}"
