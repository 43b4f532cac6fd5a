"""Code model: transformers' Llama over codes, its loss, and the step that ``generate`` calls.

Sequences begin with a start token; modeling_simvq_generation.py has those of images and of audio.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaModel, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .code_prediction import FactorizedCodes, make_codes
from .configuration_simvq_generation import SimVQGenerationConfig
from .delayed_codes import NO_CODE, DelayedCodes, delay, ids_of_rows, undelay
from .generation_options import FIXED, number, seeded, whole_number
from .hooked_weights import running_device
from .integer_codes import integers, outside
from .verified_download import VerifiedDownload


@dataclass
class CodeModelOutput(CausalLMOutputWithPast):
    """Output of both code models.

    Attributes:
        loss, logits, past_key_values: as of CausalLMOutputWithPast.
        level_losses: (Q,), the mean cross-entropy of each quantizer's codes, whose mean is the loss; None with
            one code a position.
    """

    level_losses: torch.FloatTensor | None = None


class SimVQGenerationModel(VerifiedDownload, PreTrainedModel, GenerationMixin):
    """Base of both code models: the transformer, its loss, and the step that ``generate`` calls."""

    config_class = SimVQGenerationConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # forward has keyword arguments, for generate, but none for the loss: transformers' Trainer must know.
    accepts_loss_kwargs = False

    def __init__(self, config: SimVQGenerationConfig):
        super().__init__(config)
        self.model = LlamaModel(config.llama_config())
        several = config.num_quantizers > 1
        self.model.embed_tokens = DelayedCodes(config) if several else make_codes(config)
        self.post_init()

    @property
    def codes(self) -> nn.Module:
        """The embedding and the prediction of codes: PlainCodes, FactorizedCodes or DelayedCodes."""
        return self.model.embed_tokens

    @can_return_tuple
    def step(
        self,
        input_ids: Tensor,
        logits_to_keep: int = 1,
        code_spans: Tensor | None = None,
        **kwargs,
    ) -> CodeModelOutput:
        """Compute the logits of the codes that follow the tokens, for ``generate``.

        Args:
            input_ids: (B, n) start tokens and codes, as start_tokens and forward arrange them; (B * Q, n) with
                Q codes a position, level by level for each sample, delayed.
            logits_to_keep: positions from the end whose logits are wanted; 0 for all.
            code_spans: (B * Q, 2), see ids_of_rows; by default all sequences begin with the start token.
            kwargs: attention_mask, position_ids, past_key_values, use_cache, as of LlamaModel.
        """
        ids, levels = self._integers("input_ids", input_ids), self.config.num_quantizers
        if levels > 1:
            past = kwargs.get("past_key_values")
            columns = torch.arange(ids.shape[1], device=ids.device)
            columns = columns + (0 if past is None else past.get_seq_length())
            ids = ids_of_rows(ids, levels, columns, code_spans, self.config.codes_of_all)
            for name in ("attention_mask", "position_ids"):  # alike in all levels of a sample
                if kwargs.get(name) is not None:
                    kwargs[name] = kwargs[name][::levels]
        output = self.model(input_ids=ids, **kwargs)
        logits = self.codes.logits(output.last_hidden_state[:, -logits_to_keep:])
        if levels > 1:
            logits = logits.flatten(0, 1)
        return CodeModelOutput(logits=logits, past_key_values=output.past_key_values)

    def arrange_codes(self, codebook: Tensor | list[Tensor]) -> None:
        """Give similar codes the same first factor, before training with config.code_factors.

        Args:
            codebook: (K, d), ``tokenizer.quantizer.codebook()``; of several quantizers a list, one of each.
                Without factors there is nothing to do.
        """
        if isinstance(self.codes, (FactorizedCodes, DelayedCodes)):
            self.codes.arrange(codebook)

    def _continue(
        self,
        tokens: Tensor,
        length: int,
        temperature: float,
        top_k: int,
        top_p: float,
        generator: torch.Generator | None,
        **kwargs,
    ) -> Tensor:
        """Tokens (B, n), and the codes that follow, (B', n + length), by ``generate``.

        With Q codes a position both have Q rows for each sample, and `length` counts steps.
        """
        levels, beams = self.config.num_quantizers, kwargs.get("num_beams", 1)
        if levels > 1 and beams > 1:
            raise ValueError(
                f"num_beams = {beams} does not go with {levels} codes a position, whose beams would part: "
                "sample, or set it to 1"
            )
        if not number("temperature", temperature) > 0:
            raise ValueError(f"temperature must be above 0, got {temperature} (or do_sample=False)")
        if not 0 < number("top_p", top_p) <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
        settings = {
            "temperature": float(temperature),
            "top_k": whole_number("top_k", top_k, low=0),
            "top_p": float(top_p),
        }
        if kwargs.setdefault("do_sample", True):
            kwargs |= settings
        with seeded(generator, running_device(self)):
            return self.generate(tokens, max_new_tokens=length, **FIXED, **kwargs)

    def _learn(
        self, starts: Tensor, codes: Tensor, mask: Tensor | None, return_logits: bool
    ) -> CodeModelOutput:
        """Loss of codes (B, n), or (B, Q, n), after start tokens (B, 1), where the mask (B, n) is true."""
        self._check_codes(codes)
        if self.config.num_quantizers > 1:
            return self._learn_levels(starts, codes, mask, return_logits)
        inputs = torch.cat([starts, codes[:, :-1]], dim=1)
        hidden = self.model(input_ids=inputs, use_cache=False).last_hidden_state
        if mask is None:
            loss = self.codes.loss(hidden.flatten(0, 1), codes.flatten())
        else:  # padding is on the right: no code sees it, and none is predicted there
            real = mask.flatten().nonzero()[:, 0]  # waits once; each use of a mask would
            loss = self.codes.loss(hidden.flatten(0, 1)[real], codes.flatten()[real])
        logits = self.codes.logits(hidden) if return_logits else None
        return CodeModelOutput(loss=loss, logits=logits)

    def _learn_levels(
        self, starts: Tensor, codes: Tensor, mask: Tensor | None, return_logits: bool
    ) -> CodeModelOutput:
        """Loss of codes (B, Q, n), as _learn."""
        first = starts[:, None].repeat(1, codes.shape[1], 1)
        first[:, 1:] = NO_CODE
        inputs = torch.cat([first, delay(codes, mask)[..., :-1]], dim=2)
        hidden = self.model(input_ids=inputs, use_cache=False).last_hidden_state
        losses = self.codes.loss(hidden, codes, mask)
        logits = undelay(self.codes.logits(hidden)) if return_logits else None
        return CodeModelOutput(loss=losses.mean(), logits=logits, level_losses=losses)

    def _integers(self, name: str, values) -> Tensor:
        # Tensors stay where they are, and a replica of DataParallel does not know its own device.
        return integers(name, values, None if isinstance(values, Tensor) else running_device(self))

    def _check_codes(self, codes: Tensor) -> None:
        # On a GPU in training this would wait for the device, which itself refuses such codes in the loss.
        wrong = None
        if not (self.training and codes.is_cuda):
            wrong = outside(codes, self.config.codebook_size)
        if wrong is not None:
            raise ValueError(
                f"codes must lie in [0, codebook_size = {self.config.codebook_size}), found {wrong}"
            )
