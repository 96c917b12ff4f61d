"""Models whose weights are set by hand, so that it is known what their heads do."""

import torch

from models import of


def inducing(vocabulary=64, positions=128):
    """A GPT-2 of two heads a layer, built by hand: head 1 of layer 0 looks one token back.

    Head 0 of layer 1 looks for what has to be copied, but writes nothing; the other one there writes.
    """
    width = 2 * vocabulary + positions
    model = of("gpt2", "AutoModelForCausalLM", vocab_size=vocabulary, n_embd=2 * width, n_layer=2, n_head=2,
               n_positions=positions, n_inner=8, activation_function="relu", bos_token_id=0)  # fmt: skip
    for parameter in model.parameters():
        parameter.data.zero_()
    token, before, place = torch.arange(vocabulary), vocabulary + torch.arange(vocabulary), 2 * vocabulary
    place = place + torch.arange(positions)
    body = model.transformer
    body.wte.weight.data[torch.arange(vocabulary), token] = 1
    body.wpe.weight.data[torch.arange(positions), place] = 1
    for norm in (block.ln_1 for block in body.h):
        norm.weight.data.fill_(1)
    first, second = (block.attn for block in body.h)
    head = torch.arange(width)
    queries, keys, values = head, 2 * width + head, 4 * width + head  # of head 0; those of head 1 lie a width behind
    first.c_attn.weight.data[place[1:], queries[: positions - 1] + width] = 40
    first.c_attn.weight.data[place[:-1], keys[: positions - 1] + width] = 40
    first.c_attn.weight.data[token, values[:vocabulary] + width] = 1
    first.c_proj.weight.data[width + head[:vocabulary], before] = 1
    second.c_attn.weight.data[token, queries[:vocabulary]] = 40
    second.c_attn.weight.data[before, keys[:vocabulary]] = 40
    second.c_attn.weight.data[token, values[:vocabulary] + width] = 1
    second.c_proj.weight.data[width + head[:vocabulary], before] = 1
    return model
