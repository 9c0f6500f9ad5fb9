"""llama.cpp's deci (`src/models/deci.cpp`), a GGUF file: every layer has its own heads, its own neurons, or nothing.

What that file and `src/llama-model.cpp` do, and what follows for a policy:

- `n_head(il)`, `n_head_kv(il)` and `n_ff(il)` are read from arrays, and the tensors of a layer are made by its own
  numbers with one `n_embd_head_k` for all: any number of heads and neurons in any layer.
- `if (n_head == 0) cur = inpL`: a layer without attention goes on with its feed-forward layer, so that an attention
  may go alone. Only that of the first layer stays: `hparams.n_head()` is its number of heads, and where that is 0 the
  width of all heads is 0 (`load_hparams`).
- `if (n_ff == 0) continue` comes before `inpL = cur`: what the attention of a layer without a feed-forward layer has
  computed is lost. A feed-forward layer may go only with its attention, the layer as a whole.
- In the last layer the rows whose logits are asked for are picked between attention and feed-forward layer, and that
  `continue` leaves them behind: its feed-forward layer stays.
- `LLAMA_ROPE_TYPE_NORM` rotates neighbours and transformers halves: the rows of queries and keys are reordered.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.deploy import IN_FLOAT, without
from autoprune.deploy._deci import (
    ATTENTION,
    FEED_FORWARD,
    OTHERS,
    Layer,
    branches,
    check_decoder,
    few,
    head_dim_of,
    is_decoder,
    layers_of,
    tensors_of,
)
from autoprune.deploy._gguf_vocabulary import add_vocabulary
from autoprune.errors import InputError, RunError
from autoprune.policy import Policy
from autoprune.structure import Group, Structure

NAME, ARCHITECTURE, FILE = "gguf-deci", "deci", "model.gguf"
ROPES = ("default", "linear", "llama3")
"""Rotary positions that do not change with the length of a text."""
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
WITHIN = {
    **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"},
    **{f"self_attn.{p}_proj": f"attn_{p}" for p in ("q", "k", "v")},
    **{f"mlp.{p}_proj": f"ffn_{p}" for p in ("gate", "up", "down")},
}
ROTATED = (".attn_q.", ".attn_k.")
PARTS = (ATTENTION, FEED_FORWARD)


class GgufDeci:
    """Heads and neurons by layer; whole layers but for the first and the last, attentions but for the first."""

    def check(self, model: nn.Module) -> None:
        """InputError where llama.cpp computes something else than `model`, or the package gguf is not there."""
        config = check_decoder(model, NAME)
        kind = _rope(config).get("rope_type", "default")
        if kind not in ROPES:
            raise InputError(f"deploy: {NAME} holds rotary positions of the type {', '.join(ROPES)}, not {kind!r}")
        _library()

    def restrict(self, structure: Structure) -> Structure:
        """Single feed-forward layers stay; in their place a block of a whole layer, where both its halves are blocks.

        Without operations, as a policy file has it, the last layer is the last that a block is in.
        """
        llama, parts = is_decoder(structure), branches(structure)
        last = _last_layer(structure)
        whole = {
            i: parts[i, ATTENTION]
            for i, part in parts
            if part == FEED_FORWARD and 0 < i < last and (i, ATTENTION) in parts
        }
        kept = {group.name for (i, part), group in parts.items() if part == ATTENTION and i > 0}

        def reason(group: Group) -> str | None:
            if group.kind == "bits":
                return IN_FLOAT
            if not llama:
                return OTHERS
            if group.kind == "block" and group.name not in kept and not _is_layer(group):
                return "it goes only with its attention"
            return None

        held = without(structure, reason)
        made = {block.name: _layer_block(block, parts[i, FEED_FORWARD]) for i, block in whole.items()}
        groups = [one for g in held for one in ([made[g.name], g] if g.name in made else [g])]
        names = {g.name: made[a.name].name for i, a in whole.items() for g in (a, parts[i, FEED_FORWARD])}
        return Structure(tuple(groups), _scaled(held, names), held.frozen, held.fingerprint)

    def together(self, structure: Structure, policy: Policy) -> Collection[str]:
        """Feed-forward layers that go with their attention: blocks of an unrestricted search that fit as one."""
        widths, parts, last = policy.as_dict(), branches(structure), _last_layer(structure)
        gone = {key for key, group in parts.items() if not widths[group.name]}
        return [parts[i, FEED_FORWARD].name for i, _ in gone if 0 < i < last and {(i, p) for p in PARTS} <= gone]

    def write(self, model: Any, structure: Structure, policy: Policy, folder: Path) -> None:
        """`folder`/model.gguf in the type of the weights, with the vocabulary of the tokenizer that lies in `folder`.

        Raises:
            InputError: it is a model or a point that llama.cpp's deci cannot hold (says which layers, and what would
                fit).
        """
        self.check(model)
        layers = layers_of(model)
        _check_layers(layers)
        gguf, tensors = _library(), tensors_of(model)
        folder.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(folder / FILE, ARCHITECTURE)
        _add_facts(writer, model.config, layers)
        _add_type(gguf, writer, tensors)
        if lacking := add_vocabulary(gguf, writer, folder, model.config):
            warnings.warn(f"{FILE} has no vocabulary, and takes numbers of tokens: {lacking}", stacklevel=2)
        for name, value in _tensors(model, layers, tensors):
            data, kind = _stored(gguf, value)
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def read_back(self, folder: Path, model: Any, inputs: Any) -> None:
        """See that the file holds every tensor of the model, queries and keys back in their order, and its numbers.

        Raises:
            RunError: it does not.
        """
        gguf, layers = _library(), layers_of(model)
        reader = gguf.GGUFReader(folder / FILE)
        held = {t.name: t for t in reader.tensors}
        wanted = dict(_named(tensors_of(model)))
        wrong = sorted(wanted.keys() ^ (held.keys() - {"rope_freqs.weight"}))
        for name in wanted.keys() & held.keys():
            value = torch.from_numpy(np.array(gguf.dequantize(held[name].data, held[name].tensor_type)))
            back = _reordered(value, _heads(name, layers), back=True) if name.startswith("blk.") else value
            if back.shape != wanted[name].shape or not torch.equal(back, wanted[name].float()):
                wrong.append(name)
        for key, numbers in _counts(layers).items():
            if list(reader.fields[f"{ARCHITECTURE}.{key}"].contents()) != numbers:
                wrong.append(key)
        if wrong:
            raise RunError(f"{folder.name}: what it holds of {few(wrong)} is not what the model has")


def _library() -> Any:
    """The package gguf.

    Raises:
        InputError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise InputError(f"deploy: {NAME} needs the package gguf (pip install 'autoprune[gguf]')") from error
    return gguf


def _rope(config: Any) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def _last_layer(structure: Structure) -> int:
    """The number of the last layer of which the structure knows anything."""
    names = [g.name for g in structure] + [spec.name for op in structure.ops for spec in op.tensors]
    found = [name.partition("layers.")[2].partition(".")[0] for name in names]
    return max((int(number) for number in found if number.isdigit()), default=0)


def _is_layer(group: Group) -> bool:
    return {stand.module.rpartition(".")[2] for stand in group.stands} >= set(PARTS)


def _layer_block(attention: Group, feed_forward: Group) -> Group:
    """The block of a whole layer, called like it."""
    both = (*attention.slices, *feed_forward.slices)
    slices = tuple(sorted(both, key=lambda part: part.role == "consume"))
    name, stands = attention.name.rpartition(".")[0], (*attention.stands, *feed_forward.stands)
    return replace(attention, name=name, slices=slices, stands=stands)


def _scaled(structure: Structure, names: dict[str, str]) -> tuple[Any, ...]:
    """The operations, also scaled by the layer's block where one of its halves scales them; `names` maps these."""
    more = {op.name: dict.fromkeys(names[n] for n in op.groups if n in names) for op in structure.ops}
    return tuple(replace(op, groups=(*op.groups, *more[op.name])) if more[op.name] else op for op in structure.ops)


def _check_layers(layers: list[Layer]) -> None:
    """InputError unless llama.cpp computes these layers as they are meant."""
    lost = [f"layer {i}" for i, layer in enumerate(layers) if layer.heads and not layer.neurons]
    if lost:
        raise InputError(
            f"deploy: {NAME} loses the attention of {few(lost)}, whose feed-forward layer is absent: leave out both or "
            "neither"
        )
    if not layers[0].heads:
        raise InputError(f"deploy: {NAME} reads the width of all heads off layer 0, whose attention is absent: keep it")
    if not layers[-1].neurons:
        raise InputError(f"deploy: {NAME} needs the feed-forward layer of the last layer, {len(layers) - 1}: keep it")


def _counts(layers: list[Layer]) -> dict[str, list[int]]:
    """The arrays by which the layers differ, by their keys."""
    return {
        "attention.head_count": [layer.heads for layer in layers],
        "attention.head_count_kv": [layer.kv_heads for layer in layers],
        "feed_forward_length": [layer.neurons for layer in layers],
    }


def _add_facts(writer: Any, config: Any, layers: list[Layer]) -> None:
    head_dim, counts = head_dim_of(config), _counts(layers)
    writer.add_block_count(len(layers))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(counts["attention.head_count"])
    writer.add_head_count_kv(counts["attention.head_count_kv"])
    writer.add_feed_forward_length(counts["feed_forward_length"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(_rope(config).get("rope_theta", 10000.0)))


def _add_type(gguf: Any, writer: Any, tensors: dict[str, Tensor]) -> None:
    kinds = gguf.LlamaFileType
    stored = {torch.float16: kinds.MOSTLY_F16, torch.bfloat16: kinds.MOSTLY_BF16}
    writer.add_file_type(stored.get(tensors["model.embed_tokens.weight"].dtype, kinds.ALL_F32))


def _tensors(model: Any, layers: list[Layer], tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What the file holds, by its names."""
    for name, value in _named(tensors):
        yield name, _reordered(value, _heads(name, layers)) if name.startswith("blk.") else value
    rotary = model.model.rotary_emb
    head_dim, theta = head_dim_of(model.config), float(_rope(model.config).get("rope_theta", 10000.0))
    plain = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    factors = plain / rotary.inv_freq.detach().cpu().float()
    if not torch.allclose(factors, torch.ones_like(factors), rtol=1e-6):
        yield "rope_freqs.weight", factors


def _named(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors by the names that GGUF has for them."""
    for name, value in tensors.items():
        path, _, ending = name.rpartition(".")
        if path in TOP:
            yield f"{TOP[path]}.{ending}", value
        else:
            _, _, inside = path.partition("model.layers.")
            number, _, part = inside.partition(".")
            yield f"blk.{number}.{WITHIN[part]}.{ending}", value


def _heads(name: str, layers: list[Layer]) -> int:
    """How many heads a tensor makes whose rows are reordered; 0 of all others."""
    layer = layers[int(name.split(".")[1])]
    counts = dict(zip(ROTATED, (layer.heads, layer.kv_heads), strict=True))
    return next((n for part, n in counts.items() if part in name), 0)


def _reordered(value: Tensor, heads: int, *, back: bool = False) -> Tensor:
    """Rows of each head so that what is rotated together lies side by side, or `back` in halves."""
    if not heads:
        return value
    half = value.shape[0] // heads // 2
    inner = (half, 2) if back else (2, half)
    return value.reshape(heads, *inner, *value.shape[1:]).transpose(1, 2).reshape(value.shape)


def _stored(gguf: Any, value: Tensor) -> tuple[Any, Any]:
    """The numbers as they lie in the file, and their type there where numpy has none; vectors are always float32."""
    if value.dim() < 2 or value.dtype not in (torch.float16, torch.bfloat16):
        return value.float().contiguous().numpy(), None
    if value.dtype == torch.float16:
        return value.contiguous().numpy(), None
    return value.contiguous().view(torch.uint8).numpy(), gguf.GGMLQuantizationType.BF16
