"""TransformerLens's names for places in a network, said in ours.

They name the same tensors, with three differences. TransformerLens keeps the heads apart, `[..., heads, width]`; here
neuron `head * width + i` is on one axis. It rewrites the weights when it loads a model (folds norms into the
matrices that follow, centres what is written to the residual), which moves values there but not here. And
what an attention or an MLP adds to the residual is named here by the module that computes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from patchclamp.errors import UnknownName, unknown
from patchclamp.model.site import Site

_PLACE = re.compile(r"^(?:blocks|(encoder|decoder)(?:\.blocks)?)\.([\d*?\[\]!-]+)\.(.+)$")
_EXPERT = re.compile(r"^mlp\.experts\.([^.]+)\.hook_post$")
_GLOB = re.compile(r"[*?\[]")


def unalias(name: str, sites: Mapping[str, Site]) -> str:
    """What a TransformerLens name (`blocks.3.mlp.hook_post`) is called here (`mlp.3`).

    Encoder-decoders have `encoder.3.mlp.hook_post` and `decoder.3.cross_attn.hook_z`. The number may be a glob
    (`blocks.*.mlp.hook_post` is `mlp.*`) where the answer is a site with a name of its own.

    Args:
        name: any name. One without a part `hook_...` is not TransformerLens's and is returned as it is.
        sites: those of the network. The projections of an MLP, and what a block's branches write, are looked up there.

    Raises:
        UnknownName: a TransformerLens name that stands for nothing here; the nearest that does is named.
    """
    if name.startswith("module:") or not any(part.startswith("hook_") for part in name.split(".")):
        return name
    place = _PLACE.match(name)
    if place is None:
        raise _unknown_alias(name, "blocks.0.")
    stack, layer, hook = place.groups()
    prefix = f"{stack}." if stack else ""
    if expert := _EXPERT.match(hook):
        return f"{prefix}expert.{layer}.{expert[1]}"
    if hook == "hook_resid_mid" and any(each.startswith(f"{prefix}cross_attn.") for each in sites):
        raise UnknownName(
            f"{name!r} lies between self-attention and cross-attention, where there is no site; "
            f"{name.removesuffix(hook)}hook_resid_mid_cross, before the MLP, is {prefix}resid_mid.{layer}"
        )
    if hook in _SITES:
        return f"{prefix}{_SITES[hook]}.{layer}"
    if hook not in _MODULES:
        raise _unknown_alias(name, name.removesuffix(hook))
    kind, path = _MODULES[hook]
    wanted = f"{prefix}{kind}.{layer}"
    if _GLOB.search(layer):
        raise UnknownName(f"{name!r} names a module in every layer, and modules are named one by one: give the number")
    site = sites.get(wanted) or _in_the_one_stack(wanted, sites)
    if site is None:
        raise unknown("site", wanted, sites, f"{name!r} is about it.")
    found = path(site, sites)
    if found is None:
        raise UnknownName(f"{name!r} names nothing here: {_why_none(site, hook)}")
    return f"module:{found}"


def _written(site: Site, sites: Mapping[str, Site]) -> str | None:
    """The module that returns what is added to the residual: the output projection, or the norm of that alone."""
    if site.kind == "mlp" and any(each.kind == "expert" and _same_block(each, site) for each in sites.values()):
        return None
    if site.norm is None:
        return site.writes
    middle = next((each for each in sites.values() if each.kind == "resid_mid" and _same_block(each, site)), None)
    # Where blocks normalise sums, the norm returns the residual itself, and then that is the middle.
    return site.norm if middle is not None and middle.tensor == "input" else site.writes


def _same_block(site: Site, other: Site) -> bool:
    return (site.stack, site.layer) == (other.stack, other.layer)


def _before_nonlinearity(site: Site, _sites: Mapping[str, Site]) -> str | None:
    return site.reads.get("gate") or site.reads.get("in")


def _beside_gate(site: Site, _sites: Mapping[str, Site]) -> str | None:
    return site.reads.get("up")


def _in_the_one_stack(wanted: str, sites: Mapping[str, Site]) -> Site | None:
    found = [site for name, site in sites.items() if name.endswith(f".{wanted}")]
    return found[0] if len(found) == 1 else None


def _why_none(site: Site, hook: str) -> str:
    if hook == "hook_mlp_out":
        return f"{site.name} and experts write together; name the module that adds them up, as module:a.b.c"
    if "gate_up" in site.reads:
        return f"gate and up are one fused projection; module:{site.reads['gate_up']} names what it returns"
    if site.reads:
        return f"{site.name} is fed by {', '.join(site.reads.values())}"
    return f"no projection of {site.name} is known"


def _unknown_alias(name: str, prefix: str) -> UnknownName:
    known = [prefix + hook for hook in (*_SITES, *_MODULES, "mlp.experts.0.hook_post")]
    listed = ", ".join([*_SITES, *_MODULES, "mlp.experts.E.hook_post"])
    return unknown("place known by a TransformerLens name", name, known, f"Of a block these are known: {listed}.")


# Name within a block -> kind of site.
_SITES = {
    "mlp.hook_post": "mlp",
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_mid_cross": "resid_mid",
    "hook_resid_post": "resid_post",
    "attn.hook_z": "attn",
    "attn.hook_pattern": "pattern",
    "cross_attn.hook_z": "cross_attn",
    "cross_attn.hook_pattern": "cross_pattern",
}
# Name within a block -> kind of site, and how its description names the module.
_MODULES: dict[str, tuple[str, Callable[[Site, Mapping[str, Site]], str | None]]] = {
    "mlp.hook_pre": ("mlp", _before_nonlinearity),
    "mlp.hook_pre_linear": ("mlp", _beside_gate),
    "hook_mlp_out": ("mlp", _written),
    "hook_attn_out": ("attn", _written),
    "hook_cross_attn_out": ("cross_attn", _written),
}
