"""Baichuan and Baichuan 2 in plain PyTorch, from their published description.

Baichuan-7B and Baichuan2-7B: LLaMA with one projection W_pack for query, key and value. The 13B
models: ALiBi instead of rotary positions. Baichuan 2: the head's rows are scaled to unit length.
(Baichuan 2: Open Large-scale Language Models, arXiv 2309.10305, section 2.)
"""

import json
import math
import pathlib

import safetensors.torch
import torch
import torch.nn.functional as F


class Baichuan:
    """Weights under their published names, and a forward pass one row at a time."""

    def __init__(
        self,
        *,
        alibi: bool,
        norm_head: bool,
        num_heads: int = 6,
        hidden: int = 48,
        vocab: int = 131,
    ) -> None:
        self.alibi, self.norm_head, self.num_heads = alibi, norm_head, num_heads
        self.hidden, self.width, self.layers, self.vocab = hidden, 80, 3, vocab
        generator = torch.Generator().manual_seed(11)

        def random(*shape: int) -> torch.Tensor:
            return 0.15 * torch.randn(shape, generator=generator)

        weights = {
            "model.embed_tokens.weight": random(self.vocab, self.hidden),
            "model.norm.weight": 1 + random(self.hidden),
            "lm_head.weight": random(self.vocab, self.hidden),
        }
        for layer in range(self.layers):
            name = f"model.layers.{layer}."
            weights |= {
                name + "self_attn.W_pack.weight": random(3 * self.hidden, self.hidden),
                name + "self_attn.o_proj.weight": random(self.hidden, self.hidden),
                name + "mlp.gate_proj.weight": random(self.width, self.hidden),
                name + "mlp.up_proj.weight": random(self.width, self.hidden),
                name + "mlp.down_proj.weight": random(self.hidden, self.width),
                name + "input_layernorm.weight": 1 + random(self.hidden),
                name + "post_attention_layernorm.weight": 1 + random(self.hidden),
            }
        self.weights = weights

    def config(self) -> dict[str, object]:
        config: dict[str, object] = {
            "model_type": "baichuan",
            "architectures": ["BaichuanForCausalLM" if self.alibi else "BaiChuanForCausalLM"],
            "auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"},
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.num_heads,
            "vocab_size": self.vocab,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        config["model_max_length" if self.alibi else "max_position_embeddings"] = 64
        return config | ({"z_loss_weight": 0} if self.norm_head else {})

    def save(self, folder: pathlib.Path) -> pathlib.Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config()), encoding="utf-8")
        weights = dict(self.weights)
        if not self.alibi:  # the buffers that old checkpoints carry
            for layer in range(self.layers):
                weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        path = str(folder / "model.safetensors")
        safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
        return folder

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Logits `[T, V]` of one row."""
        w = self.weights
        hidden = w["model.embed_tokens.weight"][tokens]
        for layer in range(self.layers):
            name = f"model.layers.{layer}."
            normed = self._norm(hidden, w[name + "input_layernorm.weight"])
            hidden = hidden + self._attention(normed, name + "self_attn.")
            normed = self._norm(hidden, w[name + "post_attention_layernorm.weight"])
            gate = F.silu(normed @ w[name + "mlp.gate_proj.weight"].T)
            up = normed @ w[name + "mlp.up_proj.weight"].T
            hidden = hidden + (gate * up) @ w[name + "mlp.down_proj.weight"].T
        hidden = self._norm(hidden, w["model.norm.weight"])
        head = w["lm_head.weight"]
        return hidden @ (F.normalize(head) if self.norm_head else head).T

    def _norm(self, hidden: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return scale * hidden / torch.sqrt((hidden**2).mean(-1, keepdim=True) + 1e-6)

    def _attention(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        length, head_dim = len(hidden), self.hidden // self.num_heads
        packed = hidden @ self.weights[name + "W_pack.weight"].T
        query, key, value = (
            part.reshape(length, self.num_heads, head_dim).transpose(0, 1)
            for part in packed.chunk(3, dim=-1)
        )
        if not self.alibi:
            query, key = self._rotate(query), self._rotate(key)
        scores = query @ key.transpose(1, 2) / math.sqrt(head_dim)
        distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
        if self.alibi:
            scores = scores + self._slopes()[:, None, None] * distance
        scores = scores.masked_fill(distance > 0, float("-inf"))
        mixed = (scores.softmax(-1) @ value).transpose(0, 1).reshape(length, self.hidden)
        return mixed @ self.weights[name + "o_proj.weight"].T

    def _rotate(self, heads: torch.Tensor) -> torch.Tensor:
        half = heads.shape[-1] // 2
        frequency = 10_000.0 ** (-torch.arange(half) / half)
        angle = torch.arange(heads.shape[1])[:, None] * frequency
        first, second = heads[..., :half], heads[..., half:]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def _slopes(self) -> torch.Tensor:
        def powers(n: int) -> list[float]:
            start = 2 ** (-(2 ** -(math.log2(n) - 3)))
            return [start ** (i + 1) for i in range(n)]

        lower = 2 ** math.floor(math.log2(self.num_heads))
        extra = powers(2 * lower)[0::2][: self.num_heads - lower]
        return torch.tensor(powers(lower) + extra)
