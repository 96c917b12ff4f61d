"""Machine-specific forms of weights: built at their first use, rebuilt when the weight changes, never saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

# A form cannot live on the module: under torch.compile an operator is handed the module's tensors and nothing else.
_forms: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def packed(weight: Tensor, build: Callable[[], Any], kind: int = 0) -> Any:
    """`build()` for this weight, kept as long as the weight lives, stays where it is and is not written to.

    One form is kept; another `kind` is another form.
    """
    # Inference tensors have no version counter.
    stamp = (weight.data_ptr(), kind, None if weight.is_inference() else weight._version)
    found = _forms.get(weight)
    if found is None or found[0] != stamp:
        found = _forms[weight] = (stamp, build())
    return found[1]


def held(weights: Iterable[Tensor]) -> int:
    """Bytes of the forms that are kept of these weights."""
    forms = [_forms[weight][1] for weight in weights if weight in _forms]
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(forms))
