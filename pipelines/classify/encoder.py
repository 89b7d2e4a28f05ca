"""all-MiniLM-L6-v2, the sentence encoder: texts of like meaning become vectors of like direction."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipelines.classify.weights import model_file

WIDTH, HEADS, INNER, LAYERS = 384, 12, 1536, 6
WORDS, POSITIONS = 30522, 512
EPSILON = 1e-12


class SentenceEncoder(nn.Module):  # type: ignore[misc]
    """BERT of six layers with mean pooling: token ids int64[n, length], 0 being padding, to unit vectors
    float32[n, 384]."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.positions = nn.Embedding(POSITIONS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, EPSILON)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, INNER, dropout=0.0, activation="gelu", layer_norm_eps=EPSILON, batch_first=True
        )
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        padding = ids == 0
        places = torch.arange(ids.shape[1], device=ids.device)
        tokens = self.layers(self.norm(self.words(ids) + self.positions(places)), src_key_padding_mask=padding)
        mean = tokens.masked_fill(padding[..., None], 0).sum(1) / (~padding).sum(1, keepdim=True)
        return nn.functional.normalize(mean, dim=1)


def load() -> SentenceEncoder:
    """The encoder with its published weights, in host memory."""
    encoder = SentenceEncoder()
    encoder.load_state_dict(_renamed(load_file(model_file("model.safetensors"))))
    return encoder


def _renamed(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published tensors under the names that torch's own layers have."""
    words = "embeddings.word_embeddings.weight"
    # The second of the two token types is for pairs of texts.
    types = published["embeddings.token_type_embeddings.weight"][0]
    state = {
        "words.weight": published[words] + types,
        "positions.weight": published["embeddings.position_embeddings.weight"],
    }
    names = {"embeddings.LayerNorm": "norm"}
    for index in range(LAYERS):
        old, new = f"encoder.layer.{index}", f"layers.layers.{index}"
        names[f"{old}.attention.output.dense"] = f"{new}.self_attn.out_proj"
        names[f"{old}.attention.output.LayerNorm"] = f"{new}.norm1"
        names[f"{old}.intermediate.dense"] = f"{new}.linear1"
        names[f"{old}.output.dense"] = f"{new}.linear2"
        names[f"{old}.output.LayerNorm"] = f"{new}.norm2"
        for kind in ("weight", "bias"):
            parts = [published[f"{old}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"{new}.self_attn.in_proj_{kind}"] = torch.cat(parts)
    for old, new in names.items():
        for kind in ("weight", "bias"):
            state[f"{new}.{kind}"] = published[f"{old}.{kind}"]
    return state
