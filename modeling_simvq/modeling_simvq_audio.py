"""SimVQ audio tokenizer: SEANet encoder, SimVQ quantizer, Vocos decoder.

The architecture is that of the SimVQ authors (arXiv 2411.02038, section 5, after WavTokenizer; parity is
tested against outputs of their code, tests/fixtures/audio_*).
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedAudioTokenizerBase
from transformers.utils import ModelOutput

from .audio_decoder import AudioDecoder, ConvNeXtBlock
from .audio_encoder import AudioEncoder
from .clip_lengths import clip_lengths, mask_of_clips
from .configuration_simvq_audio import SimVQAudioConfig
from .foldable_codebook import FoldableCodebook
from .hooked_weights import computing_type, running_device
from .integer_codes import integers
from .quantization_baselines import make_quantizer
from .quantization_simvq import SimVQ
from .verified_download import VerifiedDownload
from .weight_norm_conv1d import (
    LengthAndDirection,
    WeightNormConv1d,
    set_weight_norm,
    stored_with_weight_norm,
)

# Without gradients the encoder's convolutions run on so many seconds at a time, with the same result.
ENCODER_CHUNK_SECONDS = 10


@dataclass
class SimVQAudioEncoderOutput(ModelOutput):
    """What encode returns; T is the padded length over config.hop_length, rounded up.

    Attributes:
        audio_codes: (B, 1, T) int64, in [0, codebook_size). Behind a clip's end they mean nothing.
        audio_codes_mask: (B, 1, T) bool, true where a code belongs to its clip.
        quantized_latents: (B, d, T), the codes' vectors.
        commitment_loss: float32 scalar, ``beta |z - sg[q]|^2 + |q - sg[z]|^2``, over the real frames.
        latents: (B, d, T), the encoder's output before quantization.
    """

    audio_codes: torch.LongTensor | None = None
    audio_codes_mask: torch.BoolTensor | None = None
    quantized_latents: torch.FloatTensor | None = None
    commitment_loss: torch.FloatTensor | None = None
    latents: torch.FloatTensor | None = None


@dataclass
class SimVQAudioDecoderOutput(ModelOutput):
    """What decode returns.

    Attributes:
        audio_values: (B, 1, T * hop_length), trained towards [-1, 1] and not clamped. Zero behind a
            clip's last real frame.
    """

    audio_values: torch.FloatTensor | None = None


@dataclass
class SimVQAudioOutput(ModelOutput):
    """What the model returns when it is called: reconstruction, codes, their mask, loss and latents."""

    audio_values: torch.FloatTensor | None = None
    audio_codes: torch.LongTensor | None = None
    audio_codes_mask: torch.BoolTensor | None = None
    commitment_loss: torch.FloatTensor | None = None
    latents: torch.FloatTensor | None = None


class SimVQAudioPreTrainedModel(VerifiedDownload, PreTrainedAudioTokenizerBase):
    """Loading, saving and initialisation."""

    config_class = SimVQAudioConfig
    base_model_prefix = ""
    main_input_name = "input_values"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["AudioEncoder", "ConvNeXtBlock", "SimVQ"]
    # Half-precision codes are other codes: the quantizer stays in float32 whatever dtype is asked for.
    _keep_in_fp32_modules_strict = ["quantizer"]

    @classmethod
    def _load(cls, stored: Iterable[str] | None, name, *args, config=None, **kwargs) -> tuple:
        # The model is made as its weights are stored, and only then gets the form that is wanted.
        wanted = None
        if stored is not None and kwargs.get("key_mapping") is None:
            form = stored_with_weight_norm(stored)
            if isinstance(config, PreTrainedConfig):
                wanted, config = config.weight_norm, copy.deepcopy(config)
                config.weight_norm = form
            else:
                chosen = SimVQAudioConfig(weight_norm=kwargs.get("weight_norm", form))
                wanted = chosen.weight_norm
                kwargs["weight_norm"] = form
        model, report = super()._load(stored, name, *args, config=config, **kwargs)
        if wanted is not None:
            model._set_weight_norm(wanted)
        return model, report

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # torch's own initialisation, as in the original. transformers guards it so that weights that
        # came from a checkpoint are left alone.
        if isinstance(module, ConvNeXtBlock):
            init.constant_(module.layer_scale, 1 / self.config.num_decoder_layers)
        elif isinstance(module, LengthAndDirection):
            # Loading visits this and not the convolution when only the weight is missing.
            init.kaiming_uniform_(module.original1, a=5**0.5)
            norm = torch.linalg.vector_norm(module.original1, dim=(1, 2), keepdim=True)
            init.copy_(module.original0, norm)
        elif isinstance(module, WeightNormConv1d):
            bound = module.parametrizations.weight.original1[0].numel() ** -0.5
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, (nn.Conv1d, nn.Linear, nn.LSTM, nn.GroupNorm, nn.LayerNorm, SimVQ)):
            module.reset_parameters()


class SimVQAudioModel(FoldableCodebook, SimVQAudioPreTrainedModel):
    """Waveforms to codes and codes to waveforms.

    Any length from one sample upwards works; a length that is no multiple of ``config.hop_length`` comes
    back rounded up. Clips of a right-padded batch give exactly what they give alone (up to rounding), at
    every frame, if encode is told the padding_mask and decode the audio_codes_mask. In half precision the
    quantizer stays in float32, but the encoder's rounding changes some codes.
    """

    def __init__(self, config: SimVQAudioConfig):
        super().__init__(config)
        self.encoder = AudioEncoder(config)
        self.quantizer = make_quantizer(config)
        self.decoder = AudioDecoder(config)
        self._decoder_chunks: tuple[int, int] | None = None
        self.post_init()

    def save_pretrained(self, *args, **kwargs) -> None:
        """As of PreTrainedModel; the folder's code then serves both Auto classes."""
        # transformers names one Auto class in auto_map, the one given to register_for_auto_class.
        names = dict(getattr(self.config, "auto_map", None) or {})
        names["AutoModelForAudioTokenization"] = "modeling_simvq_audio.SimVQAudioModel"
        self.config.auto_map = names
        super().save_pretrained(*args, **kwargs)

    def remove_weight_norm(self) -> None:
        """Fold weight normalisation into plain weights, for inference. A saved model stays folded."""
        self._set_weight_norm(False)

    def _set_weight_norm(self, wanted: bool) -> None:
        set_weight_norm(self.encoder, wanted)
        if (
            self.config.weight_norm != wanted
        ):  # other models may have been made with this configuration
            self.config = copy.deepcopy(self.config)
            self.config.weight_norm = wanted

    def enable_chunking(self, chunk_seconds: float = 20.0, overlap_seconds: float = 2.0) -> None:
        """Decode long clips chunk by chunk (inference only), so that memory and time grow linearly.

        Attention and norms of the decoder then see one chunk instead of the whole clip, so the result
        differs a little; chunks are cross-faded over their overlap. Encoding needs no such thing: it
        always runs in chunks and gives exactly the codes of the whole clip.

        Args:
            chunk_seconds: length of a chunk; shorter clips are not cut.
            overlap_seconds: shared by neighbouring chunks, at most half a chunk.
        """
        chunk, overlap = (
            round(seconds * self.config.frame_rate) for seconds in (chunk_seconds, overlap_seconds)
        )
        if not 0 < overlap <= chunk // 2:
            raise ValueError(
                "overlap_seconds must be at least one frame and at most half of chunk_seconds, "
                f"got overlap_seconds={overlap_seconds} and chunk_seconds={chunk_seconds}"
            )
        self._decoder_chunks = (chunk, overlap)

    def disable_chunking(self) -> None:
        """Decode every clip whole again."""
        self._decoder_chunks = None

    def encode(
        self,
        input_values: Tensor,
        padding_mask: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> SimVQAudioEncoderOutput | tuple:
        """Waveforms to codes.

        Args:
            input_values: (B, 1, L) floating point in [-1, 1] at config.sampling_rate.
            padding_mask: (B, L), 1 for samples and 0 for the padding to their right.

        Raises:
            ValueError: if the shape, the type or a value cannot be those of waveforms.
        """
        self._check_waveforms(input_values)
        lengths = None
        if padding_mask is not None:
            batch, _, width = input_values.shape
            lengths = clip_lengths(
                "padding_mask", padding_mask, (batch, width), input_values.device
            )
        if lengths is not None:  # whatever the padding holds, no clip comes near it
            input_values = input_values.masked_fill(~mask_of_clips(lengths, width), 0)
        chunk = None
        if not torch.is_grad_enabled():
            chunk = max(1, round(ENCODER_CHUNK_SECONDS * self.config.frame_rate))
        dtype = computing_type(self.decoder.conv_in)
        latents, frames = self.encoder(input_values.to(dtype), lengths, chunk)
        batch, _, width = latents.shape
        if frames is None:
            mask = torch.ones(batch, 1, width, dtype=torch.bool, device=latents.device)
            quantized, codes, commitment_loss = self.quantizer(latents)
        else:
            mask = mask_of_clips(frames, width)
            # What lies behind a clip's end takes part neither in the loss nor in the batch.
            latents = latents.masked_fill(~mask, 0)
            quantized, codes, commitment_loss = self._quantize_real(latents, mask)
        output = SimVQAudioEncoderOutput(codes[:, None], mask, quantized, commitment_loss, latents)
        return self._returned(output, return_dict)

    def decode(
        self,
        audio_codes: Tensor | None = None,
        quantized_latents: Tensor | None = None,
        audio_codes_mask: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> SimVQAudioDecoderOutput | tuple:
        """Codes, or vectors of codes, to waveforms.

        Args:
            audio_codes: (B, 1, T) integers of any type in [0, codebook_size); a tensor, an array or a list.
            quantized_latents: (B, d, T) floating point. Give either this or audio_codes.
            audio_codes_mask: (B, 1, T), true for real codes, as encode returns it; None if all are.

        Raises:
            ValueError: if not exactly one of the two is given, or its shape, type or a value is impossible.
        """
        if (audio_codes is None) == (quantized_latents is None):
            raise ValueError(
                "decode takes either audio_codes or quantized_latents, exactly one of them"
            )
        if audio_codes is not None:
            audio_codes = integers("audio_codes", audio_codes, running_device(self))
            if audio_codes.ndim != 3 or audio_codes.shape[1] != 1 or audio_codes.numel() == 0:
                raise ValueError(
                    f"audio_codes must be (B, 1, T) and not empty, got shape {tuple(audio_codes.shape)}"
                )
            quantized_latents = self.quantizer.lookup(audio_codes[:, 0])
        self._check_latents(quantized_latents)
        mask = self._frame_mask(audio_codes_mask, quantized_latents)
        output = SimVQAudioDecoderOutput(self._decode_latents(quantized_latents, mask))
        return self._returned(output, return_dict)

    def forward(
        self,
        input_values: Tensor,
        padding_mask: Tensor | None = None,
        quantize: bool = True,
        return_dict: bool | None = None,
    ) -> SimVQAudioOutput | tuple:
        """Encode, quantize and decode.

        Args:
            input_values: (B, 1, L) floating point in [-1, 1] at config.sampling_rate.
            padding_mask: (B, L), 1 for samples and 0 for the padding to their right.
            quantize: False decodes the latents as they are (autoencoder warm-up); the codes and the loss
                are still those of the quantizer.
        """
        encoded = self.encode(input_values, padding_mask, return_dict=True)
        latents = encoded.quantized_latents if quantize else encoded.latents
        mask = None if padding_mask is None else self._frame_mask(encoded.audio_codes_mask, latents)
        output = SimVQAudioOutput(
            self._decode_latents(latents, mask),
            encoded.audio_codes,
            encoded.audio_codes_mask,
            encoded.commitment_loss,
            encoded.latents,
        )
        return self._returned(output, return_dict)

    def _quantize_real(self, latents: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize the frames of the clips and leave zeros behind their ends."""
        rows = mask[:, 0]
        quantized, codes, commitment_loss = self.quantizer(latents.mT[rows])
        all_codes = codes.new_zeros(rows.shape)
        all_codes[rows] = codes
        everything = torch.zeros_like(latents.mT)
        everything[rows] = quantized
        return everything.mT.contiguous(), all_codes, commitment_loss

    def _decode_latents(self, latents: Tensor, mask: Tensor | None) -> Tensor:
        latents = latents.to(computing_type(self.decoder.conv_in))
        if mask is not None:
            latents = latents.masked_fill(~mask, 0)
        # Convolutions round differently in different layouts, and a single frame is contiguous in several:
        # forward and decode must give the same sound.
        latents = latents.clone(memory_format=torch.contiguous_format)
        if (
            self._decoder_chunks is None
            or torch.is_grad_enabled()
            or latents.shape[-1] <= self._decoder_chunks[0]
        ):
            return self.decoder(latents, mask)
        return self._decode_in_chunks(latents, mask)

    def _decode_in_chunks(self, latents: Tensor, mask: Tensor | None) -> Tensor:
        """Cut each clip by its own length, as if it were alone; a chunk holds only clips that reach it."""
        chunk, overlap = self._decoder_chunks
        batch, _, frames = latents.shape
        hop = self.config.hop_length
        lengths = [frames] * batch if mask is None else mask.sum(dim=-1).flatten().tolist()
        output = latents.new_zeros(batch, 1, frames * hop, dtype=torch.float32)
        rise = (torch.arange(overlap * hop, device=latents.device) + 0.5) / (overlap * hop)
        for start in range(0, frames - overlap, chunk - overlap):
            # What is left of a clip after a chunk is more than the overlap, or nothing.
            rows = [
                row for row, length in enumerate(lengths) if length > start + overlap * (start > 0)
            ]
            if not rows:
                break
            stop = min(start + chunk, max(lengths[row] for row in rows))
            within = None if mask is None else mask[rows, :, start:stop]
            piece = self.decoder(latents[rows, :, start:stop].contiguous(), within).float()
            if start:
                piece[..., : len(rise)] *= rise
            unfinished = [i for i, row in enumerate(rows) if lengths[row] > start + chunk]
            if unfinished:
                piece[unfinished, :, -len(rise) :] *= 1 - rise
            output[rows, :, start * hop : stop * hop] += piece
        return output.to(latents.dtype)

    def _frame_mask(self, mask: Tensor | None, latents: Tensor) -> Tensor | None:
        if mask is None:
            return None
        batch, _, frames = latents.shape
        lengths = clip_lengths("audio_codes_mask", mask, (batch, 1, frames), latents.device)
        return None if lengths is None else mask_of_clips(lengths, frames)

    def _check_waveforms(self, input_values: Tensor) -> None:
        shape = tuple(input_values.shape)
        if input_values.ndim != 3 or shape[1] != 1:
            raise ValueError(
                f"input_values must be (B, 1, L), mono, got shape {shape}: "
                "mix channels down, and let SimVQAudioFeatureExtractor prepare the clips"
            )
        if input_values.numel() == 0:
            raise ValueError(f"input_values is empty: shape {shape}")
        if not input_values.is_floating_point():
            raise ValueError(
                f"input_values must be floating point in [-1, 1], got {input_values.dtype}: "
                "divide 16-bit samples by 32768"
            )
        # In training the loop watches the loss instead: this check waits for the device.
        if (
            not (self.training or torch.compiler.is_compiling())
            and not input_values.isfinite().all()
        ):
            raise ValueError("input_values holds NaN or infinite values")

    def _check_latents(self, latents: Tensor) -> None:
        if (
            latents.ndim != 3
            or latents.shape[1] != self.config.codebook_dim
            or latents.numel() == 0
        ):
            raise ValueError(
                f"quantized_latents must be (B, {self.config.codebook_dim}, T) and not empty, "
                f"got shape {tuple(latents.shape)}"
            )
        if not latents.is_floating_point():
            raise ValueError(f"quantized_latents must be floating point, got {latents.dtype}")

    def _returned(self, output: ModelOutput, return_dict: bool | None) -> ModelOutput | tuple:
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()
