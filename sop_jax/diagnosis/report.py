"""Tables of a diagnosis for people, with the numbers of papers."""

from collections.abc import Mapping
from typing import Any

from sop_jax.diagnosis.diagnosis import Result
from sop_jax.diagnosis.uniqueness import PAPER
from sop_jax.evaluation.tables import aligned, percent

# Unique prototypes at eps 0.025: Tables 1, 4, 9 and 11 and section 4 of "On Partial Prototype
# Collapse"; the last line from notes on "Why Prototypes Collapse", which were not verified.
PAPERS = """\
DINO ViT-S/16 1078 of 65536, ViT-B/16 804 of 65536, ResNet-50 984 of 60000
DINO-vMF ViT-S/16 1157, ViT-B/16 939 of 65536; EsViT Swin-T/7 1157, Swin-B/14 4088 of 65536
iBOT ViT-S/16 3242, ViT-B/16 875, ViT-L/16 969 of 8192; with KoLeo-proto all of 8192
MSN ViT-S/16 3363, PMSN 3005 of 8142; SwAV ResNet-50 1669 of 3000
second-hand: CARP 7052 of 65536, CARP with decoupled prototypes all of 65536; CAPI 16383 of 16384"""

RANGES = ((1, 1), (2, 9), (10, 99), (100, None))  # of redundancy, both ends included


def tables(results: Mapping[str, Result], knn: Mapping[str, float]) -> str:
    """Returns the numbers for people, and the papers'.

    Args:
        results: the results by name.
        knn: k-NN accuracies in [0, 1] by the same names, where they are known.
    """
    every = list(dict.fromkeys(entry["eps"] for x in results.values() for entry in x["eps"]))
    counts: list[list[Any]] = [["unique prototypes, %", "K", *(f"eps {e:g}" for e in every)]]
    for name, result in results.items():
        shares = {entry["eps"]: percent(entry["share"]) for entry in result["eps"]}
        counts.append([name, result["prototypes"], *map(shares.get, every)])
    lines = [aligned(counts)]
    own = PAPER if PAPER in every else every[0]
    detail = [_detail(result, own, knn.get(name)) for name, result in results.items()]
    shown = [key for key in detail[0] if any(row[key] is not None for row in detail)]
    rows: list[list[Any]] = [[f"at eps {own:g}", *shown]]
    rows += [[name, *map(row.get, shown)] for name, row in zip(results, detail, strict=True)]
    lines += ["", aligned(rows)]
    for name, result in results.items():
        of_eps = next(entry for entry in result["eps"] if entry["eps"] == own)
        if by := by_factor(of_eps):
            lines += ["", f"images by the redundancy of their prototype, {name}:", aligned(by)]
    return "\n".join([*lines, "", f"Unique prototypes at eps {PAPER:g} in papers:", PAPERS])


def _detail(result: Result, eps: float, knn: float | None) -> dict[str, Any]:
    """Returns the numbers of one row of the second table."""
    of_eps = next(own for own in result["eps"] if own["eps"] == eps)
    count, unique, same = result["prototypes"], of_eps["unique"], of_eps["same_image"]
    dead = result["dead"]
    return {
        "unique": unique,
        "redundant, of one image": same,
        "unique % without those": None if same is None else 100 * unique / (count - same),
        "effective rank": result["effective_rank"],
        "uniformity": result["uniformity"],
        "dead %": None if dead is None else 100 * dead / count,
        "perplexity": result["marginal_perplexity"],
        "k-NN %": percent(knn),
    }


def by_factor(of_eps: Mapping[str, Any]) -> list[list[Any]]:
    """Returns the share of images by ranges of redundancy; nothing without images or redundancy."""
    if of_eps["share_total"] is None or of_eps["factors"] == [1]:
        return []
    rows: list[list[Any]] = [["redundancy", "prototypes", "images %", "softly assigned %"]]
    for least, most in RANGES:
        inside = [
            i for i, factor in enumerate(of_eps["factors"]) if least <= factor <= (most or factor)
        ]
        if inside:
            sums = [
                sum(of_eps[key][i] for i in inside)
                for key in ("representatives", "share_total", "share_total_soft")
            ]
            words = str(least) if least == most else f"{least}-{most}" if most else f"{least}+"
            rows.append([words, sums[0], 100 * sums[1], 100 * sums[2]])
    return rows
