"""A small GPT: pre-norm transformer decoder with learned positions and an unembedding of its own.

The model trains on two CPU cores in a minute or two. It is ordinary in every other way, so the results of the
language-model demo do not come from a special architecture.

Shapes: B sequences, S tokens each, n = width, m = vocabulary. Tokens [B, S], logits [B, S, m].
"""

from __future__ import annotations

from typing import cast

from logalign.errors import InputError, MissingExtraError

try:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F
except ImportError as error:
    raise MissingExtraError('the demos need PyTorch: pip install "logalign[demo]"') from error

INIT_SCALE = 0.02


class Block(nn.Module):
    """Causal self-attention, then an MLP four times as wide, each on a normalized copy of the residual stream."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = nn.Dropout(dropout)
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = (batch, length, self.heads, width // self.heads)
        q, k, v = (
            part.reshape(split).transpose(1, 2)
            for part in self.query_key_value(self.attention_norm(x)).split(width, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.attention_out(attended.transpose(1, 2).reshape(batch, length, width)))
        return x + cast(Tensor, self.dropout(self.mlp(self.mlp_norm(x))))


class GPT(nn.Module):
    """Decoder-only language model with the measured unembedding `lm_head`, without bias.

    Args:
        vocabulary: m.
        width: n, a multiple of `heads`.
        context: longest sequence.
        tied: True if `lm_head` shares the weight of the token embedding.
        dropout: share of the attention and MLP outputs that training drops before the residual stream.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        context: int = 128,
        tied: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise InputError(f"width must be a multiple of heads, found width {width} and {heads} heads")
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.tokens.weight
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_SCALE)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention_out.weight", "mlp.2.weight")):
                nn.init.normal_(parameter, std=INIT_SCALE / (2 * layers) ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.lm_head(self.norm(x)))
