"""Sizes of the smallest tokenizers that have every kind of layer."""

IMAGE = {
    "base_channels": 32,
    "channel_multipliers": [1, 1],
    "num_res_blocks": 1,
    "codebook_size": 64,
    "codebook_dim": 8,
}
AUDIO = {
    "downsampling_ratios": [2, 4],
    "num_filters": 4,
    "num_lstm_layers": 1,
    "codebook_size": 64,
    "codebook_dim": 8,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_decoder_layers": 1,
    "n_fft": 32,
}
