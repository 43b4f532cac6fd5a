"""Trainers, evaluation and the paper's claims."""

import os

# oneDNN's AMX kernels read beyond narrow inputs of strided convolutions in bf16, and give whatever lies there
# (uxlfoundation/oneDNN 5494, pytorch 169688). It asks for this when the process first uses it.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
