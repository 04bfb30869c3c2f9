"""PEFT's `target_parameters`: matrices that stand in a parameter of their own, such as experts'; by name, in PEFT's
folders, and what is said where they are left out.
"""

import difflib
import re
from collections import defaultdict
from collections.abc import Sequence

from spectune.deltas.site import ParameterSite
from spectune.errors import ConfigError, some
from spectune.families import Family, Linear, Matrix

#: the word that names all experts of a base, as "all-linear" names all linears
ALL_EXPERTS = "all-experts"
#: words that say nothing of what a module is
_PLAIN_WORDS = frozenset({"", "proj", "linear", "weight", "layers", "model", "mlp"})
#: what experts' linears are called in older checkpoints
_ONCE = frozenset({"w1", "w2", "w3", "expert"})
#: what PEFT takes for experts, wherever it stands in a mixture of them
_TAKEN_FOR_EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


def parameters_named(family: Family, wanted: str | Sequence[str]) -> tuple[list[Linear], list[Matrix]]:
    """What `target_parameters` names, in the model's order: linears, by their weight, and other matrices.

    Args:
        wanted: `"all-experts"`, or a list of whole names or their ends (`["experts.down_proj"]`).

    Raises:
        ConfigError: a name that matches nothing, with the nearest; "all-experts" for a base without such experts.
    """
    if wanted == ALL_EXPERTS:
        if not family.experts:
            raise ConfigError(
                f"target_parameters: this {family.model_type} model has no experts in parameters of their own: leave "
                "it out. Experts that are linears are among target_modules."
            )
        return [], list(family.experts)
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    linears = [t for t in family.linears if any(_ends(_weight(t), name) for name in names)]
    matrices = [matrix for matrix in family.matrices if any(_ends(matrix.where, name) for name in names)]
    if linears and family.conv1d:
        raise ConfigError(
            f"target_parameters names weights of linears that stand transposed in a {family.model_type} model "
            f"({some([t.path for t in linears])}): name them in target_modules"
        )
    found = [*map(_weight, linears), *(matrix.where for matrix in matrices)]
    missing = [name for name in names if not any(_ends(where, name) for where in found)]
    if missing:
        known = sorted(
            {_short(where) for where in (*map(_weight, family.linears), *(m.where for m in family.matrices))}
        )
        near = {name: difflib.get_close_matches(name, known, n=1, cutoff=0) for name in missing}
        raise ConfigError(
            "\n".join(
                f"target_parameters: {name!r} matches no matrix in the layers of this {family.model_type} model"
                + (f"; the nearest is {near[name][0]!r}" if near[name] else "")
                for name in missing
            )
            + f"\nIts experts are: {', '.join(_short_names(family.experts)) or 'none'}"
        )
    return linears, matrices


def parameters_known(family: Family, wanted: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Those of the names that match something in this base."""
    if isinstance(wanted, str):
        return wanted
    where = [*map(_weight, family.linears), *(matrix.where for matrix in family.matrices)]
    return tuple(name for name in wanted if any(_ends(one, name) for one in where))


def expert_words(family: Family, names: str | Sequence[str]) -> str | None:
    """What to say where `target_modules` names a parameter that is no linear: experts, by today's names or those of the
    linears that they once were (`gate_proj`, `w1`), or a router. None where it does not."""
    given = [names] if isinstance(names, str) else list(names)
    told = [m for m in family.matrices if any(_ends(m.path, name) or _ends(m.where, name) for name in given)]
    words = {word for m in family.experts for word in _words(f"{m.path.rpartition('.')[2]}.{m.name}")}
    if not told and _words(" ".join(given)) & (words | _ONCE):
        told = list(family.experts)
    if not told:
        return None
    who = "its experts are" if all(matrix.experts for matrix in told) else "these are"
    return f"{who} parameters and no linears; name them in target_parameters = {_short_names(told)}"


def experts_left_out(family: Family, taken: Sequence[Matrix]) -> str | None:
    """A sentence on weights that no linear holds, where `taken` leaves experts out, or more than half of all; else
    None."""
    left = [matrix for matrix in family.matrices if matrix not in taken]
    everything = sum(m.size for m in family.matrices) + sum(t.in_features * t.out_features for t in family.linears)
    experts = [matrix for matrix in left if matrix.experts]
    share = sum(matrix.size for matrix in left) / max(1, everything)
    if not experts and share <= 0.5:
        return None
    told = experts or left
    setting = repr(ALL_EXPERTS) if experts and not taken else str(_short_names(told))
    what = "experts in parameters of their own" if experts else "parameters that are no linears"
    one = told[0]
    return (
        f"{share:.0%} of the weights in this {family.model_type} model's layers are {what} ({one.where} "
        f"{list(one.shape)} is the first of {len(told)}), which target_modules does not reach: they stay as they are. "
        f"To train them too: LoRA(target_parameters={setting})"
        + (
            " (vLLM loads an adapter of experts only with all of a layer's)"
            if {m.path for m in taken if m.experts}
            else ""
        )
    )


def peft_keys(sites: Sequence[ParameterSite]) -> dict[str, str]:
    """Where PEFT keeps the weights at each site's parameter, by the site's path. It wraps a module once for each of its
    parameters: the last one stands outside, and each wrapper calls what is in it `base_layer`."""
    held = defaultdict(list)
    for site in sites:
        held[site.host].append(site)
    return {
        site.path: host + ".base_layer" * (len(together) - 1 - number)
        for host, together in held.items()
        for number, site in enumerate(together)
    }


def told_apart(family: Family, linears: Sequence[Linear]) -> tuple[list[Linear], list[Linear]]:
    """Those of the linears that an adapter for PEFT can name in `target_modules`, and those that it has to name in
    `target_parameters` by their weight, which is the same change in the same tensors.

    On many mixtures PEFT takes the names that experts' linears once had for experts (`peft.utils.
    transformers_weight_conversion`), shared experts' and dense layers' linears of that name with them."""
    mistaken = [t for t in linears if family.experts and t.path.rpartition(".")[2] in _TAKEN_FOR_EXPERTS]
    return [t for t in linears if t not in mistaken], mistaken


def _ends(where: str, name: str) -> bool:
    return f".{where}".endswith(f".{name}")


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", name.lower())) - _PLAIN_WORDS


def _short_names(matrices: Sequence[Matrix]) -> list[str]:
    return sorted({_short(matrix.where) for matrix in matrices})


def _short(where: str) -> str:
    """The last two parts of a name."""
    return ".".join(where.split(".")[-2:])


def _weight(linear: Linear) -> str:
    return f"{linear.path}.weight"
