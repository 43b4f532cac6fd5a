"""Utilisation of a codebook."""

import datasets
import evaluate
import numpy as np
import torch

from training.codebook.usage import CodeUsage
from training.metrics import bases


class Utilisation(bases.TakesTensors, evaluate.Metric):
    """utilisation: codes used / K, and perplexity: exp of the entropy of the codes, over all predictions;
    reachable_utilisation: what as many tokens reach on average if all codes are equally likely.

    codebook_size: K.
    """

    @staticmethod
    def row(codes) -> np.ndarray:
        """Codes of a sample, of any shape, flat."""
        codes = codes.detach().cpu() if isinstance(codes, torch.Tensor) else codes
        codes = np.asarray(codes).reshape(-1)
        return codes.astype(np.int64, casting="same_kind") if codes.size else np.int64(codes)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="predictions: codes, integers of any shape for each sample.",
            features=datasets.Features({"predictions": datasets.List(datasets.Value("int64"))}),
        )

    def _compute(self, predictions, codebook_size: int) -> dict[str, float]:
        codes = torch.from_numpy(np.concatenate([np.int64(sample) for sample in predictions]))
        if len(codes) and not 0 <= int(codes.min()) <= int(codes.max()) < codebook_size:
            raise ValueError(
                f"codes must lie between 0 and {codebook_size - 1}, got {int(codes.min())} to "
                f"{int(codes.max())}"
            )
        usage = CodeUsage.from_counts(codes.bincount(minlength=codebook_size))
        return usage.metrics()
