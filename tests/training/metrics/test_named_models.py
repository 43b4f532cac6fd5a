"""Word error rate and speaker similarity, with small models of random weights."""

import json
from types import SimpleNamespace

import evaluate
import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from transformers import (
    GenerationConfig,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WavLMConfig,
    WavLMForXVector,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from tests.training.support.tiny_peers import louder
from training.evaluation import audio
from training.evaluation.audio import AudioEvaluationSettings, load_metrics
from training.metrics.speakers import load_speaker_similarity
from training.metrics.speech import SpeechPair, as_written
from training.metrics.transcripts import load_wer
from training.runtime.errors import SettingsError

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
SIZES |= {"conv_dim": [8, 8], "conv_kernel": [10, 8], "conv_stride": [20, 16]}
SIZES |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
CPU = torch.device("cpu")


def noise(seed: int, length: int = 16_000) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, length).astype(np.float32)


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("asr")
    torch.manual_seed(0)
    words = ["<pad>", "<unk>", "|", *"abcdefgh"]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    Wav2Vec2CTCTokenizer(
        str(folder / "vocab.json"),
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token=None,
        eos_token=None,
    ).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    louder(Wav2Vec2ForCTC(Wav2Vec2Config(**SIZES, vocab_size=len(words)))).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def speakers(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("xvector")
    torch.manual_seed(0)
    tdnn = {
        "tdnn_dim": [8, 8],
        "tdnn_kernel": [3, 1],
        "tdnn_dilation": [1, 1],
        "xvector_output_dim": 8,
    }
    WavLMForXVector(WavLMConfig(**SIZES, **tdnn)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_wer_counts_the_words_of_the_original(recogniser):
    measure = load_wer(CPU, recogniser)
    same = measure(SpeechPair(noise(0), noise(0), 16_000))
    assert same["word_errors"] == 0 and same["words"] > 1
    other = measure(SpeechPair(noise(0), noise(1), 16_000))
    assert other["words"] == same["words"] and other["word_errors"] > 0


@pytest.fixture(scope="module")
def whisper(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("whisper")
    letters = [chr(n) for n in range(33, 127)] + ["Ġ"]
    tokenizer = WhisperTokenizer(vocab={c: n for n, c in enumerate(letters)}, merges=[])
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    times = [f"<|{n * 0.02:.2f}|>" for n in range(1501)]
    tokenizer.add_tokens(special + times, special_tokens=True)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8).save_pretrained(folder)
    end, start, no_times = tokenizer.convert_tokens_to_ids(special)
    ids = {"decoder_start_token_id": start, "eos_token_id": end, "pad_token_id": end}
    layers = {f"{side}_layers": 1 for side in ("encoder", "decoder")}
    layers |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    layers |= {f"{side}_ffn_dim": 16 for side in ("encoder", "decoder")}
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=8,
        d_model=16,
        max_target_positions=40,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        bos_token_id=end,
        **ids,
        **layers,
    )
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config)
    options = {"max_length": 20, "no_timestamps_token_id": no_times, "is_multilingual": False}
    model.generation_config = GenerationConfig(**ids, **options)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1, 31])
def test_whisper_hears_long_recordings_too(whisper, seconds):
    waveform = noise(0, seconds * 16_000)
    found = load_wer(CPU, whisper)(SpeechPair(waveform, waveform, 16_000))
    assert found["word_errors"] == 0 or np.isnan(found["words"])


def test_wer_is_that_of_known_texts(recogniser, monkeypatch):
    """One word of three is replaced, one is added; capitals and points are no mistakes."""
    texts = iter(["One, two. Three!", "one too three four"])
    heard = SimpleNamespace(feature_extractor=SimpleNamespace(sampling_rate=16_000), type="ctc")
    stand_in = type("Recogniser", (), {"__call__": lambda self, _: {"text": next(texts)}})()
    stand_in.__dict__.update(vars(heard))
    monkeypatch.setattr(transformers, "pipeline", lambda *_, **__: stand_in)
    found = load_wer(CPU, "x")(SpeechPair(noise(0), noise(0), 16_000))
    assert found == {"word_errors": 2, "words": 3}


def test_the_same_voice_is_1_and_another_less(speakers):
    measure = load_speaker_similarity(CPU, speakers)
    assert measure(SpeechPair(noise(0), noise(0), 24_000))["speaker_similarity"] == pytest.approx(1)
    assert measure(SpeechPair(noise(0), noise(1), 24_000))["speaker_similarity"] < 1 - 1e-5


def test_another_rate_is_refused(speakers, tmp_path):
    Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match="takes 8,000 Hz, it must take 16,000 Hz"):
        load_speaker_similarity(CPU, str(tmp_path))


def test_all_recordings_together(recogniser, speakers, monkeypatch):
    """Errors of all over words of all; one that has no words is counted as a failure."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    settings = AudioEvaluationSettings(
        model="x", metrics=[], asr_model=recogniser, speaker_model=speakers
    )
    metrics, _ = load_metrics(settings, CPU)
    assert list(metrics) == ["wer", "speaker_similarity"]
    counts = iter([(1, 4), (3, 6), (np.nan, np.nan)])
    metrics["wer"] = lambda pair: dict(zip(("word_errors", "words"), next(counts), strict=True))
    config = SimpleNamespace(
        codebook_size=8, num_quantizers=1, sampling_rate=16_000, target_bandwidths=[1.0]
    )

    class Same(torch.nn.Module):
        def forward(self, samples, num_quantizers=None):
            codes = torch.zeros(1, 1, 2, dtype=torch.int64)
            return SimpleNamespace(audio_values=samples, audio_codes=codes)

    model = Same()
    model.config = config
    batches = [
        {"input_values": torch.from_numpy(noise(n))[None, None], "valid": torch.tensor([True])}
        for n in range(3)
    ]
    findings = audio.evaluate(model, batches, Accelerator(), metrics)
    assert findings.metrics["wer"] == pytest.approx(4 / 10)
    assert "words" not in findings.metrics and "word_errors" not in findings.intervals
    assert findings.failures == {"wer": 1}
    assert findings.metrics["speaker_similarity"] == pytest.approx(1, abs=1e-2)


@pytest.mark.slow
def test_metrics_of_the_evaluate_package(recogniser, speakers, monkeypatch, request):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(request.config.rootpath)
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)
    signals = {"predictions": [noise(1), noise(2)], "references": [noise(0), noise(2)]}
    signals |= {"sampling_rate": 16_000}
    found = evaluate.load("training/metrics/wer").compute(**signals, model=recogniser)
    pairs = [SpeechPair(noise(n), as_written(noise(m)), 16_000) for n, m in ((0, 1), (2, 2))]
    counted = [load_wer(CPU, recogniser)(pair) for pair in pairs]
    errors, words = (sum(one[key] for one in counted) for key in ("word_errors", "words"))
    assert found == {"wer": pytest.approx(errors / words), "failures": 0}
    metric = evaluate.load("training/metrics/speaker_similarity")
    similarity = metric.compute(**signals, model=speakers)["speaker_similarity"]
    measure = load_speaker_similarity(CPU, speakers)
    expected = [measure(pair)["speaker_similarity"] for pair in pairs]
    assert similarity == pytest.approx(sum(expected) / 2, abs=1e-5)
