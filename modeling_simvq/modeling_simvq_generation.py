"""Generators: transformers' own Llama over the codes of a SimVQ tokenizer.

A sequence is a start token, which for images is the class, and then the codes: those of an image in raster
order, those of a clip in time. Only codes can be predicted, so nothing else can be sampled. Of a tokenizer with
several codes a position each step predicts one of every level, in a delay pattern (delayed_codes.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput, can_return_tuple

from .clip_lengths import clip_lengths, mask_of_clips
from .code_model import CodeModelOutput, SimVQGenerationModel
from .configuration_simvq_generation import SimVQAudioGenerationConfig, SimVQImageGenerationConfig
from .delayed_codes import NO_CODE, KnownCodes, delay, undelay
from .generation_options import check_forward, check_options, number, sequences, whole_number
from .hooked_weights import running_device
from .integer_codes import integers, outside


@dataclass
class GeneratedAudioCodes(ModelOutput):
    """Prompts and what was made after them, as SimVQAudioModel.decode takes them.

    Attributes:
        audio_codes: (B, Q, T) int64.
        audio_codes_mask: (B, 1, T) bool, false for padding on the right where prompts were of unequal length.
    """

    audio_codes: torch.LongTensor | None = None
    audio_codes_mask: torch.BoolTensor | None = None


class SimVQForImageGeneration(SimVQGenerationModel):
    """Classes to images, as codes in raster order.

    Token ids: codes [0, K), then the classes and the null class.
    """

    config_class = SimVQImageGenerationConfig
    main_input_name = "input_ids"

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        image_codes: Tensor | None = None,
        class_labels: Tensor | None = None,
        return_logits: bool = False,
        **kwargs,
    ) -> CodeModelOutput:
        """The loss of images.

        Args:
            image_codes: (B, h, w) or (B, h * w) integers of any type in [0, codebook_size); with Q codes a
                position (B, Q, h, w) or (B, Q, h * w).
            class_labels: (B,) integers in [0, num_classes], of which the last is the null class; None for
                the null class.
            return_logits: whether to return the logits (B, h * w, K), or (B, Q, h * w, K), too, which may be
                large.
            input_ids, kwargs: what ``generate`` passes in place of the others, see ``step``.

        Returns:
            Output with ``loss``, the mean cross-entropy of a code: float32 scalar, natural logarithm.

        Raises:
            ValueError: if a shape, type or value is impossible.
        """
        learnt = {"image_codes": image_codes, "class_labels": class_labels}
        check_forward(type(self).__name__, input_ids, learnt, kwargs)
        if input_ids is not None:
            return self.step(input_ids, return_dict=True, **kwargs)
        height, width = self.config.grid_size
        if image_codes is None:
            raise ValueError("the model takes image_codes (B, h, w), and class_labels (B,) if any")
        image_codes = self._integers("image_codes", image_codes)
        shape, levels = tuple(image_codes.shape), self.config.num_quantizers
        several = () if levels == 1 else (levels,)
        wanted = ((*several, height, width), (*several, height * width))
        if not shape or shape[0] == 0 or shape[1:] not in wanted:
            grid, flat = (", ".join(map(str, sizes)) for sizes in wanted)
            raise ValueError(f"image_codes must be (B, {grid}) or (B, {flat}), got shape {shape}")
        starts = self.start_tokens(class_labels, len(image_codes), image_codes.device)
        flattened = image_codes.reshape(len(image_codes), *several, height * width)
        return self._learn(starts, flattened, None, return_logits)

    def generate_images(
        self,
        class_labels: Tensor | None = None,
        num_images: int = 1,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        **kwargs,
    ) -> Tensor:
        """Sample images, by transformers' ``generate``.

        Args:
            class_labels: (B,) integers in [0, num_classes]; None for the null class.
            num_images: images of each label.
            guidance_scale: of classifier-free guidance, ``null + scale * (class - null)`` in log-probabilities:
                1 for none (half the time), 0 for the null class, more for more typical images of the class.
                The model must have been trained with the null class now and then.
            temperature: below 1 for likelier codes, above for more various ones.
            top_k: sample from so many likeliest codes; 0 for all.
            top_p: sample from the likeliest codes that together have this probability.
            generator: gives the seed, and moves on; None for torch's global one (``set_seed``).
            kwargs: of ``generate``: do_sample=False, num_beams, use_cache, logits_processor, streamer, ...; see
                generation_options.PASSED_ON.

        Returns:
            image_codes (B * num_images, h, w) int64, or (B * num_images, Q, h, w), label by label, for
            SimVQImageModel.decode.

        Raises:
            ValueError: naming the argument that is impossible, or that is not passed on.
            TypeError: naming an argument that there is not.
        """
        height, width = self.config.grid_size
        check_options(self.generate_images, kwargs, f"{height} * {width}", "class_labels")
        guided = number("guidance_scale", guidance_scale) != 1
        each = sequences(kwargs, whole_number("num_images", num_images), guided)
        if class_labels is not None:
            class_labels = integers("class_labels", class_labels)
        starts = self.start_tokens(
            class_labels, 1 if class_labels is None else class_labels.numel()
        )
        levels = self.config.num_quantizers
        starts = starts.repeat_interleave(each * levels, dim=0).to(running_device(self))
        if guided:
            nulls = self.start_tokens(None, len(starts)).to(running_device(self))
            kwargs |= {"guidance_scale": float(guidance_scale), "negative_prompt_ids": nulls}
        steps = height * width + levels - 1
        tokens = self._continue(starts, steps, temperature, top_k, top_p, generator, **kwargs)
        codes = undelay(tokens[:, 1:].unflatten(0, (-1, levels))).unflatten(2, (height, width))
        return codes[:, 0] if levels == 1 else codes

    def start_tokens(self, class_labels: Tensor | None, batch: int, device=None) -> Tensor:
        """Class labels (B,), or None for the null class, to token ids (B, 1)."""
        null = self.config.null_class
        if class_labels is None:
            class_labels = torch.full((batch,), null, device=device)
        class_labels = integers("class_labels", class_labels, device).to(device)
        if batch == 0 or class_labels.shape != (batch,):
            raise ValueError(
                f"class_labels must be integers ({batch or 'B'},), got shape {tuple(class_labels.shape)}"
            )
        wrong = None
        if not (self.training and class_labels.is_cuda):
            wrong = outside(class_labels, null + 1)
        if wrong is not None:
            raise ValueError(
                f"class_labels must lie in [0, {null}], where {null} is the null class, found {wrong}"
            )
        return self.config.codebook_size + class_labels[:, None]


class SimVQForAudioGeneration(SimVQGenerationModel):
    """Audio as codes in time, from nothing or after a prompt.

    Token ids: codes [0, K), then the start. There is no end token: clips of training are mostly cut from longer
    ones, so how long to continue is the caller's choice.
    """

    config_class = SimVQAudioGenerationConfig
    main_input_name = "input_ids"

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        audio_codes: Tensor | None = None,
        audio_codes_mask: Tensor | None = None,
        return_logits: bool = False,
        code_spans: Tensor | None = None,
        **kwargs,
    ) -> CodeModelOutput:
        """The loss of clips.

        Args:
            audio_codes: (B, Q, T) integers in [0, codebook_size), T up to config.max_codes.
            audio_codes_mask: (B, 1, T), 1 or true for codes, then 0 for padding, which is ignored.
            return_logits: whether to return the logits (B, T, K), or (B, Q, T, K), too, which may be large.
            input_ids, code_spans, kwargs: what ``generate`` passes in place of the others, see ``step``.

        Returns:
            Output with ``loss``, the mean cross-entropy of a code: float32 scalar, natural logarithm.

        Raises:
            ValueError: if a shape, type or value is impossible.
        """
        learnt = {"audio_codes": audio_codes, "audio_codes_mask": audio_codes_mask}
        kwargs |= {"code_spans": code_spans}
        check_forward(type(self).__name__, input_ids, learnt, kwargs)
        if input_ids is not None:
            return self.step(input_ids, return_dict=True, **kwargs)
        if audio_codes is None:
            levels = self.config.num_quantizers
            raise ValueError(
                f"the model takes audio_codes (B, {levels}, T), and audio_codes_mask if any"
            )
        audio_codes = self._integers("audio_codes", audio_codes)
        mask = self._clips(audio_codes, audio_codes_mask)
        starts = torch.full_like(audio_codes[:, 0, :1], self.config.codebook_size)
        one = self.config.num_quantizers == 1
        return self._learn(starts, audio_codes[:, 0] if one else audio_codes, mask, return_logits)

    def generate_audio(
        self,
        num_codes: int,
        audio_codes: Tensor | None = None,
        audio_codes_mask: Tensor | None = None,
        num_clips: int = 1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        **kwargs,
    ) -> GeneratedAudioCodes:
        """Sample audio, by transformers' ``generate``.

        Args:
            num_codes: how many positions to make, ``round(seconds * tokenizer.config.frame_rate)``.
            audio_codes: (B, Q, T), prompts to continue from; None for clips from nothing.
            audio_codes_mask: (B, 1, T), 0 for padding on the right of shorter prompts.
            num_clips: clips of each prompt, (B * num_clips, Q, T) prompt by prompt.
            temperature, top_k, top_p, generator, kwargs: as of SimVQForImageGeneration.generate_images.

        Raises:
            ValueError: naming the argument that is impossible.
        """
        whole_number("num_codes", num_codes)
        check_options(self.generate_audio, kwargs, "num_codes", "audio_codes")
        each = sequences(kwargs, whole_number("num_clips", num_clips), guided=False)
        levels, mask = self.config.num_quantizers, None
        if audio_codes is None:
            audio_codes = torch.empty(1, levels, 0, dtype=torch.int64)
            lengths = torch.zeros(1, dtype=torch.int64)
        else:
            audio_codes = self._integers("audio_codes", audio_codes)
            mask = self._clips(audio_codes, audio_codes_mask)
            self._check_codes(audio_codes)
            full = torch.full((len(audio_codes),), audio_codes.shape[2])
            lengths = full if mask is None else mask.sum(dim=1)
        delayed, lengths = (
            value.to(running_device(self)).repeat_interleave(each, dim=0)
            for value in (delay(audio_codes, mask), lengths)
        )
        longest = audio_codes.shape[2]
        if longest + num_codes > self.config.max_codes:
            raise ValueError(
                f"num_codes = {num_codes} after {longest} codes is more than max_codes = "
                f"{self.config.max_codes}"
            )
        # Shorter prompts are padded on the left, so that all continue at the same position.
        padding = longest - lengths
        place = torch.arange(-1, longest, device=delayed.device) - padding[:, None]
        with_start = torch.nn.functional.pad(delayed, (1, 0), value=NO_CODE)
        index = (place + 1).clamp(min=0)[:, None].expand(-1, levels, -1)
        tokens = with_start.gather(2, index)
        # The start token, and what is no code: `step` knows it by its place.
        tokens = tokens.where(tokens != NO_CODE, self.config.codebook_size).flatten(0, 1)
        if levels > 1:
            kwargs |= self._delayed_rest(delayed, lengths, padding, num_codes, kwargs)
        tokens = self._continue(
            tokens,
            num_codes + levels - 1,
            temperature,
            top_k,
            top_p,
            generator,
            attention_mask=(place >= -1).long().repeat_interleave(levels, dim=0),
            **kwargs,
        )
        made = tokens[:, 1:].unflatten(0, (-1, levels))
        padding = padding.repeat_interleave(len(made) // len(padding))  # of several beams
        mask = mask_of_clips(longest + num_codes - padding, longest + num_codes)
        return GeneratedAudioCodes(undelay(made, padding, mask.shape[2]).where(mask, 0), mask)

    def _delayed_rest(
        self, delayed: Tensor, lengths: Tensor, padding: Tensor, num_codes: int, options: dict
    ) -> dict:
        """Arguments of ``generate``: the prompts' codes behind their last whole step, and where codes stand."""
        levels, longest = self.config.num_quantizers, delayed.shape[2] - delayed.shape[1] + 1
        behind = lengths[:, None] + torch.arange(levels - 1, device=delayed.device)
        known = delayed.gather(2, behind[:, None].expand(-1, levels, -1)).flatten(0, 1)
        spans = torch.stack([1 + padding, torch.full_like(padding, 1 + longest + num_codes)], dim=1)
        return {
            "logits_processor": [
                *(options.get("logits_processor") or ()),
                KnownCodes(known, 1 + longest),
            ],
            "code_spans": spans.repeat_interleave(levels, dim=0),
        }

    def _clips(self, audio_codes: Tensor, audio_codes_mask: Tensor | None) -> Tensor | None:
        """Check codes; their mask as (B, T) bool, or None if there is no padding."""
        shape = tuple(audio_codes.shape)
        levels = self.config.num_quantizers
        if len(shape) != 3 or shape[1] != levels or 0 in shape:
            raise ValueError(
                f"audio_codes must be (B, {levels}, T) and not empty, got shape {shape}"
            )
        if shape[2] > self.config.max_codes:
            raise ValueError(
                f"audio_codes has {shape[2]} codes in time, more than max_codes = {self.config.max_codes}"
            )
        if audio_codes_mask is None:
            return None
        lengths = clip_lengths(
            "audio_codes_mask", audio_codes_mask, (shape[0], 1, shape[2]), audio_codes.device
        )
        return None if lengths is None else mask_of_clips(lengths, shape[2])[:, 0]
