"""The flags of train.py that belong to no method, in the groups that --help shows."""

from __future__ import annotations

import argparse
import os

import criteria
import dataset
import net
from dataset.inventory import BAD_IMAGES
from flags import (
    BINARY,
    CONTINUED,
    COUNT,
    COUNT_OR_ZERO,
    EPOCHS,
    LABEL,
    NOTHING,
    SEED,
    SHARE,
    SWITCH,
    Group,
    Kind,
    Search,
    a_data_set,
    a_path,
    a_place,
    any_text,
    flag,
    in_order,
    key_value,
    key_values,
    not_negative,
    number,
    one_of,
    positive,
    whole,
)
from machine import cores
from options import needs
from terminal import as_shell
from utils import program

METRICS = ("retrieval", "official", "nmi", "f1", "ami")
"""What an evaluation of a run computes."""
METRICS_TEXT = (
    "what to compute. retrieval: R@K, RP, MAP@R, mARP, MRR; official: VehicleID's gallery of one "
    "image per vehicle (10 draws); nmi, f1, ami: k-means with one cluster per class"
)
LOSSES_TEXT = f"{criteria.losses_in_words()}; or pml:NAME for any loss of pytorch-metric-learning"
DATASETS_TEXT = f"{', '.join(dataset.NAMES)} (emoji is in the repository), folder:PATH, csv:FILE"
AMP_TEXT = "precision of the network; auto: bf16 where the hardware has it; the rest is float32"

METRIC_NAMES = Kind(str.lower, "NAME", METRICS, nargs="+")
FOLDS = COUNT_OR_ZERO._replace(metavar="K")


def _auto(text: str) -> str:
    """The one word of train.py's --resume; of evaluate.py's any checkpoint is."""
    if text != "auto":
        raise argparse.ArgumentTypeError(
            f"{text!r} is not auto; --resume-run {as_shell(text)} continues a run by its folder"
        )
    return text


AUTO = Kind(_auto, choices=("auto",))

# fmt: off
DATA = Group("data", (
    flag("--dataset --use_dataset", "emoji", Kind(a_data_set, "NAME"), DATASETS_TEXT,
         spelt=dataset.spelt),
    flag("--data-root --dataset-dir", dataset.ROOT, a_path("DIR"),
         "folder that holds the published data sets",
         need=needs.UNDER_A_ROOT, change=NOTHING, local=True),
    flag("--eval-classes", None, Kind(number(0.0, 1.0, above=True), "F"),
         "share of the classes of your own images that is held out", need=needs.OWN_DATA,
         shown="a fifth to a third where --defaults suited chooses, else 0.5; what the data say "
         "themselves comes first"),
    flag("--split-seed", None, COUNT_OR_ZERO, "chooses which classes these are",
         need=needs.OWN_DATA, shown="1"),
    flag("--ratio-classes", 1.0, Kind(number(0.0, 1.0, above=True), "F"),
         "use only this share of the classes of each split, the first ones, for a quick trial"),
    flag("--image-size --sz-crop", None, Kind(whole(16), "PX"),
         "side of the square the network sees",
         shown="64 for emoji; for photographs 224, for timm: what its weights were trained at"),
    flag("--eval-resize --sz-resize", None, Kind(whole(16), "PX"),
         "evaluation brings the short side of a photograph to this and cuts out the centre",
         need=needs.PHOTOGRAPHS, shown="256 for 224 and 227 pixels, in proportion for others"),
    flag("--eval-zoom", 1.0, Kind(number(0.5, 1.0), "X"),
         "evaluation shows a picture at this share of its size, on white; for drawings (emoji)"),
    flag("--decode", "exact", one_of("exact", "cache"),
         "exact: a file is decoded whenever it is needed; cache: all are decoded once, and their "
         "pixels kept on disk", need=needs.PHOTOGRAPHS),
    flag("--exif", "apply", one_of("apply", "ignore"),
         "orientation that a file's EXIF data give. apply: the picture is turned upright; ignore: "
         "its pixels are taken as stored, as the released programs do", need=needs.PHOTOGRAPHS),
    flag("--cache-size", 256, Kind(whole(16), "PX"),
         "short side of the images in the cache; 256 gives the evaluation what exact gives it, at "
         "224 and 227 pixels", need=needs.CACHED),
    flag("--cache-dir", None, a_path("DIR"), "where caches are kept", need=needs.CACHED,
         shown="~/.cache/anchorage", change=NOTHING, local=True),
    flag("--data-device", None, one_of("cpu", "cuda"),
         "cuda: the cache's pixels lie in the GPU's memory and are cut there; cpu keeps pictures "
         "that are in memory anyway off the GPU", shown="cpu for files, the GPU for pictures in "
         "memory", change=NOTHING),
    flag("--max-bad-images", BAD_IMAGES, Kind(number(0.0, 1.0), "F"),
         "share of the images of a split that may be unreadable (at least one; 0 allows none): a "
         "training image is replaced by another of its class, an evaluation image left out, and "
         "each is named"),
    flag("--workers --num-workers", min(4, cores()), COUNT_OR_ZERO,
         "processes that read images, for each GPU", shown="4, at most one for each core",
         change=NOTHING, local=True),
))
SELECTION = Group("batches and model selection", (
    flag("--defaults", None, one_of("suited", "published"),
         "how flags that are not given are set. suited: to suit the images and the machine, with "
         "the reasons printed; published: as in the papers, and by the defaults that stand here",
         need=needs.OWN_DATA, before="published", change=NOTHING,
         shown="suited for your own images where no --model, --checkpoint or file of flags is "
         "given, else published"),
    flag("--batch-size --batch_size", 150, Kind(whole(2), "N"),
         "images per step, over all processes",
         shown="150; AMLoss 90, DDML 180, SEC's losses 120, --experiment 128"),
    flag("--micro-batch", None, COUNT,
         "embed a batch N images at a time (in each process), and then again with the gradient of "
         "the loss of all: the memory of N images, and one more forward pass",
         need=needs.NOT_COMPILED, shown="all at once"),
    flag("--IPC --instances --num-samples-per-class", 0, COUNT_OR_ZERO,
         "images per class: batch/N classes with N images each; 0 shuffles (2 with --nb-clusters)",
         need=needs.BY_CLASS),
    flag("--IPC-repeat", 0, BINARY,
         "1: the images of a class are drawn with repetition, as Proxy-Anchor's released sampler "
         "does; 0: each once, unless the class has fewer than N, as SEC's does",
         need=needs.BALANCED),
    flag("--augment --album", None,
         Kind(str, "NAME", ("crop", "sec", "emoji", "none", "Geom", "GeomColor", "ColorHeavy")),
         "crop: random resized crop and flip; sec: the same from an image of 256 pixels; emoji: "
         "affine and colour, no flip; Geom, GeomColor, ColorHeavy: crop and flip, then turns, "
         "holes and blur; the same with light and contrast; strong colour and grey; none: as "
         "evaluation sees them",
         shown="the data set's"),
    flag("--crop-scale", None, Kind(number(0.0, 1.0, above=True), "F"),
         "smallest share of a picture's area that a random crop shows", need=needs.CROPPED,
         shown="0.08; 0.16 with --augment sec"),
    flag("--val-classes", 0.0, Kind(number(0.0, 0.5), "F"),
         "share of the training classes that picks the best epoch instead of the test classes, "
         "which are then looked at once, at the end; 0 follows the papers' protocol: best epoch on "
         "the test classes", need=needs.NO_FOLD),
    flag("--val-fold", None, COUNT_OR_ZERO,
         "like --val-classes, with fold N of the training classes: of those that the data set "
         "brings along (emoji: 0 to 3), or of --val-folds"),
    flag("--val-folds", 0, FOLDS,
         "deal the training classes into K folds of about as many images, for --val-fold",
         need=needs.FOLDED, shown="the data set's own"),
    flag("--folds", 0, FOLDS,
         "cross-validation: train K times, each time without one of K folds of the training "
         "classes, on which it is judged, and print the mean; the test classes are not looked at",
         need=needs.NOT_FOLDED, shown="off", change=NOTHING),
    flag("--no-test", False, SWITCH,
         "do not look at the test classes at the end either: for a run that only chooses options",
         need=needs.HELD_OUT),
))
NETWORK = Group("network", (
    flag("--model --arch", "bn_inception", any_text("NAME"),
         f"{', '.join(net.MODELS)}; timm:NAME or timm:NAME.TAG for any model of timm",
         spelt=lambda name: net.find_backbone(name).name),
    flag("--model-args", (), Kind(key_values, "KEY=VALUE", nargs="+"),
         "what timm builds the model with, by its own names: patch_drop_rate=0.5 depths=2,2,6,2",
         need=needs.OF_TIMM, spelt=in_order),
    flag("--embedding-size --sz-embedding", 512, COUNT, "dimensions of the embedding"),
    flag("--pretrained", None, a_path("WHAT"),
         "imagenet (downloaded where they are not here yet; of timm: those of the tag), none, or a "
         "FILE of weights",
         shown="none for emoji, imagenet for photographs", spelt=a_place),
    flag("--checkpoint", None, a_path("FILE"),
         "start from all the weights of a checkpoint, ours or released, with fresh optimisers "
         "(to go on with a run: --resume-run)", spelt=a_place),
    flag("--l2-norm", 1, BINARY, "1: the embedding is used at unit length"),
    flag("--pooling --features-pooling", None, Kind(str, "NAME", tuple(net.POOLINGS)),
         "how the last feature map becomes a vector: avg+max, avg, max; grid: average of each cell "
         "of 4 x 4; gem: generalised mean with a trained power; cls: a transformer's class token; "
         "attention: the trained pooling that the model comes with (SigLIP)",
         shown="avg+max; for timm: what its family uses"),
    flag("--stem", None, one_of(*net.STEMS),
         "first layers: as published (stride 4), stride 2, or stride 1",
         shown="imagenet from 128 pixels on, small below"),
    flag("--width", 1.0, Kind(number(0.0, 4.0, above=True), "X"),
         "channels of a ResNet as a multiple of the published ones"),
    flag("--head", "linear", one_of(*net.HEAD_USES),
         "linear: a linear head gives the embedding; training: the losses see that head, and "
         "evaluation compares the pooled features before it; none: there is no head, and the "
         "pooled features are the embedding"),
    flag("--head-norm", 0, Kind(net.head_norm_of, choices=net.HEAD_NORMS),
         "before the heads: 1: a BatchNorm, which is trained; layer: a LayerNorm; layer-plain: one "
         "without scale and shift; 0: nothing"),
    flag("--head-init --init-method", "kaiming", any_text("NAME"),
         "start of the heads. kaiming: normal by fan_out with zero bias; default: PyTorch's own; "
         "orthogonal: with zero bias; "
         "xavier_uniform_GAIN, xavier_normal_GAIN, kaiming_normal_fan_in, kaiming_normal_fan_out: "
         "for each cluster's share of the dimensions; trunc_normal; pt_splitted (as default)",
         need=needs.NEW_HEADS),
    flag("--dropout", 0.0, Kind(number(0.0, 0.99), "P"), "dropout on the pooled features"),
    flag("--input-spec", None, one_of(*net.INPUTS),
         "colour order, scale and mean of the input", shown="what the model's weights want"),
    flag("--bn-freeze --freeze_bn", None, one_of(*net.BN_FREEZE),
         "BatchNorm of the backbone. 0: trained; 1: running statistics fixed, scale and shift "
         "train after the warm-up (as the released code does); affine: all fixed; statistics: "
         "running statistics fixed, scale and shift train",
         need=needs.BLOCKS_TRAIN, shown="1 with pretrained weights, else 0"),
    flag("--bn-momentum", None, Kind(number(0.0, 1.0, above=True), "M"),
         "share of the batch in the running statistics of the backbone's BatchNorms",
         need=needs.NORMS_TRAIN, before=0.1,
         shown="the backbone's: 0.9 for bn_inception, 0.01 for efficientnet_lite0, else 0.1; 0.1 "
         "with SEC's losses"),
))
FINETUNING = Group("fine-tuning: what of a pretrained network is kept and what is frozen", (
    flag("--keep-blocks", None, COUNT,
         "the network ends after its first N blocks, for small images or drawings, for which its "
         "last layers are of little use (efficientnet_lite0)", shown="all"),
    flag("--freeze-stem", False, SWITCH,
         "freeze the patch embedding of a ViT, or what a CNN has before its first block"),
    flag("--freeze-blocks", 0, Kind(net.blocks_of, "N"),
         "freeze the stem, tokens and position embeddings included, and the first N blocks; all: "
         "only the heads train"),
    flag("--peft", "none", Kind(net.peft_of, "PARTS"),
         "the network is frozen, and what is added to it trains: lora:RANK (or lora:RANK:ALPHA), "
         "prompts:N (tokens in front of each block's), bitfit (biases, and scales and shifts of "
         "norms), or several: prompts:10,bitfit; checkpoints hold that alone", spelt=net.peft_of),
    flag("--drop-path", 0.0, Kind(number(0.0, 0.99), "P"),
         "stochastic depth: share of the images for which the last block's branches are left out, "
         "rising to it from 0 at the first block", need=needs.BLOCKS_TRAIN),
    flag("--grad-checkpointing", False, SWITCH,
         "compute the blocks again in the backward pass instead of keeping their inner results: "
         "less memory, a third more time, the same numbers", change=NOTHING),
))
LOSS = Group("loss", (
    flag("--loss --use_loss --criterion", "Proxy_Anchor", Kind(criteria.name_of, "NAME"),
         LOSSES_TEXT),
    flag("--loss-args", (), Kind(key_value, "KEY=VALUE", nargs="+"),
         "arguments of any loss, by the names in its class: margin=0.3 soft=true; of pml: losses "
         "also distance, reducer, miner by their class: distance=LpDistance(p=1)", spelt=in_order),
))
OPTIMISATION = Group("optimisation", (
    flag("--epochs --epoch --nb-epochs", 60, COUNT, "epochs",
         need=needs.BY_EPOCHS, change=CONTINUED,
         shown="60; AMLoss 40, --experiment 100; SEC's losses count in --steps"),
    flag("--steps", None, COUNT, "length of the run in optimisation steps instead of epochs",
         change=CONTINUED),
    flag("--optimizer", "adamw", Kind(str.lower, choices=("adamw", "adam", "sgd", "rmsprop")),
         "for everything but the margins of AMLoss"),
    flag("--lr --base-lr", 1e-4, positive("LR"), "learning rate of the network",
         search=Search(1e-5, 3e-3)),
    flag("--lr_p --lr-p", None, not_negative("LR"), "learning rate of the backbone",
         need=needs.BLOCKS_TRAIN, shown="--lr"),
    flag("--layer-decay", 1.0, Kind(number(0.0, 1.0, above=True), "F"),
         "each block of the backbone learns F times as fast as the one above it; the last one and "
         "the heads at the full rate", need=needs.BLOCKS_TRAIN),
    flag("--weight-decay", 1e-4, not_negative("WD"), "for every parameter"),
    flag("--decay-vectors", 1, BINARY,
         "0: no weight decay on biases and norms (BatchNorm, LayerNorm) of the network"),
    flag("--decay-biases", 0, BINARY, "1: biases decay as well, norms do not",
         need=needs.SOME_DECAY),
    flag("--adam-eps", 1e-8, positive("EPS"), "what Adam adds to its denominators",
         need=needs.ADAM),
    flag("--momentum", 0.9, Kind(number(0.0, 0.9999), "M"), "of sgd and rmsprop; 0: none",
         need=needs.MOMENTUM),
    flag("--nesterov", 1, BINARY, "0: plain momentum, without Nesterov's look ahead",
         need=needs.SGD),
    flag("--schedule", "step", one_of("step", "milestones", "cosine", "onecycle", "constant"),
         "step: a decay every few epochs; milestones: decays at given steps; cosine: a linear rise "
         "over a tenth of the run, then down to zero; onecycle: the same in cosines from 1/25 to "
         "1/250,000, while the momentum goes from .95 to .85 and back"),
    flag("--lr-warmup", None, COUNT_OR_ZERO,
         "optimisation steps in which all rates rise linearly to what the schedule says; a cosine "
         "begins after them (0: at once)", need=needs.NO_RISE,
         shown="none; with --schedule cosine its own rise"),
    flag("--lr-floor", 0.0, SHARE, "the cosine ends at F times the rates",
         need=needs.schedule_is("cosine")),
    flag("--lr-min", 0.0, Kind(number(0.0), "RATE"),
         "the cosine ends at this rate in all groups alike, as PyTorch's eta_min says",
         need=needs.schedule_is("cosine")),
    flag("--cosine-epochs", None, EPOCHS,
         "length of the cosine; a shorter run ends partway down, in a longer one the rates rise "
         "again", need=needs.schedule_is("cosine"),
         shown="the run's"),
    flag("--lr-decay-step", 10, EPOCHS, "epochs between two decays",
         need=needs.schedule_is("step")),
    flag("--lr-decay-gamma --lr_gamma", 0.5, SHARE, "factor of a decay",
         need=needs.schedule_is("step", "milestones")),
    flag("--milestones", (), Kind(whole(1), "STEP", nargs="+"), "steps at which the rates decay",
         need=needs.schedule_is("milestones"), spelt=sorted),
    flag("--clip-norm", 0.0, not_negative("G"),
         "limit on the norm of all gradients together, those of the loss included; 0: no limit",
         shown="none"),
    flag("--clip", 10.0, not_negative("G"),
         "limit on the absolute value of each gradient entry, after --clip-norm; 0: no limit"),
    flag("--ema", 0.0, Kind(number(0.0, 0.99999), "D"),
         "keep a running mean of the network's weights, of which a step replaces 1 - D; it is "
         "evaluated beside the weights themselves, and its R@1 picks the best epoch; 0: none",
         shown="none"),
    flag("--amp", "auto", one_of("auto", "bf16", "fp16", "off"), AMP_TEXT),
    flag("--compile", False, SWITCH,
         "compile the network (torch.compile): minutes at the start, faster steps afterwards"),
    flag("--cuda-graphs", 1, BINARY,
         "1: record the backbone's step on the GPU and replay it, which spares the host the start "
         "of a thousand kernels; 0: do not, which takes less memory", change=NOTHING),
))
RUN = Group("run", (
    flag("--LOG_DIR --log-dir", "logs", a_path("DIR"), "folder that run folders are made in",
         change=LABEL, spelt=a_place),
    flag("--name --experiment-id -i", None, any_text("NAME"), "name of the run and of its folder",
         shown="from data set, model, loss and time", change=LABEL),
    flag("--remark", "", any_text("TEXT"), "added to the run's name", change=LABEL),
    flag("--seed --random-seed -seed", 1, COUNT_OR_ZERO, "seed of all random draws of the run",
         change=SEED),
    flag("--deterministic", False, SWITCH,
         "the same numbers on every run on a GPU too, at some cost of speed", change=NOTHING),
    flag("--gpu-id --gpu --cuda-device", 0, Kind(whole(-1), "N"),
         "which GPU; the CPU is used where there is none; -1: all of them, a process each, as with "
         "torchrun", change=NOTHING, local=True),
    flag("--eval-every", 1, EPOCHS, "epochs between evaluations", need=needs.EVALUATED_BY_EPOCHS,
         change=CONTINUED),
    flag("--eval-steps", None, COUNT, "steps between evaluations, instead of --eval-every"),
    flag("--metrics", METRICS, METRIC_NAMES,
         f"{METRICS_TEXT}. At every evaluation; retrieval is always computed (R@1 picks the best "
         "epoch), and the final evaluation computes all", shown="all", change=NOTHING),
    flag("--max-steps", None, COUNT, "stop after N optimisation steps, evaluate and save",
         shown="no limit", change=CONTINUED),
    flag("--save-every", None, COUNT,
         "save last.pth every N steps too, besides every epoch", shown="every epoch only",
         change=NOTHING),
    flag("--keep", 0, COUNT_OR_ZERO, "older checkpoints to keep, as step_N.pth",
         change=NOTHING),
    flag("--on-nan", "stop", one_of("stop", "skip"),
         "what a loss or gradient that is not finite does: stop the run, or skip the step (100 "
         "steps at most)", change=CONTINUED),
    flag("--resume", None, AUTO,
         "auto: continue the run of this very command in --LOG_DIR if there is one, else start it",
         change=NOTHING),
    flag("--resume-run", None, a_path("DIR"),
         "continue the run in DIR from its last checkpoint, or from an older one: DIR/step_N.pth",
         change=NOTHING),
    flag("--dry-run", False, SWITCH,
         "print what would run, and stop (with --decode cache, a missing cache is made first)",
         change=NOTHING),
    flag("--no-report", False, SWITCH,
         f"no report.html at the end ({program('report')} RUN makes it at any time)",
         change=NOTHING),
    flag("--wandb", None, one_of("online", "offline", "disabled"),
         "where Weights & Biases keeps the run",
         shown="online when a key is configured, else offline", change=NOTHING),
    flag("--sweep", False, SWITCH,
         "the command is drawn by a sweep (recipes/sweep.yaml): a flag that the drawn loss does "
         "not read is noted and left out; otherwise it would be an error", change=NOTHING),
    flag("--wandb-project", os.environ.get("WANDB_PROJECT") or "anchorage", any_text("NAME"),
         "project at Weights & Biases", shown="$WANDB_PROJECT, else anchorage", change=NOTHING),
    flag("--tensorboard", False, SWITCH,
         "also write TensorBoard's files, into the run folder (needs the package tensorboard)",
         change=NOTHING),
    flag("--wandb-images", 10, COUNT_OR_ZERO,
         "epochs between pictures of random queries and their nearest images, in wandb and "
         "TensorBoard, as evaluations allow; 0: none", need=needs.TRACKED, change=NOTHING),
))
# fmt: on
