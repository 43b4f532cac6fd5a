"""Embedding and prediction of codes in a transformer: one table of K rows, or two small ones.

Both ways have the same interface: an embedding of token ids (codes, then the tokens that a sequence may start
with), ``loss(hidden, codes)`` and ``logits(hidden)``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .code_cross_entropy import chunked_cross_entropy
from .configuration_simvq_generation import SimVQGenerationConfig
from .hooked_weights import brings_weights


class PlainCodes(nn.Module):
    """A vector for each code, and a classifier over all of them.

    Args:
        start_tokens: tokens that are embedded beside the codes; the configuration's by default.
    """

    def __init__(self, config: SimVQGenerationConfig, start_tokens: int | None = None):
        super().__init__()
        self.codebook_size = config.codebook_size
        width = config.hidden_size
        starts = config.num_start_tokens if start_tokens is None else start_tokens
        self.table = nn.Embedding(config.codebook_size + starts, width)
        tied = config.tie_word_embeddings
        self.head = None if tied else nn.Linear(width, config.codebook_size, bias=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Token ids (B, n) to vectors (B, n, d)."""
        return self.table(token_ids)

    @brings_weights
    def loss(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Mean cross-entropy of codes (N,) after hidden states (N, d)."""
        return chunked_cross_entropy(hidden, self._output_table(), codes)

    @brings_weights
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, n, d) to logits (B, n, K)."""
        return F.linear(hidden, self._output_table())

    def draw(self, hidden: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw a code after each hidden state (N, d): (N,) int64, with the probabilities of the logits."""
        return _draw(self.logits(hidden), generator)

    def _output_table(self) -> Tensor:
        return self.table.weight[: self.codebook_size] if self.head is None else self.head.weight


class FactorizedCodes(nn.Module):
    """A code k as two numbers, its cell ``k // K2`` and its place in the cell ``k % K2``.

    It enters as the sum of two vectors. It is predicted by the chain rule, exactly: a classifier over K1 cells,
    then one over K2 places that knows the cell through a hidden layer. In training the cell is given, so that a
    token costs K1 + K2 logits and not K: 1,024 for K = 262,144 = 512 * 512. In generation all K joint
    probabilities are computed, for one position at a time, so that top-k, top-p and guidance mean what they
    mean without factors. (Two tokens for each code would double the sequence instead.)

    The indices of SimVQ's codes are arbitrary, as its basis is random: cells become sets of similar codes by
    ``arrange(codebook)``, before training. With cells of arbitrary codes far less is learned.

    Args:
        start_tokens: tokens that are embedded beside the codes; the configuration's by default.
    """

    def __init__(self, config: SimVQGenerationConfig, start_tokens: int | None = None):
        super().__init__()
        self.codebook_size = config.codebook_size
        (cells, places), width = config.code_factors, config.hidden_size
        self.cell_table = nn.Embedding(cells, width)
        self.place_table = nn.Embedding(places, width)
        starts = config.num_start_tokens if start_tokens is None else start_tokens
        self.start_table = nn.Embedding(starts, width)
        self.cell_of_place = nn.Embedding(cells, width)
        self.mixer = nn.Linear(width, width)
        tied = config.tie_word_embeddings
        self.cell_head = None if tied else nn.Linear(width, cells, bias=False)
        self.place_head = None if tied else nn.Linear(width, places, bias=False)
        self.register_buffer("rank", torch.arange(config.codebook_size))

    def forward(self, token_ids: Tensor) -> Tensor:
        """Token ids (B, n) to vectors (B, n, d)."""
        is_code = token_ids < self.codebook_size
        cells, places = self._factors(token_ids.clamp(max=self.codebook_size - 1))
        starts = (token_ids - self.codebook_size).clamp(min=0)
        vectors = self.cell_table(cells) + self.place_table(places)
        return torch.where(is_code[..., None], vectors, self.start_table(starts))

    @brings_weights
    def loss(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Mean cross-entropy of codes (N,) after hidden states (N, d)."""
        cells, places = self._factors(codes)
        within = F.silu(self.mixer(hidden) + self.cell_of_place(cells))
        cell_weight, place_weight = self._output_tables()
        return chunked_cross_entropy(hidden, cell_weight, cells) + chunked_cross_entropy(
            within, place_weight, places
        )

    @brings_weights
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, n, d) to log-probabilities (B, n, K), float32."""
        cell_weight, place_weight = self._output_tables()
        cell = F.linear(hidden, cell_weight).float().log_softmax(dim=-1)
        within = F.silu(self.mixer(hidden)[..., None, :] + self.cell_of_place.weight)
        place = F.linear(within, place_weight).float().log_softmax(dim=-1)
        return (cell[..., None] + place).flatten(-2)[..., self.rank]

    @brings_weights
    def draw(self, hidden: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw a code after each hidden state (N, d): (N,) int64, with the probabilities of the logits.

        A cell and then a place in it, so that it costs K1 + K2 logits and not K. For plain sampling only: what
        top-k, top-p, temperature and guidance do to the joint probabilities does not factorize.
        """
        cell_weight, place_weight = self._output_tables()
        cells = _draw(F.linear(hidden, cell_weight), generator)
        within = F.silu(self.mixer(hidden) + self.cell_of_place(cells))
        places = _draw(F.linear(within, place_weight), generator)
        return self.rank.argsort()[cells * self.place_table.num_embeddings + places]

    @torch.no_grad()
    def arrange(self, codebook: Tensor) -> None:
        """Make cells of similar codes. Before training: it changes what the tables mean.

        Args:
            codebook: (K, d), the vectors of the codes (``tokenizer.quantizer.codebook()``).
        """
        if codebook.ndim != 2 or len(codebook) != self.codebook_size:
            raise ValueError(
                f"codebook must be ({self.codebook_size}, d), got shape {tuple(codebook.shape)}"
            )
        order = order_by_similarity(codebook, self.cell_table.num_embeddings)
        self.rank[order.to(self.rank.device)] = torch.arange(len(order), device=self.rank.device)

    def _factors(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        ranks, places = self.rank[codes], self.place_table.num_embeddings
        return ranks // places, ranks % places

    def _output_tables(self) -> tuple[Tensor, Tensor]:
        if self.cell_head is None:
            return self.cell_table.weight, self.place_table.weight
        return self.cell_head.weight, self.place_head.weight


def _draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.multinomial(logits.float().softmax(dim=-1), 1, generator=generator)[:, 0]


def make_codes(
    config: SimVQGenerationConfig, start_tokens: int | None = None
) -> PlainCodes | FactorizedCodes:
    """The way that the configuration asks for, of the codes of one quantizer."""
    kind = PlainCodes if config.code_factors is None else FactorizedCodes
    return kind(config, start_tokens)


def order_by_similarity(vectors: Tensor, cells: int) -> Tensor:
    """Order vectors (K, d) such that each run of K / cells of them is close together.

    The set is halved across its longest principal axis, and so on, down to single cells; a cell is ordered
    along its own. What a halving sees is the 32 directions in which the whole set extends most.

    Returns:
        (K,) int64 on the CPU: which vector comes first, second, ...
    """
    vectors = vectors.cpu().double()  # not every device has float64
    vectors = vectors - vectors.mean(dim=0)
    vectors = vectors @ torch.linalg.eigh(vectors.T @ vectors).eigenvectors[:, -32:]
    places, ordered = len(vectors) // cells, []
    waiting = [(torch.arange(len(vectors)), cells)]
    while waiting:
        members, count = waiting.pop()
        part = vectors[members] - vectors[members].mean(dim=0)
        axis = torch.linalg.eigh(part.T @ part).eigenvectors[:, -1]
        members = members[(part @ axis).argsort(stable=True)]
        if count == 1:
            ordered.append(members)
        else:
            half = count // 2
            waiting.append((members[half * places :], count - half))
            waiting.append((members[: half * places], half))
    return torch.cat(ordered)
