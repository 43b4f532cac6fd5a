"""Names of the quantizers that a model's configuration may ask for (quantization_baselines.make_quantizer).

They stand alone so that reading a configuration imports no search and no Triton.
"""

# SimVQ and the systems of the paper, then those that came after it.
PAPER = ("simvq", "vq", "vq_ema", "fc", "fsq", "lfq", "lc")
QUANTIZERS = (*PAPER, "ibq", "diveq", "fvq")

ARRANGEMENTS = ("residual", "grouped")
