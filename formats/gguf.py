"""llama.cpp's GGUF files, written with the gguf package (requirements-extra.txt)."""

import json
from pathlib import Path

import torch

from Config import UserError
from formats.hf import EDITED
from formats.tokenizer import exported, template_of
from model import WeakWater
from text.tokenizer import OurTokenizer, TextEncoder, tokenizer_from_files

QUANTS = {"f32": ("F32", "ALL_F32"), "f16": ("F16", "MOSTLY_F16"), "bf16": ("BF16", "MOSTLY_BF16"),
          "q8_0": ("Q8_0", "MOSTLY_Q8_0")}  # our name: those of a tensor's type and of the file's
# the largest error of a weight, relative to the largest weight in its row
ROUNDING = {"f32": 0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 127}
Q8_BLOCK = 32  # weights that share a scale in q8_0: a row holds whole blocks
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}  # ours: llama.cpp's
LAYER = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
         "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
         "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def their_name(name: str) -> str:
    """llama.cpp's name of one of our tensors. Raises UserError for one that its Llama and Qwen3 do not have."""
    module, _, kind = name.rpartition(".")
    if kind == "weight" and module in OUTER:
        return f"{OUTER[module]}.weight"
    _, _, layer, part = (*module.split(".", 3), "", "", "", "")[:4]
    if kind != "weight" or part not in LAYER:
        raise UserError(f"llama.cpp has no {name}: {EDITED}")
    return f"blk.{layer}.{LAYER[part]}.weight"


def rotated_in_pairs(matrix: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of a query or key matrix (heads · D, C) in the order of llama.cpp's Llama, whose RoPE rotates dimensions
    2i and 2i + 1 of a head. Ours, transformers', and its own for Qwen3 rotate i and i + D/2."""
    return matrix.reshape(heads, 2, -1, matrix.shape[1]).transpose(1, 2).reshape(matrix.shape)


def their_tensors(model: WeakWater) -> dict:
    """The weights as numpy arrays, by llama.cpp's names and in its order of rows. Raises UserError as `their_name`."""
    c, tensors = model.config, {}
    heads = {} if c.qk_norm else {"q_proj": c.n_heads, "k_proj": c.n_kv_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_embeddings:
            continue  # llama.cpp takes token_embd where there is no output
        theirs, tensor, matrix = their_name(name), tensor.detach().float().cpu(), name.split(".")[-2]
        tensor = rotated_in_pairs(tensor, heads[matrix]) if matrix in heads else tensor
        tensors[theirs] = tensor.contiguous().numpy()
    return tensors


def check(path: Path, model: WeakWater, quant: str) -> None:
    """Read a file back. Raises UserError, naming the tensor, if it does not hold the weights of the model."""
    import gguf

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    expected = their_tensors(model)
    if found.keys() != expected.keys():
        raise UserError(f"{path}: its tensors are not the model's: {sorted(found.keys() ^ expected.keys())[0]}")
    for name, tensor in expected.items():
        values = gguf.quants.dequantize(found[name].data, found[name].tensor_type).reshape(tensor.shape)
        limit = (ROUNDING[quant] if tensor.ndim > 1 else 0) * abs(tensor).max(axis=-1, keepdims=True) + 1e-7
        if not (abs(values - tensor) <= limit).all():
            raise UserError(f"{path}: {name} is not the model's, or has numbers that {quant} cannot hold")


def write(path: Path, model: WeakWater, quant: str, tokenizer_files: dict[str, str] | None = None,
          stage: str = "") -> None:
    """Write a file with the matrices as `quant`, a key of QUANTS, and the norms in float32. Without a tokenizer the
    text of token i is "<i>". Raises UserError where llama.cpp cannot hold the network or the tokenizer."""
    import gguf

    c, (kind, file_type) = model.config, QUANTS[quant]
    kind = getattr(gguf.GGMLQuantizationType, kind)
    widths = sorted({tensor.shape[1] for tensor in model.state_dict().values() if tensor.ndim == 2})
    if quant == "q8_0" and any(width % Q8_BLOCK for width in widths):
        raise UserError(f"--quant q8_0: rows of {' and '.join(map(str, widths))} weights: each must be a multiple of "
                        f"{Q8_BLOCK}; use f16")
    writer = gguf.GGUFWriter(path, "qwen3" if c.qk_norm else "llama")
    writer.add_name(f"WeakWater {stage}".strip())
    writer.add_file_type(getattr(gguf.LlamaFileType, file_type))
    writer.add_context_length(c.max_seq_len)
    writer.add_embedding_length(c.dim)
    writer.add_block_count(c.n_layers)
    writer.add_feed_forward_length(c.hidden_dim)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_vocab_size(c.vocab_size)
    if tokenizer_files is None:
        add_numbered_tokens(writer, c.vocab_size)
    else:
        add_tokenizer(writer, tokenizer_files, stage, c.vocab_size)
    for name, tensor in their_tensors(model).items():
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_numbered_tokens(writer, vocab_size: int) -> None:
    """A vocabulary in which the text of token i is "<i>": for benchmarks, which compare ids."""
    import gguf

    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(vocab_size)])
    writer.add_token_scores([0.0] * vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * vocab_size)


def add_tokenizer(writer, files: dict[str, str], stage: str, vocab_size: int) -> None:
    """The byte-level BPE. llama.cpp knows how a tokenizer splits text by a name: that of Qwen2 splits as ours does.
    Raises UserError for another kind of tokenizer."""
    import gguf

    if not OurTokenizer.is_ours(files):
        raise UserError("--format gguf: the tokenizer is not one of train_tokenizer.py, and llama.cpp knows others by "
                        "name only: export with --format hf, and convert that with llama.cpp's convert_hf_to_gguf.py")
    encoder = TextEncoder.of(tokenizer_from_files(files, "the tokenizer"))
    state = json.loads(exported(files, stage)["tokenizer.json"])
    texts = {index: token for token, index in state["model"]["vocab"].items()}
    types = dict.fromkeys(texts, gguf.TokenType.NORMAL)
    for token in state["added_tokens"]:
        texts[token["id"]] = token["content"]
        types[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([texts.get(i, f"[unused {i}]") for i in range(vocab_size)])
    writer.add_token_types([types.get(i, gguf.TokenType.UNUSED) for i in range(vocab_size)])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in state["model"]["merges"]])
    writer.add_bos_token_id(encoder.bos_id)  # llama.cpp's default is 11
    writer.add_eos_token_id(encoder.eos_id)
    writer.add_pad_token_id(encoder.unk_id)
    writer.add_unk_token_id(encoder.unk_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(template_of(stage))
