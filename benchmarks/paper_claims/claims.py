"""The papers' claims as data.

Each claim has statements that can be tested (`statements.py`), with limits and margins that were
chosen before any run. Sizes are scaled down from ImageNet's: the recipes for the digits have a
memory of 1024 instead of 65536, 128 instead of 4096 anchors and 512 instead of 8192 prototypes, and
sweeps cover the same ratios. "SOP" is Silva et al. (2025), "004" is "On Partial Prototype Collapse"
(Govindarajan et al., 2024) and "003" is "Why Prototypes Collapse" (Arteaga et al., 2026).
"""

from typing import Any, NamedTuple

from paper_claims.costs import Cost, Size, Step
from paper_claims.runs import Run, run
from paper_claims.statements import (
    COLLAPSED,
    EARLY_EPOCHS,
    ENTROPY,
    FEWSHOT,
    HEAD,
    KEPT,
    LOGISTIC,
    MIDDLE,
    PAPER,
    TAIL,
    TRANSFER,
    Statement,
    Subject,
    above,
    below,
    cost_above,
    cost_shown,
    cost_within,
    flat,
    less_change,
    more,
    not_worse,
    peak,
    slow_growth,
    unique,
)
from sop_jax.diagnosis.uniqueness import EPS

# The lengths of the papers' runs, for what it would take to repeat them.
ABLATION = Size(
    "ViT-S/16, 300 epochs of ImageNet-1k without local crops",
    Step("imagenet_vits16.py", (("augment.local_crops", 0),)),
    300.0,
)
FULL = Size("ViT-S/16, 800 epochs of ImageNet-1k", Step("imagenet_vits16.py"), 800.0)
IBOT_FULL = Size(
    "iBOT, ViT-S/16, 800 epochs of ImageNet-1k", Step("imagenet_ibot_vits16.py"), 800.0
)
INATURALIST = Size(
    "MSN, ViT-S/16, 300 epochs of iNaturalist 2018",
    Step("inat18_msn_vits16.py"),
    300.0,
    437_513,
)


class Claim(NamedTuple):
    """A claim.

    Attributes:
        name: what `--only` selects.
        title: what is claimed.
        source: the paper and its table.
        paper: the paper's numbers.
        statements: what is tested.
        limits: what cannot show at this size, and why.
        size: the run of the paper that would show it; None if nothing is trained for it.
        quick: whether it is a part of the quick set.
    """

    name: str
    title: str
    source: str
    paper: str
    statements: tuple[Statement, ...]
    limits: str
    size: Size | None = ABLATION
    quick: bool = True


def sweep(recipe: str, setting: str, values: tuple[Any, ...], default: Any) -> tuple[Run, ...]:
    """Returns the runs of the values of a setting; that of the default is the recipe itself."""
    return tuple(run(recipe, {} if value == default else {setting: value}) for value in values)


SOP, IBOT, DINO, MASSL = map(run, ("sop", "ibot", "dino", "massl"))
CARP, DECOUPLED = map(run, ("carp", "decoupled"))  # the second has the loss of the first
SPREAD = run("decoupled", {"decoupled.start_variance": 1.0})
OF_DINO = {
    "head.unit": True,
    "head.batch_norm": False,
    "decoupled.loss": "dino",
    "decoupled.prior": "none",
    "decoupled.student_temperature": 0.1,
    "decoupled.teacher_temperature": (0.015, 0.015),
}

# [CLS] only, and masked patches only. iBOT has no weight of [CLS]: a weight of patches of 1000
# leaves it a thousandth of the loss, and neither clipping nor AdamW keeps the scale of gradients.
SOP_CLS = run("sop", {"sop.patch.tasks": 0, "sop.patch.memory": 0, "mask.none": 1.0})
SOP_MIM = run("sop", {"sop.cls.weight": 0.0})
IBOT_MIM = run("ibot", {"ibot.patch_weight": 1000.0})

CLS_SUPPORTS = sweep("sop", "sop.cls.supports", (1, 2, 4, 8, 16), 4)
MIM_SUPPORTS = sweep("sop", "sop.patch.supports", (0, 1, 3, 7, 15), 0)
ANCHORS = sweep("sop", "sop.cls.anchors", (32, 64, 128, 256, 512), 128)
PROTOTYPES = sweep("ibot", "ibot.prototypes", (128, 256, 512, 1024, 2048), 512)
PATCH_ANCHORS = sweep("sop", "sop.patch.anchors", (32, 64, 128), 64)
CLS_MEMORY = sweep("sop", "sop.cls.memory", (256, 512, 1024, 1536), 1024)
PATCH_MEMORY = sweep("sop", "sop.patch.memory", (128, 256, 512, 1024), 512)
MOMENTUM = tuple(
    run("sop", {} if start == 0.99 else {"optim.momentum": (start, 0.995)})
    for start in (0.98, 0.99, 0.994)
)
TASKS = {
    (cls, patch): run(
        "sop",
        ({"sop.cls.tasks": cls} if cls > 1 else {})
        | ({"sop.patch.tasks": patch} if patch > 1 else {}),
    )
    for cls, patch in ((1, 1), (2, 1), (4, 1), (4, 4))
}

VMF = {"ibot.layer": "vmf", "ibot.marginal": "probability_centering"}
BASE = run("ibot", VMF)
KP = {weight: run("ibot", {**VMF, "ibot.koleo_prototypes": weight}) for weight in (0.02, 0.1, 0.5)}
KD = {weight: run("ibot", {**VMF, "ibot.koleo_data": weight}) for weight in (0.02, 0.1, 0.5)}
BASE_TAIL = run("ibot", VMF, "long_tail")
KP_TAIL = run("ibot", {**VMF, "ibot.koleo_prototypes": 0.1}, "long_tail")
KD_TAIL = run("ibot", {**VMF, "ibot.koleo_data": 0.1}, "long_tail")
BASE_HALF = run("ibot", VMF, "half")
KP_HALF = run("ibot", {**VMF, "ibot.koleo_prototypes": 0.1}, "half")
PRIORS = {
    method: tuple(
        run(method, {} if weight == 1 else {f"{method}.prior_weight": weight}, "long_tail")
        for weight in (1.0, 5.0, 15.0)
    )
    for method in ("msn", "pmsn")
}
BALANCE: dict[str, dict[str, Any]] = {
    "PC": VMF,
    "Sinkhorn": {"ibot.marginal": "sinkhorn"},
    "ME-MAX": {"ibot.marginal": "none", "ibot.prior": "uniform"},
}
BATCHES = {
    (name, batch): run("ibot", {**changes, **({} if batch == 64 else {"batch_size": batch})})
    for name, changes in BALANCE.items()
    for batch in (16, 64)
}

SOP_STEP, IBOT_STEP = Step("imagenet_vits16.py"), Step("imagenet_ibot_vits16.py")


def _sized(step: Step, batch: int, **changes: Any) -> Step:
    return Step(step.file, (("batch_size", batch), *changes.items()))


TIME = Cost(
    "time",
    "time of a step, SOP / iBOT, recipes for the digits",
    Step("digits.py"),
    Step("digits_ibot.py"),
)
OPERATIONS = Cost(
    "operations", "operations of a step, SOP / iBOT, ViT-S/16, batch 1024", SOP_STEP, IBOT_STEP
)
MEMORY = Cost(
    "memory",
    "memory of a step, SOP / iBOT, ViT-S/16, batch 64",
    _sized(SOP_STEP, 64),
    _sized(IBOT_STEP, 64),
)
ESTIMATE = Cost(
    "estimate",
    "estimated time of a step, SOP / iBOT, ViT-S/16, batch 64",
    MEMORY.step,
    MEMORY.base,
)
IBOT_GROWTH = Cost(
    "memory",
    "memory of a step of iBOT, K 10240 / K 1024, ViT-S/16, batch 64",
    _sized(IBOT_STEP, 64, **{"ibot.prototypes": 10240}),
    _sized(IBOT_STEP, 64, **{"ibot.prototypes": 1024}),
)
SOP_GROWTH = Cost(
    "memory",
    "memory of a step of SOP, K 10240 / K 1024, ViT-S/16, batch 64",
    _sized(SOP_STEP, 64, **{"sop.cls.anchors": 10240}),
    _sized(SOP_STEP, 64, **{"sop.cls.anchors": 1024}),
)

EVERY_EPS = tuple(unique(eps) for eps in EPS)
EARLY = tuple(unique(eps, EARLY_EPOCHS) for eps in EPS)
M = unique(PAPER)

SMALL = (
    "The paper's differences are below two points, and a k-NN accuracy of 360 images moves in "
    "steps of 0.28: only larger effects show with three seeds."
)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "table_1",
        "SOP is at least as good as iBOT and MaSSL, and iBOT as DINO",
        "SOP, table 1, k-NN",
        "ViT-S/16: DINO 74.5, iBOT 75.2, MaSSL 75.1, SOP 75.3; ViT-B/16: 76.1, 77.1, 77.2, 78.2",
        (
            more("SOP above iBOT", SOP, IBOT),
            more("iBOT above DINO", IBOT, DINO),
            more("SOP above MaSSL", SOP, MASSL),
        ),
        "The paper's gain is 0.1 points for ViT-S and grows with the network to 1.2 for ViT-L. "
        + SMALL,
        FULL,
    ),
    Claim(
        "table_7",
        "With masked patches only, SOP is far above iBOT; with [CLS] only, above DINO; and both "
        "together are best",
        "SOP, table 7",
        "patches only: iBOT 9.5, SOP 16.8; [CLS] only: DINO 67.9, SOP 68.9; both: iBOT 69.1, "
        "SOP 70.0",
        (
            more("patches only: SOP above iBOT", SOP_MIM, IBOT_MIM),
            more("[CLS] only: SOP above DINO", SOP_CLS, DINO),
            more("SOP: both above [CLS] only", SOP, SOP_CLS),
            more("SOP: both above patches only", SOP, SOP_MIM),
        ),
        "An untrained network already reaches 85 % here, and the paper's with patches only 9.5 "
        "and 16.8 %, so that little range is left. iBOT has no weight of [CLS]: with a weight of "
        "patches of 1000, [CLS] is about a thousandth of its loss.",
    ),
    Claim(
        "table_8_cls",
        "More supports of [CLS] help up to 8",
        "SOP, table 8, first row",
        "1, 2, 4, 8, 16 supports: 69.3, 69.6, 69.5, 70.0, 69.5",
        (
            peak(
                "peak at 4 or 8 supports, of 1 to 16",
                CLS_SUPPORTS,
                CLS_SUPPORTS[2:4],
                SOP,
            ),
        ),
        "The memory has about 100 rows of each of 10 classes, the paper's 66 of each of 1000, so "
        f"that a fall by supports of other classes may come later. {SMALL}",
    ),
    Claim(
        "table_8_mim",
        "More supports of patches make no difference",
        "SOP, table 8, columns",
        "8 of [CLS] with 1, 2, 4, 8 of patches: 70.0, 69.6, 69.2, 69.4",
        (flat("no effect of 1 to 16 embeddings per SOP of patches", MIM_SUPPORTS, SOP),),
        "The margin is larger than the paper's range of 0.8 points.",
    ),
    Claim(
        "table_9",
        "Soft votes are at least as good as one-hot votes",
        "SOP, table 9",
        "soft 70.0, one-hot 69.7",
        (more("soft above one-hot", SOP, run("sop", {"sop.cls.votes": "one_hot"})),),
        SMALL,
    ),
    Claim(
        "table_10",
        "K makes no difference for SOP over a factor of 16, and does for iBOT",
        "SOP, table 10",
        "1024 to 16384: SOP 69.5, 69.7, 70.0, 69.9, 69.7; iBOT 67.6, 67.9, 68.3, 69.1, 68.8",
        (
            flat("SOP is flat in K from 32 to 512", ANCHORS, SOP),
            more("iBOT with 2048 prototypes above 128", PROTOTYPES[-1], PROTOTYPES[0]),
        ),
        "There are 10 classes: 128 prototypes are as many per class as the paper's 12800 would be.",
    ),
    Claim(
        "table_c1",
        "Several tasks per step are at least as good as one",
        "SOP, table C.1",
        "[CLS], patches: 1, 1 69.6; 2, 1 70.0; 4, 1 69.7; 4, 4 70.0",
        (
            more("4 of [CLS] and 4 of patches above 1 and 1", TASKS[4, 4], SOP),
            more("4 of [CLS] above 1", TASKS[4, 1], SOP, quick=False),
            more("2 of [CLS] above 1", TASKS[2, 1], SOP, quick=False),
        ),
        SMALL,
    ),
    Claim(
        "table_c2",
        "[CLS] is better than the mean of the patches",
        "SOP, table C.2",
        "[CLS] 70.0, mean 67.8",
        (more("[CLS] above the mean", SOP, run("sop", {"model.pool": "mean"})),),
        "A view has 16 patches, the paper's 196: an average of so few may lose less.",
    ),
    Claim(
        "figure_c1",
        "Block masks of 30 % are better than random masks of 70 %",
        "SOP, figure C.1",
        "block above random at all epochs (no numbers)",
        (
            more(
                "block above random",
                SOP,
                run("sop", {"mask.kind": "random", "mask.ratio": (0.7, 0.7)}),
            ),
        ),
        "A view has 16 patches, so that 30 % are 4 or 5 of them, and blocks are of 1 to 5 patches.",
        quick=False,
    ),
    Claim(
        "table_c3",
        "The number of patch anchors has a peak at its default",
        "SOP, table C.3",
        "256, 512, 1024: 69.0, 70.0, 69.5",
        (peak("64 above 32 and 128", PATCH_ANCHORS, (SOP,), SOP),),
        SMALL,
        quick=False,
    ),
    Claim(
        "table_c4",
        "The teacher's momentum has a peak at its default start",
        "SOP, table C.4",
        ".992, .994, .996 to 1: 69.2, 70.0, 69.6",
        (peak("0.99 above 0.98 and 0.994, all to 0.995", MOMENTUM, (SOP,), SOP),),
        "A momentum that rises to 1 would freeze the teacher in so few steps; the starts are "
        f"scaled with it. {SMALL}",
        quick=False,
    ),
    Claim(
        "table_c5",
        "The memory of [CLS] has a peak",
        "SOP, table C.5",
        "8192 to 98304: 67.0, 67.7, 68.5, 70.0, 69.7",
        (peak("1024 above 256 and 1536", CLS_MEMORY, (SOP,), SOP),),
        "1024 rows are 71 % of the train images, and 65536 are 5 % of ImageNet: the fall after the "
        "peak, by old embeddings, comes at other sizes.",
        quick=False,
    ),
    Claim(
        "table_c6",
        "The memory of patches has a peak",
        "SOP, table C.6",
        "1024 to 16384: 68.3, 68.7, 69.2, 70.0, 69.1",
        (peak("512 above 128 and 1024", PATCH_MEMORY, (SOP,), SOP),),
        SMALL,
        quick=False,
    ),
    Claim(
        "table_c7_rows",
        "Fixed anchors collapse, if their rows are frozen",
        "SOP, table C.7",
        "random 70.0, fixed: collapse",
        (
            above(
                f"frozen rows: entropy above {COLLAPSED:.0%} of ln K",
                run("sop", {"sop.anchors": "frozen_rows"}),
                (ENTROPY,),
                COLLAPSED,
            ),
            more(
                "random anchors above frozen rows", SOP, run("sop", {"sop.anchors": "frozen_rows"})
            ),
        ),
        "The paper does not say what is fixed. The frozen rows are the memory's random start.",
    ),
    Claim(
        "table_c7_slots",
        "Fixed anchors collapse, if only their slots in the memory are fixed",
        "SOP, table C.7",
        "random 70.0, fixed: collapse",
        (
            above(
                f"fixed slots: entropy above {COLLAPSED:.0%} of ln K",
                run("sop", {"sop.anchors": "fixed_slots"}),
                (ENTROPY,),
                COLLAPSED,
            ),
            more(
                "random anchors above fixed slots", SOP, run("sop", {"sop.anchors": "fixed_slots"})
            ),
        ),
        "The other reading of the same table: rows still change as the memory does.",
    ),
    Claim(
        "table_b1",
        "SOP costs as much time and memory as iBOT",
        "SOP, table B.1",
        "300 epochs of ViT-S/16: iBOT 73.3 h, SOP 73.3 h; 19.5 GB, 19.4 GB",
        (
            cost_within("time within 5 %", TIME),
            cost_within("memory within 5 %", MEMORY),
            cost_within("time within 5 %, as estimated for GPUs", ESTIMATE),
            cost_shown("not claimed: operations of matrix products", OPERATIONS),
        ),
        "The paper names neither the device nor the batch. On a CPU its networks have time for "
        "small batches only, in which the search for supports, which does not shrink with them, "
        "would weigh too much. So its times are of the small recipes, and operations of the "
        "paper's.",
        None,
    ),
    Claim(
        "joint",
        "Prototypes that learn with the encoder lose uniqueness within the first epochs",
        "004, tables 1 and 9; 003, figure 3",
        "M at eps .025: DINO 1078 of 65536, iBOT 3242 of 8192; 003: early, at every eps",
        tuple(
            below(
                f"{one.recipe}: below {KEPT:.0%} unique after {EARLY_EPOCHS:g} epochs at every eps",
                one,
                EARLY,
                KEPT,
            )
            for one in (DINO, IBOT, CARP)
        ),
        "512 prototypes in 64 dimensions have more room than 65536 in 256.",
        IBOT_FULL,
    ),
    Claim(
        "kept",
        "KoLeo on prototypes and decoupled prototypes keep nearly all unique",
        "004, table 10; 003, figure 3",
        "M with KoLeo 8192 of 8192; decoupled: no collapse at any eps",
        (
            above(f"KoLeo: above {KEPT:.0%} at eps .025", KP[0.1], (M,), KEPT),
            above(f"decoupled: above {KEPT:.0%} at every eps", DECOUPLED, EVERY_EPS, KEPT),
        ),
        "As for `joint`.",
        IBOT_FULL,
    ),
    Claim(
        "kept_spread",
        "Decoupled prototypes keep nearly all unique, if their first means are spread",
        "003, figure 3",
        "decoupled: no collapse at any eps",
        (above(f"decoupled: above {KEPT:.0%} at every eps", SPREAD, EVERY_EPS, KEPT),),
        "Chosen after the runs of `kept`, in which about half of the prototypes are within .025 of "
        "another one. There, the 512 first means are the 128 features of the first step, each "
        "taken four times, plus noise of a tenth of their length; here the noise has the length of "
        "the features. The authors of the paper publish no start.",
        IBOT_FULL,
        quick=False,
    ),
    Claim(
        "growth",
        "M of prototypes that learn with the encoder does not grow with K",
        "004, figure 3",
        "M of the baseline is the same for K from 2048 to 10240",
        (
            slow_growth(
                "iBOT: M at K 2048 and 128 by less than K to the power 0.1",
                PROTOTYPES[0],
                PROTOTYPES[-1],
                16.0,
            ),
        ),
        "As for `joint`.",
        IBOT_FULL,
    ),
    Claim(
        "decoupled",
        "Decoupled prototypes need no centering, and are not worse by k-NN",
        "003",
        "diverse prototypes improve k-NN (no numbers)",
        (
            not_worse("decoupled as good as CARP, whose loss it has", DECOUPLED, CARP),
            not_worse(
                "with DINO's loss and no centering as good as DINO",
                run("decoupled", OF_DINO),
                DINO,
                quick=False,
            ),
            not_worse(
                "with DINO's loss, no centering as good as centering",
                run("decoupled", OF_DINO),
                run("decoupled", {**OF_DINO, "decoupled.marginal": "centering"}),
                quick=False,
            ),
        ),
        "The paper decouples CARP, which is not centered either, and publishes neither code nor "
        "constants.",
        IBOT_FULL,
    ),
    Claim(
        "figure_2",
        "Probability centering is more robust to small batches than Sinkhorn-Knopp and ME-MAX",
        "004, figure 2",
        "the gap is largest at the smallest batch (no numbers)",
        (
            *(
                more(f"batch 16: PC above {name}", BATCHES["PC", 16], BATCHES[name, 16])
                for name in ("Sinkhorn", "ME-MAX")
            ),
            *(
                less_change(
                    f"from batch 64 to 16 PC loses less than {name}",
                    (BATCHES["PC", 16], BATCHES["PC", 64]),
                    (BATCHES[name, 16], BATCHES[name, 64]),
                )
                for name in ("Sinkhorn", "ME-MAX")
            ),
        ),
        "The paper does not give its batches. Steps are equal, so that small batches see fewer "
        "images, as in the paper.",
        IBOT_FULL,
        quick=False,
    ),
    Claim(
        "table_10_koleo",
        "KoLeo on prototypes makes them unique from a weight of 0.1 on and improves k-NN, more "
        "than KoLeo on data",
        "004, table 10 and figure 3",
        "weight 0, .02, .1, .5: M 1045, 4693, 8192, 8192; k-NN 72.39, 72.56, 72.62, 72.64",
        (
            more("M: 0.1 above none", KP[0.1], BASE, M),
            more("k-NN: 0.1 above none", KP[0.1], BASE),
            flat("k-NN: 0.5 as 0.1", (KP[0.1], KP[0.5]), KP[0.1]),
            more("k-NN: on prototypes above on data", KP[0.1], KD[0.1]),
            more("M: 0.1 above 0.02", KP[0.1], KP[0.02], M, quick=False),
            more(
                "k-NN: the best weight on prototypes above the best on data",
                tuple(KP.values()),
                tuple(KD.values()),
                quick=False,
            ),
        ),
        f"Where no prototypes collapse without KoLeo, it has nothing to cure. {SMALL}",
        IBOT_FULL,
    ),
    Claim(
        "table_2",
        "KoLeo on prototypes is better with few labels",
        "004, table 2",
        "ViT-S/16, 1, 2, 5 images per class: 40.7, 51.1, 60.6 without, 41.6, 51.7, 61.1 with",
        tuple(
            more(f"{shots} per class: with above without", KP[0.1], BASE, metric)
            for shots, metric in FEWSHOT.items()
        ),
        "Each accuracy is the mean of three draws of 10 to 50 images, the same for all runs of a "
        "seed.",
        IBOT_FULL,
    ),
    Claim(
        "table_4",
        "On long-tailed images KoLeo on prototypes is better than none and than KoLeo on data",
        "004, table 4",
        "linear: 50.1 without, 50.5 on data, 51.1 on prototypes",
        (
            more("with above without", KP_TAIL, BASE_TAIL, LOGISTIC, shown=(HEAD, MIDDLE, TAIL)),
            more("on prototypes above on data", KP_TAIL, KD_TAIL, LOGISTIC),
            more("tail classes: with above without", KP_TAIL, BASE_TAIL, TAIL),
        ),
        "The digits are resampled: the class of rank r has 1 / r of the images of the first, 137 "
        "to 14. Head, middle and tail classes have more than 100, 20 to 100 and fewer than 20 "
        "train images, as in iNaturalist's benchmark, which has 8142 classes. The paper's gain "
        "comes from more clusters than classes, and 512 prototypes are always more than 10.",
        INATURALIST,
        quick=False,
    ),
    Claim(
        "table_3",
        "KoLeo on prototypes trades transfer for accuracy with few labels",
        "004, table 3",
        "ViT-B/16, mean of 8 data sets: 87.3 without, 86.6 with; ViT-S/16: 85.5, 85.6",
        (
            more("other classes: without above with", BASE_HALF, KP_HALF, TRANSFER),
            more("5 per class: with above without", KP_HALF, BASE_HALF, FEWSHOT[5]),
        ),
        "Runs learn five of the ten digits, drawn by seed; the others are for transfer. Transfer "
        "to other kinds of images, as in the paper, does not show here.",
        IBOT_FULL,
        quick=False,
    ),
    Claim(
        "table_8_pmsn",
        "PMSN's prior does not beat MSN on long-tailed images, over weights",
        "004, table 8",
        "weight 1, 5, 15: MSN 43.8, 42.3, 40.9, PMSN 41.4, 41.8, 41.0",
        (
            not_worse(
                "the best weight of MSN, the best of PMSN", PRIORS["msn"], PRIORS["pmsn"], LOGISTIC
            ),
            more("MSN: weight 1 above 15", PRIORS["msn"][0], PRIORS["msn"][2], LOGISTIC),
        ),
        "The power law of PMSN over prototypes does not match the classes' here either, which are "
        "ten.",
        INATURALIST,
        quick=False,
    ),
    Claim(
        "table_12",
        "Memory grows with K for iBOT, hardly for SOP",
        "004, table 12",
        "iBOT, ViT-S/16, batch 64, K 1024 and 10240: 12.9 and 20.2 GB",
        (
            cost_above("iBOT: by more than 5 % from K 1024 to 10240", IBOT_GROWTH),
            cost_within("SOP: by less than 5 % from K 1024 to 10240", SOP_GROWTH),
        ),
        "K of SOP is that of [CLS], as in its table 10; patches have 512 anchors throughout.",
        None,
    ),
)


def by_name() -> dict[str, Claim]:
    """Returns the claims by name."""
    return {claim.name: claim for claim in CLAIMS}


def subjects(claim: Claim, quick: bool) -> list[Subject]:
    """Returns what a claim needs, without repetitions; in the quick set, only the ends of sweeps.

    A claim that is not a part of the quick set needs nothing there.
    """
    if quick and not claim.quick:
        return []
    found: list[Subject] = []
    for statement in claim.statements:
        if not quick:
            found += [*statement.needed, *statement.further]
        elif statement.quick:
            found += statement.needed
    return list(dict.fromkeys(found))
