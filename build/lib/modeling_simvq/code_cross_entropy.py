"""Cross-entropy over a large vocabulary, without ever holding the logits of all tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .integer_codes import integers

CHUNK_ELEMENTS = 2**24  # of the logits that exist at a time: 64 MiB in float32


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean of ``-log softmax(hidden @ weight.T)[target]``, in natural logarithms.

    Tokens are taken in chunks, and a chunk's share of the gradients is computed at once, while its logits are
    there: each logit is computed once, where checkpointing would compute it twice. What stays until the
    backward pass has the sizes of the two inputs. Losses and sums are in float32 (float64 for float64 inputs);
    under autocast the products are in autocast's type.

    Args:
        hidden: (N, d) floating point, N >= 1.
        weight: (V, d) floating point.
        targets: (N,) integers of any type in [0, V).

    Returns:
        float32 scalar (float64 for float64 inputs). It goes backward once.
    """
    targets = integers("targets", targets, hidden.device)
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, wanted)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, wanted):
        device = hidden.device.type
        dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        )
        precise = torch.promote_types(dtype, torch.float32)
        total = torch.zeros((), dtype=precise, device=hidden.device)
        if wanted:
            grad_hidden = torch.empty_like(hidden)
            grad_weight = torch.zeros_like(
                weight, dtype=torch.promote_types(weight.dtype, torch.float32)
            )
        rows = max(1, CHUNK_ELEMENTS // len(weight))
        with torch.autocast(device, enabled=False):
            table = weight.to(dtype)
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                states, wished = hidden[part].to(dtype), targets[part, None]
                logits = F.linear(states, table).to(precise)
                normalizer = logits.logsumexp(dim=1, keepdim=True)
                total += (normalizer - logits.gather(1, wished)).sum()
                if not wanted:
                    continue
                # softmax minus one-hot, in the memory of the logits
                grad = logits.sub_(normalizer).exp_()
                grad.scatter_add_(1, wished, grad.new_full(wished.shape, -1.0))
                grad = grad.to(dtype)  # the mean comes later: in float16 it would lose small values
                grad_hidden[part] = grad @ table
                if grad_weight.dtype == dtype:
                    grad_weight.addmm_(grad.T, states)
                else:
                    grad_weight += grad.T @ states
        if wanted:
            ctx.tokens = len(hidden)
            ctx.gradients = grad_hidden, grad_weight.to(weight.dtype)
        return total / len(hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if ctx.gradients is None:
            raise RuntimeError("chunked_cross_entropy goes backward only once")
        # Scaled in place and given away: a copy of the table's gradient can be a gigabyte.
        grad_hidden, grad_weight = ctx.gradients
        ctx.gradients, scale = None, grad / ctx.tokens
        return grad_hidden.mul_(scale), grad_weight.mul_(scale), None, None
