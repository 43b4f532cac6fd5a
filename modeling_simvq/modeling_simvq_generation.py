"""Generators: transformers' own Llama over the codes of a SimVQ tokenizer.

A sequence is a start token, which for pictures is the class, and then the codes: those of a picture in raster
order, those of a clip in time. Only codes can be predicted, so nothing else can be sampled.
"""

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaModel, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from .code_prediction import make_codes
from .configuration_simvq_generation import (
    SimVQAudioGenerationConfig,
    SimVQGenerationConfig,
    SimVQImageGenerationConfig,
)
from .verified_download import VerifiedDownload


class SimVQGenerationModel(VerifiedDownload, PreTrainedModel, GenerationMixin):
    """What both generators share: the transformer, its loss, and the step that ``generate`` calls."""

    config_class = SimVQGenerationConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: SimVQGenerationConfig):
        super().__init__(config)
        self.model = LlamaModel(config.llama_config())
        self.model.embed_tokens = make_codes(config)
        self.post_init()

    @property
    def codes(self) -> nn.Module:
        """The embedding and the prediction of codes, PlainCodes or FactorizedCodes."""
        return self.model.embed_tokens

    def step(
        self,
        input_ids: Tensor,
        logits_to_keep: int = 1,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """What ``generate`` calls: tokens to the logits of the codes that follow.

        Args:
            input_ids: (B, n) start tokens and codes, as start_tokens and forward arrange them.
            logits_to_keep: positions from the end whose logits are wanted; 0 for all.
            kwargs: attention_mask, position_ids, past_key_values, use_cache, as of LlamaModel.
        """
        output = self.model(input_ids=input_ids, **kwargs)
        logits = self.codes.logits(output.last_hidden_state[:, -logits_to_keep:])
        result = CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)
        return self._returned(result, return_dict)

    def _learn(
        self, starts: Tensor, codes: Tensor, mask: Tensor | None, return_logits: bool
    ) -> CausalLMOutputWithPast:
        """Loss of codes (B, n) after start tokens (B, 1), where the mask (B, n) is true."""
        self._check_codes(codes)
        inputs = torch.cat([starts, codes[:, :-1]], dim=1)
        hidden = self.model(input_ids=inputs, use_cache=False).last_hidden_state
        if mask is None:
            loss = self.codes.loss(hidden.flatten(0, 1), codes.flatten())
        else:  # padding is on the right: no code sees it, and none is predicted there
            loss = self.codes.loss(hidden[mask], codes[mask])
        logits = self.codes.logits(hidden) if return_logits else None
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def _check_codes(self, codes: Tensor) -> None:
        if codes.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"codes must be int64, got {codes.dtype}")
        # On a GPU in training this would wait for the device, which itself refuses such codes in the loss.
        if codes.numel() and not (self.training and codes.is_cuda):
            low, high = int(codes.min()), int(codes.max())
            if low < 0 or high >= self.config.codebook_size:
                raise ValueError(
                    f"codes must lie in [0, codebook_size = {self.config.codebook_size}), "
                    f"found {low if low < 0 else high}"
                )

    def _returned(self, output: ModelOutput, return_dict: bool | None) -> ModelOutput | tuple:
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()


class SimVQForImageGeneration(SimVQGenerationModel):
    """Classes to pictures, as codes in raster order.

    Token ids: codes [0, K), then the classes and the null class.
    """

    config_class = SimVQImageGenerationConfig
    main_input_name = "input_ids"

    def forward(
        self,
        input_ids: Tensor | None = None,
        image_codes: Tensor | None = None,
        class_labels: Tensor | None = None,
        return_logits: bool = False,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """The loss of pictures.

        Args:
            image_codes: (B, h, w) or (B, h * w) integers in [0, codebook_size).
            class_labels: (B,) integers in [0, num_classes], of which the last is the null class; None for
                the null class.
            return_logits: whether to return the logits (B, h * w, K) too, which may be large.
            input_ids, kwargs: what ``generate`` passes in place of the others, see ``step``.

        Returns:
            Output with ``loss``, the mean cross-entropy of a code: float32 scalar, natural logarithm.

        Raises:
            ValueError: if a shape, type or value is impossible.
        """
        if input_ids is not None:
            return self.step(input_ids, return_dict=return_dict, **kwargs)
        height, width = self.config.grid_size
        if image_codes is None:
            raise ValueError("the model takes image_codes (B, h, w), and class_labels (B,) if any")
        shape = tuple(image_codes.shape)
        if not shape or shape[0] == 0 or shape[1:] not in ((height, width), (height * width,)):
            raise ValueError(
                f"image_codes must be (B, {height}, {width}) or (B, {height * width}), got shape {shape}"
            )
        starts = self.start_tokens(class_labels, len(image_codes), image_codes.device)
        output = self._learn(starts, image_codes.flatten(1), None, return_logits)
        return self._returned(output, return_dict)

    def start_tokens(self, class_labels: Tensor | None, batch: int, device=None) -> Tensor:
        """Class labels (B,), or None for the null class, to token ids (B, 1)."""
        null = self.config.null_class
        if class_labels is None:
            class_labels = torch.full((batch,), null, device=device)
        if class_labels.shape != (batch,) or class_labels.is_floating_point():
            raise ValueError(
                f"class_labels must be integers ({batch},), got {class_labels.dtype} of shape "
                f"{tuple(class_labels.shape)}"
            )
        if not (self.training and class_labels.is_cuda):
            low, high = int(class_labels.min()), int(class_labels.max())
            if low < 0 or high > null:
                raise ValueError(
                    f"class_labels must lie in [0, {null}], where {null} is the null class, "
                    f"found {low if low < 0 else high}"
                )
        return self.config.codebook_size + class_labels[:, None]


class SimVQForAudioGeneration(SimVQGenerationModel):
    """Sound as codes in time, from nothing or after a prompt.

    Token ids: codes [0, K), then the start. There is no end token: clips of training are mostly cut from longer
    ones, so how long to go on is the caller's choice.
    """

    config_class = SimVQAudioGenerationConfig
    main_input_name = "input_ids"

    def forward(
        self,
        input_ids: Tensor | None = None,
        audio_codes: Tensor | None = None,
        audio_codes_mask: Tensor | None = None,
        return_logits: bool = False,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """The loss of clips.

        Args:
            audio_codes: (B, 1, T) integers in [0, codebook_size), T up to config.max_codes.
            audio_codes_mask: (B, 1, T), 1 or true for codes, then 0 for padding, which is ignored.
            return_logits: whether to return the logits (B, T, K) too, which may be large.
            input_ids, kwargs: what ``generate`` passes in place of the others, see ``step``.

        Returns:
            Output with ``loss``, the mean cross-entropy of a code: float32 scalar, natural logarithm.

        Raises:
            ValueError: if a shape, type or value is impossible.
        """
        if input_ids is not None:
            return self.step(input_ids, return_dict=return_dict, **kwargs)
        if audio_codes is None:
            raise ValueError("the model takes audio_codes (B, 1, T), and audio_codes_mask if any")
        mask = self._clips(audio_codes, audio_codes_mask)
        starts = torch.full_like(audio_codes[:, 0, :1], self.config.codebook_size)
        output = self._learn(starts, audio_codes[:, 0], mask, return_logits)
        return self._returned(output, return_dict)

    def _clips(self, audio_codes: Tensor, audio_codes_mask: Tensor | None) -> Tensor | None:
        """Check codes; their mask as (B, T) bool, or None if there is no padding."""
        shape = tuple(audio_codes.shape)
        if len(shape) != 3 or shape[1] != 1 or 0 in shape:
            raise ValueError(f"audio_codes must be (B, 1, T) and not empty, got shape {shape}")
        if shape[2] > self.config.max_codes:
            raise ValueError(
                f"audio_codes has {shape[2]} codes in time, more than max_codes = {self.config.max_codes}"
            )
        if audio_codes_mask is None:
            return None
        if audio_codes_mask.shape != shape:
            raise ValueError(
                f"audio_codes_mask must be (B, 1, T) = {shape}, got {tuple(audio_codes_mask.shape)}"
            )
        mask = audio_codes_mask[:, 0].bool()
        if not mask[:, 0].all() or (mask[:, 1:] & ~mask[:, :-1]).any():
            raise ValueError(
                "audio_codes_mask must be 1 for codes and then 0, with at least one code in every clip: "
                "pad on the right"
            )
        return None if mask.all() else mask
