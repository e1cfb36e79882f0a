"""The cases of unchanged.py: commands whose --help is compared, and trainings.

Flags are those of every version; `{images}`, `{cache}`, `{root}` and `{steps}` are filled in.
"""

from __future__ import annotations

SEARCHES = "build add remove query duplicates info approximate compact serve".split()
COMMANDS = {
    "train": ["train.py"],
    "evaluate": ["evaluate.py"],
    "report": ["report.py"],
    "net export": ["-m", "net", "export"],
    "search": ["search.py"],
    **{f"search {name}": ["search.py", name] for name in SEARCHES},
    "study": ["study.py"],
    "dataset": ["-m", "dataset"],
    **{f"dataset {name}": ["-m", "dataset", name] for name in ("check", "download")},
}
NETWORK = (
    "--dataset folder:{images} --model resnet10 --width 0.125 --stem small --embedding-size 8 "
    "--image-size 32 --pretrained none --batch-size 12 --workers 0 --amp off --metrics retrieval "
    "--wandb disabled --no-report"
)
"""48 training images, so four steps per epoch."""

SEC = "--steps {steps} --milestones 8 15 --image-size 32 --lr 1e-3 --lr_p 1e-3"
DIVIDED = "--nb-clusters 4 --mod-epoch 1 --lr 1e-3"
SMALL_CLASSES = f"--loss MarginLoss {DIVIDED} --batch-sampler adaptbalanced --IPC 4"
MIXED = "--loss AMLoss --introspective"

METHODS = {
    # proxies
    "proxy-anchor": "--loss Proxy_Anchor",
    "proxy-anchor alpha": "--loss Proxy_Anchor --alpha 16 --mrg 0.2 --proxy-lr-scale 10",
    "amloss": "--loss AMLoss",
    "amloss options": "--loss AMLoss --alphap 48 --alphan 24 --delta 0 --lam 0.5 --mrg-lr 1e-2 "
    "--mrg-lr-decay-step 2 --mrg-lr-decay-gamma 0.3",
    "amloss raw": "--loss AMLoss --l2-norm 0",
    # IDML, DDML, mixup
    "introspective released": MIXED,
    "introspective paper": f"{MIXED} paper --mixup 0.5",
    "introspective unmixed": f"{MIXED} paper --mixup 0 --l2-norm 0",
    "introspective proxy-anchor": "--loss Proxy_Anchor --introspective paper",
    "mixup": "--loss MS --mixup 0.4",
    "disentangled": "--loss Proxy_Anchor --disent True --al 1 --be 0.1 --gam 1e-5",
    "disentangled amloss": "--loss AMLoss --disent True --al 0.5 --be 0.2 --gam 1e-3",
    # any loss on prefixes; pairs among earlier batches
    "matryoshka": "--loss AMLoss --matryoshka 2 8",
    "memory bank": f"--loss ms {SEC} --batch-size 10 --memory-bank 30 --memory-bank-start 3",
    # SEC
    "sec": "--loss AMLoss --sec_wei 0.5 --norm_momentum 0.1",
    "sec raw": "--loss MS --sec_wei 0.5 --l2-norm 0",
    "l2reg": "--loss Proxy_Anchor --l2reg_wei 1e-2",
    "sec and l2reg": "--loss AMLoss --sec_wei 0.5 --l2reg_wei 1e-2 --norm_momentum 0.5",
    **{f"spherical {loss}": f"--loss {loss} {SEC}" for loss in ("triplet", "semihtriplet")},
    "spherical n-npair": f"--loss n-npair {SEC}",
    "spherical ms": f"--loss ms {SEC} --batch-size 10",
    "spherical triplet sec": f"--loss triplet {SEC} --sec_wei 1 --norm_momentum 0.5",
    "spherical semihtriplet sec": f"--loss semihtriplet {SEC} --sec_wei 1 --eval-steps 7",
    "spherical n-npair sec": f"--loss n-npair {SEC} --sec_wei 0.5",
    "spherical ms sec": f"--loss ms {SEC} --batch-size 10 --sec_wei 1",
    "spherical n-npair l2": f"--loss n-npair {SEC} --l2reg_wei 1e-2",
    # the library's losses
    **{
        f"library {loss}": f"--loss {loss} --lr 1e-3"
        for loss in "Proxy_NCA MS Contrastive Triplet NPair SoftTriple Circle Margin".split()
    },
    "circle loss of amloss": "--loss CircleLoss --IPC 3",
    "pml": "--loss pml:NormalizedSoftmaxLoss --loss-args temperature=0.1",
    "pml pairs": "--loss pml:ContrastiveLoss --IPC 3",
    # divide and conquer's losses
    "margin": "--loss MarginLoss --IPC 3 --lr 1e-3 --margin 0.3",
    "margin learned": "--loss MarginLoss --IPC 3 --lr 1e-3 --lr-beta 5e-2",
    **{
        f"margin {miner}": f"--loss MarginLoss --IPC 3 --lr 1e-3 --sampler {miner}"
        for miner in "easypeasy distanceweighted HPHN EPHN EPSHN RPSHN RPHN".split()
    },
    "triplet": "--loss TripletLoss --IPC 3 --lr 1e-3",
    "triplet mined": "--loss TripletLoss --IPC 3 --lr 1e-3 --sampler EPSHN --soft-loss",
    "triplet earlier": "--loss TripletLoss --IPC 3 --lr 1e-3 --mining earlier",
    "triplet all": "--loss TripletAllLoss --IPC 3 --lr 1e-3 --margin 0.1",
    "triplet semihard": "--loss TripletSemihardLoss --IPC 3 --lr 1e-3 --soft-loss",
    "npairs": "--loss NPairsLoss --IPC 2 --lr 1e-3 --lr-alpha 0.1",
    # divide and conquer
    "divide learned": f"--loss MarginLoss {DIVIDED} --mask-lr-mult 100 --masking-lambda 0.01",
    "divide fixed": f"--loss MarginLoss {DIVIDED} --fixed-mask 1",
    "divide full": f"--loss MarginLoss {DIVIDED} --force-full-embedding-epoch 3",
    "divide rests": "--loss TripletLoss --lr 1e-3 --nb-clusters 2 --mod-epoch 2 "
    "--mod-epoch-freeze 1 --stop-recluster --masks-freeze-one-cluster 1",
    "divide at once": f"--loss Proxy_Anchor {DIVIDED} --hierarchy-method none --IPC 2",
    "divide adaptive": f"--loss MarginLoss {DIVIDED} -crs 3 "
    "--clustering-method kmeans_adaptive_centroids --penultimate-for-clusters 0",
    "divide legacy": f"--loss NPairsLoss {DIVIDED} --legacy-renumbering",
    "divide sum": f"--loss MarginLoss {DIVIDED} --masks-sum-for-full-emb 1 --mask-relu 0 "
    "--masking-init normal --masks-normalize-before-sum l1 --mask-wd-mult 0.5",
    "divide replicas": f"--loss MarginLoss {DIVIDED} --batch-sampler adaptbalanced "
    "--num-replicas 2",
    **{
        f"divide {kind}": f"--loss MarginLoss {DIVIDED} --batch-sampler {kind}"
        for kind in ("npairs", "randombatch")
    },
    **{
        f"divide {action}": f"{SMALL_CLASSES} --small-class-action {action}"
        for action in ("sample_other", "duplicate", "smaller_batch")
    },
    "divide experiment": "--experiment margin_loss_resnet50 --dataset folder:{images} --model "
    "resnet10 --batch-size 12 --nb-clusters 2 --mod-epoch 2 --lr 1e-3",
    "divide sec": f"--loss AMLoss {DIVIDED} --sec_wei 0.5",
    # what trains, and how
    "warm none": "--loss AMLoss --warm 0",
    "warm 3": "--loss AMLoss --warm 3 --bn-freeze 1",
    **{f"bn-freeze {kind}": f"--bn-freeze {kind}" for kind in ("1", "affine", "statistics")},
    "bn-momentum": "--bn-momentum 0.5",
    "cosine": "--loss AMLoss --schedule cosine --epochs 6",
    "cosine steps": "--loss AMLoss --schedule cosine --steps 18",
    "milestones": "--loss AMLoss --schedule milestones --milestones 6 14 --lr-decay-gamma 0.1",
    "step": "--loss AMLoss --lr-decay-step 2 --lr-decay-gamma 0.3",
    "constant": "--schedule constant",
    **{f"optimizer {name}": f"--optimizer {name} --lr 1e-3" for name in ("sgd", "rmsprop", "adam")},
    "decay": "--decay-vectors 0 --decay-biases 1 --weight-decay 1e-2 --lr_p 1e-5 --clip 0.01",
    # batches and selection
    "images per class": "--loss AMLoss --IPC 3",
    "images per class repeated": "--loss AMLoss --IPC 3 --IPC-repeat 1",
    "validation": "--loss AMLoss --val-classes 0.25",
    "no test": "--loss AMLoss --val-classes 0.25 --no-test",
    "evaluations": "--eval-steps 3 --save-every 4 --keep 2",
    "all metrics": "--eval-every 2 --metrics retrieval nmi f1 ami",
    **{f"augment {name}": f"--augment {name}" for name in ("sec", "emoji", "none", "ColorHeavy")},
    "geometry": "--augment GeomColor --ratio-classes 0.75 --eval-resize 48 --eval-zoom 0.8",
    "cached": "--decode cache --cache-dir {cache} --cache-size 36",
    # networks
    "heads": "--head-norm 1 --head-init xavier_uniform_1 --dropout 0.3 --pooling max",
    "pooling": "--pooling avg --stem tiny --head-init default",
    "grid": "--pooling grid --input-spec caffe --stem imagenet --image-size 64",
    "resnet18": "--model resnet18 --input-spec white",
    "resnet50": "--model resnet50 --head-norm 1 --bn-freeze statistics",
    "bn_inception": "--model bn_inception --width 1 --stem imagenet --image-size 64 --loss AMLoss "
    "--batch-size 4 --eval-every 2",
    "googlenet": "--model googlenet --width 1 --stem imagenet --image-size 64 --batch-size 4 "
    "--eval-every 2",
    # a run's life
    "skip": "--on-nan skip --seed 3",
    "emoji": "--dataset emoji --data-root {root}/data --loss AMLoss --ratio-classes 0.1",
}
"""Name → flags, in addition to NETWORK: every method and its options, and the parts of methods."""
