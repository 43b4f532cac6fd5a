"""Speech as it comes: chunks of samples to codes, and codes to samples, equal to those of the whole clip."""

import torch
from torch import Tensor

from .audio_input_checks import check_codes, check_waveforms
from .audio_outputs import AudioPast, SimVQAudioDecoderOutput, SimVQAudioEncoderOutput
from .hooked_weights import computing_type
from .integer_codes import integers
from .kept_codebook import book_of, trusting
from .nearest_code import Book
from .peer_arguments import with_channel
from .several_quantizers import levels_of, quantize
from .streaming_layers import State, rest_of_waveform, unplain_layer


class SimVQAudioStream:
    """A stream of speech, or a batch of streams, through a model with `streaming=True`.

    Concatenated, the codes are those of `model.encode(whole)` and the samples those of `model.decode(codes)`
    (within 1e-6). Streams of one model do not disturb each other. Neither memory nor time of a chunk grows
    with the stream. Weights must not change within one: it keeps the codebook that it began with.

        stream = SimVQAudioStream(model)
        for samples in microphone:
            loudspeaker.write(stream.decode(stream.encode(samples)))
        loudspeaker.write(stream.flush()[1])

    Args:
        model: SimVQAudioModel in evaluation mode, of a configuration with streaming=True.
        batch_size: B, streams that go in step.

    Raises:
        ValueError: if the model cannot stream, or is in training mode.
    """

    def __init__(self, model, batch_size: int = 1):
        model.check_streaming()
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size}")
        self.model, self.batch_size = model, batch_size
        self.reset()

    def reset(self) -> None:
        """Forget the stream, and begin another."""
        self._encoder: AudioPast | None = None
        self._decoder: AudioPast | None = None
        self._coded = False

    @property
    def latency(self) -> int:
        """Samples by which the output is behind the input, without computing time.

        A frame must be full before it has a code, and the inverse STFT's windows reach (n_fft - hop) / 2
        samples into the frames behind it.
        """
        return self.model.config.hop_length + self.model.decoder.inverse_stft.lag

    @torch.no_grad()
    def encode(self, samples: Tensor) -> Tensor:
        """Take the next samples, (B, 1, n) or (B, n) in [-1, 1]; return full frames' codes, (B, Q, t), t >= 0.

        Raises:
            ValueError: if shape, type or a value is impossible; the stream is then as before.
        """
        samples = with_channel(samples)
        if samples.shape[1:] == (1, 0):
            self._check_batch("samples", samples)
            return self._no_codes()
        check_waveforms(samples, look_inside=False)  # the model looks inside
        self._check_batch("samples", samples)
        output = self.model.encode(
            samples, encoder_past_key_values=self._encoder, use_streaming=True
        )
        self._encoder = output.encoder_past_key_values
        self._coded |= output.audio_codes.shape[-1] > 0
        return output.audio_codes

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Take the next codes, (B, q, t), t >= 0; return the samples that they settle, (B, 1, m), m >= 0.

        Raises:
            ValueError: if shape, type or a value is impossible; the stream is then as before.
        """
        codes = integers("codes", codes, self.model.device)
        check_codes(codes, self.model.config.num_quantizers, may_be_empty=True)
        self._check_batch("codes", codes)
        output = self.model.decode(codes, decoder_past_key_values=self._decoder, use_cache=True)
        self._decoder = output.decoder_past_key_values
        return output.audio_values

    @torch.no_grad()
    def flush(self) -> tuple[Tensor, Tensor]:
        """End the stream: return what is still inside, codes (B, Q, t) and samples (B, 1, m); then be as new.

        The last frame is filled with silence. If this stream has decoded too, or has had no code before, the
        samples include those of these codes.
        """
        model, empty = self.model, torch.empty(self.batch_size, 1, 0, device=self.model.device)
        codes, samples, past = self._no_codes(), [empty], self._encoder
        if past is not None and past.pending.shape[-1]:
            missing = model.config.hop_length - past.pending.shape[-1]
            silence = past.pending.new_zeros(self.batch_size, 1, missing)
            codes = model.encode(silence, encoder_past_key_values=past).audio_codes
        if self._decoder is not None or not self._coded:
            if codes.shape[-1]:
                samples.append(self.decode(codes))
            if self._decoder is not None and self._decoder.layers:
                rest = rest_of_waveform(model.decoder.inverse_stft, self._decoder.layers)
                lag = model.decoder.inverse_stft.lag
                samples.append(rest[:, None, self._decoder.lag : lag].to(samples[-1].dtype))
        self.reset()
        return codes, torch.cat([part.to(samples[-1]) for part in samples], dim=-1)

    def _no_codes(self) -> Tensor:
        shape = (self.batch_size, self.model.config.num_quantizers, 0)
        return torch.empty(shape, dtype=torch.int64, device=self.model.device)

    def _check_batch(self, name: str, values: Tensor) -> None:
        if len(values) != self.batch_size:
            raise ValueError(
                f"{name} of {len(values)} streams, but this stream was made with batch_size={self.batch_size}"
            )


class TakesChunks:
    """Part of the audio model that takes chunks of a stream, and knows of those before by an AudioPast."""

    def stream(self, batch_size: int = 1) -> SimVQAudioStream:
        """Return a stream, or a batch of streams that go in step, through this model."""
        return SimVQAudioStream(self, batch_size)

    def check_streaming(self) -> None:
        """Refuse streams through a model that cannot have them.

        Raises:
            ValueError: if it was not made with streaming=True, or is in training mode.
        """
        if not self.config.streaming:
            raise ValueError(
                "this model sees the whole clip and has no state: streams need streaming=True in its "
                "configuration, and a training with it"
            )
        if self.training:
            raise ValueError("streams need evaluation mode: call model.eval() first")
        if not torch.compiler.is_compiling():
            layers = (("encoder", self.encoder), ("decoder", self.decoder))
            unplain = (f"{side}.{name}" for side, part in layers if (name := unplain_layer(part)))
            if (name := next(unplain, None)) is not None:
                raise ValueError(
                    f"{name} has hooks, an adapter or weights elsewhere, which a stream would leave out: load "
                    "the model whole, and merge adapters"
                )

    def _is_streamed(self, asked: bool, past: AudioPast | None, mask: Tensor | None) -> bool:
        if not asked and past is None:
            return False
        self.check_streaming()
        if mask is not None and not torch.as_tensor(mask).bool().all():
            raise ValueError("chunks of a stream take no mask: streams of a batch go in step")
        return True

    def _no_past(self) -> AudioPast:
        return AudioPast(lag=self.decoder.inverse_stft.lag)

    def _latents_in_order(self, waveform: Tensor, state: State, place: int) -> Tensor:
        """Latents of whole frames of a stream or a clip, the same ones however a stream is cut."""
        latents = self.encoder.step(waveform, state, place)
        if self.whitening is None:
            return latents
        # Products of other lengths are rounded otherwise.
        return torch.cat([self.whitening(frame) for frame in latents.split(1, dim=-1)], dim=-1)

    def _encode_next(self, samples: Tensor, past: AudioPast, count: int) -> SimVQAudioEncoderOutput:
        given, samples = samples, samples.to(computing_type(self.decoder.conv_in))
        # What was looked at before can only have become infinite by a conversion.
        converted = samples is not given and not torch.compiler.is_compiling()
        if converted and not samples.isfinite().all():
            raise ValueError(f"input_values are too large for {samples.dtype}")
        if past.pending is not None:
            samples = torch.cat([past.pending, samples], dim=-1)
        state, full = dict(past.layers), samples.shape[-1] // self.config.hop_length
        ready, pending = samples.split(
            [full * self.config.hop_length, samples.shape[-1] - full * self.config.hop_length],
            dim=-1,
        )
        if full:
            latents = self._latents_in_order(ready, state, past.frames)
            with trusting(levels_of(self.quantizer), past.books):
                quantized, codes, loss = quantize(self.quantizer, latents, count)
        else:
            latents = quantized = samples.new_zeros(len(samples), self.config.codebook_dim, 0)
            codes = torch.empty(len(samples), count, 0, dtype=torch.int64, device=samples.device)
            loss = torch.zeros((), device=samples.device)
        mask = torch.ones_like(codes[:, :1], dtype=torch.bool)
        state = {name: value.detach() for name, value in state.items()}
        books = self._books(past, count) if full else past.books
        past = AudioPast(state, pending.detach().clone(), past.frames + full, books)
        return SimVQAudioEncoderOutput(codes, mask, quantized, loss, latents, past)

    def _books(self, past: AudioPast, count: int) -> tuple[Book | None, ...]:
        """Return the stream's books: those it had, and of quantizers just used for the first time theirs.

        What another quantizer keeps may be of other weights.
        """
        levels = levels_of(self.quantizer)
        had = past.books or (None,) * len(levels)
        return tuple(
            book or (book_of(level) if place < count else None)
            for place, (level, book) in enumerate(zip(levels, had, strict=True))
        )

    def _decode_next(self, latents: Tensor, past: AudioPast) -> SimVQAudioDecoderOutput:
        state = dict(past.layers)
        latents = latents.to(computing_type(self.decoder.conv_in)).contiguous()
        samples = self.decoder(latents, state=state)
        left_out = min(past.lag, samples.shape[-1])
        state = {name: value.detach() for name, value in state.items()}
        past = AudioPast(state, lag=past.lag - left_out)
        return SimVQAudioDecoderOutput(samples[..., left_out:], past)

    def _nothing_decoded(self, codes: Tensor, past: AudioPast | None) -> SimVQAudioDecoderOutput:
        samples = torch.empty(
            len(codes), 1, 0, dtype=computing_type(self.decoder.conv_in), device=codes.device
        )
        return SimVQAudioDecoderOutput(samples, past or self._no_past())
