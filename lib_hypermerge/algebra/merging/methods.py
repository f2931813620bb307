"""The table of methods by which several changes of one layer become one; free of torch."""

from __future__ import annotations

from dataclasses import dataclass

FACTORED, DENSE = "factored", "dense"
DENSITY, SEED, ENERGY = "density", "seed", "energy"
SUM, MEAN, PART = "sum", "mean", "part"
FULL = "full"


@dataclass(frozen=True)
class Method:
    """What a person, a plan and a page need to know of a method.

    id: as written in requests.  title: for people.  source: paper and arXiv number, where there is one.
    kind: FACTORED never forms n×k and gives factors; DENSE works on whole matrices and gives one, of full rank: cut to
    the sum of all ranks, it loses a quarter to half of its energy where LoRAs are unlike.
    advice: when it is a good idea or a bad one.  uses: which of DENSITY, SEED and ENERGY it heeds.
    strength: what terms do that say the same: SUM, they add up; MEAN, they count once, at about the largest weight, and
    only unlike ones add up; PART, the result is a part of the first.
    In all of them weights times c give c times the result, and a term of weight 0 is as if it were not there.
    rank: of the result at most the "sum" of all ranks, the "largest" of them, that of the "first", or "full".
    is_exact: whether the result is Σ w·Δ itself.  symmetric: whether the order of terms is of no account.
    first_is_special: whether the first term is the one that is worked on, and the others' weights are of no account.
    """

    id: str
    title: str
    source: str
    kind: str
    advice: str
    uses: tuple[str, ...] = ()
    strength: str = SUM
    rank: str = "sum"
    is_exact: bool = False
    symmetric: bool = True
    first_is_special: bool = False


_ALL = (
    Method(
        "linear",
        "Weighted sum",
        "",
        FACTORED,
        "Exact: the same as loading all LoRAs together, each at its weight.",
        is_exact=True,
    ),
    Method(
        "ties",
        "TIES",
        "Yadav et al. 2023, arXiv 2306.01708",
        DENSE,
        "Keeps LoRAs that contradict each other from cancelling out; it averages, so it is weaker than the sum.",
        (DENSITY,),
        MEAN,
        FULL,
    ),
    Method(
        "dare",
        "DARE",
        "Yu et al. 2023, arXiv 2311.03099",
        DENSE,
        "Right on average, but random noise takes the place of what is dropped: keep the density high for images.",
        (DENSITY, SEED),
        SUM,
        FULL,
        symmetric=False,
    ),
    Method(
        "dare-ties",
        "DARE with TIES' election of signs",
        "Yu et al. 2023, arXiv 2311.03099; Yadav et al. 2023, arXiv 2306.01708",
        DENSE,
        "DARE for LoRAs that contradict each other; the same noise, so keep the density high for images.",
        (DENSITY, SEED),
        MEAN,
        FULL,
        symmetric=False,
    ),
    Method(
        "della",
        "DELLA",
        "Deep et al. 2024, arXiv 2406.11617",
        DENSE,
        "As DARE with TIES, with less noise, because large entries are dropped less often; the slowest of these.",
        (DENSITY, SEED),
        MEAN,
        FULL,
        symmetric=False,
    ),
    Method(
        "breadcrumbs",
        "Model Breadcrumbs",
        "Davari and Belilovsky 2023, arXiv 2312.06795",
        DENSE,
        "Drops outliers and small entries without making up for them; for LoRAs that burn images, otherwise too weak.",
        (DENSITY,),
        SUM,
        FULL,
    ),
    Method(
        "knots",
        "KnOTS with TIES",
        "Stoica et al. 2024, arXiv 2410.19735",
        FACTORED,
        "TIES for LoRAs: signs are compared over directions that all share, and the result is of low rank by itself.",
        (DENSITY,),
        MEAN,
    ),
    Method(
        "tsv",
        "Task singular vectors (TSV-M)",
        "Gargiulo et al. 2024, arXiv 2412.00081",
        FACTORED,
        "Turns LoRAs out of each other's way, good for unlike subjects; not for LoRAs that are nearly the same.",
        (ENERGY,),
        MEAN,
    ),
    Method(
        "iso-c",
        "Isotropic merging (Iso-C)",
        "Marczak et al. 2025, arXiv 2502.04959",
        FACTORED,
        "Leads in tables of image classifiers; in image generators it is known to deform what is shown.",
        (ENERGY,),
    ),
    Method(
        "iso-cts",
        "Isotropic merging with own directions (Iso-CTS)",
        "Marczak et al. 2025, arXiv 2502.04959",
        FACTORED,
        "As Iso-C, with room kept for what each LoRA has alone; the same caution holds.",
        (ENERGY,),
    ),
    Method(
        "aligned",
        "Aligned average of factors",
        "",
        FACTORED,
        "Keeps the rank of one LoRA without a cut; good for versions of one LoRA, poor for unlike ones.",
        (),
        MEAN,
        "largest",
        symmetric=False,
    ),
    Method(
        "without",
        "First without the others",
        "",
        FACTORED,
        "Takes out of the first LoRA all directions that the others use; with large others little is left.",
        (ENERGY,),
        PART,
        "first",
        symmetric=False,
        first_is_special=True,
    ),
    Method(
        "shared",
        "What the first shares with the others",
        "",
        FACTORED,
        "Leaves of the first LoRA only what lies in directions that the others use too; often very little.",
        (ENERGY,),
        PART,
        "first",
        symmetric=False,
        first_is_special=True,
    ),
)
METHODS: dict[str, Method] = {method.id: method for method in _ALL}
