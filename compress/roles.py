"""What a projection is called in the wild, and how wide it is: the only table of names in the toolkit."""

from __future__ import annotations

import re

from torch import nn

BEFORE = r"(?:to_|w_?|linear_|attn_|attention_|in_proj_|proj_|self_|fc_)?"
AFTER = r"(?:_proj|_lin|_linear|_layer|_attn|_projection|_head|_proj_layer|_weights|_b_proj)?"
OUTPUTS = (
    "o|out|wo|o_proj|out_proj|output|output_proj|out_lin|c_proj|proj|projection|dense|o_attn|out_projection|"
    "output_dense|attn_out|final_proj|fc|out_layer|linear_out|resid_proj|proj_out|output_linear|to_out|post|"
    "post_proj|projection_layer"
)
ROLES = {
    "q": re.compile(rf"{BEFORE}(q|query|queries|query_states|q_b|qs){AFTER}", re.I),
    "k": re.compile(rf"{BEFORE}(k|key|keys|ks){AFTER}", re.I),
    "v": re.compile(rf"{BEFORE}(v|value|values|vs){AFTER}", re.I),
    "kv": re.compile(rf"{BEFORE}(kv|key_value|keyvalue|kv_b){AFTER}", re.I),
    "qkv": re.compile(
        r"(?:to_|w|attn_|in_|self_)?(qkv|query_key_value|c_attn|qkvw|att_proj|in_proj|inproj|qkv_mat)"
        r"(?:_proj|_lin|_linear|_layer|_attn)?",
        re.I,
    ),
    "o": re.compile(rf"(?:to_|attn_|self_|linear_)?({OUTPUTS})", re.I),
}
ADDED = {"q": "add_q_proj", "k": "add_k_proj", "v": "add_v_proj", "o": "to_add_out"}  # diffusers' second stream

HEADS = (
    "num_heads", "num_attention_heads", "n_heads", "heads", "n_head", "nhead", "num_q_heads", "attn_heads",
    "attention_heads", "n_head_q", "num_query_heads", "num_head", "num_local_heads",
)  # fmt: skip
KV_HEADS = (
    "num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads", "num_heads_kv", "n_head_kv",
    "num_local_key_value_heads",
)  # fmt: skip
GROUPS = ("num_key_value_groups", "num_kv_groups", "n_rep")
HEAD_DIMS = (
    "head_dim", "attention_head_size", "head_size", "dim_head", "key_value_proj_dim", "d_kv", "dim_per_head",
    "size_per_head", "attention_head_dim", "hidden_size_per_attention_head", "d_head",
)  # fmt: skip
# Widths of all heads together; `hidden_size` is left out because it names the width of the input.
TOTALS = (
    "all_head_size", "inner_dim", "inner_kv_dim", "embed_dim", "split_size", "attn_head_size", "projection_size",
    "all_head_dim", "dim", "attn_dim", "num_q_dim",
)  # fmt: skip
QK_NORM = re.compile(r"(?=.*(norm|ln))(.*_|)(q|k|qk|query|key|sub|inner)(_.*|)|(q|k)(norm|ln)", re.I)
TABLE = re.compile(r"relative_position_bias_table|relative_attention_bias|relative_bias")
PER_HEAD = re.compile(r"bias|logit_scale|sink|gate|alibi|slope|head|temperature|rel_pos|gru|dt|lambda", re.I)


def is_conv1d(module: nn.Module) -> bool:
    """Is it transformers' Conv1D, a linear layer with its weight as [in, out]? Told by its sizes `nx` and `nf`."""
    weight = getattr(module, "weight", None)
    return hasattr(module, "nx") and hasattr(module, "nf") and weight.shape == (module.nx, module.nf)


def is_linear(module: nn.Module) -> bool:
    """Is this a linear layer as the libraries write it (nn.Linear, its subclasses, transformers' Conv1D)?"""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_projection(module: nn.Module) -> bool:
    """A linear layer or something that took its place (quantized, low-rank ...)."""
    return is_linear(module) or (hasattr(module, "in_features") and hasattr(module, "out_features"))


def width_in(module: nn.Module) -> int:
    """Input features."""
    return module.weight.shape[0] if is_conv1d(module) else module.in_features


def width_out(module: nn.Module) -> int:
    """Output features."""
    return module.weight.shape[1] if is_conv1d(module) else module.out_features


def number(owner: object, names: tuple[str, ...]) -> int | None:
    """The first of these attributes that holds a positive count."""
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def join(path: str, name: str) -> str:
    """`name` below `path`, where the path of the model itself is empty."""
    return f"{path}.{name}" if path else name


def parent_of(path: str) -> str:
    """The path of the module that holds this one."""
    return path.rpartition(".")[0]


def matches(role: str, name: str) -> bool:
    """Does a child of this name play this role? A numbered child (`to_out.0`) counts by its list's name."""
    name = name.removesuffix(".0").rpartition(".")[2]
    return ROLES[role].fullmatch(name) is not None
