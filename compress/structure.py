"""Finds attention by structure: children named by role, verified by shapes; what does not add up is refused."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace

from torch import nn

from compress.layout import decide
from compress.refusals import refusal
from compress.roles import (
    ADDED,
    GROUPS,
    HEAD_DIMS,
    HEADS,
    KV_HEADS,
    is_linear,
    is_projection,
    join,
    matches,
    number,
    parent_of,
    width_in,
    width_out,
)


@dataclass(frozen=True)
class Attention:
    """One attention module: where its heads are and whether they can be removed exactly."""

    path: str  # module that owns the heads
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    layout: str  # "separate" | "q_kv" | "fused" | "interleaved"
    q: str | None = None
    k: str | None = None
    v: str | None = None
    kv: str | None = None
    qkv: str | None = None
    o: str | None = None
    added: dict[str, str] = field(default_factory=dict)  # second stream of a joint attention: roles q, k, v, o
    cross: bool = False  # keys come from another sequence
    causal: bool = False  # causal self-attention
    refusal: str = ""  # why heads cannot be removed exactly

    def projections(self) -> dict[str, str]:
        """The paths of all projections by role; those of the second stream as `added.q` and so on."""
        own = {role: path for role in ("q", "k", "v", "kv", "qkv", "o") if (path := getattr(self, role))}
        return own | {f"added.{role}": path for role, path in self.added.items()}


def find_attentions(model: nn.Module) -> list[Attention]:
    """Every attention module of the model, in the order of the module tree."""
    modules = dict(model.named_modules())
    layouts: dict[tuple, str] = {}  # the forward of a class is watched once for each shape
    found = []
    for path, module in modules.items():
        if isinstance(module, nn.MultiheadAttention):
            found.append(packed(path, module))
        elif attention := read(path, module, modules, layouts):
            found.append(attention)
    return found


def packed(path: str, module: nn.MultiheadAttention) -> Attention:
    """torch's own attention, whose forward insists on embed_dim == heads * head_dim."""
    return Attention(
        path, module.num_heads, module.num_heads, module.head_dim, module.head_dim, "fused", o=join(path, "out_proj"),
        cross=not module._qkv_same_embed_dim, refusal="nn.MultiheadAttention cannot have fewer heads than its width",
    )  # fmt: skip


def children(module: nn.Module) -> dict[str, nn.Module]:
    """The projections of a module: linear children, also as the first of a short list (`to_out.0`)."""
    found = {}
    for name, child in module.named_children():
        if is_projection(child):
            found[name] = child
        elif isinstance(child, (nn.Sequential, nn.ModuleList)) and len(child) and is_projection(child[0]):
            found[name + ".0"] = child[0]
    return found


def roles_of(linears: dict[str, nn.Module]) -> dict[str, str] | None:
    """Which child plays which role, or None where this is no attention."""
    role = {r: next((name for name in linears if matches(r, name)), None) for r in ("q", "k", "v", "kv", "qkv")}
    if role["q"] and role["k"] and role["v"]:
        return {r: role[r] for r in "qkv"}
    if role["q"] and role["kv"]:
        return {"q": role["q"], "kv": role["kv"]}
    if role["qkv"] and role["q"]:  # GPT-2's cross attention: c_attn holds keys and values only
        return {"q": role["q"], "kv": role["qkv"]}
    return {"qkv": role["qkv"]} if role["qkv"] else None


def read(path: str, module: nn.Module, modules: dict[str, nn.Module], layouts: dict) -> Attention | None:
    """The attention that this module computes, if it does."""
    linears = children(module)
    roles = roles_of(linears)
    if roles is None:
        return None
    widths = {role: width_out(linears[name]) for role, name in roles.items()}
    sizes = solve_latent(module, roles, widths) or solve(module, widths)
    if sizes is None:
        if "qkv" in roles:  # the same names are used by state-space and convolution blocks
            return None
        sizes = (0, 0, 0, 0)
    heads, groups, dim, value_dim = sizes
    paths = {role: join(path, name) for role, name in roles.items()}
    attention = Attention(path, heads, groups, dim, value_dim, "separate", **paths)
    attention = replace(
        attention,
        o=find_output(attention, modules),
        added={role: join(path, name) for role, name in ADDED.items() if name in linears},
        cross=is_cross(path, module, modules, paths),
    )
    attention = replace(attention, causal=not attention.cross and is_causal(path, module, modules))
    layout, trouble = find_layout(attention, modules, layouts)
    return replace(attention, layout=layout, refusal=trouble or refusal(attention, modules))


def solve(module: nn.Module, widths: dict[str, int]) -> tuple[int, int, int, int] | None:
    """heads, kv_heads, head_dim and value_dim that explain the widths of the projections."""
    config = getattr(module, "config", None)
    dim, groups, repeat = number(module, HEAD_DIMS), number(module, KV_HEADS), number(module, GROUPS)
    candidates = [number(module, HEADS)]
    if repeat and dim and "k" in widths and widths["k"] % dim == 0:
        candidates.append(widths["k"] // dim * repeat)
    if dim and "q" in widths:
        candidates.append(widths["q"] // dim)
    candidates.append(number(config, HEADS))
    for heads in filter(None, candidates):
        if "qkv" in widths:
            answer = solve_fused(widths["qkv"], heads, groups or number(config, KV_HEADS), dim)
        elif "kv" in widths:
            answer = solve_pair(widths["q"], widths["kv"], heads, groups)
        else:
            answer = solve_separate(widths, heads, dim)
        if answer:
            return answer
    return None


def solve_separate(widths: dict[str, int], heads: int, dim: int | None) -> tuple[int, int, int, int] | None:
    """The same for three projections, of which the keys' and values' may hold fewer heads."""
    gated = dim and widths["q"] == 2 * heads * dim and widths["k"] % dim == 0  # the query projection holds a gate too
    if widths["q"] % heads:
        return None
    dim = dim if gated else widths["q"] // heads
    groups = widths["k"] // dim
    if widths["k"] % dim or not groups or heads % groups or widths["v"] % groups:
        return None
    return heads, groups, dim, widths["v"] // groups


def solve_pair(query: int, pair: int, heads: int, groups: int | None) -> tuple[int, int, int, int] | None:
    """The same for a projection of queries and one of keys and values."""
    dim = query // heads
    groups = groups or (pair // (2 * dim) if dim and pair % (2 * dim) == 0 else heads)
    if query % heads or pair % groups or heads % groups or pair // groups <= dim:
        return None
    return heads, groups, dim, pair // groups - dim


def solve_latent(module: nn.Module, roles: dict, widths: dict) -> tuple[int, int, int, int] | None:
    """Latent attention (DeepSeek): `kv_b_proj` expands one latent, each head to its own key and value width."""
    heads, value_dim = number(module, HEADS), number(module, ("v_head_dim",))
    if not roles.get("kv", "").startswith("kv_b") or not heads or not value_dim or widths["q"] % heads:
        return None
    return heads, heads, widths["q"] // heads, value_dim


def solve_fused(width: int, heads: int, groups: int | None, dim: int | None) -> tuple[int, int, int, int] | None:
    """The same for one projection of all three."""
    for count in (heads, groups, 1):
        size = width // (heads + 2 * count) if count and width % (heads + 2 * count) == 0 else 0
        if size and heads % count == 0 and dim in (None, size):
            return heads, count, size, size
    return None


def find_output(attention: Attention, modules: dict[str, nn.Module]) -> str | None:
    """The output projection: an own child, else a neighbour (BERT's `output.dense`), else a parallel block's."""
    width = attention.heads * attention.value_dim
    used = set(attention.projections().values())
    own = children(modules[attention.path])
    for name, child in own.items():
        if join(attention.path, name) not in used and matches("o", name) and width_in(child) == width:
            return join(attention.path, name)
    above = parent_of(attention.path)
    if not attention.path:
        return None
    near = {join(above, name): child for name, child in children(modules[above]).items()}
    for name, child in modules[above].named_children():
        if name in ("output", "attention_output", "out", "attn_out"):
            near |= {join(above, f"{name}.{inner}"): linear for inner, linear in children(child).items()}
    for path, child in near.items():
        if path not in used and matches("o", path) and width_in(child) == width:
            return path
    for path, child in near.items():  # Flux: proj_out(cat(attention, mlp))
        rest = width_in(child) - width
        beside = {width_out(other) for key, other in near.items() if key != path}
        if matches("o", path) and width and rest > 0 and beside & {rest, 2 * rest}:
            return path
    return None


def find_layout(attention: Attention, modules: dict[str, nn.Module], layouts: dict) -> tuple[str, str]:
    """The layout, and why it is not known where that is so."""
    fused = attention.qkv or attention.kv
    if not fused:
        return "separate", ""
    fallback = "fused" if attention.qkv else "q_kv"
    module, linear = modules[attention.path], modules[fused]
    if attention.kv and fused.rpartition(".")[2].startswith("kv_b"):
        return fallback, "keys and values of all heads come from one latent"
    if not is_linear(linear) or not attention.heads:
        return fallback, ""
    sizes = (attention.kv_heads, attention.head_dim, attention.value_dim)
    key = (type(module), width_out(linear), attention.heads, *sizes)
    if key not in layouts:
        queries = attention.heads if attention.qkv else 0
        layouts[key] = decide(module, linear, queries, *sizes)
    if layouts[key] == "fused":
        return fallback, ""
    if layouts[key] and attention.qkv:
        return layouts[key], ""
    return fallback, f"the forward does not show how {fused} is split into heads"


def is_cross(path: str, module: nn.Module, modules: dict[str, nn.Module], paths: dict[str, str]) -> bool:
    """Do the keys come from another sequence: by flag, by name, or because they are read from another width?"""
    for flag in ("is_cross_attention", "is_cross_attn"):
        if isinstance(getattr(module, flag, None), bool):
            return getattr(module, flag)
    keys = paths.get("k") or paths.get("kv")
    if keys and width_in(modules[keys]) != width_in(modules[paths["q"]]):
        return True
    words = path.lower().replace("_", "")
    return any(word in words for word in ("cross", "encoderattn", "encdec"))


def is_causal(path: str, module: nn.Module, modules: dict[str, nn.Module]) -> bool:
    """Causal by its own flag, or because the nearest module that makes masks makes causal ones only."""
    if getattr(module, "is_causal", False) is True:
        return True
    while True:
        code = getattr(inspect.unwrap(type(modules[path]).forward), "__code__", None)
        makers = [name for name in code.co_names if name.startswith("create_") and "mask" in name] if code else []
        if makers:
            is_decoder = getattr(module, "is_decoder", False) is True
            return all("causal" in name for name in makers) or (is_decoder and any("causal" in name for name in makers))
        if not path:
            return False
        path = parent_of(path)
