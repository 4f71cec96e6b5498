"""The model card of an exported folder: what the weights are, from their metadata."""

from Config import LLMConfig

CARD = """---
language: zh
library_name: transformers
pipeline_tag: text-generation
license: other
license_name: license-of-the-data-to-be-named
---

# WeakWater, {stage}

{origin}

**License of the data**: to be filled in, also above, by whoever publishes this folder.

| | |
|---|---|
| parameters | {parameters:,} |
| layers | {c.n_layers} |
| width; heads (of keys and values), their width | {c.dim}, {c.n_heads} ({c.n_kv_heads}), {c.head_dim} |
| SwiGLU width | {c.hidden_dim:,} |
| vocabulary | {c.vocab_size:,} |
| context | {c.max_seq_len:,} tokens |
{scores}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
{call}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200)[0], skip_special_tokens=True))
```

{formats}

To upload this folder to the Hugging Face Hub: `hf upload USER/NAME FOLDER`
"""
TRAINED = ("A small Chinese language model that was trained from nothing, stage by stage, with WeakWater. These are "
           "the weights of\n`{made_from}`: the stage {stage}, step {step}, {tokens:,} tokens in this stage.")
IMPORTED = "A language model that was brought into WeakWater from another program, and written from `{made_from}`."
CONTINUE = """text = tokenizer.bos_token + "从前"
inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)"""
CHAT = """messages = [{"role": "user", "content": "你好"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""
SCORES = (("loss", "validation loss"), ("ppl", "perplexity"), ("bpb", "bits per byte"))
FORMATS = {
    "pretrain": "These weights continue text. They hold no conversation.",
    "distill": "A reply thinks first, in `<think>…</think>`; `enable_thinking=False` in the chat template's arguments "
               "switches that off. `<answer>` and `</answer>` are control tokens.",
}


def model_card(config: LLMConfig, parameters: int, meta: dict, made_from: str) -> str:
    """README.md in the form of the Hugging Face Hub."""
    stage, val = str(meta.get("stage")), meta.get("val") or {}
    origin = (IMPORTED if stage == "imported" else TRAINED).format(
        made_from=made_from, stage=stage, step=meta.get("step", "?"), tokens=meta.get("tokens", 0))
    return CARD.format(
        stage=stage, origin=origin, c=config, parameters=parameters, call=CONTINUE if stage == "pretrain" else CHAT,
        scores="".join(f"| {label} | {val[key]:.4f} |\n" for key, label in SCORES if key in val),
        formats=FORMATS.get(stage, "A reply follows the chat template; these weights do not think."))
