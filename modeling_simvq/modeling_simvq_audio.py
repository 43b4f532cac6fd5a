"""SimVQ audio tokenizer: SEANet encoder, SimVQ quantizer, Vocos decoder.

The architecture is that of the SimVQ authors (arXiv 2411.02038, section 5, after WavTokenizer; parity is
tested against outputs of their code, tests/fixtures/audio_*).
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedAudioTokenizerBase
from transformers.utils import can_return_tuple

from .audio_decoder import AudioDecoder, ConvNeXtBlock
from .audio_decoding_in_pieces import DecodesInPieces
from .audio_encoder import AudioEncoder
from .audio_input_checks import check_codes, check_latents, check_waveforms
from .audio_outputs import (
    AudioPast,
    SimVQAudioDecoderOutput,
    SimVQAudioEncoderOutput,
    SimVQAudioOutput,
)
from .audio_stream import TakesChunks
from .clip_lengths import clip_lengths, mask_of_clips
from .configuration_simvq_audio import SimVQAudioConfig
from .foldable_codebook import FoldableCodebook
from .hooked_weights import computing_type, running_device
from .integer_codes import integers
from .latent_whitening import Whitening
from .lstm import LSTM
from .peer_arguments import (
    CountsFrames,
    check_past,
    check_scales,
    decoded_frames,
    of_dac,
    of_encodec,
    one_mask,
    quantizers_for,
    with_channel,
    without_channel,
    without_chunks,
)
from .quantization_baselines import make_quantizer
from .quantization_simvq import SimVQ
from .several_quantizers import look_up, quantize
from .streaming_layers import name_layers, unplain_layer
from .verified_download import VerifiedDownload
from .weight_norm_conv1d import (
    LengthAndDirection,
    WeightNormConv1d,
    set_weight_norm,
    stored_with_weight_norm,
)

# Without gradients the encoder's convolutions run on so many seconds at a time, with the same result.
ENCODER_CHUNK_SECONDS = 10


class SimVQAudioPreTrainedModel(VerifiedDownload, PreTrainedAudioTokenizerBase):
    """Loading, saving and initialisation."""

    config_class = SimVQAudioConfig
    base_model_prefix = ""
    main_input_name = "input_values"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["AudioEncoder", "ConvNeXtBlock", "SimVQ"]
    # Half-precision codes are other codes: the quantizer stays in float32 whatever dtype is asked for.
    _keep_in_fp32_modules_strict = ["whitening", "quantizer"]

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
        elif isinstance(
            module, (nn.Conv1d, nn.Linear, LSTM, nn.GroupNorm, nn.LayerNorm, Whitening, SimVQ)
        ):
            module.reset_parameters()


class SimVQAudioModel(
    TakesChunks, DecodesInPieces, CountsFrames, FoldableCodebook, SimVQAudioPreTrainedModel
):
    """Waveforms to codes and codes to waveforms.

    Any length from one sample upwards works; a length that is no multiple of ``config.hop_length`` comes
    back rounded up. Clips of a right-padded batch give exactly what they give alone (up to rounding), at
    every frame, if encode is told the padding_mask and decode the audio_codes_mask. In half precision the
    quantizer stays in float32, but the encoder's rounding changes some codes.
    """

    def __init__(self, config: SimVQAudioConfig):
        super().__init__(config)
        self.encoder = AudioEncoder(config)
        self.whitening = Whitening(config.codebook_dim) if config.whiten_latents else None
        self.quantizer = make_quantizer(config)
        self.decoder = AudioDecoder(config)
        name_layers(self)
        self.post_init()

    def save_pretrained(self, *args, **kwargs) -> None:
        """Save as PreTrainedModel does; the folder's code then serves both Auto classes."""
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

    @can_return_tuple
    def encode(
        self,
        input_values: Tensor,
        padding_mask: Tensor | None = None,
        num_quantizers: int | None = None,
        encoder_past_key_values: AudioPast | None = None,
        padding_cache: None = None,
        use_streaming: bool | None = None,
        *,
        attention_mask: Tensor | None = None,
        n_quantizers: int | None = None,
        bandwidth: float | None = None,
    ) -> SimVQAudioEncoderOutput:
        """Waveforms to codes.

        Args:
            input_values: (B, 1, L) or (B, L) floating point in [-1, 1] at config.sampling_rate.
            padding_mask: (B, L) or (B, 1, L), 1 for samples and 0 for the padding to their right.
            num_quantizers: how many of the model's codebooks, the first ones; all of them by default.
            encoder_past_key_values: of the chunks before, from their output (streaming models).
            padding_cache: Mimi's; None here, where encoder_past_key_values holds all of the state.
            use_streaming: the samples are a chunk of a stream, the first one if there is no past. Only full
                frames get codes; the others wait in the past for the next chunk.
            attention_mask: another name of padding_mask.
            n_quantizers: the same, as in DAC.
            bandwidth: the same, as in EnCodec, in kbit a second: one of config.target_bandwidths.

        Raises:
            ValueError: if the shape, the type or a value cannot be those of waveforms; if the model cannot
                stream, or not give so many bits.
        """
        if isinstance(padding_mask, int):  # DAC's order
            padding_mask, n_quantizers = None, padding_mask
        count = quantizers_for(self.config, num_quantizers, n_quantizers, bandwidth)
        if padding_cache is not None:
            raise ValueError(
                "padding_cache must be left out: encoder_past_key_values holds all state"
            )
        input_values = with_channel(input_values)
        check_past(
            "encoder",
            encoder_past_key_values,
            AudioPast,
            input_values.shape[0],
            self.config.num_quantizers,
        )
        padding_mask = without_channel(one_mask(padding_mask, attention_mask))
        # In training the loop watches the loss instead: a look at the values waits for the device.
        check_waveforms(input_values, not (self.training or torch.compiler.is_compiling()))
        if self._is_streamed(bool(use_streaming), encoder_past_key_values, padding_mask):
            return self._encode_next(
                input_values,
                encoder_past_key_values or self._no_past(),
                count or self.config.num_quantizers,
            )
        lengths = None
        if padding_mask is not None:
            batch, _, width = input_values.shape
            lengths = clip_lengths(
                "padding_mask", padding_mask, (batch, width), input_values.device
            )
        if lengths is not None:  # whatever the padding holds, no clip comes near it
            input_values = input_values.masked_fill(~mask_of_clips(lengths, width), 0)
        # A graph takes any number of frames: no loop over them.
        chunk, in_pieces = None, not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        if in_pieces:
            chunk = max(1, round(ENCODER_CHUNK_SECONDS * self.config.frame_rate))
        input_values = input_values.to(computing_type(self.decoder.conv_in))
        exact = self.config.streaming and in_pieces and not self.training
        if exact and unplain_layer(self.encoder) is None:
            waveform, frames = self.encoder.whole_frames(input_values, lengths)
            latents = self._latents_in_order(waveform, {}, 0)
        else:
            latents, frames = self.encoder(input_values, lengths, chunk)
            if self.whitening is not None:
                real = None if frames is None else mask_of_clips(frames, latents.shape[-1])[:, 0]
                latents = self.whitening(latents, real)
        batch, _, width = latents.shape
        if frames is None:
            mask = torch.ones(batch, 1, width, dtype=torch.bool, device=latents.device)
            quantized, codes, commitment_loss = quantize(self.quantizer, latents, count)
        else:
            mask = mask_of_clips(frames, width)
            # What lies behind a clip's end takes part neither in the loss nor in the batch.
            latents = latents.masked_fill(~mask, 0)
            quantized, codes, commitment_loss = self._quantize_real(latents, mask, count)
        output = SimVQAudioEncoderOutput(codes, mask, quantized, commitment_loss, latents)
        return output

    @can_return_tuple
    def decode(
        self,
        audio_codes: Tensor | None = None,
        padding_mask: Tensor | None = None,
        decoder_past_key_values: AudioPast | None = None,
        use_cache: bool | None = None,
        *,
        quantized_latents: Tensor | None = None,
        audio_codes_mask: Tensor | None = None,
        quantized_representation: Tensor | None = None,
        audio_scales: list | None = None,
        last_frame_pad_length: int = 0,
    ) -> SimVQAudioDecoderOutput:
        """Codes, or vectors of codes, to waveforms.

        Args:
            audio_codes: (B, q, T) integers of any type in [0, codebook_size); a tensor, an array or a list.
                q is 1, or up to num_quantizers: the first codebooks' codes. Also with EnCodec's axis of chunks,
                (1, B, q, T).
            padding_mask: (B, L), of the clips' samples: as audio_codes_mask, and the waveforms are cut to L.
            decoder_past_key_values: of the chunks before, from their output (streaming models).
            use_cache: the codes are a chunk of a stream, the first one if there is no past. Only the samples
                that no later code changes are returned; SimVQAudioStream.flush gives the last ones.
            quantized_latents: (B, d, T) floating point. Give either this or audio_codes.
            audio_codes_mask: (B, 1, T) or (B, T), true for real codes, as encode returns it; None if all are.
            quantized_representation: another name of quantized_latents, DAC's.
            audio_scales: EnCodec's; None, or a list of None.
            last_frame_pad_length: EnCodec's; 0.

        Raises:
            ValueError: if not exactly one of the two is given, or its shape, type or a value is impossible;
                if the model cannot stream.
        """
        padding_mask, decoder_past_key_values, scales = of_encodec(
            padding_mask, decoder_past_key_values
        )
        check_scales(scales if audio_scales is None else audio_scales, last_frame_pad_length)
        audio_codes, quantized_latents, padding_mask = of_dac(
            audio_codes,
            quantized_latents,
            quantized_representation,
            padding_mask,
            self.config.codebook_dim,
        )
        given = quantized_latents if audio_codes is None else audio_codes
        batch = given.shape[-3] if isinstance(given, Tensor) and given.ndim >= 3 else None
        check_past("decoder", decoder_past_key_values, AudioPast, batch, self.config.num_quantizers)
        if padding_mask is not None and audio_codes_mask is not None:
            raise ValueError("decode takes either padding_mask or audio_codes_mask, not both")
        masks = audio_codes_mask if padding_mask is None else padding_mask
        streamed = self._is_streamed(bool(use_cache), decoder_past_key_values, masks)
        if (audio_codes is None) == (quantized_latents is None):
            raise ValueError(
                "decode takes either audio_codes or quantized_latents, exactly one of them"
            )
        if audio_codes is not None:
            audio_codes = without_chunks(integers("audio_codes", audio_codes, running_device(self)))
            check_codes(audio_codes, self.config.num_quantizers, may_be_empty=streamed)
            if not audio_codes.shape[-1]:
                return self._nothing_decoded(audio_codes, decoder_past_key_values)
            quantized_latents = look_up(self.quantizer, audio_codes)
        check_latents(quantized_latents, self.config.codebook_dim)
        if streamed:
            return self._decode_next(quantized_latents, decoder_past_key_values or self._no_past())
        width = None
        if padding_mask is not None:
            hop, frames = self.config.hop_length, quantized_latents.shape[-1]
            lengths, width = decoded_frames(padding_mask, hop, quantized_latents.device)
            if frames != -(-width // hop):
                raise ValueError(
                    f"padding_mask is of {width} samples, which have {-(-width // hop)} codes, and there are "
                    f"{frames}: give the mask of the clips that these codes are of"
                )
            audio_codes_mask = mask_of_clips(lengths, frames)
        mask = self._frame_mask(audio_codes_mask, quantized_latents)
        return SimVQAudioDecoderOutput(self._decode_latents(quantized_latents, mask)[..., :width])

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor | None = None,
        padding_mask: Tensor | None = None,
        num_quantizers: int | None = None,
        audio_codes: Tensor | None = None,
        encoder_past_key_values: None = None,
        decoder_past_key_values: None = None,
        *,
        quantize: bool = True,
        attention_mask: Tensor | None = None,
        n_quantizers: int | None = None,
        bandwidth: float | None = None,
        audio_scales: list | None = None,
    ) -> SimVQAudioOutput:
        """Encode, quantize and decode.

        Args:
            input_values: (B, 1, L) or (B, L) floating point in [-1, 1] at config.sampling_rate.
            padding_mask: (B, L), 1 for samples and 0 for the padding to their right.
            num_quantizers: as of encode.
            audio_codes: (B, q, T), made before: they are decoded, and nothing is encoded.
            encoder_past_key_values, decoder_past_key_values: Mimi's; None here, streams take encode and decode.
            quantize: False decodes the latents as they are (autoencoder warm-up); the codes and the loss
                are still those of the quantizer.
            attention_mask, n_quantizers, bandwidth: as of encode.
            audio_scales: as of decode.

        Raises:
            ValueError: as encode and decode; if neither samples nor codes are given.
        """
        if not (encoder_past_key_values is None and decoder_past_key_values is None):
            raise ValueError("forward takes no past: use encode and decode for streams")
        if isinstance(padding_mask, int):  # DAC's order
            padding_mask, n_quantizers = None, padding_mask
        padding_mask = one_mask(padding_mask, attention_mask)
        if audio_codes is not None:
            quantizers_for(self.config, num_quantizers, n_quantizers, bandwidth)
            decoded = self.decode(
                audio_codes, padding_mask, audio_scales=audio_scales, return_dict=True
            )
            return SimVQAudioOutput(decoded.audio_values, audio_codes)
        if input_values is None:
            raise ValueError("give input_values or audio_codes")
        encoded = self.encode(
            input_values,
            padding_mask,
            num_quantizers,
            n_quantizers=n_quantizers,
            bandwidth=bandwidth,
            return_dict=True,
        )
        latents = encoded.quantized_latents if quantize else encoded.latents
        mask = None if padding_mask is None else self._frame_mask(encoded.audio_codes_mask, latents)
        output = SimVQAudioOutput(
            self._decode_latents(latents, mask),
            encoded.audio_codes,
            encoded.audio_codes_mask,
            encoded.commitment_loss,
            encoded.latents,
        )
        return output

    def _quantize_real(
        self, latents: Tensor, mask: Tensor, count: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize the frames of the clips and leave zeros behind their ends."""
        rows = mask[:, 0]
        quantized, codes, commitment_loss = quantize(self.quantizer, latents.mT[rows], count)
        all_codes = codes.new_zeros(*rows.shape, codes.shape[1])
        all_codes[rows] = codes
        all_codes = all_codes.mT.contiguous()
        everything = torch.zeros_like(latents.mT)
        everything[rows] = quantized
        return everything.mT.contiguous(), all_codes, commitment_loss

    def _decode_latents(self, latents: Tensor, mask: Tensor | None) -> Tensor:
        latents = latents.to(computing_type(self.decoder.conv_in))
        if mask is not None:
            latents = latents.masked_fill(~mask, 0)
        # Convolutions round differently in different layouts, and a single frame is contiguous in several:
        # forward and decode must give the same waveform.
        latents = latents.clone(memory_format=torch.contiguous_format)
        if (
            self._decoder_chunks is None
            or torch.is_grad_enabled()
            or latents.shape[-1] <= self._decoder_chunks[0]
        ):
            return self.decoder(latents, mask)
        return self._decode_in_chunks(latents, mask)

    def _frame_mask(self, mask: Tensor | None, latents: Tensor) -> Tensor | None:
        if mask is None:
            return None
        batch, _, frames = latents.shape
        mask = torch.as_tensor(mask)
        mask = mask[:, None] if mask.ndim == 2 else mask
        lengths = clip_lengths("audio_codes_mask", mask, (batch, 1, frames), latents.device)
        return None if lengths is None else mask_of_clips(lengths, frames)
