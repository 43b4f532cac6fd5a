"""Names of the quantizers that a model's configuration may ask for (quantization_baselines.make_quantizer).

They stand alone so that reading a configuration imports no search and no Triton.
"""

QUANTIZERS = ("simvq", "vq", "vq_ema", "fc", "fsq", "lfq", "lc")

ARRANGEMENTS = ("residual", "grouped")
