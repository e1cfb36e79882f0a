"""Settings that suit the user's own images if no network is named, each with its reason.

    python train.py --dataset folder:photos

The published defaults are meant for benchmarks with thousands of images, on a GPU. With a few
hundred photographs they give two steps per epoch, at a low rate. So `RULES` derive flags from the
images and the machine. A flag that is given wins, and later rules take it into account.
docs/own_images.md says how they were chosen; `python benchmarks/own_images.py` measures it.
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
"""The least number of steps per epoch: with fewer, a network hardly moves before rates fall."""


class Images(NamedTuple):
    """What is known of the images before training.

    Attributes:
        classes: number of classes, including held-out ones.
        divided: whether the data themselves say which classes are held out.
        trained: number of classes to train on.
        images: about how many images these have.
        smallest, largest: number of images of the smallest and of the largest training class.
        side: short side of a typical picture, in pixels.
        fewest: number of images of the `trained` smallest classes: training has no fewer, whichever
            classes are taken out for validation.
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
        same = self.smallest == self.largest
        each = f"{self.smallest}" if same else f"{self.smallest} to {self.largest}"
        return f"{self.images:,} training images of {self.trained:,} classes, {each} each"


class Machine(NamedTuple):
    """What is known of the machine.

    Attributes:
        cores: of the CPU. gpu: whether there is one.
        weights: whether the ImageNet weights of `MODEL` are installed.
        remedy: the command that installs them.
        free: free bytes on the disk where caches are kept.
    """

    cores: int
    gpu: bool
    weights: bool
    remedy: str
    free: int

    def __str__(self) -> str:
        return "a GPU" if self.gpu else counted(self.cores, "CPU core")


class Chosen(NamedTuple):
    """Settings that belong together (option → value), and the reason for them in words."""

    settings: Mapping[str, Any]
    why: str


Rule = Callable[[Options, Images, Machine], Chosen]


def wanted(args: Options) -> bool:
    """Whether settings should be chosen to suit the images.

    They should with --defaults suited; and by default with the user's own images, unless a network,
    a checkpoint or a file of flags is named, because then the user has settings in mind.
    """
    if args.defaults is not None:
        return args.defaults == "suited" and OWN_DATA.met(args)
    named = {"model", "checkpoint"} & set(args.given) or args.recipe
    return OWN_DATA.met(args) and not named and args.pretrained in (None, "imagenet", "none")


# --- the rules ------------------------------------------------------------------------------------


def held_out(args: Options, images: Images, machine: Machine) -> Chosen:
    """Enough classes for a measurement."""
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
    why = "from scratch, as --pretrained none says"
    if args.pretrained is None:
        why = f"from scratch, for lack of ImageNet weights; far better: {machine.remedy}"
    narrow = {} if "model" in args.given else {"model": "resnet18", "width": 0.5}
    return Chosen({**narrow, "pretrained": "none"}, why)


def pixels(args: Options, images: Images, machine: Machine) -> Chosen:
    """As many as the weights were trained at, but no more than the pictures have."""
    if "model" in args.given:  # whose weights may want a certain size
        return Chosen({}, "")
    if images.side < 128:
        return Chosen({"image_size": max(32, images.side // 32 * 32)}, "the pictures are no larger")
    if args.pretrained == "none" and not machine.gpu:
        return Chosen(
            {"image_size": 112},
            "from scratch the images must be seen often, so each step must be quick",
        )
    return Chosen({"image_size": 224}, "detail tells much, and the weights were trained at it")


def reading(args: Options, images: Images, machine: Machine) -> Chosen:
    """A cache, where it holds all that the network sees and the disk has room for it."""
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
    """So small that an epoch has `LEAST_STEPS`; for a loss on pairs, several images of a class."""
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
    return Chosen({"batch_size": size}, f"{_steps(images, size)} per epoch")


def _instances(args: Options, size: int, classes: int) -> int:
    """How many images of each class a batch has; 0 where it cannot have two of each of two classes.

    Four, or fewer in a small batch; where --batch-size is given, a number that divides it.

    Args:
        size: of the batch. classes: how many are trained on.
    """
    if "IPC" in args.given:
        return args.IPC
    if "batch_size" not in args.given:
        return min(4, size // LEAST_CLASSES) if size >= 2 * LEAST_CLASSES else 0
    return instances_in(size, classes)


def instances_in(size: int, classes: int) -> int:
    """A number of images of each class that divides a batch of this size.

    4 where that is possible, else the nearest below 4, else the nearest above. The batch then has
    two classes or more, and no more than `classes`. 0 where there is no such number.
    """
    each = range(2, size // LEAST_CLASSES + 1)
    fits = [n for n in each if size % n == 0 and size // n <= classes]
    return min(fits, key=lambda n: (n > 4, abs(n - 4)), default=0)


def length(args: Options, images: Images, machine: Machine) -> Chosen:
    """As many epochs as take the machine minutes, between 10 and 100."""
    looks = 120_000 if machine.gpu else 10_000
    if args.pretrained == "none":
        looks *= 2
    epochs = min(max(round(looks / images.images), 10), 100)
    steps = f"{_steps(images, args.batch_size)} each"
    if args.steps is not None or "epochs" in args.given:
        return Chosen({}, "")
    return Chosen({"epochs": epochs}, f"{steps}, {epochs * images.images:,} images seen in all")


def judging(args: Options, images: Images, machine: Machine) -> Chosen:
    """Once, at the end: then no epoch is picked on the very classes that it is judged on."""
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
        return Chosen({"warm": 0, "schedule": "cosine"}, "down to zero at the end")
    settings = {"schedule": "cosine", "warm": 0, "weight_decay": 0.02, "decay_vectors": 0}
    if args.pretrained == "none":
        return Chosen({"lr": 4e-3, **settings}, "few steps from scratch must be long ones")
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
"""In the order in which they are applied, and explained to the user."""


def choose(
    args: Options, look: Callable[[Options], Images], machine: Machine
) -> tuple[Options, list[list[str]]]:
    """Applies `RULES`.

    Args:
        look: options → what is known of the images. It is called again once a rule has decided
            which classes are held out.

    Returns:
        The options as the rules set them; and, to be printed, a pair of texts for each rule that
        set something: the flags, and the reason. The first pair describes the images alone.
    """
    flags = {entry.dest: entry for entry in train_flags()}
    explained = []
    args = Options(**vars(args))
    images = look(args)
    for rule in RULES if images.images else ():
        chosen = rule(args, images, machine)
        settings = {k: v for k, v in chosen.settings.items() if k not in args.given}
        vars(args).update(settings)
        if settings:
            words = " ".join(_as_flag(flags[name], value) for name, value in settings.items())
            explained.append([words, chosen.why])
        if "eval_classes" in settings:
            images = look(args)
    if explained:
        explained.insert(0, ["", f"for {images}, on {machine}; a flag that you give wins"])
    return args, explained


def _steps(images: Images, size: int) -> str:
    """How many batches of this size an epoch has, in words."""
    return counted(max(1, images.images // size), "step")


def _as_flag(entry: Flag, value: Any) -> str:
    shown = f"{value:g}" if isinstance(value, float) else value
    return f"{entry.spellings[0]} {shown}"
