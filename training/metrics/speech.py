"""Quality of reconstructed speech: PESQ, STOI, V/UV F1 against the original; UTMOS, DNSMOS, DistillMOS alone.

Each function takes a SpeechPair and gives floats; NaN where the metric is not defined for the recording.
"""

import contextlib
import importlib
import importlib.util
import io
import math
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import soxr
import torch
from huggingface_hub import constants

from training.metrics.pesq_process import PesqProcess
from training.metrics.pitch import load_crepe, voiced_f1
from training.runtime.errors import MissingWeights

RATE = 16_000  # of every metric but STOI
UTMOS_FILE = "utmos_state_dict.pt"
UTMOS_REPOSITORY = "Blinorot/UTMOS-PyTorch"


@dataclass
class SpeechPair:
    """A recording and its reconstruction as the metrics get them.

    Attributes:
        original: (L,) float32 in [-1, 1].
        decoded: (M,), see as_written.
        rate: samples per second of both.
    """

    original: np.ndarray
    decoded: np.ndarray
    rate: int

    @property
    def trimmed(self) -> tuple[np.ndarray, np.ndarray]:
        """Both, cut to the length of the shorter."""
        length = min(len(self.original), len(self.decoded))
        return self.original[:length], self.decoded[:length]

    @cached_property
    def decoded_16k(self) -> np.ndarray:
        """The whole reconstruction at 16 kHz."""
        return _resample(self.decoded, self.rate)

    @cached_property
    def trimmed_16k(self) -> tuple[np.ndarray, np.ndarray]:
        """Both at 16 kHz, cut to the length of the shorter."""
        both = _resample(self.original, self.rate), self.decoded_16k
        length = min(map(len, both))
        return both[0][:length], both[1][:length]


def as_written(waveform: np.ndarray) -> np.ndarray:
    """A waveform as a 16-bit file would hold it: clipped at 0.99, rounded. The protocol of the authors."""
    return (np.clip(waveform, -0.99, 0.99) * 32_768).round().astype(np.float32) / 32_768


def _resample(waveform: np.ndarray, rate: int) -> np.ndarray:
    if rate == RATE:
        return waveform
    return soxr.resample(waveform, rate, RATE, "HQ").astype(np.float32)


def pesq_metric(pair: SpeechPair) -> dict[str, float]:
    """PESQ, wide band (ITU-T P.862.2), between 1.04 and 4.64.

    NaN for what it has no answer: recordings under a quarter of a second, without an utterance, or with more
    utterances than PESQ's own code survives (about 50).
    """
    if not pair.original.any():
        return {"pesq": math.nan}
    return {"pesq": _PESQ.score(*pair.trimmed_16k)}


_PESQ = PesqProcess()


def load_pesq(device: torch.device) -> Callable:
    """PESQ of the package pesq, see pesq_metric; on the CPU."""
    if importlib.util.find_spec("pesq") is None:
        raise MissingWeights("PESQ needs a package: pip install pesq==0.0.4")
    return pesq_metric


def stoi_metric(pair: SpeechPair) -> dict[str, float]:
    """STOI (Taal et al. 2011, not the extended one), up to 1; NaN with too little speech in the recording."""
    from pystoi import stoi

    original, decoded = pair.trimmed
    if not original.any():
        return {"stoi": math.nan}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        score = float(stoi(original, decoded, pair.rate, extended=False))
    # pystoi's way to say that less than 0.4 s are left without the silence.
    return {"stoi": math.nan if score == 1e-5 else score}


def load_vuv_f1(device: torch.device, capacity: str = "full") -> Callable:
    """V/UV F1, see training/metrics/pitch.py."""
    network = load_crepe(capacity).to(device)
    return lambda pair: {"vuv_f1": voiced_f1(network, *pair.trimmed_16k)}


def load_dnsmos(device: torch.device) -> Callable:
    """DNSMOS (Reddy et al. 2022) of the speechmos package: overall quality and P.808; on the CPU."""
    dnsmos = _package(
        "speechmos.dnsmos", "DNSMOS", "onnxruntime && pip install --no-deps speechmos==0.0.1.1"
    )

    def measure(pair: SpeechPair) -> dict[str, float]:
        scores = dnsmos.run(np.clip(pair.decoded_16k, -1, 1), RATE)
        return {"dnsmos": float(scores["ovrl_mos"]), "dnsmos_p808": float(scores["p808_mos"])}

    return measure


def load_distillmos(device: torch.device) -> Callable:
    """DistillMOS (Stahl and Gamper 2025), quality between 1 and 5."""
    packages = "--no-deps distillmos==0.9.1 xls-r-sqa==0.1.0"
    with _without_torchaudio(), contextlib.redirect_stdout(io.StringIO()):  # it prints a path
        module = _package("distillmos.sqa", "DistillMOS", packages)
        network = module.ConvTransformerSQAModel().eval().to(device)

    @torch.no_grad()
    def measure(pair: SpeechPair) -> dict[str, float]:
        return {"distillmos": float(network(torch.from_numpy(pair.decoded_16k)[None].to(device)))}

    return measure


@contextlib.contextmanager
def _without_torchaudio():
    """Lets a package be imported that names torchaudio but needs it only in its command line."""
    try:
        importlib.import_module("torchaudio")
        placed = False
    except (ImportError, OSError, RuntimeError):  # absent, or built for another torch
        placed = True
        for name in [n for n in sys.modules if n.split(".")[0] == "torchaudio"]:
            del sys.modules[name]
        sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    try:
        yield
    finally:
        if placed:
            del sys.modules["torchaudio"]


def utmos_path() -> Path:
    """Return where the weights of UTMOS are looked for."""
    return Path(constants.HF_HOME) / "simvq" / UTMOS_FILE


def load_utmos(device: torch.device, weights: str | None = None) -> Callable:
    """UTMOS22, strong learner (Saeki et al. 2022), between 1 and 5, of the package utmos-pytorch.

    Args:
        weights: file of the weights; otherwise utmos_path() or, if that is not there, a download.
    """
    package = _package("utmos_pytorch", "UTMOS", "--no-deps utmos-pytorch==0.1.0")
    path = Path(weights) if weights else utmos_path()
    if weights is None and not path.is_file():
        path = _download_utmos(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        with torch.device("meta"):
            expected = sys.modules["utmos_pytorch.utmos_torch"].UTMOSModel().state_dict()
        if lacking := expected.keys() - state.keys():  # the package itself would not say so
            raise ValueError(f"it lacks {len(lacking)} tensors, such as {min(lacking)}")
        network = package.UTMOSScoreTorch(str(path), device=str(device))
    except Exception as error:  # a damaged file: torch raises nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise MissingWeights(f"UTMOS: {path} cannot be used: {reason}") from error

    @torch.no_grad()
    def measure(pair: SpeechPair) -> dict[str, float]:
        return {"utmos": float(network(torch.from_numpy(pair.decoded_16k).to(device)))}

    return measure


def _download_utmos(path: Path) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(UTMOS_REPOSITORY, UTMOS_FILE))
    except Exception as error:  # no network, a proxy, no such file: the remedy is the same
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise MissingWeights(
            f"UTMOS is left out, its weights cannot be downloaded ({reason}): put {UTMOS_FILE} of "
            f"{UTMOS_REPOSITORY} at {path}, or name it with utmos_weights=FILE"
        ) from error


def _package(module: str, metric: str, arguments: str) -> types.ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingWeights(
            f"{metric} needs a package ({error}): pip install {arguments}"
        ) from error


LOADERS = {
    "pesq": load_pesq,
    "stoi": lambda device: stoi_metric,
    "vuv_f1": load_vuv_f1,
    "utmos": load_utmos,
    "distillmos": load_distillmos,
    "dnsmos": load_dnsmos,
}
# What they give, where it is not their own name.
KEYS = {"dnsmos": ("dnsmos", "dnsmos_p808"), "wer": ("word_errors", "words")}
